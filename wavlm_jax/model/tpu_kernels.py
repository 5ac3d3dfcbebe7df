"""The bodies of the TPU kernels: attention with a gated Toeplitz bias, of one row and one group of heads.

A group is as many heads as fill 128 lanes, side by side as they come out of the projections: nothing is transposed or
padded in HBM. A product with one head masks the lanes of the others, which a matrix unit 128 wide does for nothing.

The bias of 128 queries is a window of one sheared array: its line i is the profile moved i places to the right, so the
tile of block n starts n * 128 places further left. It is built once a group of heads and serves all rows and blocks;
its gradient gathers in an array of the same form and is folded back to the profile once.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from wavlm_jax.model.kernel_rules import BLOCK, HALF, RESOLUTION, matmul, random_words, scale_of_kept, shifted_right

SUBLANES = 8


class Plan(NamedTuple):
    """What a kernel knows beforehand: `Facts`, and how many heads are one block."""

    num_heads: int
    head_dim: int
    frames: int
    has_bias: bool
    has_fill: bool
    drop_threshold: int
    group: int
    """Heads of one block."""

    @property
    def width(self) -> int:
        """Lanes of a group."""
        return self.group * self.head_dim

    @property
    def num_groups(self) -> int:
        """Blocks in which the heads are handled."""
        return self.num_heads // self.group


class Operands(NamedTuple):
    """References to what both kernels read; None where the plan says that it is not there."""

    query: Any
    """(1, frames, width), as `key` and `value`."""
    key: Any
    value: Any
    profile: Any
    """float32 (1, group, 2 * frames): the bias of distance d at place frames + d."""
    gate: Any
    """float32 (1, 1, group, frames)."""
    fill: Any
    """float32 (1, 1, frames): 0, or what stands in for the logits of a key that is padding."""
    seeds: Any
    """int32 (rows * heads * 2) in scalar memory."""


class Block(NamedTuple):
    """One block of queries and one head of the group."""

    number: Array
    head: int
    seeds: Array
    """Where the head's two seeds stand."""


class Scores(NamedTuple):
    """Of one block: exponentials and their sums, float32 (BLOCK, frames) and (BLOCK, 1), and what they came from."""

    exponentials: Array
    total: Array
    gate: Array | None
    tile: Array | None


