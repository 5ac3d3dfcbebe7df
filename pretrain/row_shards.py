"""Rows spread over devices: those of this host for features, those of all hosts for the fit of the clusters."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array


def row_sharding(rows: int) -> NamedSharding:
    """Rows over as many local devices as divide them."""
    devices = jax.local_devices()
    used = max(count for count in range(1, len(devices) + 1) if rows % count == 0)
    return _over(devices[:used])


def _over(devices: list[jax.Device]) -> NamedSharding:
    mesh = jax.sharding.Mesh(np.array(devices), ("rows",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("rows"))


def fit_sharding(rows: int) -> NamedSharding:
    """Rows over the devices of all hosts, which have to divide them; of one host: over as many as do."""
    return row_sharding(rows) if jax.process_count() == 1 else _over(jax.devices())


def put(array: Any, sharding: NamedSharding) -> Array:
    """An array that all hosts have whole, onto the devices of all hosts."""
    whole = np.asarray(array)
    placed: Array = jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
    return placed
