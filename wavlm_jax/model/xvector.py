"""The parts of an x-vector: time-delay layers, statistics over time, vectors of the training speakers (FACTS B4)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from wavlm_jax.config import Compute, WavLMConfig
from wavlm_jax.model.elements import keep_where, linear
from wavlm_jax.model.frontend import prefix_mask
from wavlm_jax.model.head_config import HeadConfig
from wavlm_jax.shapes import FrameMask, Hidden, NumSamples

Embeddings = Float[Array, "rows embedding"]

_SMALLEST_NORM = 1e-12
"""Below it a vector is not scaled up to length 1, as in torch's `normalize`."""


class XVectorOutput(NamedTuple):
    """What an utterance sounds like."""

    embeddings: Embeddings
    """The speaker embedding: compare by cosine."""
    logits: Embeddings
    """One more linear map on top: what the margin loss is trained on. transformers' name; no class scores."""
    cosines: Float[Array, "rows speakers"]
    """Between `logits` and the vector of every training speaker."""


class TDNNLayer(nn.Module):
    """A convolution over `taps` frames, `dilation` apart, without padding, and ReLU.

    Its parameters are those of a linear map on the frames side by side, as transformers stores them.
    """

    features: int
    taps: int
    dilation: int
    config: WavLMConfig

    def setup(self) -> None:
        """The linear map; transformers calls it `kernel`."""
        self.kernel = linear(self.features, self.config, Compute())

    def __call__(self, hidden: Float[Array, "rows frames inputs"]) -> Float[Array, "rows fewer features"]:
        """(taps - 1) * dilation frames fewer."""
        num_frames = hidden.shape[1] - (self.taps - 1) * self.dilation
        shifted = [hidden[:, tap * self.dilation :][:, :num_frames] for tap in range(self.taps)]
        return jax.nn.relu(self.kernel(jnp.concatenate(shifted, axis=-1)))


class SpeakerVectors(nn.Module):
    """The margin loss's own parameters: one vector a training speaker, in columns (`objective/weight`)."""

    num_speakers: int

    @nn.compact
    def __call__(self, embeddings: Embeddings) -> Float[Array, "rows speakers"]:
        """Cosines between every row and every speaker, in [-1, 1]."""
        shape = (embeddings.shape[-1], self.num_speakers)
        weight = self.param("weight", nn.initializers.normal(1.0), shape)
        return unit_length(embeddings, axis=1) @ unit_length(weight, axis=0)


def pooled_frames(num_frames: NumSamples | None, shape: tuple[int, ...], head: HeadConfig) -> FrameMask:
    """Which frames behind the time-delay layers are pooled over: those that saw speech alone, and at least one.

    transformers counts as if no layer were dilated, so it pools over up to 6 frames that saw padding (FACTS E30).

    Args:
        num_frames: (rows,) real frames before the layers; None: no row is padded.
        shape: (rows, frames) behind the layers.
        head: kernels, dilations, and whose convention.

    """
    if num_frames is None:
        return jnp.ones(shape, bool)
    if head.compat == "huggingface":
        return prefix_mask(num_frames - sum(taps - 1 for taps in head.tdnn_kernel), shape[1])
    return prefix_mask(jnp.maximum(num_frames - head.tdnn_context, 1), shape[1])


def statistics_pooling(frames: Hidden, mask: FrameMask) -> Float[Array, "rows statistics"]:
    """Mean and unbiased standard deviation over the frames of the mask, side by side; deviation 0 for one frame."""
    count = jnp.maximum(mask.sum(axis=1), 1)[:, None]
    mean = keep_where(mask, frames).sum(axis=1) / count
    squares = jnp.square(keep_where(mask, frames - mean[:, None, :])).sum(axis=1)
    variance = squares / jnp.maximum(count - 1, 1)
    varies = variance > 0
    deviation = jnp.where(varies, jnp.sqrt(jnp.where(varies, variance, 1.0)), 0.0)  # no infinite slope at 0
    return jnp.concatenate([mean, deviation], axis=-1)


def unit_length(x: Float[Array, "rows columns"], axis: int) -> Float[Array, "rows columns"]:
    """`x` divided by its Euclidean norm along `axis`; a vector of zeros stays one, with a finite gradient."""
    squares = jnp.square(x).sum(axis=axis, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squares, _SMALLEST_NORM**2))