def forward_kernel(plan: Plan, operands: Operands, output: Any, sheared: Any) -> None:
    """Mixed values of one row and group; `sheared` (group, BLOCK, 2 * frames) stays from row to row."""
    _shear_once(plan, operands, sheared)
    seeds = _first_seed(plan)

    def one_block(number: Array, _: None) -> None:
        mixed = jnp.zeros((BLOCK, plan.width), jnp.float32)
        value = operands.value[0]
        for block in _heads(plan, number, seeds):
            scores = _scores(plan, operands, sheared, block)
            weights = scores.exponentials
            total = scores.total
            if plan.drop_threshold:
                weights = jnp.where(_kept(plan, operands, block), weights, 0.0)
                total = total / scale_of_kept(plan.drop_threshold)
            product = matmul(weights.astype(value.dtype), value, 1, 0)
            mixed = jnp.where(_lanes(plan, block.head), product / total, mixed)
        output[0, _rows(number), :] = mixed.astype(output.dtype)

    jax.lax.fori_loop(0, plan.frames // BLOCK, one_block, None)


class Gradients(NamedTuple):
    """References to what the backward kernel writes, in the forms of `Operands`."""

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
    """(group, BLOCK, 2 * frames), stays from row to row as its gradient does."""
    sheared_gradient: Any


def backward_kernel(plan: Plan, operands: Operands, direction: Any, gradients: Gradients, scratch: Scratch) -> None:
    """Gradients of one row and group for the gradient `direction` of the mixed values; the softmax is computed anew."""
    _shear_once(plan, operands, scratch.sheared)
    if plan.has_bias:

        @pl.when(pl.program_id(1) == 0)
        def _() -> None:
            scratch.sheared_gradient[...] = jnp.zeros_like(scratch.sheared_gradient)

    scratch.key[...] = jnp.zeros_like(scratch.key)
    scratch.value[...] = jnp.zeros_like(scratch.value)
    seeds = _first_seed(plan)

    def one_block(number: Array, _: None) -> None:
        to_query = jnp.zeros((BLOCK, plan.width), jnp.float32)
        for block in _heads(plan, number, seeds):
            product = _backward_of_block(plan, operands, direction, gradients, scratch, block)
            to_query = jnp.where(_lanes(plan, block.head), product, to_query)
        gradients.query[0, _rows(number), :] = to_query.astype(gradients.query.dtype)

    jax.lax.fori_loop(0, plan.frames // BLOCK, one_block, None)
    gradients.key[0] = scratch.key[...].astype(gradients.key.dtype)
    gradients.value[0] = scratch.value[...].astype(gradients.value.dtype)
    if plan.has_bias:

        @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
        def _() -> None:
            for head in range(plan.group):
                gradients.profile[0, head : head + 1, :] = fold(scratch.sheared_gradient[head])


def _backward_of_block(
    plan: Plan, operands: Operands, direction: Any, gradients: Gradients, scratch: Scratch, block: Block
) -> Array:
    """Adds this block's share to the gradients; returns that of the query, right in the head's own lanes."""
    scores = _scores(plan, operands, scratch.sheared, block)
    probabilities = scores.exponentials / scores.total
    arriving = _masked_to_head(plan, direction[0, _rows(block.number), :], block.head)
    to_weights = matmul(arriving, operands.value[0], 1, 1)
    weights = probabilities
    if plan.drop_threshold:
        keep = _kept(plan, operands, block)
        scale = scale_of_kept(plan.drop_threshold)
        weights = jnp.where(keep, probabilities * scale, 0.0)
        to_weights = jnp.where(keep, to_weights * scale, 0.0)
    scratch.value[...] += matmul(weights.astype(arriving.dtype), arriving, 0, 0)

    mean = (probabilities * to_weights).sum(axis=1, keepdims=True)
    to_logits = probabilities * (to_weights - mean)
    if plan.has_fill:
        to_logits = jnp.where(operands.fill[0] == 0, to_logits, 0.0)
    if scores.tile is not None and scores.gate is not None:
        window = _window(plan, block.number)
        scratch.sheared_gradient[block.head, :, window] += scores.gate * to_logits
        to_gate = (to_logits * scores.tile).sum(axis=1, keepdims=True)
        gradients.gate[0, 0, block.head : block.head + 1, _rows(block.number)] = line(to_gate)
    rounded = to_logits.astype(arriving.dtype)
    query = _masked_to_head(plan, operands.query[0, _rows(block.number), :], block.head)
    scratch.key[...] += matmul(rounded, query, 0, 0)
    return matmul(rounded, operands.key[0], 1, 0)


def _heads(plan: Plan, number: Array, first_seed: Array) -> Iterator[Block]:
    return (Block(number, head, first_seed + 2 * head) for head in range(plan.group))


def _first_seed(plan: Plan) -> Array:
    """Where the seeds of this row and group begin."""
    return 2 * (pl.program_id(1) * plan.num_heads + pl.program_id(0) * plan.group)


def _rows(number: Array) -> Any:
    return pl.ds(pl.multiple_of(number * BLOCK, BLOCK), BLOCK)


def _window(plan: Plan, number: Array) -> Any:
    """Where the tile of block `number` lies in the sheared profile."""
    return pl.ds(pl.multiple_of(plan.frames - number * BLOCK, BLOCK), plan.frames)


def _lanes(plan: Plan, head: int) -> Array:
    """(1, width), True in the head's own lanes."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, plan.width), 1)
    return (lane >= head * plan.head_dim) & (lane < (head + 1) * plan.head_dim)


def _masked_to_head(plan: Plan, x: Array, head: int) -> Array:
    return x if plan.group == 1 else jnp.where(_lanes(plan, head), x, jnp.zeros((), x.dtype))


def _scores(plan: Plan, operands: Operands, sheared: Any, block: Block) -> Scores:
    query = _masked_to_head(plan, operands.query[0, _rows(block.number), :], block.head)
    logits = matmul(query, operands.key[0], 1, 1)
    gate = tile = None
    if plan.has_bias:
        gate = column(operands.gate[0, 0, block.head : block.head + 1, _rows(block.number)])
        tile = sheared[block.head, :, _window(plan, block.number)]
        logits = logits + gate * tile
    if plan.has_fill:
        fill = operands.fill[0]
        logits = jnp.where(fill == 0, logits, fill)
    exponentials = jnp.exp(logits - logits.max(axis=1, keepdims=True))
    return Scores(exponentials, exponentials.sum(axis=1, keepdims=True), gate, tile)


def _kept(plan: Plan, operands: Operands, block: Block) -> Array:
    """`attention_rules.kept` for one block: two decisions a word."""
    pair = block.number * HALF + jax.lax.broadcasted_iota(jnp.int32, (HALF, 1), 0)
    key = jax.lax.broadcasted_iota(jnp.int32, (1, plan.frames), 1)
    words = random_words(operands.seeds[block.seeds], operands.seeds[block.seeds + 1], pair, key)
    halves = [words & (RESOLUTION - 1), shifted_right(words, 16)]
    return jnp.concatenate(halves) >= plan.drop_threshold


def _shear_once(plan: Plan, operands: Operands, sheared: Any) -> None:
    if not plan.has_bias:
        return

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        for head in range(plan.group):
            sheared[head] = shear(operands.profile[0, head : head + 1, :])


def shear(row: Array) -> Array:
    """(BLOCK, length) from (1, length): line i is the row moved i places to the right, by doubling."""
    lines = jnp.broadcast_to(row, (SUBLANES, row.shape[1]))
    number = jax.lax.broadcasted_iota(jnp.int32, lines.shape, 0)
    for shift in (1, 2, 4):
        lines = jnp.where(number & shift != 0, pltpu.roll(lines, shift, 1), lines)
    while lines.shape[0] < BLOCK:
        lines = jnp.concatenate([lines, pltpu.roll(lines, lines.shape[0], 1)])
    return lines


def fold(lines: Array) -> Array:
    """(1, length) from (BLOCK, length): the transpose of `shear`, by halving."""
    length = lines.shape[1]
    while lines.shape[0] > SUBLANES:
        half = lines.shape[0] // 2
        lines = lines[:half] + pltpu.roll(lines[half:], length - half, 1)
    number = jax.lax.broadcasted_iota(jnp.int32, lines.shape, 0)
    for shift in (1, 2, 4):
        lines = jnp.where(number & shift != 0, pltpu.roll(lines, length - shift, 1), lines)
    return lines.sum(axis=0, keepdims=True)


def column(row: Array) -> Array:
    """(BLOCK, 1) from (1, BLOCK), exactly, where Mosaic has no such transposition."""
    return jnp.where(_diagonal(), row, 0.0).sum(axis=1, keepdims=True)


def line(values: Array) -> Array:
    """(1, BLOCK) from (BLOCK, 1)."""
    return jnp.where(_diagonal(), values, 0.0).sum(axis=0, keepdims=True)


def _diagonal() -> Array:
    numbers = [jax.lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), axis) for axis in (0, 1)]
    return numbers[0] == numbers[1]
