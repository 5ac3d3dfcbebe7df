"""Which mesh axes arrays lie on while the model runs: the training tower's rules, asked where a device works alone."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax.linen.spmd import logical_to_mesh_axes
from jax.sharding import PartitionSpec


def mesh_axes(sizes: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Logical axis -> the mesh axes that its size can be spread over; without a mesh, or indivisible: none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return dict.fromkeys(sizes, ())
    lying = dict(zip(sizes, logical_to_mesh_axes(tuple(sizes)) or (), strict=False))
    found = {}
    for name, size in sizes.items():
        axes = lying.get(name)
        names = (axes,) if isinstance(axes, str) else tuple(axes or ())
        found[name] = names if size % math.prod(mesh.shape[axis] for axis in names) == 0 else ()
    return found


_AXES = {
    **dict.fromkeys(("query", "key", "value", "direction", "result"), ("rows", None, "heads")),
    "profile": ("heads", None),
    "gate": ("rows", "heads", None),
    "fill": ("rows", None),
    "seeds": ("rows", "heads", None),
    "statistics": ("rows", "heads", None),
}
"""Logical axes of what goes into a fused kernel and comes out; the training tower says which mesh axes they lie on."""


def on_each_device(
    num_heads: int,
    call: Callable[..., Any],
    names: tuple[str, ...],
    results: tuple[str, ...],
    arguments: tuple[Any, ...],
) -> Any:
    """`call` on each device's own rows and heads; the profile's gradient is summed over the devices' rows.

    Args:
        num_heads: of all devices.
        call: from the number of its own heads and the arguments to a sequence of results.
        names: of the arguments, keys of `_AXES`.
        results: of the results, likewise.
        arguments: arrays.

    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tuple(call(num_heads, *arguments))
    axes = mesh_axes({"rows": arguments[0].shape[0], "heads": num_heads})
    own_heads = num_heads // math.prod(mesh.shape[axis] for axis in axes["heads"])

    def spec(name: str) -> PartitionSpec:
        return PartitionSpec(*(axes[axis] if axis else None for axis in _AXES[name]))

    def body(*arguments: Any) -> Any:
        found = zip(results, call(own_heads, *arguments), strict=True)
        return tuple(jax.lax.psum(x, axes["rows"]) if name == "profile" else x for name, x in found)

    given = tuple(map(spec, names))
    return jax.shard_map(body, in_specs=given, out_specs=tuple(map(spec, results)), check_vma=False)(*arguments)
