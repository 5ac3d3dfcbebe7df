"""Speaker embeddings: time-delay layers, statistics over time, a linear map (x-vectors, FACTS B4)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from wavlm_jax.config import Compute, WavLMConfig
from wavlm_jax.model.elements import keep_where, linear
from wavlm_jax.model.frontend import prefix_mask
from wavlm_jax.model.heads import Encoded, Headed, Keys, Masks
from wavlm_jax.shapes import FrameMask, Hidden, NumSamples, Waveform

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


class WavLMForXVector(Headed):
    """X-vectors trained by a margin loss over speakers."""

    has_adapter = True

    def setup(self) -> None:
        """Encoder, `projector`, `tdnn`, `feature_extractor` (to the embedding), `classifier`, `objective`."""
        super().setup()
        head = self.head
        self.projector = linear(head.tdnn_dim[0], self.config, Compute())
        sizes = zip(head.tdnn_dim, head.tdnn_kernel, head.tdnn_dilation, strict=True)
        self.tdnn = [TDNNLayer(features, taps, dilation, self.config) for features, taps, dilation in sizes]
        self.feature_extractor = linear(head.xvector_output_dim, self.config, Compute())
        self.classifier = linear(head.xvector_output_dim, self.config, Compute())
        self.objective = SpeakerVectors(head.num_labels)

    def __call__(
        self,
        waveform: Waveform,
        num_samples: NumSamples | None = None,
        masks: Masks | None = None,
        keys: Keys | None = None,
    ) -> XVectorOutput:
        """Embeddings, and their cosines with the training speakers.

        Raises:
            ValueError: rows are so short that the time-delay layers have no frame left.

        """
        encoded = self.encode(waveform, num_samples, masks, keys)
        self._check(encoded.hidden.shape[1])
        hidden = self.projector(encoded.hidden)
        if self.head.compat == "exact":
            hidden = keep_where(encoded.frame_mask, hidden)
        for layer in self.tdnn:
            hidden = layer(hidden)
        pooled = statistics_pooling(
            hidden, self._pooled_frames(encoded, hidden.shape[1], padded=num_samples is not None)
        )
        embeddings = self.feature_extractor(pooled)
        logits = self.classifier(embeddings)
        return XVectorOutput(embeddings, logits, self.objective(logits))

    def _pooled_frames(self, encoded: Encoded, total: int, *, padded: bool) -> FrameMask:
        """Which frames behind the time-delay layers are pooled over: those that saw speech alone, and at least one.

        transformers counts as if no layer were dilated, so it pools over up to 6 frames that saw padding (FACTS E30).
        """
        if not padded:
            return jnp.ones((*encoded.frame_mask.shape[:1], total), bool)
        if self.head.compat == "huggingface":
            counted = encoded.num_frames - sum(taps - 1 for taps in self.head.tdnn_kernel)
        else:
            counted = jnp.maximum(encoded.num_frames - self.head.tdnn_context, 1)
        return prefix_mask(counted, total)

    def _check(self, num_frames: int) -> None:
        if num_frames <= self.head.tdnn_context:
            raise ValueError(
                f"waveform: found rows of {num_frames} frames, expected at least {self.head.tdnn_context + 1} for the "
                "time-delay layers; pad them with zeros and pass num_samples"
            )


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
