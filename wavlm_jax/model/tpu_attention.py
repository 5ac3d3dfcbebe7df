"""Attention on a TPU: one fused kernel forward, one backward, memory that grows with frames and not their square.

Numbers are those of "dense" up to rounding, dropout included. Frames are padded to a multiple of 128 inside. Under a
mesh each device runs the kernel on its own rows and heads.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array

from wavlm_jax.model.attention_rules import EXCLUDED, AttentionDropout
from wavlm_jax.model.placement import mesh_axes
from wavlm_jax.model.position import Bias
from wavlm_jax.model.tpu_kernels import (
    BLOCK,
    Gradients,
    Operands,
    Plan,
    Scratch,
    backward_kernel,
    forward_kernel,
)
from wavlm_jax.shapes import FrameMask, Heads

LANES = 128


def attend_on_tpu(
    query: Heads, key: Heads, value: Heads, bias: Bias | None, frame_mask: FrameMask | None, drop: AttentionDropout
) -> Heads:
    """`attention.attend` as a TPU kernel."""
    rows, frames, heads, head_dim = query.shape
    padding = -frames % BLOCK
    flat = [jnp.pad(x.reshape(rows, frames, -1), ((0, 0), (0, padding), (0, 0))) for x in (query, key, value)]
    given = Bias(jnp.zeros((heads, 2 * frames - 1)), jnp.zeros((rows, frames, heads))) if bias is None else bias
    # Distance d stands at place padded frames + d, so that the windows of blocks are whole registers apart.
    profile = jnp.pad(given.position.astype(jnp.float32), ((0, 0), (padding + 1, padding)))
    gate = jnp.pad(given.gate.astype(jnp.float32).swapaxes(1, 2), ((0, 0), (0, 0), (0, padding)))
    seeds = jnp.zeros((rows, heads, 2), jnp.uint32) if drop.seeds is None else drop.seeds
    has_fill = frame_mask is not None or padding > 0
    plan = Plan(heads, 1, head_dim, frames + padding, bias is not None, has_fill, drop.threshold)
    fixed = _fill(frame_mask, rows, frames, padding), jax.lax.bitcast_convert_type(seeds, jnp.int32)
    return _fused(plan, (*flat, profile, gate), fixed)[:, :frames].reshape(query.shape)


def _fill(frame_mask: FrameMask | None, rows: int, frames: int, padding: int) -> Array:
    """float32 (rows, frames + padding): 0 for a key that counts, else what its logit becomes."""
    inside = jnp.zeros((rows, frames)) if frame_mask is None else jnp.where(frame_mask, 0.0, EXCLUDED)
    return jnp.pad(inside.astype(jnp.float32), ((0, 0), (0, padding)), constant_values=-np.inf)


Differentiable = tuple[Array, Array, Array, Array, Array]
"""Query, key, value (rows, frames, width), profile (heads, 2 * frames) and gate (rows, heads, frames)."""
Fixed = tuple[Array, Array]
"""Fill (rows, frames) and seeds (rows, heads, 2)."""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(plan: Plan, inputs: Differentiable, fixed: Fixed) -> Array:
    return _on_each_device(plan, _forward_call, _RESULT, (*inputs, *fixed))[0]


def _fused_forward(plan: Plan, inputs: Differentiable, fixed: Fixed) -> tuple[Array, tuple[Differentiable, Fixed]]:
    return _fused(plan, inputs, fixed), (inputs, fixed)


def _fused_backward(plan: Plan, saved: tuple[Differentiable, Fixed], direction: Array) -> tuple[Any, Any]:
    inputs, fixed = saved
    gradients = _on_each_device(plan, _backward_call, Gradients._fields, (*inputs, *fixed, direction))
    return tuple(gradients), (None, None)


_fused.defvjp(_fused_forward, _fused_backward)

_RESULT = ("value",)
_AXES = {
    "query": ("rows", None, "heads"),
    "key": ("rows", None, "heads"),
    "value": ("rows", None, "heads"),
    "profile": ("heads", None),
    "gate": ("rows", "heads", None),
    "fill": ("rows", None),
    "seeds": ("rows", "heads", None),
    "direction": ("rows", None, "heads"),
}
"""Logical axes of the arguments, in their order; the training tower says which mesh axes they lie on."""


def _on_each_device(plan: Plan, call: Callable[..., Any], results: tuple[str, ...], arguments: tuple[Any, ...]) -> Any:
    """`call` on each device's own rows and heads; the profile's gradient is summed over the devices' rows."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return call(_grouped(plan, plan.num_heads), *arguments)
    axes = mesh_axes({"rows": arguments[0].shape[0], "heads": plan.num_heads})
    local = _grouped(plan, plan.num_heads // math.prod(mesh.shape[axis] for axis in axes["heads"]))

    def spec(name: str) -> PartitionSpec:
        return PartitionSpec(*(axes[axis] if axis else None for axis in _AXES[name]))

    def body(*arguments: Any) -> Any:
        found = dict(zip(results, call(local, *arguments), strict=True))
        if "profile" in found:
            found["profile"] = jax.lax.psum(found["profile"], axes["rows"])
        return tuple(found.values())

    given = tuple(spec(name) for name in list(_AXES)[: len(arguments)])
    return jax.shard_map(body, in_specs=given, out_specs=tuple(map(spec, results)), check_vma=False)(*arguments)


def _grouped(plan: Plan, num_heads: int) -> Plan:
    """The plan of a device with `num_heads` heads: groups that fill whole registers, else all heads at once."""
    group = LANES // math.gcd(LANES, plan.head_dim)
    return plan._replace(num_heads=num_heads, group=group if num_heads % group == 0 else num_heads)


def _forward_call(plan: Plan, *arguments: Array) -> list[Array]:
    def kernel(*references: Any) -> None:
        forward_kernel(plan, Operands(*references[:7]), *references[7:])

    inputs, specs = _blocks(plan, arguments)
    mixed = pl.pallas_call(
        kernel,
        grid=(plan.num_groups, inputs[0].shape[0]),
        in_specs=specs,
        out_specs=[specs[0]],
        out_shape=[jax.ShapeDtypeStruct(inputs[0].shape, inputs[0].dtype)],
        scratch_shapes=[_sheared(plan)],
        compiler_params=_compiler_params(plan, inputs[0].dtype.itemsize),
        cost_estimate=_cost(plan, inputs, 2),
        name="toeplitz_attention_forward",
    )(*inputs)
    return list(mixed)


def _backward_call(plan: Plan, *arguments: Array) -> list[Array]:
    def kernel(*references: Any) -> None:
        operands, results, scratch = references[:7], references[8:13], references[13:]
        backward_kernel(plan, Operands(*operands), references[7], Gradients(*results), Scratch(*scratch))

    inputs, specs = _blocks(plan, arguments)
    accumulator = pltpu.VMEM((plan.frames, plan.width), jnp.float32)
    gradients = pl.pallas_call(
        kernel,
        grid=(plan.num_groups, inputs[0].shape[0]),
        in_specs=specs,
        out_specs=specs[:5],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs[:5]],
        scratch_shapes=[accumulator, accumulator, _sheared(plan), _sheared(plan)],
        compiler_params=_compiler_params(plan, inputs[0].dtype.itemsize),
        cost_estimate=_cost(plan, inputs, 5),
        name="toeplitz_attention_backward",
    )(*inputs)
    return [gradient.reshape(x.shape) for gradient, x in zip(gradients, arguments, strict=False)]


