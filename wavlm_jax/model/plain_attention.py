"""Attention with a gated Toeplitz bias by what JAX has: "dense", the measure of all others, "chunked", and "cudnn"."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from wavlm_jax.model.attention_rules import EXCLUDED, NO_DROPOUT, AttentionDropout, kept
from wavlm_jax.model.position import Bias, toeplitz
from wavlm_jax.shapes import FrameMask, Heads, Probabilities

BLOCK = 128
"""Queries that "chunked" handles at a time: one tile of a TPU."""


def attention_probabilities(query: Heads, key: Heads, bias: Bias | None, frame_mask: FrameMask | None) -> Probabilities:
    """Softmax over keys of query . key + gated bias: float32 (rows, heads, frames, frames)."""
    if bias is None:
        return _probabilities(query, key, None, None, frame_mask)
    frames = query.shape[1]
    pairs = bias.position if bias.position.ndim == _PAIR_AXES else toeplitz(bias.position, frames, frames)
    return _probabilities(query, key, pairs, bias.gate, frame_mask)


_PAIR_AXES = 3


def _probabilities(
    query: Array, key: Array, tile: Array | None, gates: Array | None, frame_mask: FrameMask | None
) -> Probabilities:
    logits = jnp.einsum("rqhd,rkhd->rhqk", query, key, preferred_element_type=jnp.float32)
    if tile is not None and gates is not None:
        logits = logits + _gated(gates.swapaxes(1, 2), tile)
    if frame_mask is not None:
        logits = jnp.where(frame_mask[:, None, None, :], logits, EXCLUDED)
    return jax.nn.softmax(logits, axis=-1)


@jax.custom_vjp
def _gated(gates: Float[Array, "rows heads queries"], tile: Float[Array, "heads queries keys"]) -> Probabilities:
    """The position bias of each row: gate of the query times bias of the pair."""
    return gates[:, :, :, None] * tile[None]


def _gated_forward(gates: Array, tile: Array) -> tuple[Array, tuple[Array, Array]]:
    return _gated(gates, tile), (gates, tile)


def _gated_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    """On a CPU the sum over rows is a matrix product: XLA's reduction of the first axis takes ten times as long."""
    gates, tile = saved
    to_tile = jax.lax.platform_dependent(
        gates,
        gradient,
        cpu=lambda gates, gradient: jnp.einsum("rhqk,rhq->hqk", gradient, gates),
        default=lambda gates, gradient: (gradient * gates[:, :, :, None]).sum(axis=0),
    )
    return (gradient * tile[None]).sum(axis=-1), to_tile


_gated.defvjp(_gated_forward, _gated_backward)


def mix(
    probabilities: Probabilities, value: Heads, drop: AttentionDropout, first_query: Int[Array, ""] | int = 0
) -> Float[Array, "rows queries heads head_dim"]:
    """Values weighted by probabilities, some of which are dropped; `first_query` numbers the queries for that."""
    weights = probabilities.astype(value.dtype)
    if drop.seeds is not None:
        queries, keys = first_query + jnp.arange(weights.shape[2]), jnp.arange(weights.shape[3])
        keep = kept(drop.threshold, drop.seeds, queries, keys)
        weights = jnp.where(keep, weights * drop.scale, jnp.zeros((), weights.dtype))
    return jnp.einsum("rhqk,rkhd->rqhd", weights, value)


def attend_at_once(
    query: Heads, key: Heads, value: Heads, bias: Bias | None, frame_mask: FrameMask | None, drop: AttentionDropout
) -> Heads:
    """All queries at once. The probabilities are computed anew in the backward pass: storing them costs more."""

    @jax.checkpoint
    def mixed(query: Heads, key: Heads, value: Heads, bias: Bias | None) -> Heads:
        return mix(attention_probabilities(query, key, bias, frame_mask), value, drop)

    return mixed(query, key, value, bias)


def attend_in_blocks(
    query: Heads, key: Heads, value: Heads, bias: Bias | None, frame_mask: FrameMask | None, drop: AttentionDropout
) -> Heads:
    """One block of queries after the other, each computed anew in the backward pass."""
    rows, frames, heads, head_dim = query.shape
    blocks = -(-frames // BLOCK)
    padding = blocks * BLOCK - frames
    padded = None if bias is None else jnp.pad(bias.position, ((0, 0), (padding, 0)))

    @jax.checkpoint
    def one_block(number: Array, queries: Array, gates: Array | None) -> Array:
        tile = None
        if padded is not None:
            start = (blocks - 1 - number) * BLOCK
            window = jax.lax.dynamic_slice_in_dim(padded, start, BLOCK + frames - 1, axis=1)
            tile = toeplitz(window, BLOCK, frames)
        probabilities = _probabilities(queries, key, tile, gates, frame_mask)
        return mix(probabilities, value, drop, number * BLOCK)

    def in_blocks(x: Array) -> Array:
        widths = [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, widths).reshape(rows, blocks, BLOCK, *x.shape[2:]).swapaxes(0, 1)

    gates = None if bias is None else in_blocks(bias.gate)
    mixed = jax.lax.map(lambda block: one_block(*block), (jnp.arange(blocks), in_blocks(query), gates))
    return mixed.swapaxes(0, 1).reshape(rows, blocks * BLOCK, heads, head_dim)[:, :frames]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend_by_cudnn(
    query: Heads, key: Heads, value: Heads, bias: Bias | None, frame_mask: FrameMask | None, backend: str = "cudnn"
) -> Heads:
    """Forward by cuDNN, backward by `attend_in_blocks`; bfloat16, an even number of frames, no dropout.

    cuDNN takes the bias written out, (rows, heads, frames, frames), and accounts differ on whether the bias gradient
    that it gives back is right for more than one row, so it is not asked for one. `backend` is for tests without a GPU.
    """
    rows, frames, heads, _ = query.shape
    written = jnp.zeros((rows, heads, frames, frames), query.dtype)
    if bias is not None:
        written = _gated(bias.gate.swapaxes(1, 2), toeplitz(bias.position, frames, frames)).astype(query.dtype)
    if frame_mask is not None:
        written = jnp.where(frame_mask[:, None, None, :], written, jnp.asarray(EXCLUDED, query.dtype))
    implementation: Any = backend
    return jax.nn.dot_product_attention(query, key, value, bias=written, scale=1.0, implementation=implementation)


def _cudnn_forward(*arguments: Any) -> tuple[Heads, tuple[Any, ...]]:
    return attend_by_cudnn(*arguments), arguments[:5]


def _cudnn_backward(_: str, saved: tuple[Any, ...], direction: Heads) -> tuple[Any, ...]:
    *inputs, frame_mask = saved

    def again(query: Heads, key: Heads, value: Heads, bias: Bias | None) -> Heads:
        return attend_in_blocks(query, key, value, bias, frame_mask, NO_DROPOUT)

    return (*jax.vjp(again, *inputs)[1](direction), None)


attend_by_cudnn.defvjp(_cudnn_forward, _cudnn_backward)
