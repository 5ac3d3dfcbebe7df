"""Work and arrays spread over the devices and hosts of a run that makes labels.

Every program runs on all devices of all hosts, because the compiler refuses programs for some of the chips on slices
of v5e and v6e with more than 16. Each host gives and gets its own rows. A run on one host has the only share and
exchanges nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int64, Shaped

from wavlm_jax.training.hosts import all_gather, all_succeed

ROWS = PartitionSpec("rows")


def row_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """One axis called "rows", host by host, so that a host's rows are neighbours."""
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(ordered), ("rows",), axis_types=(AxisType.Auto,))


def row_sharding() -> NamedSharding:
    """Rows over the devices of all hosts."""
    return NamedSharding(row_mesh(jax.devices()), ROWS)


def fit_sharding(rows: int) -> NamedSharding:
    """Rows over the devices of all hosts, which have to divide them; of one host: over as many as do."""
    devices = jax.devices()
    if jax.process_count() == 1:
        devices = devices[: max(count for count in range(1, len(devices) + 1) if rows % count == 0)]
    return NamedSharding(row_mesh(devices), ROWS)


def put_sharded(array: Any, sharding: NamedSharding) -> Array:
    """An array that all hosts have whole, onto the devices of all hosts."""
    whole = np.asarray(array)
    placed: Array = jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
    return placed


def replicate(tree: Any) -> Any:
    """Arrays that all hosts have whole, each of them onto every device."""
    everywhere = NamedSharding(row_sharding().mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: put_sharded(leaf, everywhere), tree)


def put_local_rows(arrays: Any, sharding: NamedSharding) -> Any:
    """Arrays of this host's rows, as a part of those of all hosts; the same shapes on each of them."""

    def placed(rows: np.ndarray) -> Array:
        whole = (len(rows) * jax.process_count(), *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, whole)

    return jax.tree.map(placed, arrays)


def local_rows(array: Array) -> np.ndarray:
    """The rows of this host, in the order in which `put_local_rows` got them."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


@contextmanager
def rows_over(mesh: Mesh) -> Iterator[None]:
    """While entered, a model knows that its rows are spread over `mesh`: a kernel has to be told, XLA finds out."""
    with jax.set_mesh(mesh), nn.logical_axis_rules((("rows", "rows"),)):
        yield


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
        """Whether this is the first host, which writes what all hosts read."""
        return self.index == 0

    def of(self, weights: Int64[np.ndarray, " items"]) -> tuple[int, int]:
        """The consecutive items [start, end) of this host: about the same weight for each, none twice, none left."""
        before = np.concatenate([[0], np.cumsum(weights)])
        edges = [int(np.searchsorted(before, before[-1] * part // self.count)) for part in range(self.count)]
        start, end = [*edges, len(weights)][self.index : self.index + 2]
        return start, end


def run_on_all_hosts(name: str, do: Callable[[], Result]) -> Result:
    """The result of `do` on this host, once all hosts have run theirs.

    Args:
        name: of the stage, for messages.
        do: may fail on some hosts only.

    Raises:
        ValueError: on all hosts, naming those where it failed. Alone: what `do` raises.
        HostsMissing: not all hosts came.

    """

    def failure(said: str) -> ValueError:
        return ValueError(f"{name}: {said}")

    return all_succeed(name, do, catch=(ValueError, OSError), failure=failure, seconds=PATIENCE)


def max_over_hosts(name: str, counts: Mapping[int, int]) -> dict[int, int]:
    """For each key the largest count of all hosts.

    Args:
        name: of what is counted, for messages.
        counts: of this host.

    Raises:
        HostsMissing: not all hosts came.

    """
    found: dict[int, int] = {}
    for _, _, theirs in all_gather(name, sorted(counts.items()), PATIENCE):
        for key, count in theirs:
            found[key] = max(found.get(key, 0), count)
    return found


def sum_over_hosts(parts: Shaped[np.ndarray, "frames dim"]) -> Shaped[np.ndarray, "frames dim"]:
    """The sum of the arrays of all hosts, piece by piece to bound memory."""
    if jax.process_count() == 1:
        return parts
    rows = max(1, _PIECE_BYTES // max(parts[:1].nbytes, 1))
    for start in range(0, len(parts), rows):
        piece = slice(start, start + rows)
        parts[piece] = np.asarray(multihost_utils.process_allgather(parts[piece])).sum(0)
    return parts


def from_first_host(array: Shaped[np.ndarray, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
    """The array of process 0, on all hosts."""
    return array if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(array))
