"""Attention on a GPU: fused Pallas kernels (by Triton), forward and backward, with position bias and dropout inside.

The results are those of "dense" up to rounding, dropout included. Frames are padded to a multiple of 128 inside. Under
a mesh each device runs the kernels on its own rows and heads. Only one array grows with the square of the frames: the
gradient of the bias of all pairs, (heads, frames, frames), which has no axis of rows.

A kernel handles one row and head, tile by tile. A tile is HALF queries by KEYS keys. Its bias is read from the profile
(the bias of each distance), where neighbouring keys are neighbours in memory, so the bias of a tile is never written
out. Two tiles, of queries q and q + HALF, share the random words of dropout. The forward kernel stores the largest
logit and the sum of exponentials of each query. The backward kernels recompute the probabilities: one kernel for keys
and values, one for queries and gates, and one for the bias of pairs, which sums over rows.

The blocks of `Operands` here are those of one row and head: query, key and value (frames, head_dim) with as many frames
as the kernel needs, profile (2 * frames), gate (queries), fill (frames), seeds (2). A name `to_x` is the gradient of
the loss with respect to x.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array

from wavlm_jax.model.fused_attention import (
    ATTENDED,
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
from wavlm_jax.model.position import toeplitz

KEYS = 64
"""Keys in one tile."""


class Known(NamedTuple):
    """References to what the backward kernels read besides `Operands`: float32 (queries), except `direction`."""

    direction: Any
    """(queries, head_dim): the gradient of the loss with respect to the mixed values."""
    highest: Any
    """Largest logit of each query."""
    total: Any
    """Sum of exp(logit - highest)."""
    mean: Any
    """Inner product of the mixed values and their gradient. It is the mean of the probabilities' gradients, weighted by
    the probabilities, which the gradient of the softmax subtracts."""


class Tile(NamedTuple):
    """Position and orientation of a tile."""

    query: Any
    """Frame of its first query."""
    local: Any
    """Number of its first query among those in the kernel's block."""
    key: Any
    """Frame of its first key."""
    row: Array | None = None
    """Index of the row where references hold all rows; None: they hold one."""
    keys_first: bool = False
    """Whether its shape is (KEYS, HALF): a product that sums over queries then needs no transposition."""

    @property
    def queries(self) -> Any:
        """Its queries in the kernel's block."""
        return pl.ds(self.local, HALF)

    def in_row(self, index: Any) -> Any:
        """`index`, preceded by the row in a reference that holds all rows."""
        return index if self.row is None else (self.row, index)

    def by_query(self, numbers: Array) -> Array:
        """One number per query, to broadcast over keys."""
        return numbers[None, :] if self.keys_first else numbers[:, None]

    def by_key(self, numbers: Array) -> Array:
        """One number per key, to broadcast over queries."""
        return numbers[:, None] if self.keys_first else numbers[None, :]

    def product(self, of_queries: Array, of_keys: Array) -> Array:
        """Inner product of each query's vector with each key's."""
        pair = (of_keys, of_queries) if self.keys_first else (of_queries, of_keys)
        return matmul(*pair, 1, 1)


class Backward(NamedTuple):
    """Values of the backward pass in one tile, float32."""

    weights: Array
    """Probabilities after dropout."""
    to_logits: Array
    bias: Array | None
    """Bias of each pair, before the gate."""


