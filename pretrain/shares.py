"""What several hosts divide among themselves when they make labels, and how their parts come together again.

Alone, one host has the only share and nothing is exchanged.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int64, Shaped

from pretrain.label_arrays import LabelError
from wavlm_jax.training.waiting import agreed, told

Result = TypeVar("Result")
PATIENCE = 6 * 3600.0
"""Seconds that the first host waits for the slowest, after hours of equal shares."""
_PIECE_BYTES = 2**22


@dataclass(frozen=True)
class Share:
    """The part of one host."""

    index: int
    count: int

    @classmethod
    def here(cls) -> "Share":
        """Of this process."""
        return cls(jax.process_index(), jax.process_count())

    @property
    def first(self) -> bool:
        """Whether this host writes what all hosts read."""
        return self.index == 0

    def of(self, weights: Int64[np.ndarray, " items"]) -> tuple[int, int]:
        """The consecutive items [start, end) of this host: about the same weight for each, none twice, none left."""
        before = np.concatenate([[0], np.cumsum(weights)])
        edges = [int(np.searchsorted(before, before[-1] * part // self.count)) for part in range(self.count)]
        start, end = [*edges, len(weights)][self.index : self.index + 2]
        return start, end


def together(name: str, do: Callable[[], Result]) -> Result:
    """What `do` gives here, once all hosts have done theirs.

    Args:
        name: of the stage, for messages.
        do: may fail on some hosts only.

    Raises:
        LabelError: on all hosts, naming those where it failed. Alone: what `do` raises.
        HostsMissing: not all hosts came.

    """
    error: Exception | None = None
    result: list[Result] = []
    try:
        result.append(do())
    except (ValueError, OSError) as found:
        error = found
    complaint = agreed(name, None if error is None else str(error), PATIENCE)
    if error is not None and jax.process_count() == 1:
        raise error
    if complaint:
        raise LabelError(f"{name}: {complaint}")
    return result[0]


def most(name: str, counts: Mapping[int, int]) -> dict[int, int]:
    """For each key the largest of the counts of all hosts.

    Args:
        name: of what is counted, for messages.
        counts: of this host.

    Raises:
        HostsMissing: not all hosts came.

    """
    found: dict[int, int] = {}
    for _, _, theirs in told(name, sorted(counts.items()), PATIENCE):
        for key, count in theirs:
            found[key] = max(found.get(key, 0), count)
    return found


def total(parts: Shaped[np.ndarray, "frames dim"]) -> Shaped[np.ndarray, "frames dim"]:
    """The sum of the arrays of all hosts, of which each is 0 where it has nothing; a piece at a time."""
    if jax.process_count() == 1:
        return parts
    rows = max(1, _PIECE_BYTES // max(parts[:1].nbytes, 1))
    for start in range(0, len(parts), rows):
        piece = slice(start, start + rows)
        parts[piece] = np.asarray(multihost_utils.process_allgather(parts[piece])).sum(0)
    return parts


def of_first(array: Shaped[np.ndarray, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
    """Process 0's array, on all hosts."""
    return array if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(array))
