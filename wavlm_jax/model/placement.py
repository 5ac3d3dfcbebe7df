"""Which mesh axes arrays lie on while the model runs: the training tower's rules, asked where a device works alone."""

import math
from collections.abc import Mapping

import jax
from flax.linen.spmd import logical_to_mesh_axes


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
