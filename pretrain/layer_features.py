"""One layer of a teacher as features: padded batches of few static shapes, rows spread over the devices.

The features stay on the devices; nothing but labels comes back when blocks are assigned to clusters.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Int16, Int32, Int64

from pretrain.features import Block, Corpus, Piece, Utterances, in_threads
from pretrain.row_shards import row_sharding
from wavlm_jax.config import WavLMConfig
from wavlm_jax.model.wavlm import WavLM
from wavlm_jax.shapes import SAMPLE_RATE, Geometry, Params, num_frames, samples_for

WINDOW = 1024
"""Utterances that are sorted by length together."""
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
        batch_seconds: audio in one batch over all devices.
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
        self._devices = len(jax.local_devices())
        everywhere = NamedSharding(row_sharding(self._devices).mesh, PartitionSpec())
        self._params: Params = jax.device_put(teacher.up_to(layer).params, everywhere)
        self._features = jax.jit(partial(layer_output, self._config))

    def counts(self, lengths: Utterances) -> Utterances:
        """Frames of the conv encoder."""
        counts: Utterances = num_frames(lengths, self.geometry)
        return counts

    def blocks(self, corpus: Corpus, utterances: Utterances) -> Iterator[Block]:
        """The layer's frames of the utterances, by length within windows of `WINDOW` utterances."""
        for batch, pieces in in_threads(
            lambda planned: (self._padded(corpus, *planned), planned[1]),
            self._plan(np.asarray(corpus.lengths), utterances),
            self._num_threads,
        ):
            place = row_sharding(len(batch.waveform))
            placed = jax.device_put(batch, place)
            mesh: Any = place.mesh
            with rows_over(mesh):
                features = self._features(self._params, placed)
            yield Block(features, pieces)

    def _plan(self, lengths: Lengths, utterances: Utterances) -> Iterator[tuple[int, tuple[Piece, ...]]]:
        """(bucket in frames, pieces) of each batch; `Piece.row` counts frames of the flattened batch."""
        for first in range(0, len(utterances), WINDOW):
            waiting: dict[int, list[Piece]] = {}
            for piece in sorted(self._pieces(lengths, utterances[first : first + WINDOW]), key=lambda p: p.frames):
                bucket = bucket_of(piece.frames, self._longest)
                batch = waiting.setdefault(bucket, [])
                batch.append(piece._replace(row=len(batch) * bucket))
                if len(batch) == self._rows(bucket):
                    yield bucket, tuple(waiting.pop(bucket))
            for bucket, pieces in waiting.items():
                yield bucket, tuple(pieces)

    def _pieces(self, lengths: Lengths, utterances: Utterances) -> Iterator[Piece]:
        for utterance, frames in zip(utterances.tolist(), self.counts(lengths[utterances]).tolist(), strict=True):
            parts = -(-frames // self._longest)
            edges = [part * frames // parts for part in range(parts)] + [frames]
            for start, end in itertools.pairwise(edges):
                yield Piece(utterance, start, end - start, 0)

    def _rows(self, bucket: int) -> int:
        return rows_for(bucket, self._batch_frames, self._devices)

    def _padded(self, corpus: Corpus, bucket: int, pieces: Sequence[Piece]) -> Padded:
        rows, samples = self._rows(bucket), samples_of(bucket, self.geometry)
        batch = Padded(
            np.zeros((rows, samples), np.int16),
            np.zeros(rows, np.int32),
            np.zeros(rows, np.float32),
            np.ones(rows, np.float32),
        )
        for row, piece in enumerate(pieces):
            first, needed = piece.start * self.geometry.hop, samples_for(piece.frames, self.geometry)
            left = int(corpus.lengths[piece.utterance]) - first
            taken = left if left < needed + self.geometry.hop else needed
            batch.waveform[row, :taken] = corpus.wave(piece.utterance, first, taken)
            batch.num_samples[row] = taken
            batch.mean[row] = corpus.means[piece.utterance]
            batch.variance[row] = corpus.variances[piece.utterance]
        return batch


@contextmanager
def rows_over(mesh: Mesh) -> Iterator[None]:
    """While entered, the model knows that its rows are spread over `mesh`: a kernel has to be told, XLA finds out."""
    with jax.set_mesh(mesh), nn.logical_axis_rules((("rows", "rows"),)):
        yield


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
