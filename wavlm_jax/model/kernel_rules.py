"""What a kernel needs of the rules of attention: its facts, exact products, and the hash that dropout is drawn from.

The hash is of (row's key, head, query, key frame): whoever computes a tile of probabilities computes its decisions, and
stores none.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

RESOLUTION = 1 << 16
"""Rates of dropout are rounded to 1 / 65,536: two decisions from one 32-bit word."""
HALF = 64
"""Queries q and q + HALF of each block of 2 * HALF share a word, so that a kernel's block splits between registers."""
BLOCK = 2 * HALF
"""Queries of a block of the fused kernels, which pad frames to a multiple of it."""
ATTENDED = "attended"
"""Name of the mixed values for recomputation policies: a fused kernel is no matrix product that they would know."""


class Facts(NamedTuple):
    """What a fused kernel knows beforehand."""

    num_heads: int
    head_dim: int
    frames: int
    """A multiple of BLOCK."""
    has_bias: bool
    has_fill: bool
    drop_threshold: int
    """Of `AttentionDropout`; 0: no dropout."""
    group: int = 1
    """Heads that are one block."""

    @property
    def width(self) -> int:
        """Numbers of a frame in a group."""
        return self.group * self.head_dim

    @property
    def num_groups(self) -> int:
        """Blocks in which the heads are handled."""
        return self.num_heads // self.group


class Operands(NamedTuple):
    """What all kernels read, as references inside of them; each module of kernels says in which blocks."""

    query: Any
    key: Any
    value: Any
    profile: Any
    """float32: the bias of distance d at place frames + d."""
    gate: Any
    """float32, one a query."""
    fill: Any
    """float32, one a key: 0, or what stands in for the logits of a key that is padding."""
    seeds: Any
    """int32, two a row and head."""


OPERANDS = Operands._fields
Differentiable = tuple[Array, Array, Array, Array, Array]
"""Query, key, value (rows, frames, width), profile (heads, 2 * frames) with distance d at place frames + d, and gate
(rows, heads, frames)."""
Fixed = tuple[Array, Array]
"""Fill (rows, frames): 0 for a key that counts, else what its logit becomes; and int32 seeds (rows, heads, 2)."""


def matmul(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """Product over the named axes, float32; float32 operands are not rounded."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    axes = (((x_axis,), (y_axis,)), ((), ()))
    return jax.lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)


def scale_of_kept(threshold: int) -> float:
    """What is kept is multiplied by this, when threshold / RESOLUTION is dropped."""
    return RESOLUTION / (RESOLUTION - threshold)


def random_words(first: Array, second: Array, pairs: Array, keys: Array) -> Array:
    """One random int32 for each pair of queries and each key frame, under two int32 seeds; shapes broadcast."""
    return _scrambled(_scrambled(pairs * _ODD + first) ^ _scrambled(keys * _ODD + second))


def _scrambled(x: Array) -> Array:
    """A bijection of 32-bit words in which each bit of the result depends on all (multipliers: C. Wellons, 2018)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32))):
        x = (x ^ shifted_right(x, shift)) * factor
    return x ^ shifted_right(x, 16)


def shifted_right(x: Array, bits: int) -> Array:
    """The upper bits of int32 words, zeros moving in."""
    return jax.lax.shift_right_logical(x, jnp.full_like(x, bits))


_ODD = 0x9E3779B9 - (1 << 32)
"""The golden ratio's bits: successive multiples spread over all words."""
