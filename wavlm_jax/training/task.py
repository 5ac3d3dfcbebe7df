"""The contract between tasks and the training loop: `Task`, what it reads (`BatchStream`) and returns (`LossSums`).

The loop knows neither speech nor Flax; a task knows neither devices nor files. A batch is a function of its number.
A loss is a sum and a count, never a mean.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jax.stages import Traced

from wavlm_jax.shapes import Batch, Params, StepKey
from wavlm_jax.training.optim import Freeze
from wavlm_jax.training.sharding import row_shards


@dataclass(frozen=True)
class Topology:
    """What a task needs to know about the machine to cut its batches."""

    num_devices: int
    """Devices that work on different rows (data * fsdp)."""
    process_index: int
    process_count: int

    @classmethod
    def of(cls, mesh: Mesh) -> "Topology":
        """The topology of a mesh, seen from this process."""
        return cls(row_shards(mesh), jax.process_index(), jax.process_count())


Sum = Any
"""A float32 scalar: a tracer in the step, numpy once fetched, a ShapeDtypeStruct when only shapes are asked for."""


@struct.dataclass
class LossSums:
    """Sums over the rows of a (micro-)batch; the step adds them over the global batch and divides once."""

    loss: Sum
    """float32: sum of the loss."""
    count: Sum
    """float32: what `loss` is divided by (masked frames, utterances); 0 if there is nothing to learn from."""
    metrics: dict[str, tuple[Sum, Sum]]
    """name -> (sum, count), float32: reported as sum / count."""
    histograms: dict[str, Any] = field(default_factory=dict)
    """name -> counts, float32 (bins,): reported as the entropy of the normalised counts, in nats."""
    averages: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """In training: path of a parameter -> (sum, count). Such parameters are running averages (batch norms' statistics):
    they are not learned, but moved towards sum / count by `step.train_step`."""
    answers: dict[str, Any] = field(default_factory=dict)
    """In evaluation: name -> (rows, ...), one value or vector per row, in the order of the batch. `Task.score` gets
    those of a whole evaluation, for metrics that are no sums (F1, equal error rate)."""


class BatchSpec(NamedTuple):
    """A static shape of batches. The specs of one stream have different names."""

    name: str
    arrays: Mapping[str, jax.ShapeDtypeStruct]
    """Global shapes: the first axis is the rows of all hosts."""
    microbatches: int
    """Number of micro-batches (gradient accumulation) that the rows are split into."""
    seconds: float
    """Seconds of audio in a full batch, for throughput."""


@runtime_checkable
class BatchStream(Protocol):
    """An endless (training) or finite (evaluation) sequence of batches; the batch number is its only state."""

    @property
    def specs(self) -> tuple[BatchSpec, ...]:
        """Every static shape that `batches` yields; all are compiled before the first step."""
        ...

    @property
    def num_batches(self) -> int | None:
        """None: endless."""
        ...

    def batches(self, start: int = 0) -> Iterator[tuple[BatchSpec, dict[str, np.ndarray]]]:
        """This host's rows of the batches number `start`, `start` + 1, ...; the same at every call."""
        ...

    def name(self, index: int) -> str:
        """Name of the utterance whose number in `batch["id"]` is `index`, for reports."""
        ...


Score: TypeAlias = Callable[[str, Mapping[str, np.ndarray]], Mapping[str, float]]
"""(split, `LossSums.answers` of all its utterances, each once; "id" has their numbers) -> name -> metric."""


def no_score(split: str, answers: Mapping[str, np.ndarray]) -> Mapping[str, float]:
    """No metrics besides the sums."""
    del split, answers
    return {}


@dataclass(frozen=True)
class Task:
    """What is trained: pure functions, and facts about the data."""

    init: Callable[[StepKey], Params]
    """Fresh parameters; only traced, so that each device makes its own shards."""
    loss: Callable[[Params, Batch, StepKey | None], LossSums]
    """Sums over the batch, in which `row` is the row's number in the global batch. The key is None in evaluation."""
    stream: Callable[[str], BatchStream]
    """From "train", or the name of an evaluation split, to its batches."""
    initial_params: Callable[[Params], Params]
    """From fresh parameters to those that training starts from: the same, or converted weights, or an earlier run's."""
    row_group: int = 1
    """Consecutive rows that stay together on one device and in one micro-batch (mixing partners)."""
    freeze: Mapping[str, Freeze] = field(default_factory=dict)
    """Entries besides `optim.freeze` of the config: a pretrained body that waits for its fresh head."""
    score: Score = no_score
    """Metrics of an evaluation that are no sums."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Name -> fingerprint of what training depends on besides the config (its corpus and labels, wherever they are; not
    evaluation data). A resume with others is refused."""
    resolved: Mapping[str, Any] = field(default_factory=dict)
    """Config sections that the data completed (the head with its number of outputs, the vocabulary), as JSON values.
    They replace those of the config in every checkpoint, so that a run describes its model completely."""


LabelStep: TypeAlias = Callable[[Mapping[str, Any], Sequence[jax.Device]], tuple[str, Traced, float, Mesh]]
"""From a config and all devices to (name, program, seconds of audio, mesh) of the step that makes its labels."""


class TaskKind(NamedTuple):
    """A row of `pretrain.task.TASKS`: how a task is made from its config."""

    build: Callable[[Mapping[str, Any], Topology], Task]
    """The task that train.py runs. Data are opened and checked before anything is compiled."""
    outline: Callable[[Mapping[str, Any], Topology], Task]
    """The same task without its data, whose streams know their shapes only: what `wavlm_jax.plan` compiles."""
    label_step: LabelStep | None = None
    """Of a task that makes labels first."""
