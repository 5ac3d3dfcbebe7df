"""Features to cluster, in batches of static shape: MFCC, or one layer of a teacher model (FACTS C9).

MFCC-39 are the features of the first labels: Kaldi's MFCC (13 cepstra of 23 mel bins, 25 ms every 10 ms, Povey window,
no energy, no dither, no mean normalisation) of a wave in [-1, 1], then deltas and delta-deltas over five frames, as in
HuBERT's first iteration. They are computed in threads on the host.

A layer's output is computed on the devices from padded batches of few static shapes, rows spread over the devices, and
stays there: only labels come back. The pieces of a batch say which of its frames belong to which utterance; the others
are filler. A host holds no more than a few batches, however large the corpus is.
"""

import hashlib
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import kaldi_native_fbank
import numpy as np
from jaxtyping import Array, Float, Float32, Int16, Int32, Int64

from pretrain.distributed import replicate
from wavlm_jax.config import WavLMConfig
from wavlm_jax.data.corpus import Corpus
from wavlm_jax.files import read_json
from wavlm_jax.loading import load_weights
from wavlm_jax.model.wavlm import WavLM
from wavlm_jax.settings import read
from wavlm_jax.shapes import SAMPLE_RATE, Geometry, Params, num_frames, samples_for


class FrameSpan(NamedTuple):
    """Some frames of one utterance, and where a batch has them."""

    utterance: int
    start: int
    """First frame, counted in the utterance."""
    frames: int
    row: int
    """First row, counted in the features of the batch."""


class Batch(NamedTuple):
    """What the devices of this host get at a time."""

    size: int
    """Which of the source's few static shapes."""
    arrays: Any
    """Tree of numpy arrays, rows first."""
    pieces: tuple[FrameSpan, ...]
    """Whose frames they are; the others are filler."""


MFCC_GEOMETRY = Geometry(kernels=(400,), strides=(160,))
"""Windows of 25 ms every 10 ms, none that reaches over an edge: `num_frames(n, MFCC_GEOMETRY)` frames."""

NUM_CEPSTRA = 13
MFCC_DIM = 3 * NUM_CEPSTRA
_SLOPE_WEIGHTS = (1, 2)


def mfcc(wave: Int16[np.ndarray, " samples"]) -> Float32[np.ndarray, "frames 39"]:
    """Cepstra, deltas and delta-deltas of a 16 kHz wave, 100 frames a second.

    1 + floor((samples - 400) / 160) frames; none below 400 samples.
    """
    computer = kaldi_native_fbank.OnlineMfcc(_options())
    computer.accept_waveform(SAMPLE_RATE, (wave.astype(np.float32) / 32768).tolist())
    computer.input_finished()
    cepstra = _stacked(computer.get_frame(frame) for frame in range(computer.num_frames_ready))
    slopes = deltas(cepstra)
    return np.concatenate([cepstra, slopes, deltas(slopes)], axis=1)


def deltas(features: Float32[np.ndarray, "frames dim"]) -> Float32[np.ndarray, "frames dim"]:
    """Slope of each dimension over five frames: sum n (c[t+n] - c[t-n]) / 10, n = 1, 2; edge frames are repeated."""
    if not len(features):
        return features
    reach, frames = max(_SLOPE_WEIGHTS), len(features)
    padded = np.pad(features, ((reach, reach), (0, 0)), mode="edge")
    slope = np.zeros_like(features)
    for n in _SLOPE_WEIGHTS:
        slope += n * (padded[reach + n : reach + n + frames] - padded[reach - n : reach - n + frames])
    return slope / np.float32(2 * sum(n * n for n in _SLOPE_WEIGHTS))


def _stacked(frames: Iterable[np.ndarray]) -> Float32[np.ndarray, "frames 13"]:
    # Copied one by one: the extractor owns the buffer behind each frame.
    copies = [frame.copy() for frame in frames]
    return np.stack(copies) if copies else np.zeros((0, NUM_CEPSTRA), np.float32)


def _options() -> kaldi_native_fbank.MfccOptions:
    """Kaldi's options; what is not set is Kaldi's default and equals FACTS C9 (20 Hz to Nyquist, lifter 22)."""
    options = kaldi_native_fbank.MfccOptions()
    options.frame_opts.samp_freq = SAMPLE_RATE
    options.frame_opts.dither = 0.0
    options.frame_opts.preemph_coeff = 0.97
    options.frame_opts.window_type = "povey"
    options.frame_opts.snip_edges = True
    options.mel_opts.num_bins = 23
    options.num_ceps = NUM_CEPSTRA
    options.use_energy = False
    return options


