"""Rows spread over the devices of all hosts, each host giving and getting its own.

A program for some of the chips only is refused by the compiler on slices of v5e and v6e with more than 16 of them, so
there is none here: a mesh has all devices, or is that of one host alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

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


def put(array: Any, sharding: NamedSharding) -> Array:
    """An array that all hosts have whole, onto the devices of all hosts."""
    whole = np.asarray(array)
    placed: Array = jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
    return placed


def put_everywhere(tree: Any) -> Any:
    """Arrays that all hosts have whole, each of them onto every device."""
    everywhere = NamedSharding(row_sharding().mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: put(leaf, everywhere), tree)


def put_rows(arrays: Any, sharding: NamedSharding) -> Any:
    """Arrays of this host's rows, as a part of those of all hosts; the same shapes on each of them."""

    def placed(rows: np.ndarray) -> Array:
        whole = (len(rows) * jax.process_count(), *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, whole)

    return jax.tree.map(placed, arrays)


def own_rows(array: Array) -> np.ndarray:
    """The rows of this host, in the order in which `put_rows` got them."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


@contextmanager
def rows_over(mesh: Mesh) -> Iterator[None]:
    """While entered, a model knows that its rows are spread over `mesh`: a kernel has to be told, XLA finds out."""
    with jax.set_mesh(mesh), nn.logical_axis_rules((("rows", "rows"),)):
        yield
