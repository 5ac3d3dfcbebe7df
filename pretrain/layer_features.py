"""One layer of a teacher as features: padded batches of few static shapes, rows spread over the devices.

The features stay on the devices; nothing but labels comes back when frames are assigned to clusters.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int16, Int32, Int64

from pretrain.batches import Batch, Piece
from pretrain.features import Corpus, Utterances, in_threads
from pretrain.row_shards import put_everywhere
from wavlm_jax.config import WavLMConfig
from wavlm_jax.model.wavlm import WavLM
from wavlm_jax.shapes import SAMPLE_RATE, Geometry, Params, num_frames, samples_for

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
        self.geometry = Geometry(self._config.conv_kernel, self._config.conv_stride)
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
        self.params: Params = put_everywhere(teacher.up_to(layer).params)
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

    def _plan(self, lengths: Lengths, utterances: Utterances) -> Iterator[tuple[int, tuple[Piece, ...]]]:
        """(bucket in frames, pieces) of each batch; `Piece.row` counts frames of the flattened batch."""
        ordered = sorted(self._pieces(lengths, utterances), key=lambda piece: piece.frames)
        for bucket, group in itertools.groupby(ordered, key=lambda piece: bucket_of(piece.frames, self._longest)):
            pieces, rows = list(group), self._rows(bucket)
            for first in range(0, len(pieces), rows):
                chosen = enumerate(pieces[first : first + rows])
                yield bucket, tuple(piece._replace(row=row * bucket) for row, piece in chosen)

    def _pieces(self, lengths: Lengths, utterances: Utterances) -> Iterator[Piece]:
        for utterance, frames in zip(utterances.tolist(), self.counts(lengths[utterances]).tolist(), strict=True):
            parts = -(-frames // self._longest)
            edges = [part * frames // parts for part in range(parts)] + [frames]
            for start, end in itertools.pairwise(edges):
                yield Piece(utterance, start, end - start, 0)

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

    def _padded(self, corpus: Corpus, bucket: int, pieces: tuple[Piece, ...]) -> Batch:
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