Item = TypeVar("Item")
Result = TypeVar("Result")
Utterances = Int64[np.ndarray, " utterances"]
MFCC_BLOCK = 2**14
"""Frames of MFCC that a host labels at a time."""


@runtime_checkable
class FeatureSource(Protocol):
    """Something that turns utterances into frames of features, a part on the host and a part on the devices."""

    @property
    def geometry(self) -> Geometry:
        """Hop and window of a frame; the hop gives the label rate."""
        ...

    @property
    def dim(self) -> int:
        """Width of a frame."""
        ...

    @property
    def description(self) -> Mapping[str, str | int]:
        """What the features are, for the header of the labels."""
        ...

    @property
    def params(self) -> Any:
        """What the devices compute with, on each of them."""
        ...

    @property
    def compute(self) -> Callable[[Any, Any], Float[Array, "frames dim"]]:
        """(params, arrays of a batch) -> its features; traced, with the rows over all devices."""
        ...

    def counts(self, lengths: Utterances) -> Utterances:
        """Frames of utterances of `lengths` samples."""
        ...

    def sizes(self, lengths: Utterances) -> Counter[int]:
        """How many batches of each size utterances of `lengths` samples make."""
        ...

    def batches(self, corpus: Corpus, utterances: Utterances) -> Iterator[Batch]:
        """All frames of the numbered utterances, each frame once, the smallest size first."""
        ...

    def empty(self, size: int) -> Batch:
        """A filler batch: the usual shapes, and frames of no utterance."""
        ...


def mfcc_frames(_params: Any, frames: Float[Array, "frames 39"]) -> Float[Array, "frames 39"]:
    """The features as they are: MFCC are computed on the host, and the devices have nothing to add."""
    return frames


