"""The devices' part of making labels: all hosts run the same program at the same time, each on its own rows.

A host that has fewer batches than others, or that has failed, continues with filler, so that nobody waits on a device
for a program that never comes; a failure is told to all hosts at the end of the part (`distributed.run_on_all_hosts`).
`trace_label_step` gives the same program from the config alone, for `wavlm_jax.plan`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Traced
from jaxtyping import Array, Int, Int64, UInt16

from pretrain.distributed import (
    ROWS,
    local_rows,
    max_over_hosts,
    put_local_rows,
    row_mesh,
    row_sharding,
    rows_over,
    run_on_all_hosts,
)
from pretrain.features import (
    MFCC_BLOCK,
    MFCC_DIM,
    FeatureSource,
    FrameSpan,
    Padded,
    Utterances,
    layer_output,
    mfcc_frames,
    rows_for,
    samples_of,
    teacher_config,
)
from pretrain.kmeans import Centroids, nearest
from pretrain.labels import LabelError, LabelSettings
from wavlm_jax.config import WavLMConfig
from wavlm_jax.data.corpus import Corpus
from wavlm_jax.model.wavlm import WavLM
from wavlm_jax.shapes import SAMPLE_RATE, samples_for


def trace_label_step(labels: LabelSettings, devices: Sequence[jax.Device]) -> tuple[str, Traced, float, Mesh]:
    """(name, program, seconds of audio, mesh) of the step that labels a batch, on the devices of all hosts.

    A teacher's folder (`labels.run`) gives its shape; where nothing is there yet, it is taken for a HuBERT Base, whose
    layer 9 the paper clusters. The longest row is `labels.piece_seconds`, a host's rows are `labels.batch_seconds`.
    """
    mesh = row_mesh(devices)
    hosts = len({device.process_index for device in devices})
    rows_of = NamedSharding(mesh, ROWS)
    if labels.teacher == "mfcc" or labels.run is None or labels.layer is None:
        block = MFCC_BLOCK * hosts
        frames, centroids = _shape((block, MFCC_DIM), mesh, ROWS), _shape((labels.num_clusters, MFCC_DIM), mesh)
        traced = label_program(mfcc_frames, rows_of).trace((), frames, centroids)
        return f"labels mfcc {block}", traced, block / labels.rate_hz, mesh
    teacher = dataclasses.replace(teacher_config(Path(labels.run)), num_hidden_layers=labels.layer, padding="exact")
    geometry = teacher.geometry
    a_second = SAMPLE_RATE / geometry.hop
    bucket = int(labels.piece_seconds * a_second)
    rows = rows_for(bucket, int(labels.batch_seconds * a_second), len(devices) // hosts) * hosts
    fields: list[Any] = [
        _shape((rows, samples_of(bucket, geometry)), mesh, ROWS, np.int16),
        *(_shape((rows,), mesh, ROWS, dtype) for dtype in (np.int32, np.float32, np.float32)),
    ]
    batch: Any = Padded(*fields)
    params = jax.tree.map(lambda leaf: _shape(leaf.shape, mesh, dtype=leaf.dtype), _abstract(teacher))
    centroids = _shape((labels.num_clusters, teacher.hidden_size), mesh)
    with rows_over(mesh):
        traced = label_program(partial(layer_output, teacher), rows_of).trace(params, batch, centroids)
    return f"labels {rows}x{bucket}", traced, rows * labels.piece_seconds, mesh


def _abstract(teacher: WavLMConfig) -> Any:
    samples = samples_for(1, teacher.geometry)

    def init() -> Any:
        return WavLM(teacher).init(jax.random.key(0), jnp.zeros((1, samples)), jnp.full((1,), samples, jnp.int32))

    return jax.eval_shape(init)["params"]


def _shape(
    shape: Sequence[int], mesh: Mesh, spec: PartitionSpec | None = None, dtype: Any = np.float32
) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=NamedSharding(mesh, spec or PartitionSpec()))


Result = TypeVar("Result")
Part = tuple[int, int]
"""The first of consecutive items, and the one behind the last."""
Program = Callable[[Any], Array]
"""From the arrays of a batch of all hosts to an array of which each has its rows."""
Use = Callable[[Array, tuple[FrameSpan, ...]], None]
_Done = tuple[Array, tuple[FrameSpan, ...]]


def in_parts(name: str, parts: Sequence[Part], do: Callable[[int, int], None]) -> None:
    """Calls `do(first, end)` for each part; a host that has none left calls `do(0, 0)` until all hosts are done.

    Args:
        name: of the stage, for messages.
        parts: of this host.
        do: one of them, the same programs on all hosts. May fail on some hosts only.

    Raises:
        ValueError, HostsMissing: as `run_on_all_hosts`.

    """
    rounds = max_over_hosts(f"parts of {name}", {0: len(parts)})[0]
    for first, end in [*parts, *[(0, 0)] * (rounds - len(parts))]:
        run_on_all_hosts(name, partial(do, first, end))


def in_rounds(
    name: str, source: FeatureSource, corpus: Corpus, utterances: Utterances, program: Program, use: Use
) -> None:
    """Runs a program on the batches of this host's utterances while the other hosts run it on theirs.

    Args:
        name: of the stage, for messages.
        source: of the batches.
        corpus: of the utterances.
        utterances: of this host.
        program: what to compute.
        use: called with the result of each batch of this host, one batch late so that the devices never wait.

    Raises:
        ValueError, OSError: of `source` or `use`, after the rounds of the other hosts.

    """
    ours = source.sizes(np.asarray(corpus.lengths)[utterances])
    everyones = max_over_hosts(f"batches of {name}", ours)
    trial, sharding, batches = _Trial(), row_sharding(), source.batches(corpus, utterances)
    mesh: Any = sharding.mesh
    done: _Done | None = None
    for size, rounds in sorted(everyones.items()):
        for number in range(rounds):
            batch = trial.of(lambda: next(batches, None)) if number < ours[size] else None
            # None too where the audio is shorter than the corpus says, or something failed.
            arrays, pieces = source.empty(size)[1:] if batch is None else batch[1:]
            with rows_over(mesh):
                result = program(put_local_rows(arrays, sharding))
            trial.of(partial(_use, use, done))
            done = result, pieces
    trial.of(partial(_use, use, done))
    trial.end()


def _use(use: Use, done: _Done | None) -> None:
    if done is not None and done[1]:
        use(*done)


class _Trial:
    """Runs functions until one fails; after that does nothing, so that this host can keep up with the others."""

    def __init__(self) -> None:
        self._error: Exception | None = None

    def of(self, do: Callable[[], Result]) -> Result | None:
        """The result of `do`; None if it or an earlier one failed. On a single host its exception is raised at once."""
        if self._error is not None:
            return None
        try:
            return do()
        except (ValueError, OSError) as error:
            if jax.process_count() == 1:
                raise
            self._error = error
            return None

    def end(self) -> None:
        """Raises the first exception, if there was one."""
        if self._error is not None:
            raise self._error


PART_LABELS = 2**20
"""Labels that are made between two updates of the progress file."""
Edges = Int64[np.ndarray, " edges"]


def parts_of(offsets: Edges, first: int, end: int) -> list[tuple[int, int]]:
    """The utterances from `first` to `end` (exclusive) in consecutive parts of about `PART_LABELS` labels.

    Args:
        offsets: of the labels of all utterances.
        first: of the utterances.
        end: behind the last of them.

    """
    parts = []
    while first < end:
        reach = int(np.searchsorted(offsets, offsets[first] + PART_LABELS))
        parts.append((first, max(first + 1, min(reach, end))))
        first = parts[-1][1]
    return parts


def label_program(compute: Callable[[Any, Any], Array], rows: NamedSharding) -> Any:
    """Jitted: (params, arrays of a batch, centroids) -> int32, the label of each of its frames.

    Args:
        compute: of the features (`FeatureSource.compute`).
        rows: of the batch and of the labels.

    """

    def label(params: Any, arrays: Any, centroids: Centroids) -> Int[Array, " frames"]:
        return nearest(compute(params, arrays), centroids)[0]

    return jax.jit(label, out_shardings=rows)


class PartLabels:
    """Labels of consecutive utterances from `first` on, concatenated; `offsets` says where each begins in the split."""

    def __init__(self, offsets: Edges, first: int) -> None:
        self._offsets, self._first = offsets, first
        self._missing = int(offsets[-1] - offsets[0])
        self._labels = np.zeros(self._missing, np.uint16)

    def take(self, result: Int[Array, " frames"], pieces: tuple[FrameSpan, ...]) -> None:
        """Stores the labels of a batch (this host's rows of it)."""
        found = local_rows(result)
        for piece in pieces:
            at = self._offsets[piece.utterance - self._first] - self._offsets[0] + piece.start
            self._labels[at : at + piece.frames] = found[piece.row : piece.row + piece.frames]
            self._missing -= piece.frames

    def whole(self) -> UInt16[np.ndarray, " labels"]:
        """All of them.

        Raises:
            LabelError: some were not taken.

        """
        if self._missing:
            raise LabelError(
                f"features: {self._missing} frames are missing from the utterances number {self._first} to "
                f"{self._first + len(self._offsets) - 2}; the audio is shorter than the corpus says; prepare the "
                "corpus again"
            )
        return self._labels
