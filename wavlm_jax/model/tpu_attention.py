"""Attention on a TPU: one fused kernel forward, one backward, in memory that grows with the frames, not their square.

The results are those of "dense" up to rounding, dropout included. Frames are padded to a multiple of 128 inside. Under
a mesh each device runs the kernels on its own rows and heads.

A kernel handles one row and one group of heads: as many heads as fill 128 lanes, side by side as the projections return
them, so that nothing is transposed or padded in HBM. A product with one head masks the lanes of the others, which costs
nothing on a matrix unit that is 128 wide.

The bias of 128 queries is a window of one sheared array, whose line i is the profile shifted i places to the right. The
window of query block n starts n * 128 places further left. The array is built once for each group of heads and used for
all rows and blocks. Its gradient is added up in an array of the same shape and folded back to the profile once.

The blocks of `Operands` here: query, key and value (1, frames, width), profile (1, group, 2 * frames), gate
(1, 1, group, frames), fill (1, 1, frames), and all seeds, (rows * heads * 2), in scalar memory. A name `to_x` is the
gradient of the loss with respect to x.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from wavlm_jax.model.fused_attention import (
    BLOCK,
    HALF,
    OPERANDS,
    RESOLUTION,
    Differentiable,
    Facts,
    Fixed,
    Operands,
    matmul,
    on_each_device,
    random_words,
    scale_of_kept,
    shifted_right,
)

SUBLANES = 8


class Block(NamedTuple):
    """One block of queries and one head of the group."""

    number: Array
    head: int
    seeds: Array
    """Index of the head's first seed; the second follows."""


class Scores(NamedTuple):
    """Softmax of one block, float32; gate and bias tile are None without a position bias."""

    exponentials: Array
    """(BLOCK, frames)."""
    total: Array
    """(BLOCK, 1): their sums."""
    gate: Array | None
    """(BLOCK, 1)."""
    tile: Array | None
    """(BLOCK, frames): the bias before the gate."""


