"""Where every array lives: one table from parameter names to axes, one from axes to the mesh.

Auto axes throughout: the tables say what is wanted, XLA inserts the communication. Nothing here changes a result.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wavlm_jax.shapes import Params
from wavlm_jax.training.axes import AxesTable
from wavlm_jax.training.mesh import ROWS
from wavlm_jax.training.trees import KeyPath, path_name

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
SMALLEST_SHARD = 16
"""Rows of a parameter on a device; less than a tile of a TPU."""


def replicated(mesh: Mesh) -> NamedSharding:
    """The same values on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    """First axis spread over the devices that see different rows."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


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


def thin_shards(params: Params, shardings: Mapping[str, NamedSharding]) -> str | None:
    """What to change where `fsdp` cuts a parameter into less than `SMALLEST_SHARD` rows a device; None: nothing."""
    thin = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        spec = shardings[name].spec
        for axis, size in zip(spec, leaf.shape, strict=False):
            shards = shardings[name].mesh.shape["fsdp"] if axis == "fsdp" else 1
            if shards > 1 and size // shards < SMALLEST_SHARD:
                thin[name] = size // shards
    if not thin:
        return None
    first = min(thin, key=lambda name: thin[name])
    return (
        f"config.mesh.fsdp: leaves {thin[first]} rows of {first} on a device ({len(thin)} parameters have less than "
        f"{SMALLEST_SHARD}); XLA then gathers weights by all-reduce, at twice the bytes. Take a smaller fsdp, more data"
    )


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


def place(
    arrays: Mapping[str, np.ndarray], shapes: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh, name: str
) -> dict[str, jax.Array]:
    """This host's rows of a batch, onto the devices.

    Args:
        arrays: this host's rows.
        shapes: global shapes, for which the step was compiled.
        mesh: spreads the rows.
        name: of the batch, for messages.

    Raises:
        ValueError: where names, dtypes or shapes are not those announced.

    """
    if set(arrays) != set(shapes):
        raise ValueError(f"batch {name}: found arrays {sorted(arrays)}, expected {sorted(shapes)}")
    placed = {}
    for key, expected in shapes.items():
        local = (expected.shape[0] // jax.process_count(), *expected.shape[1:])
        found = arrays[key]
        if found.shape != local or found.dtype != expected.dtype:
            raise ValueError(f"batch {name}: {key} is {found.dtype}{found.shape}, expected {expected.dtype}{local}")
        placed[key] = jax.make_array_from_process_local_data(by_rows(mesh), found, expected.shape)
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
