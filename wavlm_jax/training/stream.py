"""What a task reads: static shapes that are known beforehand, and batches whose only position is their number."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np


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