class MfccFeatures:
    """MFCC-39 at 100 Hz (FACTS C9); decoding and Kaldi's arithmetic run in threads, outside Python's lock."""

    geometry = MFCC_GEOMETRY
    dim = MFCC_DIM
    description: Mapping[str, str | int] = {"kind": "mfcc"}
    params = ()
    compute = staticmethod(mfcc_frames)

    def __init__(self, num_threads: int, block_frames: int = MFCC_BLOCK) -> None:
        self._num_threads = num_threads
        self._block_frames = block_frames - block_frames % jax.local_device_count()

    def counts(self, lengths: Utterances) -> Utterances:
        """1 + floor((samples - 400) / 160), 0 below 400 samples."""
        counts: Utterances = num_frames(lengths, MFCC_GEOMETRY)
        return counts

    def sizes(self, lengths: Utterances) -> Counter[int]:
        """Blocks of one size, the last one perhaps not full."""
        return Counter({self._block_frames: -(-int(self.counts(lengths).sum()) // self._block_frames)})

    def batches(self, corpus: Corpus, utterances: Utterances) -> Iterator[Batch]:
        """The utterances in their order, one behind the other, cut into blocks."""

        def features(utterance: int) -> tuple[int, Float32[np.ndarray, "frames dim"]]:
            return utterance, mfcc(corpus.wave(utterance))

        return self._packed(in_threads(features, (int(u) for u in utterances), self._num_threads))

    def _packed(self, utterances: Iterable[tuple[int, Float32[np.ndarray, "frames dim"]]]) -> Iterator[Batch]:
        block, filled, pieces = self._filler(), 0, list[FrameSpan]()
        for utterance, features in utterances:
            start = 0
            while start < len(features):
                count = min(len(features) - start, self._block_frames - filled)
                block[filled : filled + count] = features[start : start + count]
                pieces.append(FrameSpan(utterance, start, count, filled))
                start, filled = start + count, filled + count
                if filled == self._block_frames:
                    yield Batch(self._block_frames, block, tuple(pieces))
                    block, filled, pieces = self._filler(), 0, []
        if pieces:
            yield Batch(self._block_frames, block, tuple(pieces))

    def empty(self, size: int) -> Batch:
        """A block of zeros."""
        return Batch(size, self._filler(), ())

    def _filler(self) -> Float32[np.ndarray, "rows dim"]:
        return np.zeros((self._block_frames, self.dim), np.float32)


def in_threads(function: Callable[[Item], Result], items: Iterable[Item], num_threads: int) -> Iterator[Result]:
    """`function` of each item, in order; a few items ahead of the reader and never more, so that memory stays flat."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 4 * num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


SMALLEST_BUCKET = 32
INT16_SCALE = 32_768.0
Lengths = Int64[np.ndarray, " corpus"]


class Padded(NamedTuple):
    """Pieces of utterances, padded to one length."""

    waveform: Int16[np.ndarray, "rows samples"]
    num_samples: Int32[np.ndarray, " rows"]
    mean: Float32[np.ndarray, " rows"]
    """Of the whole utterance, which normalises its pieces (FACTS C4)."""
    variance: Float32[np.ndarray, " rows"]


@dataclass(frozen=True)
class Teacher:
    """A WavLM or HuBERT in evaluation."""

    config: WavLMConfig
    params: Params
    """Of `wavlm_jax.model.wavlm.WavLM`, on the host."""
    fingerprint: str
    """Over names, shapes and values of the parameters: 16 hex digits."""

    def up_to(self, layer: int) -> "Teacher":
        """The same model without the layers above `layer` (1-based); its fingerprint stays that of the whole model.

        Raises:
            ValueError: the model has no such layer.

        """
        if not 1 <= layer <= self.config.num_hidden_layers:
            raise ValueError(
                f"labels.layer: found {layer}, the teacher has the layers 1 to {self.config.num_hidden_layers}"
            )
        layers = jax.tree.map(lambda stacked: stacked[:layer], self.params["encoder"]["layers"])
        params = {**self.params, "encoder": {**self.params["encoder"], "layers": layers}}
        return replace(self, config=replace(self.config, num_hidden_layers=layer), params=params)


class LayerFeatures:
    """Output of transformer layer `layer` (1-based, FACTS A10), in evaluation, unmasked, waves normalised as trained.

    Args:
        teacher: the whole model; layers above are cut off.
        layer: which output; before the final norm where there is one.
        piece_seconds: longer utterances are cut into equal pieces not longer than this.
        batch_seconds: audio in one batch over the devices of this host.
        num_threads: threads that decode.

    """

    def __init__(
        self, teacher: Teacher, layer: int, *, piece_seconds: float, batch_seconds: float, num_threads: int
    ) -> None:
        self._config = teacher.up_to(layer).config
        self.geometry = self._config.geometry
        self.dim = self._config.hidden_size
        frames_a_second = SAMPLE_RATE / self.geometry.hop
        self._longest = max(SMALLEST_BUCKET, int(piece_seconds * frames_a_second))
        self.description: Mapping[str, str | int] = {
            "kind": "layer",
            "layer": layer,
            "params": teacher.fingerprint,
            "piece_frames": self._longest,
        }
        self._batch_frames = int(batch_seconds * frames_a_second)
        self._num_threads = num_threads
        self._devices = jax.local_device_count()
        self.params: Params = replicate(teacher.up_to(layer).params)
        self.compute = partial(layer_output, self._config)

    def counts(self, lengths: Utterances) -> Utterances:
        """Frames of the conv encoder."""
        counts: Utterances = num_frames(lengths, self.geometry)
        return counts

    def sizes(self, lengths: Utterances) -> Counter[int]:
        """Batches of each bucket of frames."""
        everyone = np.arange(len(lengths))
        pieces = Counter(bucket_of(piece.frames, self._longest) for piece in self._pieces(lengths, everyone))
        return Counter({bucket: -(-count // self._rows(bucket)) for bucket, count in pieces.items()})

    def batches(self, corpus: Corpus, utterances: Utterances) -> Iterator[Batch]:
        """The layer's frames of the utterances, by length."""
        return in_threads(
            lambda planned: self._padded(corpus, *planned),
            self._plan(np.asarray(corpus.lengths), utterances),
            self._num_threads,
        )

    def empty(self, size: int) -> Batch:
        """Rows of silence."""
        return Batch(size, self._filler(size), ())

    def _plan(self, lengths: Lengths, utterances: Utterances) -> Iterator[tuple[int, tuple[FrameSpan, ...]]]:
        """(bucket in frames, pieces) of each batch; `FrameSpan.row` counts frames of the flattened batch."""
        ordered = sorted(self._pieces(lengths, utterances), key=lambda piece: piece.frames)
        for bucket, group in itertools.groupby(ordered, key=lambda piece: bucket_of(piece.frames, self._longest)):
            pieces, rows = list(group), self._rows(bucket)
            for first in range(0, len(pieces), rows):
                chosen = enumerate(pieces[first : first + rows])
                yield bucket, tuple(piece._replace(row=row * bucket) for row, piece in chosen)

    def _pieces(self, lengths: Lengths, utterances: Utterances) -> Iterator[FrameSpan]:
        for utterance, frames in zip(utterances.tolist(), self.counts(lengths[utterances]).tolist(), strict=True):
            parts = -(-frames // self._longest)
            edges = [part * frames // parts for part in range(parts)] + [frames]
            for start, end in itertools.pairwise(edges):
                yield FrameSpan(utterance, start, end - start, 0)

    def _rows(self, bucket: int) -> int:
        return rows_for(bucket, self._batch_frames, self._devices)

    def _filler(self, bucket: int) -> Padded:
        rows, samples = self._rows(bucket), samples_of(bucket, self.geometry)
        return Padded(
            np.zeros((rows, samples), np.int16),
            np.zeros(rows, np.int32),
            np.zeros(rows, np.float32),
            np.ones(rows, np.float32),
        )

    def _padded(self, corpus: Corpus, bucket: int, pieces: tuple[FrameSpan, ...]) -> Batch:
        batch = self._filler(bucket)
        for row, piece in enumerate(pieces):
            first, needed = piece.start * self.geometry.hop, samples_for(piece.frames, self.geometry)
            left = int(corpus.lengths[piece.utterance]) - first
            taken = left if left < needed + self.geometry.hop else needed
            batch.waveform[row, :taken] = corpus.wave(piece.utterance, first, taken)
            batch.num_samples[row] = taken
            batch.mean[row] = corpus.means[piece.utterance]
            batch.variance[row] = corpus.variances[piece.utterance]
        return Batch(bucket, batch, pieces)


def layer_output(config: WavLMConfig, params: Params, batch: Padded) -> Float[Array, "rows_and_frames dim"]:
    """The last layer of a teacher that was cut off there (`Teacher.up_to`), frame after frame, float32."""
    waveform = jnp.asarray(batch.waveform, jnp.float32) / INT16_SCALE
    if config.do_normalize:
        scale = jax.lax.rsqrt(batch.variance + config.normalize_eps)
        waveform = (waveform - batch.mean[:, None]) * scale[:, None]
    # Padding needs no care: the model zeroes what lies past num_samples.
    output: Any = WavLM(config).apply({"params": params}, waveform, batch.num_samples, output_hidden_states=True)
    return output.hidden_states[-1].reshape(-1, config.hidden_size).astype(jnp.float32)


def rows_for(bucket: int, batch_frames: int, devices: int) -> int:
    """Rows of a batch of `bucket` frames: the same on each device, at least one."""
    return max(1, batch_frames // (bucket * devices)) * devices


def samples_of(bucket: int, geometry: Geometry) -> int:
    """Samples of a row; a last piece keeps those after its last frame: they count in the statistics of a group norm."""
    return samples_for(bucket + 1, geometry) - 1


def bucket_of(frames: int, longest: int) -> int:
    """The static length that `frames` are padded to: 32, 48, 64, 96, 128, ... but never above `longest`."""
    size = SMALLEST_BUCKET
    while size < frames:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, longest)


def load_teacher(path: Path, step: int | None = None) -> Teacher:
    """The teacher in `path`.

    Args:
        path: workdir of a run of ours, or a Hugging Face folder (WavLM or HuBERT).
        step: checkpoint of the run; None: its newest.

    Raises:
        ValueError: neither of the two, a step of a folder that has none, or whatever the file's reader finds.

    """
    weights = load_weights(path, step)
    # A padded batch must give what each row gives alone, whatever the checkpoint was trained with.
    return Teacher(replace(weights.config, padding="exact"), weights.params, fingerprint(weights.params))


def fingerprint(params: Params) -> str:
    """16 hex digits over names, shapes, dtypes and values of a parameter tree."""
    digest = hashlib.sha256()
    for name, array in sorted(_named(params)):
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _named(params: Params) -> Iterator[tuple[str, np.ndarray]]:
    for path, array in jax.tree_util.tree_leaves_with_path(params):
        yield jax.tree_util.keystr(path), np.asarray(array)


def teacher_config(path: Path) -> WavLMConfig:
    """Of a run's workdir or a Hugging Face folder; HuBERT Base where neither is there."""
    file = path / "config.json"
    if not file.is_file():
        return WavLMConfig.base(position_bias=False)
    found = read_json(file)
    if "model" in found:
        model: WavLMConfig = read(found["model"], WavLMConfig, "model")
        return model
    return WavLMConfig.from_huggingface(found)
