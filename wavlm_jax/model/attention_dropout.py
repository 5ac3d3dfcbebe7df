"""Which attention probabilities are dropped: a hash of (row's key, head, query, key frame), the same everywhere.

A generator that hands out its numbers in order would give every way to compute attention other draws, and a kernel
would have to store them for the backward pass. A hash needs neither: each implementation computes the decisions it
needs where it needs them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

from wavlm_jax.model.elements import Site, site_keys
from wavlm_jax.shapes import RowKeys

RESOLUTION = 1 << 16
"""Rates are rounded to 1 / 65,536: two decisions from one 32-bit word."""
HALF = 64
"""Queries q and q + HALF of each block of 2 * HALF share a word: a kernel's block splits between two registers."""

Seeds = UInt32[Array, "rows heads words=2"]


class Dropout(NamedTuple):
    """A share threshold / RESOLUTION of the probabilities is dropped, the rest scaled up; no seeds: none is."""

    threshold: int
    seeds: Seeds | None

    @property
    def scale(self) -> float:
        """What is kept is multiplied by this."""
        return RESOLUTION / (RESOLUTION - self.threshold)


NO_DROPOUT = Dropout(0, None)


def attention_dropout(rate: float, row_keys: RowKeys | None, num_heads: int) -> Dropout:
    """The dropout of a layer whose rows have these keys; none without keys or rate."""
    if row_keys is None or rate == 0:
        return NO_DROPOUT
    draw = jax.vmap(lambda key: jax.random.bits(key, (num_heads, 2), jnp.uint32))
    return Dropout(min(round(rate * RESOLUTION), RESOLUTION - 1), draw(site_keys(row_keys, Site.ATTENTION)))


def kept(
    drop: Dropout, queries: Int[Array, "queries"], keys: Int[Array, "keys"]
) -> Bool[Array, "rows heads queries keys"]:
    """Which probabilities of these queries and keys are kept."""
    assert drop.seeds is not None
    pair = queries // (2 * HALF) * HALF + queries % HALF
    shift = queries // HALF % 2 * 16
    seeds = jax.lax.bitcast_convert_type(drop.seeds, jnp.int32)[:, :, None, None, :]
    words = random_words(seeds[..., 0], seeds[..., 1], pair[None, None, :, None], keys[None, None, None, :])
    return jax.lax.shift_right_logical(words, shift[None, None, :, None]) & (RESOLUTION - 1) >= drop.threshold


def random_words(first: Array, second: Array, pair: Array, key: Array) -> Array:
    """One random int32 for each pair of queries and key frame, under two int32 seeds; shapes broadcast."""
    return _scramble(_scramble(pair * _ODD + first) ^ _scramble(key * _ODD + second))


def _scramble(x: Array) -> Array:
    """A bijection of 32-bit words in which each bit of the result depends on all bits (constants: C. Wellons, 2018)."""
    x = (x ^ jax.lax.shift_right_logical(x, 16)) * 0x7FEB352D
    x = (x ^ jax.lax.shift_right_logical(x, 15)) * (0x846CA68B - (1 << 32))
    return x ^ jax.lax.shift_right_logical(x, 16)


_ODD = 0x9E3779B9 - (1 << 32)
