"""Self-attention with a gated relative position bias: one function `attend`, several ways to compute it.

"dense" holds all logits at once and is the measure of the others. "chunked" goes over blocks of queries and recomputes
each in the backward pass, so memory grows with frames * block instead of frames squared. "auto" is dense up to
`DENSE_FRAMES`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from wavlm_jax.config import Attention as Implementation
from wavlm_jax.config import Compute, WavLMConfig
from wavlm_jax.model.elements import Site, dropout, linear, site_keys
from wavlm_jax.model.position import Gate, GateProjection, Profile, gate, toeplitz
from wavlm_jax.shapes import FrameMask, Hidden, RowKeys

DENSE_FRAMES = 800
"""Up to 16 s the logits of one row and head fit in 2.5 MB, and recomputing them costs more than it saves."""
BLOCK = 128
"""Queries that "chunked" handles at a time: one tile of a TPU."""

Heads = Float[Array, "rows frames heads head_dim"]
Probabilities = Float[Array, "rows heads queries frames"]


PairBias = Float[Array, "heads frames frames"]
"""Position bias of every pair of frames, before the gate."""


class Bias(NamedTuple):
    """What is added to the logits: gate[row, query, head] * position[head, key - query].

    `position` is the profile, or for "dense" also its matrix, so that layers can share one.
    """

    position: Profile | PairBias
    gate: Gate


class AttentionDropout(NamedTuple):
    """A share `rate` of the probabilities is dropped, row by row."""

    rate: float
    row_keys: RowKeys | None


def attend(
    query: Heads,
    key: Heads,
    value: Heads,
    bias: Bias | None,
    frame_mask: FrameMask | None,
    drop: AttentionDropout,
    implementation: Implementation,
) -> Heads:
    """Attention of every frame to all valid frames of its row.

    Args:
        query: (rows, frames, heads, head_dim), already divided by sqrt(head_dim).
        key: as `query`.
        value: as `query`.
        bias: gated position bias, float32, or None (HuBERT).
        frame_mask: (rows, frames), True where a frame may be attended to; None: everywhere. A row without a valid
            frame attends to all its frames alike, so it stays finite.
        drop: dropout of the probabilities.
        implementation: how; all give the same result (different draws of dropout).

    Returns:
        (rows, frames, heads, head_dim) in the dtype of `value`. Logits and softmax are float32.

    """
    if _is_dense(implementation, query.shape[1]):
        return _attend_at_once(query, key, value, bias, frame_mask, drop)
    return _attend_in_blocks(query, key, value, bias, frame_mask, drop)


def _is_dense(implementation: Implementation, num_frames: int) -> bool:
    return implementation == "dense" or (implementation == "auto" and num_frames <= DENSE_FRAMES)


def shared_position_bias(profile: Profile, num_frames: int, implementation: Implementation) -> Profile | PairBias:
    """What is computed of the position bias once for all layers: for "dense" the whole matrix, else the profile.

    Written out once, the matrix costs heads * frames^2 numbers; in every layer its gradient would cost a pass over as
    much again.
    """
    return toeplitz(profile, num_frames, num_frames) if _is_dense(implementation, num_frames) else profile


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
        # Finite, so that a row without a valid frame gives a uniform softmax and not 0 / 0.
        logits = jnp.where(frame_mask[:, None, None, :], logits, _EXCLUDED)
    return jax.nn.softmax(logits, axis=-1)


_EXCLUDED = -1e30


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


def _mix(
    probabilities: Probabilities, value: Heads, drop: AttentionDropout
) -> Float[Array, "rows queries heads head_dim"]:
    kept = dropout(probabilities.astype(value.dtype), drop.rate, drop.row_keys, Site.ATTENTION)
    return jnp.einsum("rhqk,rkhd->rqhd", kept, value)


def _attend_at_once(
    query: Heads, key: Heads, value: Heads, bias: Bias | None, frame_mask: FrameMask | None, drop: AttentionDropout
) -> Heads:
    """All queries at once. The probabilities are computed anew in the backward pass: storing them costs more."""

    @jax.checkpoint
    def mixed(query: Heads, key: Heads, value: Heads, bias: Bias | None) -> Heads:
        return _mix(attention_probabilities(query, key, bias, frame_mask), value, drop)

    return mixed(query, key, value, bias)


def _attend_in_blocks(
    query: Heads, key: Heads, value: Heads, bias: Bias | None, frame_mask: FrameMask | None, drop: AttentionDropout
) -> Heads:
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
        keys = None if drop.row_keys is None else site_keys(drop.row_keys, number)
        probabilities = _probabilities(queries, key, tile, gates, frame_mask)
        return _mix(probabilities, value, AttentionDropout(drop.rate, keys))

    def in_blocks(x: Array) -> Array:
        widths = [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, widths).reshape(rows, blocks, BLOCK, *x.shape[2:]).swapaxes(0, 1)

    gates = None if bias is None else in_blocks(bias.gate)
    mixed = jax.lax.map(lambda block: one_block(*block), (jnp.arange(blocks), in_blocks(query), gates))
    return mixed.swapaxes(0, 1).reshape(rows, blocks * BLOCK, heads, head_dim)[:, :frames]


class Attention(nn.Module):
    """Multi-head self-attention of one layer, with the gate of its position bias."""

    config: WavLMConfig
    compute: Compute

    def setup(self) -> None:
        """The four projections and, with position bias, the gate; names as in Hugging Face's WavLMAttention."""
        config = self.config
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            linear(config.hidden_size, config, self.compute) for _ in range(4)
        )
        if config.position_bias:
            self.gru_rel_pos_linear = GateProjection(config)
            ones = nn.initializers.ones
            self.gru_rel_pos_const = self.param("gru_rel_pos_const", ones, (config.num_attention_heads,))

    def __call__(
        self,
        hidden: Hidden,
        position: Profile | PairBias | None,
        frame_mask: FrameMask | None,
        row_keys: RowKeys | None,
        output_attentions: bool,
    ) -> tuple[Hidden, Probabilities | None]:
        """The attended states and, if wanted, the probabilities of each head before dropout."""
        query, key, value = (self._heads(projection(hidden)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        query = query * self.config.head_dim**-0.5
        bias = None
        if position is not None:
            logits = self.gru_rel_pos_linear(self._heads(hidden))
            bias = Bias(position, gate(logits, self.gru_rel_pos_const))
        drop = AttentionDropout(self.config.attention_dropout, row_keys)
        if output_attentions:
            probabilities = attention_probabilities(query, key, bias, frame_mask)
            mixed = _mix(probabilities, value, drop)
        else:
            probabilities = None
            mixed = attend(query, key, value, bias, frame_mask, drop, self.compute.attention)
        return self.out_proj(mixed.reshape(hidden.shape)), probabilities

    def _heads(self, x: Hidden) -> Heads:
        return x.reshape(*x.shape[:2], self.config.num_attention_heads, self.config.head_dim)
