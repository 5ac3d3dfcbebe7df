"""What a task needs to know about the devices in order to cut its batches.

What a loss returns: sums and counts, never means; in evaluation lists of answers too.

What a task reads: static shapes that are known beforehand, and batches whose only position is their number.

What the loop trains: the one contract between a model and the training tower.

A task is four pure functions. The loop knows neither speech nor Flax; a task knows neither devices nor files.
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
    """How many see different rows, and which of them this process is."""

    num_devices: int
    """Devices that see different rows (data * fsdp)."""
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
    """Sums over the rows of a (micro-)batch; the step adds them up over the global batch and divides once."""

    loss: Sum
    """float32: sum of the loss."""
    count: Sum
    """float32: what `loss` is divided by (masked frames, utterances); 0 where a batch has nothing to learn from."""
    metrics: dict[str, tuple[Sum, Sum]]
    """name -> (sum, count), float32: reported as sum / count."""
    histograms: dict[str, Any] = field(default_factory=dict)
    """name -> counts, float32 (bins,): reported as the entropy of the normalised counts, in nats."""
    averages: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Of training: path of a parameter -> (sum, count) of what the batch says about it. Such parameters are not learned
    but follow these means from step to step (running statistics of batch norms)."""
    answers: dict[str, Any] = field(default_factory=dict)
    """Of an evaluation: name -> a value or vector a row (rows, ...), in the order of the batch. Those of a whole
    evaluation reach `Task.score`, which makes of them what is no sum (F1, equal error rate)."""


class BatchSpec(NamedTuple):
    """One static shape that a stream yields. Specs of one stream have different names."""

    name: str
    arrays: Mapping[str, jax.ShapeDtypeStruct]
    """Global shapes: the first axis counts the rows of all hosts."""
    microbatches: int
    """Steps of gradient accumulation that the rows are split into."""
    seconds: float
    """Seconds of audio in a full batch, for throughput."""


@runtime_checkable
class BatchStream(Protocol):
    """An endless (training) or finite (evaluation) sequence of batches; its only position is the batch number."""

    @property
    def specs(self) -> tuple[BatchSpec, ...]:
        """Every static shape that `batches` yields: all are compiled before the first step."""
        ...

    @property
    def num_batches(self) -> int | None:
        """None: endless."""
        ...

    def batches(self, start: int = 0) -> Iterator[tuple[BatchSpec, dict[str, np.ndarray]]]:
        """This host's rows of the batches number `start`, `start` + 1, ...: the same whenever they are asked for."""
        ...

    def name(self, index: int) -> str:
        """The utterance that `batch["id"]` calls `index`, for reports."""
        ...


Score: TypeAlias = Callable[[str, Mapping[str, np.ndarray]], Mapping[str, float]]
"""(split, `LossSums.answers` of all its utterances, `id` their numbers, each once) -> name -> metric."""


def no_score(split: str, answers: Mapping[str, np.ndarray]) -> Mapping[str, float]:
    """Nothing: all there is to say are sums."""
    del split, answers
    return {}


@dataclass(frozen=True)
class Task:
    """Four pure functions, two facts about the data, and what is frozen."""

    init: Callable[[StepKey], Params]
    """Fresh parameters; only ever traced, so that they are born sharded."""
    loss: Callable[[Params, Batch, StepKey | None], LossSums]
    """Sums over the batch, whose `row` is the row's number in the global batch; key None = evaluation."""
    stream: Callable[[str], BatchStream]
    """"train", or the name of an evaluation split."""
    initial_params: Callable[[Params], Params]
    """From fresh parameters to those that training starts from: the same, or converted weights, or an earlier run."""
    row_group: int = 1
    """Consecutive rows that stay together on one device and in one micro-batch (mixing partners)."""
    freeze: Mapping[str, Freeze] = field(default_factory=dict)
    """What stands still at first besides `optim.freeze` of the config: a body that waits for its fresh head."""
    score: Score = no_score
    """What an evaluation says besides its sums."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Name -> fingerprint of what training depends on besides the config (corpus, labels); a resume insists on them."""
    resolved: Mapping[str, Any] = field(default_factory=dict)
    """Sections that the data completed (the head with its number of outputs, the vocabulary), as JSON values. They
    take their place in the config that every checkpoint keeps, so that a run says all about its model."""


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