def forward_kernel(facts: Facts, operands: Operands, output: Any, sheared: Any) -> None:
    """Mixed values of one row and group; `sheared` (group, BLOCK, 2 * frames) is kept from row to row."""
    _shear_once(facts, operands, sheared)
    seeds = _first_seed(facts)

    def one_block(number: Array, _: None) -> None:
        mixed = jnp.zeros((BLOCK, facts.width), jnp.float32)
        value = operands.value[0]
        for block in _heads(facts, number, seeds):
            scores = _scores(facts, operands, sheared, block)
            weights = scores.exponentials
            total = scores.total
            if facts.drop_threshold:
                weights = jnp.where(_kept(facts, operands, block), weights, 0.0)
                total = total / scale_of_kept(facts.drop_threshold)
            product = matmul(weights.astype(value.dtype), value, 1, 0)
            mixed = jnp.where(_lanes(facts, block.head), product / total, mixed)
        output[0, _rows(number), :] = mixed.astype(output.dtype)

    jax.lax.fori_loop(0, facts.frames // BLOCK, one_block, None)


class Gradients(NamedTuple):
    """References to what the backward kernel writes, with the shapes of `Operands`."""

    query: Any
    key: Any
    value: Any
    profile: Any
    gate: Any


class Scratch(NamedTuple):
    """Working memory of the backward kernel, float32."""

    key: Any
    """(frames, width): the gradient so far, as `value`."""
    value: Any
    sheared: Any
    """(group, BLOCK, 2 * frames), kept from row to row, and so is its gradient."""
    sheared_gradient: Any


def backward_kernel(facts: Facts, operands: Operands, direction: Any, gradients: Gradients, scratch: Scratch) -> None:
    """Gradients of one row and group from `direction`, that of the mixed values; the softmax is recomputed."""
    _shear_once(facts, operands, scratch.sheared)
    if facts.has_bias:

        @pl.when(pl.program_id(1) == 0)
        def _() -> None:
            scratch.sheared_gradient[...] = jnp.zeros_like(scratch.sheared_gradient)

    scratch.key[...] = jnp.zeros_like(scratch.key)
    scratch.value[...] = jnp.zeros_like(scratch.value)
    seeds = _first_seed(facts)

    def one_block(number: Array, _: None) -> None:
        to_query = jnp.zeros((BLOCK, facts.width), jnp.float32)
        for block in _heads(facts, number, seeds):
            product = _backward_of_block(facts, operands, direction, gradients, scratch, block)
            to_query = jnp.where(_lanes(facts, block.head), product, to_query)
        gradients.query[0, _rows(number), :] = to_query.astype(gradients.query.dtype)

    jax.lax.fori_loop(0, facts.frames // BLOCK, one_block, None)
    gradients.key[0] = scratch.key[...].astype(gradients.key.dtype)
    gradients.value[0] = scratch.value[...].astype(gradients.value.dtype)
    if facts.has_bias:

        @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
        def _() -> None:
            for head in range(facts.group):
                gradients.profile[0, head : head + 1, :] = fold(scratch.sheared_gradient[head])


def _backward_of_block(
    facts: Facts, operands: Operands, direction: Any, gradients: Gradients, scratch: Scratch, block: Block
) -> Array:
    """Adds this block's part to the gradients; returns the query's, which is valid in the head's own lanes."""
    scores = _scores(facts, operands, scratch.sheared, block)
    probabilities = scores.exponentials / scores.total
    arriving = _masked_to_head(facts, direction[0, _rows(block.number), :], block.head)
    to_weights = matmul(arriving, operands.value[0], 1, 1)
    weights = probabilities
    if facts.drop_threshold:
        keep = _kept(facts, operands, block)
        scale = scale_of_kept(facts.drop_threshold)
        weights = jnp.where(keep, probabilities * scale, 0.0)
        to_weights = jnp.where(keep, to_weights * scale, 0.0)
    scratch.value[...] += matmul(weights.astype(arriving.dtype), arriving, 0, 0)

    mean = (probabilities * to_weights).sum(axis=1, keepdims=True)
    to_logits = probabilities * (to_weights - mean)
    if facts.has_fill:
        to_logits = jnp.where(operands.fill[0] == 0, to_logits, 0.0)
    if scores.tile is not None and scores.gate is not None:
        window = _window(facts, block.number)
        scratch.sheared_gradient[block.head, :, window] += scores.gate * to_logits
        to_gate = (to_logits * scores.tile).sum(axis=1, keepdims=True)
        gradients.gate[0, 0, block.head : block.head + 1, _rows(block.number)] = line(to_gate)
    rounded = to_logits.astype(arriving.dtype)
    query = _masked_to_head(facts, operands.query[0, _rows(block.number), :], block.head)
    scratch.key[...] += matmul(rounded, query, 0, 0)
    return matmul(rounded, operands.key[0], 1, 0)


def _heads(facts: Facts, number: Array, first_seed: Array) -> Iterator[Block]:
    return (Block(number, head, first_seed + 2 * head) for head in range(facts.group))


def _first_seed(facts: Facts) -> Array:
    """Index of the first seed of this row and group."""
    return 2 * (pl.program_id(1) * facts.num_heads + pl.program_id(0) * facts.group)


def _rows(number: Array) -> Any:
    return pl.ds(pl.multiple_of(number * BLOCK, BLOCK), BLOCK)


def _window(facts: Facts, number: Array) -> Any:
    """Place of block `number`'s tile in the sheared profile."""
    return pl.ds(pl.multiple_of(facts.frames - number * BLOCK, BLOCK), facts.frames)


def _lanes(facts: Facts, head: int) -> Array:
    """(1, width), True in the head's own lanes."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, facts.width), 1)
    return (lane >= head * facts.head_dim) & (lane < (head + 1) * facts.head_dim)


def _masked_to_head(facts: Facts, x: Array, head: int) -> Array:
    return x if facts.group == 1 else jnp.where(_lanes(facts, head), x, jnp.zeros((), x.dtype))


def _scores(facts: Facts, operands: Operands, sheared: Any, block: Block) -> Scores:
    query = _masked_to_head(facts, operands.query[0, _rows(block.number), :], block.head)
    logits = matmul(query, operands.key[0], 1, 1)
    gate = tile = None
    if facts.has_bias:
        gate = column(operands.gate[0, 0, block.head : block.head + 1, _rows(block.number)])
        tile = sheared[block.head, :, _window(facts, block.number)]
        logits = logits + gate * tile
    if facts.has_fill:
        fill = operands.fill[0]
        logits = jnp.where(fill == 0, logits, fill)
    exponentials = jnp.exp(logits - logits.max(axis=1, keepdims=True))
    return Scores(exponentials, exponentials.sum(axis=1, keepdims=True), gate, tile)


def _kept(facts: Facts, operands: Operands, block: Block) -> Array:
    """`fused_attention.kept` for one block: two decisions per word."""
    pair = block.number * HALF + jax.lax.broadcasted_iota(jnp.int32, (HALF, 1), 0)
    key = jax.lax.broadcasted_iota(jnp.int32, (1, facts.frames), 1)
    words = random_words(operands.seeds[block.seeds], operands.seeds[block.seeds + 1], pair, key)
    halves = [words & (RESOLUTION - 1), shifted_right(words, 16)]
    return jnp.concatenate(halves) >= facts.drop_threshold


def _shear_once(facts: Facts, operands: Operands, sheared: Any) -> None:
    if not facts.has_bias:
        return

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        for head in range(facts.group):
            sheared[head] = shear(operands.profile[0, head : head + 1, :])


def shear(row: Array) -> Array:
    """(BLOCK, length) from (1, length): line i is the row shifted i places to the right, built by doubling."""
    lines = jnp.broadcast_to(row, (SUBLANES, row.shape[1]))
    number = jax.lax.broadcasted_iota(jnp.int32, lines.shape, 0)
    for shift in (1, 2, 4):
        lines = jnp.where(number & shift != 0, pltpu.roll(lines, shift, 1), lines)
    while lines.shape[0] < BLOCK:
        lines = jnp.concatenate([lines, pltpu.roll(lines, lines.shape[0], 1)])
    return lines


def fold(lines: Array) -> Array:
    """(1, length) from (BLOCK, length): the transpose of `shear`, computed by halving."""
    length = lines.shape[1]
    while lines.shape[0] > SUBLANES:
        half = lines.shape[0] // 2
        lines = lines[:half] + pltpu.roll(lines[half:], length - half, 1)
    number = jax.lax.broadcasted_iota(jnp.int32, lines.shape, 0)
    for shift in (1, 2, 4):
        lines = jnp.where(number & shift != 0, pltpu.roll(lines, length - shift, 1), lines)
    return lines.sum(axis=0, keepdims=True)


def column(row: Array) -> Array:
    """(BLOCK, 1) from (1, BLOCK), exactly: Mosaic does not support this transposition."""
    return jnp.where(_diagonal(), row, 0.0).sum(axis=1, keepdims=True)


def line(values: Array) -> Array:
    """(1, BLOCK) from (BLOCK, 1)."""
    return jnp.where(_diagonal(), values, 0.0).sum(axis=0, keepdims=True)


def _diagonal() -> Array:
    numbers = [jax.lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), axis) for axis in (0, 1)]
    return numbers[0] == numbers[1]


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
    """The facts for a device with `num_heads` heads: groups that fill whole registers, else all heads in one group."""
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
    """The kernels' arguments with heads split into groups, and their blocks in grid step (group, row)."""
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
    """Estimate of the fast memory (VMEM) for the backward kernel's blocks, scratch and temporaries, in bytes."""
    lanes = -(-facts.width // LANES) * LANES
    blocks = 2 * 7 * facts.frames * lanes * itemsize
    accumulators = 2 * facts.frames * lanes * 4
    sheared = 2 * facts.group * BLOCK * 2 * facts.frames * 4
    temporaries = 16 * BLOCK * facts.frames * 4
    return blocks + accumulators + sheared + temporaries


def _cost(facts: Facts, inputs: list[Array], products: int) -> pl.CostEstimate:
    """Cost for XLA's scheduler: `products` matrix products of frames x frames x head_dim per row and head."""
    rows = inputs[0].shape[0]
    logits = rows * facts.num_heads * facts.frames**2
    moved = sum(x.size * x.dtype.itemsize for x in inputs) + inputs[0].size * inputs[0].dtype.itemsize
    return pl.CostEstimate(
        flops=2 * products * logits * facts.head_dim,
        transcendentals=logits,
        bytes_accessed=moved if products == FORWARD_PRODUCTS else moved + 2 * inputs[0].size * inputs[0].dtype.itemsize,
    )


FORWARD_PRODUCTS = 2