def forward_kernel(facts: Facts, operands: Operands, result: Any, highest: Any, total: Any) -> None:
    """Mixed values of BLOCK queries, and their softmax statistics; grid (query block, head, row)."""
    block = pl.program_id(0)
    queries = [operands.query[_half(half), :] for half in range(2)]

    def step(number: Array, states: Any) -> Any:
        here = pl.ds(number * KEYS, KEYS)
        keys, values = operands.key[here, :], operands.value[here, :]
        tiles = _tiles(block, number * KEYS)
        keep = _keep(facts, operands, block, tiles[0])
        return tuple(one(*given, keys, values) for given in zip(states, tiles, keep, queries, strict=True))

    def one(state: Any, tile: Tile, keep: Array | None, query: Array, keys: Array, values: Array) -> Any:
        mixed, most, sum_of = state
        logits = _logits(facts, operands, tile, query, keys)[0]
        higher = jnp.maximum(most, logits.max(axis=1))
        exponentials, shrink = jnp.exp(logits - higher[:, None]), jnp.exp(most - higher)
        weights = exponentials if keep is None else jnp.where(keep, exponentials, 0.0)
        product = matmul(weights.astype(values.dtype), values, 1, 0)
        return mixed * shrink[:, None] + product, higher, sum_of * shrink + exponentials.sum(axis=1)

    numbers = jnp.full((HALF,), -jnp.inf, jnp.float32), jnp.zeros((HALF,), jnp.float32)
    start = jnp.zeros((HALF, facts.head_dim), jnp.float32), *numbers
    states = jax.lax.fori_loop(0, facts.frames // KEYS, step, (start, start))
    scale = scale_of_kept(facts.drop_threshold)
    for half, (mixed, most, sum_of) in enumerate(states):
        result[_half(half), :] = (mixed * (scale / sum_of)[:, None]).astype(result.dtype)
        highest[_half(half)], total[_half(half)] = most, sum_of


def key_kernel(facts: Facts, operands: Operands, known: Known, to_key: Any, to_value: Any) -> None:
    """Gradients of KEYS keys and values; grid (key block, head, row)."""
    first = pl.program_id(0) * KEYS
    keys, values = operands.key[...], operands.value[...]

    def step(block: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        key_sum, value_sum = sums
        tiles = [tile._replace(local=tile.query) for tile in _tiles(block, first, keys_first=True)]
        for tile, keep in zip(tiles, _keep(facts, operands, block, tiles[0]), strict=True):
            query, direction = operands.query[tile.queries, :], known.direction[tile.queries, :]
            of = _backward(facts, operands, known, tile, (query, keys, values, direction), keep)
            value_sum += matmul(of.weights.astype(direction.dtype), direction, 1, 0)
            key_sum += matmul(of.to_logits.astype(query.dtype), query, 1, 0)
        return key_sum, value_sum

    zeros = jnp.zeros((KEYS, facts.head_dim), jnp.float32)
    sums = jax.lax.fori_loop(0, facts.frames // BLOCK, step, (zeros, zeros))
    to_key[...], to_value[...] = (total.astype(to_key.dtype) for total in sums)


def query_kernel(facts: Facts, operands: Operands, known: Known, to_query: Any, to_gate: Any) -> None:
    """Gradients of BLOCK queries and their gates; grid (query block, head, row)."""
    block = pl.program_id(0)
    queries, directions = ([x[_half(half), :] for half in range(2)] for x in (operands.query, known.direction))

    def step(number: Array, sums: Any) -> Any:
        here = pl.ds(number * KEYS, KEYS)
        keys, values = operands.key[here, :], operands.value[here, :]
        tiles = _tiles(block, number * KEYS)
        keep = _keep(facts, operands, block, tiles[0])
        found = []
        for half, (query_sum, gate_sum) in enumerate(sums):
            given = (queries[half], keys, values, directions[half])
            of = _backward(facts, operands, known, tiles[half], given, keep[half])
            product = matmul(of.to_logits.astype(keys.dtype), keys, 1, 0)
            more = gate_sum if of.bias is None else gate_sum + (of.to_logits * of.bias).sum(axis=1)
            found.append((query_sum + product, more))
        return tuple(found)

    start = jnp.zeros((HALF, facts.head_dim), jnp.float32), jnp.zeros((HALF,), jnp.float32)
    for half, (query_sum, gate_sum) in enumerate(jax.lax.fori_loop(0, facts.frames // KEYS, step, (start, start))):
        to_query[_half(half), :], to_gate[_half(half)] = query_sum.astype(to_query.dtype), gate_sum


def pair_kernel(facts: Facts, rows: int, operands: Operands, known: Known, to_pairs: Any) -> None:
    """Gradient of the bias of BLOCK x KEYS pairs, summed over rows; grid (key block, query block, head).

    The first axis of all references is rows, except for the profile and the result.
    """
    first, block = pl.program_id(0) * KEYS, pl.program_id(1)

    def step(row: Array, sums: Any) -> Any:
        keys, values = operands.key[row, :, :], operands.value[row, :, :]
        tiles = _tiles(block, first, row=row)
        keep = _keep(facts, operands, block, tiles[0])
        found = []
        for half, total in enumerate(sums):
            query, direction = (x[row, _half(half), :] for x in (operands.query, known.direction))
            of = _backward(facts, operands, known, tiles[half], (query, keys, values, direction), keep[half])
            found.append(total + _gate(operands, tiles[half]) * of.to_logits)
        return tuple(found)

    zeros = jnp.zeros((HALF, KEYS), jnp.float32)
    for half, total in enumerate(jax.lax.fori_loop(0, rows, step, (zeros, zeros))):
        to_pairs[_half(half), :] = total


def _tiles(block: Any, first_key: Any, **more: Any) -> list[Tile]:
    """The two tiles of a query block."""
    return [Tile(block * BLOCK + half * HALF, half * HALF, first_key, **more) for half in range(2)]


def _backward(
    facts: Facts,
    operands: Operands,
    known: Known,
    tile: Tile,
    given: tuple[Array, Array, Array, Array],
    keep: Array | None,
) -> Backward:
    query, keys, values, direction = given
    logits, bias, counts = _logits(facts, operands, tile, query, keys)
    highest, total, mean = (x[tile.in_row(tile.queries)] for x in (known.highest, known.total, known.mean))
    probabilities = jnp.exp(logits - tile.by_query(highest)) * tile.by_query(1 / total)
    to_weights = tile.product(direction, values)
    weights = probabilities
    if keep is not None:
        scale = scale_of_kept(facts.drop_threshold)
        weights = jnp.where(keep, probabilities * scale, 0.0)
        to_weights = jnp.where(keep, to_weights * scale, 0.0)
    to_logits = probabilities * (to_weights - tile.by_query(mean))
    if counts is not None:
        to_logits = jnp.where(counts, to_logits, 0.0)
    return Backward(weights, to_logits, bias)


def _logits(
    facts: Facts, operands: Operands, tile: Tile, query: Array, keys: Array
) -> tuple[Array, Array | None, Array | None]:
    """Logits of a tile, its bias before the gate, and which of its keys count."""
    logits = tile.product(query, keys)
    bias = counts = None
    if facts.has_bias:
        distance = tile.by_key(jnp.arange(KEYS)) - tile.by_query(jnp.arange(HALF)) + (tile.key - tile.query)
        bias = pltriton.load(operands.profile.at[distance + facts.frames])
        logits = logits + _gate(operands, tile) * bias
    if facts.has_fill:
        fill = tile.by_key(operands.fill[tile.in_row(pl.ds(tile.key, KEYS))])
        counts = fill == 0
        logits = jnp.where(counts, logits, fill)
    return logits, bias, counts


def _gate(operands: Operands, tile: Tile) -> Array:
    return tile.by_query(operands.gate[tile.in_row(tile.queries)])


def _keep(facts: Facts, operands: Operands, block: Any, tile: Tile) -> list[Array | None]:
    """`fused_attention.kept` for the two tiles of a block, of which `tile` is the first: two decisions per word."""
    if not facts.drop_threshold:
        return [None, None]
    pairs = tile.by_query(block * HALF + jnp.arange(HALF))
    keys = tile.by_key(tile.key + jnp.arange(KEYS))
    first, second = (operands.seeds[tile.in_row(word)] for word in range(2))
    words = random_words(first, second, pairs, keys)
    return [half >= facts.drop_threshold for half in (words & (RESOLUTION - 1), shifted_right(words, 16))]


def _half(half: int) -> Any:
    return pl.ds(half * HALF, HALF)


_PARAMS = pltriton.CompilerParams(num_warps=4, num_stages=2)
_GIVEN = (*OPERANDS, "direction", "statistics", "statistics", "statistics")
_GRADIENTS = OPERANDS[:5]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def on_gpu(facts: Facts, inputs: Differentiable, fixed: Fixed) -> Array:
    """Mixed values of all rows and heads: (rows, frames, width), dtype of the query; differentiable in `inputs`."""
    return _forward(facts, inputs, fixed)[0]


def _forward(facts: Facts, inputs: Differentiable, fixed: Fixed) -> tuple[Array, Array, Array]:
    """Mixed values, and each query's largest logit and sum of exponentials."""
    results = ("result", "statistics", "statistics")
    found: Any = on_each_device(facts.num_heads, partial(_forward_call, facts), OPERANDS, results, (*inputs, *fixed))
    return found


def _fused_forward(facts: Facts, inputs: Differentiable, fixed: Fixed) -> tuple[Array, Any]:
    # Named here too: a recomputation policy does not see that the array named outside is the one saved here.
    mixed, highest, total = (checkpoint_name(x, ATTENDED) for x in _forward(facts, inputs, fixed))
    return mixed, (inputs, fixed, mixed, highest, total)


def _fused_backward(facts: Facts, saved: Any, direction: Array) -> tuple[Any, Any]:
    inputs, fixed, mixed, highest, total = saved
    by_head = (*mixed.shape[:2], facts.num_heads, facts.head_dim)
    product = mixed.astype(jnp.float32) * direction.astype(jnp.float32)
    mean = product.reshape(by_head).sum(axis=3).swapaxes(1, 2)
    arguments = (*inputs, *fixed, direction, highest, total, mean)
    call = partial(_backward_call, facts)
    return on_each_device(facts.num_heads, call, _GIVEN, _GRADIENTS, arguments), (None, None)


on_gpu.defvjp(_fused_forward, _fused_backward)


def _forward_call(facts: Facts, num_heads: int, *arguments: Array) -> list[Array]:
    facts = facts._replace(num_heads=num_heads)

    def kernel(*references: Any) -> None:
        forward_kernel(facts, Operands(*references[:7]), *references[7:])

    specs = _specs(facts, queries=BLOCK, keys=None)
    statistics = jax.ShapeDtypeStruct(arguments[4].shape, jnp.float32)
    return list(
        pl.pallas_call(
            kernel,
            grid=(facts.frames // BLOCK, facts.num_heads, arguments[0].shape[0]),
            in_specs=specs[:7],
            out_specs=[specs[0], specs[4], specs[4]],
            out_shape=[jax.ShapeDtypeStruct(arguments[0].shape, arguments[0].dtype), statistics, statistics],
            compiler_params=_PARAMS,
            name="toeplitz_attention_forward",
        )(*arguments)
    )


def _backward_call(facts: Facts, num_heads: int, *arguments: Array) -> list[Array]:
    facts = facts._replace(num_heads=num_heads)
    query, key, value, profile, gate = arguments[:5]
    to_key, to_value = _one_row(facts, arguments, key_kernel, "keys", (key, value))
    to_query, to_gate = _one_row(facts, arguments, query_kernel, "queries", (query, gate))
    to_profile = _profile_gradient(facts, arguments) if facts.has_bias else jnp.zeros_like(profile)
    return [to_query, to_key, to_value, to_profile, to_gate]


def _one_row(facts: Facts, arguments: tuple[Array, ...], body: Any, along: str, like: tuple[Array, Array]) -> Any:
    """Gradients with the shapes of `like`, by a kernel that handles a block of keys or queries of one row and head."""

    def kernel(*references: Any) -> None:
        body(facts, Operands(*references[:7]), Known(*references[7:11]), *references[11:])

    if along == "keys":
        specs, blocks = _specs(facts, queries=None, keys=KEYS), facts.frames // KEYS
        outputs = [specs[1], specs[2]]
    else:
        specs, blocks = _specs(facts, queries=BLOCK, keys=None), facts.frames // BLOCK
        outputs = [specs[0], specs[4]]
    return pl.pallas_call(
        kernel,
        grid=(blocks, facts.num_heads, arguments[0].shape[0]),
        in_specs=specs,
        out_specs=outputs,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like],
        compiler_params=_PARAMS,
        name=f"toeplitz_attention_{along}",
    )(*arguments)


def _specs(facts: Facts, *, queries: int | None, keys: int | None) -> list[pl.BlockSpec]:
    """Blocks of `Operands` and `Known` in grid step (block, head, row); an axis without a block size is whole."""

    def frames(size: int | None) -> tuple[int, Any]:
        return (facts.frames, lambda _: 0) if size is None else (size, lambda block: block)

    (query_size, query_at), (key_size, key_at) = frames(queries), frames(keys)
    return _in_order(
        query=pl.BlockSpec((None, query_size, facts.head_dim), lambda block, head, row: (row, query_at(block), head)),
        key=pl.BlockSpec((None, key_size, facts.head_dim), lambda block, head, row: (row, key_at(block), head)),
        profile=pl.BlockSpec((None, 2 * facts.frames), lambda *at: (at[1], 0)),
        number=pl.BlockSpec((None, None, query_size), lambda block, head, row: (row, head, query_at(block))),
        fill=pl.BlockSpec((None, facts.frames), lambda *at: (at[2], 0)),
        seeds=pl.BlockSpec((None, None, 2), lambda _, head, row: (row, head, 0)),
    )


def _pair_specs(facts: Facts, rows: int) -> list[pl.BlockSpec]:
    """The same in grid step (key block, query block, head), with all rows."""
    return _in_order(
        query=pl.BlockSpec((rows, BLOCK, facts.head_dim), lambda _, block, head: (0, block, head)),
        key=pl.BlockSpec((rows, KEYS, facts.head_dim), lambda block, _, head: (0, block, head)),
        profile=pl.BlockSpec((None, 2 * facts.frames), lambda *at: (at[2], 0)),
        number=pl.BlockSpec((rows, None, BLOCK), lambda _, block, head: (0, head, block)),
        fill=pl.BlockSpec((rows, facts.frames), lambda *_: (0, 0)),
        seeds=pl.BlockSpec((rows, None, 2), lambda *at: (0, at[2], 0)),
    )


def _in_order(*, query: Any, key: Any, profile: Any, number: Any, fill: Any, seeds: Any) -> list[Any]:
    """One block for each of `Operands`, then of `Known`."""
    return [query, key, key, profile, number, fill, seeds, query, number, number, number]


def _profile_gradient(facts: Facts, arguments: tuple[Array, ...]) -> Array:
    """(heads, 2 * frames): the gradient of the bias of all pairs, summed over each diagonal."""
    rows = arguments[0].shape[0]

    def kernel(*references: Any) -> None:
        pair_kernel(facts, rows, Operands(*references[:7]), Known(*references[7:11]), references[11])

    pairs = pl.pallas_call(
        kernel,
        grid=(facts.frames // KEYS, facts.frames // BLOCK, facts.num_heads),
        in_specs=_pair_specs(facts, rows),
        out_specs=pl.BlockSpec((None, BLOCK, KEYS), lambda keys, queries, head: (head, queries, keys)),
        out_shape=jax.ShapeDtypeStruct((facts.num_heads, facts.frames, facts.frames), jnp.float32),
        compiler_params=_PARAMS,
        name="toeplitz_attention_pairs",
    )(*arguments)
    written_out = partial(toeplitz, queries=facts.frames, keys=facts.frames)
    distances = jax.ShapeDtypeStruct((facts.num_heads, 2 * facts.frames - 1), jnp.float32)
    return jnp.pad(jax.linear_transpose(written_out, distances)(pairs)[0], ((0, 0), (1, 0)))
