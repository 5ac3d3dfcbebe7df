"""Attention on a TPU: one fused kernel forward, one backward, memory that grows with frames and not their square.

Numbers are those of "dense" up to rounding, dropout included. Frames are padded to a multiple of 128 inside. Under a
mesh each device runs the kernel on its own rows and heads.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from wavlm_jax.model.kernel_rules import BLOCK, OPERANDS, Differentiable, Facts, Fixed
from wavlm_jax.model.placement import on_each_device
from wavlm_jax.model.tpu_kernels import (
    Gradients,
    Operands,
    Plan,
    Scratch,
    backward_kernel,
    forward_kernel,
)

LANES = 128


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def on_tpu(facts: Facts, inputs: Differentiable, fixed: Fixed) -> Array:
    """Mixed values of all rows and heads: (rows, frames, width), dtype of the query; differentiable in `inputs`."""
    mixed: Array
    (mixed,) = on_each_device(facts.num_heads, partial(_forward_call, facts), OPERANDS, ("result",), (*inputs, *fixed))
    return mixed


def _fused_forward(facts: Facts, inputs: Differentiable, fixed: Fixed) -> tuple[Array, tuple[Differentiable, Fixed]]:
    return on_tpu(facts, inputs, fixed), (inputs, fixed)


def _fused_backward(facts: Facts, saved: tuple[Differentiable, Fixed], direction: Array) -> tuple[Any, Any]:
    inputs, fixed = saved
    given = (*inputs, *fixed, direction)
    call, names = partial(_backward_call, facts), (*OPERANDS, "direction")
    return on_each_device(facts.num_heads, call, names, Gradients._fields, given), (None, None)


on_tpu.defvjp(_fused_forward, _fused_backward)


def _grouped(facts: Facts) -> Plan:
    """The plan of a device: groups of heads that fill whole registers, else all heads at once."""
    group = LANES // math.gcd(LANES, facts.head_dim)
    return Plan(*facts, group if facts.num_heads % group == 0 else facts.num_heads)


def _forward_call(facts: Facts, num_heads: int, *arguments: Array) -> list[Array]:
    plan = _grouped(facts._replace(num_heads=num_heads))

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


def _backward_call(facts: Facts, num_heads: int, *arguments: Array) -> list[Array]:
    plan = _grouped(facts._replace(num_heads=num_heads))

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
