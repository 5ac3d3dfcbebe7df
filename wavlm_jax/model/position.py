"""Gated relative position bias (FACTS A5): which bucket a distance falls in, the bias of each distance, the gate.

The bias of an attention logit is gate[row, head, query] * profile[head, key - query]. The profile has one number a head
and distance, comes from one table for all layers, and is computed once; the gate belongs to each layer.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from wavlm_jax.config import WavLMConfig
from wavlm_jax.shapes import Hidden

Profile = Float[Array, "heads distances"]
"""Bias of each distance key - query, from -(frames - 1) to frames - 1."""
PairBias = Float[Array, "heads frames frames"]
"""Bias of every pair of frames, (query, key)."""
Gate = Float[Array, "rows frames heads"]


class Bias(NamedTuple):
    """What is added to the logits: gate[row, query, head] * position[head, key - query].

    `position` is the profile, or for "dense" also its matrix, so that layers can share one.
    """

    position: Profile | PairBias
    gate: Gate


def relative_buckets(
    distances: Int[np.ndarray, "*shape"], num_buckets: int, max_distance: int
) -> Int[np.ndarray, "*shape"]:
    """The bucket of each distance key - query, int32.

    Half of the buckets are for keys after the query. Of each half, the first half holds one distance each, the rest is
    logarithmic up to `max_distance`, beyond which all distances share the last. Computed on the host: an accelerator's
    logarithm may round a bucket's edge the other way.
    """
    half = num_buckets // 2
    exact = half // 2
    size = np.abs(distances)
    scale = (half - exact) / np.log(max_distance / exact)
    logarithmic = exact + (np.log(np.maximum(size, exact) / exact) * scale).astype(np.int32)
    bucket = np.where(size < exact, size, np.minimum(logarithmic, half - 1))
    return (bucket + np.where(distances > 0, half, 0)).astype(np.int32)


class RelativePositionTable(nn.Module):
    """The learned table (num_buckets, heads), read once per forward pass."""

    config: WavLMConfig

    @nn.compact
    def __call__(self, num_frames: int) -> Profile:
        """The profile of all distances between `num_frames` frames, float32."""
        shape = (self.config.num_buckets, self.config.num_attention_heads)
        table = self.param("embedding", nn.initializers.normal(self.config.initializer_range), shape)
        distances = np.arange(1 - num_frames, num_frames)
        buckets = relative_buckets(distances, self.config.num_buckets, self.config.max_bucket_distance)
        return table[buckets].T


def toeplitz(window: Float[Array, "heads distances"], queries: int, keys: int) -> Float[Array, "heads queries keys"]:
    """The matrix whose entry (query, key) is `window[queries - 1 - query + key]`.

    `window` holds the queries + keys - 1 distances from the last query and first key to the first query and last key.
    Reading a sequence of period p in rows of p - 1 shifts each row by one: no gather, and no scatter in the gradient.
    """
    heads, period = window.shape[0], queries + keys
    repeated = jnp.tile(jnp.pad(window, ((0, 0), (0, 1))), (1, queries))
    skewed = repeated[:, queries - 1 : queries - 1 + queries * (period - 1)].reshape(heads, queries, period - 1)
    return skewed[:, :, :keys]


class GateProjection(nn.Module):
    """The linear map from each head's slice of the layer input to its two gate logits, the same for all heads.

    Stored with the authors' 8 outputs, which they add up in two groups of 4; adding up the weights instead is the same
    function with the same gradients. All heads together are one product with a block diagonal matrix: slices of 64
    numbers would be laid out anew, at many times the traffic of the hidden states themselves.
    """

    config: WavLMConfig

    @nn.compact
    def __call__(self, hidden: Hidden) -> Float[Array, "rows frames gates=2 heads"]:
        """The two logits of every row, frame and head, float32."""
        heads, head_dim = self.config.num_attention_heads, self.config.head_dim
        initialiser = nn.initializers.normal(self.config.initializer_range)
        kernel = self.param("kernel", initialiser, (head_dim, _GATE_OUTPUTS))
        bias = self.param("bias", nn.initializers.zeros, (_GATE_OUTPUTS,))
        folded = kernel.reshape(-1, 2, _GATE_OUTPUTS // 2).sum(axis=-1)
        offset = bias.reshape(2, _GATE_OUTPUTS // 2).sum(axis=-1)
        diagonal = jnp.einsum("dg,hk->hdgk", folded, jnp.eye(heads)).reshape(heads * head_dim, 2 * heads)
        logits = hidden.astype(jnp.float32) @ diagonal
        return logits.reshape(*hidden.shape[:2], 2, heads) + offset[None, None, :, None]


_GATE_OUTPUTS = 8


def gate(logits: Float[Array, "rows frames gates=2 heads"], constant: Float[Array, "heads"]) -> Gate:
    """sigmoid(z1) * (sigmoid(z2) * constant - 1) + 2: about 1.75 at initialisation, in (1, 2) for constant 1."""
    update, reset = jax.nn.sigmoid(logits[:, :, 0]), jax.nn.sigmoid(logits[:, :, 1])
    return update * (reset * constant[None, None, :] - 1.0) + 2.0
