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

from wavlm_jax.model.kernel_rules import BLOCK, OPERANDS, Differentiable, Facts, Fixed, Operands
from wavlm_jax.model.placement import on_each_device
from wavlm_jax.model.tpu_kernels import (
    Gradients,
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


def _grouped(facts: Facts, num_heads: int) -> Facts:
    """The facts of a device with `num_heads` heads: groups that fill whole registers, else all heads at once."""
    group = LANES // math.gcd(LANES, facts.head_dim)
    return facts._replace(num_heads=num_heads, group=group if num_heads % group == 0 else num_heads)


def _forward_call(facts: Facts, num_heads: int, *arguments: Array) -> list[Array]:
    facts = _grouped(facts, num_heads)

    def kernel(*references: Any) -> None:
        forward_kernel(facts, Operands(*references[:7]), *references[7:])

    inputs, specs = _blocks(facts, arguments)
    mixed = pl.pallas_call(
        kernel,
        grid=(facts.num_groups, inputs[0].shape[0]),
        in_specs=specs,
        out_specs=[specs[0]],
        out_shape=[jax.ShapeDtypeStruct(inputs[0].shape, inputs[0].dtype)],
        scratch_shapes=[_sheared(facts)],
        compiler_params=_compiler_params(facts, inputs[0].dtype.itemsize),
        cost_estimate=_cost(facts, inputs, 2),
        name="toeplitz_attention_forward",
    )(*inputs)
    return list(mixed)


def _backward_call(facts: Facts, num_heads: int, *arguments: Array) -> list[Array]:
    facts = _grouped(facts, num_heads)

    def kernel(*references: Any) -> None:
        operands, results, scratch = references[:7], references[8:13], references[13:]
        backward_kernel(facts, Operands(*operands), references[7], Gradients(*results), Scratch(*scratch))

    inputs, specs = _blocks(facts, arguments)
    accumulator = pltpu.VMEM((facts.frames, facts.width), jnp.float32)
    gradients = pl.pallas_call(
        kernel,
        grid=(facts.num_groups, inputs[0].shape[0]),
        in_specs=specs,
        out_specs=specs[:5],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs[:5]],
        scratch_shapes=[accumulator, accumulator, _sheared(facts), _sheared(facts)],
        compiler_params=_compiler_params(facts, inputs[0].dtype.itemsize),
        cost_estimate=_cost(facts, inputs, 5),
        name="toeplitz_attention_backward",
    )(*inputs)
    return [gradient.reshape(x.shape) for gradient, x in zip(gradients, arguments, strict=False)]


def _blocks(facts: Facts, arguments: tuple[Array, ...]) -> tuple[list[Array], list[pl.BlockSpec]]:
    """The kernels' arguments with heads split into groups, and the block of each that grid step (group, row) sees."""
    query, key, value, profile, gate, fill, seeds, *direction = arguments
    rows, groups = query.shape[0], facts.num_groups
    profile = profile.reshape(groups, facts.group, 2 * facts.frames)
    gate = gate.reshape(rows, groups, facts.group, facts.frames)
    heads = pl.BlockSpec((1, facts.frames, facts.width), lambda group, row: (row, 0, group))
    specs = [
        heads,
        heads,
        heads,
        pl.BlockSpec((1, facts.group, 2 * facts.frames), lambda group, _: (group, 0, 0)),
        pl.BlockSpec((1, 1, facts.group, facts.frames), lambda group, row: (row, group, 0, 0)),
        pl.BlockSpec((1, 1, facts.frames), lambda _, row: (row, 0, 0)),
        pl.BlockSpec(memory_space=pltpu.SMEM),
        heads,
    ]
    inputs = [query, key, value, profile, gate, fill[:, None, :], seeds.reshape(-1), *direction]
    return inputs, specs[: len(inputs)]


def _sheared(facts: Facts) -> Any:
    return pltpu.VMEM((facts.group, BLOCK, 2 * facts.frames), jnp.float32)


def _compiler_params(facts: Facts, itemsize: int) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=2 * vmem_bytes(facts, itemsize)
    )


def vmem_bytes(facts: Facts, itemsize: int) -> int:
    """Fast memory that the backward kernel's blocks, scratch and temporaries take, about."""
    lanes = -(-facts.width // LANES) * LANES
    blocks = 2 * 7 * facts.frames * lanes * itemsize
    accumulators = 2 * facts.frames * lanes * 4
    sheared = 2 * facts.group * BLOCK * 2 * facts.frames * 4
    temporaries = 16 * BLOCK * facts.frames * 4
    return blocks + accumulators + sheared + temporaries


def _cost(facts: Facts, inputs: list[Array], products: int) -> pl.CostEstimate:
    """What XLA's scheduler is told: `products` matrix products of frames x frames x head_dim a row and head."""
    rows = inputs[0].shape[0]
    logits = rows * facts.num_heads * facts.frames**2
    moved = sum(x.size * x.dtype.itemsize for x in inputs) + inputs[0].size * inputs[0].dtype.itemsize
    return pl.CostEstimate(
        flops=2 * products * logits * facts.head_dim,
        transcendentals=logits,
        bytes_accessed=moved if products == FORWARD_PRODUCTS else moved + 2 * inputs[0].size * inputs[0].dtype.itemsize,
    )


FORWARD_PRODUCTS = 2
