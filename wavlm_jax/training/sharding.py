"""Where every array lives: one mesh, one table from parameter names to axes, one from axes to the mesh.

Auto axes throughout: the tables say what is wanted, XLA inserts the communication. Nothing here changes a result.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from wavlm_jax.shapes import Params
from wavlm_jax.training.task import BatchSpec

KeyPath = tuple[Any, ...]

AxesTable = tuple[tuple[str, tuple[str | None, ...]], ...]
"""Rows of (regular expression over the whole parameter path, one logical axis per dimension; None = never split)."""

MESH_AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
"""Mesh axes over which the rows of a batch are spread."""

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("rows", ROWS),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("layers", None),
    ("frames", None),
    ("samples", None),
    ("channels", None),
    ("width", None),
)
"""Logical axis -> mesh axes, for parameters and for activations (the model's `nn.with_logical_constraint`)."""


@dataclass(frozen=True, kw_only=True)
class MeshSettings:
    """Sizes of the mesh; at most one is -1: whatever devices the others leave."""

    data: int
    """Copies of the parameters; each sees its own rows."""
    fsdp: int
    """Devices over which parameters and optimizer state are split; each sees its own rows. 8 or 16, not all."""
    tensor: int
    """Devices that share the same rows and split heads and feed-forward units."""

    def sizes(self, num_devices: int) -> tuple[int, int, int]:
        """(data, fsdp, tensor) with -1 resolved.

        Raises:
            ValueError: where they do not multiply to `num_devices`.

        """
        sizes = [self.data, self.fsdp, self.tensor]
        known = math.prod(size for size in sizes if size != -1)
        if sizes.count(-1) == 1 and known > 0 and num_devices % known == 0:
            sizes[sizes.index(-1)] = num_devices // known
        if min(sizes) < 1 or math.prod(sizes) != num_devices:
            raise ValueError(
                f"config.mesh: data {self.data}, fsdp {self.fsdp}, tensor {self.tensor} on {num_devices} devices; "
                f"expected sizes that multiply to {num_devices}, one of them may be -1 (the rest)"
            )
        return sizes[0], sizes[1], sizes[2]


@dataclass(frozen=True)
class Topology:
    """What a task needs to know about the devices in order to cut its batches."""

    num_devices: int
    """Devices that see different rows (data * fsdp)."""
    process_index: int
    process_count: int

    @classmethod
    def of(cls, mesh: Mesh) -> "Topology":
        """The topology of a mesh, seen from this process."""
        return cls(row_shards(mesh), jax.process_index(), jax.process_count())


def make_mesh(settings: MeshSettings) -> Mesh:
    """The mesh (data, fsdp, tensor) over all devices, rows in the order of the processes.

    `jax.make_mesh` knows the physical network but may interleave processes (and refuses several slices); a loader hands
    out rows by process, so then the plain order is taken.
    """
    sizes = settings.sizes(jax.device_count())
    if jax.local_device_count() % sizes[2]:
        raise ValueError(
            f"config.mesh.tensor: {sizes[2]} does not divide the {jax.local_device_count()} devices a host"
        )
    devices = sorted(jax.devices(), key=lambda d: (getattr(d, "slice_index", 0), d.process_index, d.id))
    plain = Mesh(np.array(devices).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    if len({getattr(device, "slice_index", 0) for device in devices}) > 1:
        return plain
    mesh = jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    owners = [device.process_index for device in mesh.devices.flat]
    return mesh if owners == sorted(owners) else plain


def row_shards(mesh: Mesh) -> int:
    """Devices that see different rows."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same values on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    """First axis spread over the devices that see different rows."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def path_name(path: KeyPath) -> str:
    """A tree path as "encoder/layers/attention/q_proj/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def parameter_axes(params: Params, table: AxesTable) -> dict[str, tuple[str | None, ...]]:
    """Logical axes of every parameter.

    Args:
        params: arrays or ShapeDtypeStructs.
        table: every parameter must match exactly one row, of its own rank.

    Raises:
        ValueError: naming the parameter that matches no row, several, or one of another rank.

    """
    result = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        rows = [(pattern, axes) for pattern, axes in table if re.fullmatch(pattern, name)]
        if len(rows) != 1:
            found = "no row" if not rows else f"{len(rows)} rows ({', '.join(pattern for pattern, _ in rows)})"
            raise ValueError(f"sharding table: parameter {name} {leaf.shape} matches {found}, expected exactly one")
        (pattern, axes) = rows[0]
        if len(axes) != len(leaf.shape):
            raise ValueError(
                f"sharding table: parameter {name} has shape {leaf.shape}, but row {pattern!r} names {len(axes)} axes"
            )
        result[name] = axes
    return result


def parameter_shardings(params: Params, table: AxesTable, mesh: Mesh) -> dict[str, NamedSharding]:
    """Path -> sharding. An axis that its mesh axis does not divide stays whole (`describe` shows it)."""
    rules = dict(RULES)
    shapes = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    result = {}
    for name, axes in parameter_axes(params, table).items():
        unknown = [axis for axis in axes if axis is not None and axis not in rules]
        if unknown:
            raise ValueError(f"sharding table: {name} names axis {unknown[0]!r}; known: {', '.join(rules)}")
        wanted = [None if axis is None else rules[axis] for axis in axes]
        fits = [
            axis if isinstance(axis, str) and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(wanted, shapes[name], strict=True)
        ]
        result[name] = NamedSharding(mesh, PartitionSpec(*fits))
    return result


def tree_shardings(tree: Any, parameters: Mapping[str, NamedSharding], mesh: Mesh) -> Any:
    """Shardings of a train state: what mirrors a parameter by path (Adam's moments) follows it, scalars are everywhere.

    Raises:
        ValueError: naming an array that is neither.

    """

    def of(path: KeyPath, leaf: Any) -> NamedSharding:
        for start in range(len(path)):
            name = path_name(path[start:])
            if name in parameters:
                return parameters[name]
        if leaf.shape:
            raise ValueError(f"sharding: {path_name(path)} {leaf.shape} follows no parameter and is no scalar")
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(of, tree)


def place(arrays: Mapping[str, np.ndarray], spec: BatchSpec, mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of a batch, onto the devices.

    Raises:
        ValueError: where names, dtypes or shapes are not what the spec announced (and was compiled for).

    """
    if set(arrays) != set(spec.arrays):
        raise ValueError(f"batch {spec.name}: found arrays {sorted(arrays)}, expected {sorted(spec.arrays)}")
    placed = {}
    for name, expected in spec.arrays.items():
        rows = expected.shape[0] // jax.process_count()
        found = arrays[name]
        if found.shape != (rows, *expected.shape[1:]) or found.dtype != expected.dtype:
            raise ValueError(
                f"batch {spec.name}: {name} is {found.dtype}{found.shape}, "
                f"expected {expected.dtype}{(rows, *expected.shape[1:])}"
            )
        placed[name] = jax.make_array_from_process_local_data(by_rows(mesh), found, expected.shape)
    return placed


def describe(params: Params, shardings: Mapping[str, NamedSharding]) -> str:
    """A table for people: one line a parameter with shape, dtype, split, and the bytes that one device holds."""
    lines, total, held = [], 0, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        local = math.prod(shardings[name].shard_shape(leaf.shape))
        total, held = total + math.prod(leaf.shape), held + local
        split = [axis for axis in shardings[name].spec if axis and shardings[name].mesh.shape[axis] > 1]
        place = f"split over {', '.join(split)}" if split else "whole"
        lines.append(f"  {name:<72} {leaf.shape!s:<22} {leaf.dtype!s:<9} {place}")
    lines.append(f"  {total:,} parameters, {held:,} on each device")
    return "\n".join(lines)
