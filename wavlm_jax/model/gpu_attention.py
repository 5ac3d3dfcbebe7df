"""Attention on a GPU: fused kernels forward and backward, by Pallas and Triton, with bias and dropout inside.

Numbers are those of "dense" up to rounding, dropout included. Frames are padded to a multiple of 128 inside. Under a
mesh each device runs the kernels on its own rows and heads. What grows with the square of the frames is the gradient of
the bias of all pairs, (heads, frames, frames), which has no rows.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array

from wavlm_jax.model.gpu_kernels import (
    KEYS,
    Known,
    forward_kernel,
    key_kernel,
    pair_kernel,
    query_kernel,
)
from wavlm_jax.model.kernel_rules import ATTENDED, BLOCK, OPERANDS, Differentiable, Facts, Fixed, Operands
from wavlm_jax.model.placement import on_each_device
from wavlm_jax.model.position import toeplitz

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
    # Named here too: as far as a recomputation policy can see, what is named outside is not what is saved here.
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
    """Gradients of the form of `like`, by a kernel that handles a block of keys or queries of one row and head."""

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
    """What grid step (block, head, row) sees of operands and `Known`; the axis without a block size is whole."""

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
    """What grid step (key block, query block, head) sees of them, of all rows."""
    return _in_order(
        query=pl.BlockSpec((rows, BLOCK, facts.head_dim), lambda _, block, head: (0, block, head)),
        key=pl.BlockSpec((rows, KEYS, facts.head_dim), lambda block, _, head: (0, block, head)),
        profile=pl.BlockSpec((None, 2 * facts.frames), lambda *at: (at[2], 0)),
        number=pl.BlockSpec((rows, None, BLOCK), lambda _, block, head: (0, head, block)),
        fill=pl.BlockSpec((rows, facts.frames), lambda *_: (0, 0)),
        seeds=pl.BlockSpec((rows, None, 2), lambda *at: (0, at[2], 0)),
    )


def _in_order(*, query: Any, key: Any, profile: Any, number: Any, fill: Any, seeds: Any) -> list[Any]:
    """One for each of `Operands`, then of `Known`."""
    return [query, key, key, profile, number, fill, seeds, query, number, number, number]


def _profile_gradient(facts: Facts, arguments: tuple[Array, ...]) -> Array:
    """(heads, 2 * frames): the gradient of the bias of all pairs, folded."""
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
