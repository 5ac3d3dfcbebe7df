"""What all ways to compute attention agree on: the logit of a padded key, and which probabilities are dropped.

Dropout is a hash of (row's key, head, query, key frame). A generator that hands out its numbers in order would give
every implementation other draws, and a kernel would have to store them for the backward pass; from a hash each computes
the decisions it needs where it needs them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key, UInt32

from wavlm_jax.model.kernel_rules import HALF, RESOLUTION, random_words, scale_of_kept, shifted_right

EXCLUDED = -1e30
"""Logit of a key that is padding. Finite, so that a row without a valid frame gives a uniform softmax and not 0 / 0."""
Seeds = UInt32[Array, "rows heads words=2"]


class AttentionDropout(NamedTuple):
    """A share threshold / RESOLUTION of the probabilities is dropped, the rest scaled up; nothing without seeds."""

    threshold: int
    seeds: Seeds | None

    @property
    def scale(self) -> float:
        """What is kept is multiplied by this."""
        return scale_of_kept(self.threshold)


NO_DROPOUT = AttentionDropout(0, None)


def attention_dropout(rate: float, keys: Key[Array, "rows"], num_heads: int) -> AttentionDropout:
    """Dropout of a share `rate` of the probabilities, each row's by its own key."""
    seeds: Seeds = jax.vmap(lambda key: jax.random.bits(key, (num_heads, 2), jnp.uint32))(keys)
    return AttentionDropout(min(round(rate * RESOLUTION), RESOLUTION - 1), seeds)


def kept(
    threshold: int, seeds: Seeds, queries: Int[Array, "queries"], keys: Int[Array, "keys"]
) -> Bool[Array, "rows heads queries keys"]:
    """Which probabilities of these queries and keys are kept."""
    pairs = queries // (2 * HALF) * HALF + queries % HALF
    signed = jax.lax.bitcast_convert_type(seeds, jnp.int32)[:, :, None, None, :]
    words = random_words(signed[..., 0], signed[..., 1], pairs[None, None, :, None], keys[None, None, None, :])
    upper = (queries // HALF % 2 == 1)[None, None, :, None]
    return jnp.where(upper, shifted_right(words, 16), words & (RESOLUTION - 1)) >= threshold
