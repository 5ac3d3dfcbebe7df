"""Making MFCC labels: seconds of audio per second, and peak memory at one and at four times the corpus.

    python -m bench.labels

labels_1x  compares with the usual script: MFCC of the corpus in one list, scikit-learn's MiniBatchKMeans on a sample
           of it (as many frames, passes and seedings, batches of the same size), its labels; `ratio` is how many times
           faster this is.
labels_4x  compares with labels_1x: `ratio` is peak memory at 1x over peak memory at 4x; 1 = it does not grow.

`peak_rss_mib` is the peak of the process's own memory (RssAnon). Pages of the memory-mapped corpus are not in it: they
are the page cache's, which takes them back when it wants.

Each run is a process of its own and times what follows the imports; runs of both kinds alternate.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Self

import numpy as np

RUNS = 3
UTTERANCE_SECONDS = 12
UTTERANCES = 160
CLUSTERS, BATCH, PASSES, SAMPLE = 100, 8192, 5, 40_960
SAMPLE_SECONDS = 420.0


def main() -> None:
    """Runs everything, or with --measure one thing in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", choices=("ours", "script"))
    parser.add_argument("--corpus", type=Path)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps((_ours if options.measure == "ours" else _script)(options.corpus)))
        return
    with tempfile.TemporaryDirectory() as name:
        one, four = _corpus(Path(name) / "one", UTTERANCES), _corpus(Path(name) / "four", 4 * UTTERANCES)
        found: dict[str, list[dict[str, float]]] = {"ours": [], "script": [], "four": []}
        for _ in range(RUNS):
            found["ours"].append(_measured("ours", one))
            found["script"].append(_measured("script", one))
            found["four"].append(_measured("ours", four))
    _print(found)


def _print(found: dict[str, list[dict[str, float]]]) -> None:
    speed = {name: statistics.median(run["speed"] for run in runs) for name, runs in found.items()}
    peak = {name: statistics.median(run["peak_rss_mib"] for run in runs) for name, runs in found.items()}
    common: dict[str, Any] = {"unit": "audio_s/s", "runs": RUNS}
    against = f"MFCC list and sklearn MiniBatchKMeans, {speed['script']:.0f} audio_s/s, {peak['script']:.0f} MiB"
    lines = (
        ("labels_1x", speed["ours"], against, speed["ours"] / speed["script"], peak["ours"]),
        ("labels_4x", speed["four"], "peak memory of labels_1x", peak["ours"] / peak["four"], peak["four"]),
    )
    for name, value, compared, ratio, rss in lines:
        line = {"name": name, "value": round(value, 1), "against": compared, "ratio": round(ratio, 3)}
        print(json.dumps(line | common | {"peak_rss_mib": round(rss)}), flush=True)


def _corpus(folder: Path, utterances: int) -> Path:
    """A prepared corpus of tones in noise, that change ten times a second."""
    import soundfile

    (folder / "audio").mkdir(parents=True)
    for number in range(utterances):
        rng = np.random.default_rng(number)
        pitch = np.repeat(rng.uniform(100, 3000, size=10 * UTTERANCE_SECONDS), 1600)
        wave = 0.2 * np.sin(2 * np.pi * np.cumsum(pitch) / 16000) + 0.02 * rng.normal(size=len(pitch))
        soundfile.write(folder / "audio" / f"{number:05d}.wav", wave.astype(np.float32), 16000, subtype="PCM_16")
    command = [sys.executable, "-m", "wavlm_jax.data", str(folder / "audio"), "--out", str(folder / "corpus")]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return folder / "corpus"


def _measured(what: str, corpus: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.labels", "--measure", what, "--corpus", str(corpus)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


class Watch:
    """Elapsed time and peak memory of what runs inside it."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._peak = 0
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Self:
        self._start = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._elapsed = time.perf_counter() - self._start
        self._done.set()
        self._thread.join()

    def result(self, seconds: float) -> dict[str, float]:
        """Speed for `seconds` of audio, and peak memory in MiB."""
        return {"speed": seconds / self._elapsed, "peak_rss_mib": self._peak / 1024}

    def _look(self) -> None:
        while not self._done.wait(0.02):
            found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
            self._peak = max(self._peak, int(found[1]) if found else 0)


def _ours(folder: Path) -> dict[str, float]:
    import os

    import sklearn.cluster  # noqa: F401 make_labels imports it late

    from pretrain.kmeans import KMeansSettings
    from pretrain.labelling import make_labels
    from pretrain.labels import LabelSettings
    from wavlm_jax.data.corpus import Corpus

    kmeans = KMeansSettings(sample_frames=SAMPLE, batch_frames=BATCH, passes=PASSES, tolerance=0.0, initialisations=1)
    with tempfile.TemporaryDirectory() as out:
        settings = LabelSettings(
            path=out,
            make=True,
            num_clusters=CLUSTERS,
            rate_hz=100,
            teacher="mfcc",
            run=None,
            step=None,
            layer=None,
            seed=0,
            sample_seconds=SAMPLE_SECONDS,
            kmeans=kmeans,
            piece_seconds=30.0,
            batch_seconds=60.0,
            num_threads=os.cpu_count() or 1,
            min_entropy=0.0,
            max_constant_share=1.0,
        )
        corpus = Corpus.open(folder)
        with Watch() as watch:
            make_labels(settings, {"train": corpus})
        return watch.result(float(corpus.lengths.sum()) / 16000)


def _script(folder: Path) -> dict[str, float]:
    from sklearn.cluster import MiniBatchKMeans

    from pretrain.features import mfcc
    from wavlm_jax.data.corpus import Corpus

    corpus = Corpus.open(folder)
    with Watch() as watch:
        features = np.concatenate([mfcc(corpus.wave(index)) for index in range(len(corpus))])
        clusters = MiniBatchKMeans(
            CLUSTERS,
            batch_size=BATCH,
            max_iter=PASSES,
            n_init=1,
            max_no_improvement=None,
            reassignment_ratio=0,
            random_state=0,
        )
        sample = np.random.default_rng(0).choice(len(features), SAMPLE, replace=False)
        labels = clusters.fit(features[sample]).predict(features)
        np.save(folder.parent / "script.npy", labels.astype(np.uint16))
    return watch.result(float(corpus.lengths.sum()) / 16000)


if __name__ == "__main__":
    main()
