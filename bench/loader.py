"""Throughput of the input pipeline alone, on a generated corpus: no model, no accelerator (USERS #30).

    python -m bench.loader

`loader`: seconds of audio per second of CPU time in an epoch of random crops, from FLAC in Arrow. The ratio is to
libsndfile decoding the same files as a whole, and nothing else, in the same run. It is below 1 because FLAC has no
index: libsndfile decodes everything before the start of a crop.
"""

import io
import json
import statistics
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import soundfile

from wavlm_jax.data.batches import BatchSettings
from wavlm_jax.data.corpus import Corpus
from wavlm_jax.data.loader import CropStream, LoaderSettings, PaddedStream
from wavlm_jax.data.prepare import Preparation, prepare
from wavlm_jax.data.sources import from_folder

UTTERANCES = 300
RUNS = 5
BATCH = BatchSettings(
    buckets=(128, 256, 384, 512, 640, 768), seconds_per_update=160.0, seconds_per_device=160.0, row_multiple=2
)


def main() -> None:
    """Print one JSON line per figure."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(Path(folder))
        stream = CropStream(corpus, BATCH, LoaderSettings(threads=0), seed=0, annotate=no_labels)
        files = datasets.load_from_disk(str(corpus.path))["audio"]
        flac = [file["bytes"] for file in files]
        epoch(stream), bare(flac)  # once, so that neither pays for cold files
        ours, theirs = zip(*((epoch(stream), bare(flac)) for _ in range(RUNS)), strict=True)
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        against = "libsndfile decoding the same files whole, in the same run"
        emit("loader", statistics.median(ours), "audio seconds per core-second", RUNS, against=against, ratio=ratio)
        shares = (padding(stream), padding(PaddedStream(corpus, BATCH, LoaderSettings(threads=0), annotate=no_labels)))
        emit("padding_share", shares[0], "share of samples, pre-training epoch", 1)
        emit("padding_share_evaluation", shares[1], "share of samples, evaluation with the buckets of pre-training", 1)
        emit("compiles", shapes(stream), "distinct batch shapes in a pre-training epoch", 1)


def make_corpus(folder: Path) -> Corpus:
    """About three quarters of an hour that compresses like speech: voiced bursts with pauses, over noise."""
    random = np.random.default_rng(0)
    (folder / "audio").mkdir()
    for number in range(UTTERANCES):
        seconds = float(np.exp(random.normal(2.0, 0.5)).clip(2.6, 25))
        moments = np.arange(int(seconds * 16000)) / 16000
        pitch = 2 * np.pi * random.uniform(90, 220) * moments
        voice = sum(np.sin(k * pitch + random.uniform(0, 6)) / k for k in range(1, 20))
        bursts = np.clip(np.sin(2 * np.pi * random.uniform(1, 3) * moments), 0, 1)
        wave = 0.1 * voice * bursts + 0.003 * random.standard_normal(len(moments))
        soundfile.write(folder / f"audio/{number:03d}.flac", wave, 16000, subtype="PCM_16")
    prepare(from_folder(folder / "audio"), folder / "corpus", Preparation(name="bench"))
    return Corpus.open(folder / "corpus")


def no_labels(_index: int, _first_frame: int, num_frames: int, _bits: int) -> dict[str, np.ndarray]:
    """Labels that cost nothing."""
    return {"labels": np.zeros(num_frames, np.int32)}


def epoch(stream: CropStream) -> float:
    """Audio seconds per second of processor time over one epoch."""
    seconds, batches = 0.0, stream.batches()
    began = time.process_time()
    for _ in range(stream.census.num_batches):
        seconds += next(batches)[0].seconds
    return seconds / (time.process_time() - began)


def bare(files: list[bytes]) -> float:
    """The same figure for libsndfile alone."""
    began = time.process_time()
    samples = sum(len(soundfile.read(io.BytesIO(data), dtype="int16")[0]) for data in files)
    return samples / 16000 / (time.process_time() - began)


def padding(stream: CropStream | PaddedStream) -> float:
    """Share of the samples of an epoch that is padding or filler, counted in the batches themselves."""
    held = real = 0
    for _, arrays in zip(range(stream.census.num_batches), (arrays for _, arrays in stream.batches()), strict=False):
        held += arrays["waveform"].size
        real += int((arrays["num_samples"] * (arrays["weight"] > 0)).sum())
    return 1 - real / held


def shapes(stream: CropStream) -> int:
    """Distinct shapes in an epoch, of which each is one compilation."""
    taken = zip(range(stream.census.num_batches), stream.batches(), strict=False)
    return len({tuple(array.shape for array in arrays.values()) for _, (_, arrays) in taken})


def emit(name: str, value: float, unit: str, runs: int, **comparison: str | float) -> None:
    """One line."""
    print(json.dumps({"name": name, "value": value, "unit": unit, "runs": runs, **comparison}), flush=True)


if __name__ == "__main__":
    main()