def _blocks(plan: Plan, arguments: tuple[Array, ...]) -> tuple[list[Array], list[pl.BlockSpec]]:
    """The kernels' arguments with heads split into groups, and the block of each that grid step (group, row) sees."""
    query, key, value, profile, gate, fill, seeds, *direction = arguments
    rows, groups = query.shape[0], plan.num_groups
    profile = profile.reshape(groups, plan.group, 2 * plan.frames)
    gate = gate.reshape(rows, groups, plan.group, plan.frames)
    heads = pl.BlockSpec((1, plan.frames, plan.width), lambda group, row: (row, 0, group))
    specs = [
        heads,
        heads,
        heads,
        pl.BlockSpec((1, plan.group, 2 * plan.frames), lambda group, _: (group, 0, 0)),
        pl.BlockSpec((1, 1, plan.group, plan.frames), lambda group, row: (row, group, 0, 0)),
        pl.BlockSpec((1, 1, plan.frames), lambda _, row: (row, 0, 0)),
        pl.BlockSpec(memory_space=pltpu.SMEM),
        heads,
    ]
    inputs = [query, key, value, profile, gate, fill[:, None, :], seeds.reshape(-1), *direction]
    return inputs, specs[: len(inputs)]


def _sheared(plan: Plan) -> Any:
    return pltpu.VMEM((plan.group, BLOCK, 2 * plan.frames), jnp.float32)


def _compiler_params(plan: Plan, itemsize: int) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=2 * vmem_bytes(plan, itemsize)
    )


def vmem_bytes(plan: Plan, itemsize: int) -> int:
    """Fast memory that the backward kernel's blocks, scratch and temporaries take, about."""
    lanes = -(-plan.width // LANES) * LANES
    blocks = 2 * 7 * plan.frames * lanes * itemsize
    accumulators = 2 * plan.frames * lanes * 4
    sheared = 2 * plan.group * BLOCK * 2 * plan.frames * 4
    temporaries = 16 * BLOCK * plan.frames * 4
    return blocks + accumulators + sheared + temporaries


def _cost(plan: Plan, inputs: list[Array], products: int) -> pl.CostEstimate:
    """What XLA's scheduler is told: `products` matrix products of frames x frames x head_dim a row and head."""
    rows = inputs[0].shape[0]
    logits = rows * plan.num_heads * plan.frames**2
    moved = sum(x.size * x.dtype.itemsize for x in inputs) + inputs[0].size * inputs[0].dtype.itemsize
    return pl.CostEstimate(
        flops=2 * products * logits * plan.head_dim,
        transcendentals=logits,
        bytes_accessed=moved if products == FORWARD_PRODUCTS else moved + 2 * inputs[0].size * inputs[0].dtype.itemsize,
    )


FORWARD_PRODUCTS = 2
