"""A small ECAPA-TDNN: speaker embeddings from frames, as the authors verify speakers (FACTS D4, UniSpeech).

Batch norms have their running mean and variance among the parameters (`mean`, `variance`). These are not learned: in
training each batch returns its statistics in the Flax collection `averages` (`LossSums.averages`), and the step moves
the running values towards them. Padding changes nothing: padded frames are 0 before every convolution and count in no
statistic. The names are ours, since transformers has no such head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from wavlm_jax.shapes import FrameMask, Hidden

AVERAGES = "averages"
"""Flax collection: path of a running statistic -> its (sum, count) over a training batch."""
_SCALE = 8
_BOTTLENECK = 128
_BLOCKS = (2, 3, 4)
"""Dilations of the three blocks."""
_EPSILON = 1e-5
_LEAST_VARIANCE = 1e-9


class Frames(NamedTuple):
    """Frames and which of them are speech."""

    hidden: Hidden
    mask: FrameMask


class ECAPA(nn.Module):
    """Frames to one vector per row. The authors add 1e-6 to the frames first, which the normalisation removes again."""

    width: int
    """A multiple of 8."""
    embedding: int

    @nn.compact
    def __call__(self, hidden: Hidden, frame_mask: FrameMask, training: bool) -> Float[Array, "rows embedding"]:
        """Embeddings.

        Args:
            hidden: of the encoder, float32.
            frame_mask: True where a frame is speech; the first frame always counts.
            training: whether batch norms use the statistics of this batch, and return them in `averages`.

        """
        mask = frame_mask.at[:, 0].set(True)
        x = Unit(self.width, taps=5, name="layer1")(instance_norm(Frames(hidden, mask)), mask, training)
        outputs = []
        for number, dilation in enumerate(_BLOCKS, start=2):
            x = SERes2Block(self.width, dilation, name=f"layer{number}")(x, mask, training)
            outputs.append(x)
        x = jax.nn.relu(_conv(3 * self.width, name="conv")(jnp.concatenate(outputs, axis=-1)))
        pooled = AttentivePooling(name="pooling")(Frames(x, mask))
        everywhere = jnp.ones((len(pooled), 1), bool)
        normed = BatchNorm(name="bn")(pooled[:, None, :], everywhere, training)[:, 0]
        return nn.Dense(self.embedding, name="linear")(normed)


class BatchNorm(nn.Module):
    """Normalises each feature by its mean and variance over all frames of all rows, or by the running ones."""

    @nn.compact
    def __call__(self, x: Hidden, mask: FrameMask, training: bool) -> Hidden:
        """As torch's BatchNorm1d, over the frames of the mask."""
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        mean = self.param("mean", nn.initializers.zeros, shape)
        variance = self.param("variance", nn.initializers.ones, shape)
        if training:
            count = jnp.maximum(mask.sum(), 1).astype(jnp.float32)
            mean = _speech(mask, x).sum(axis=(0, 1)) / count
            squares = jnp.square(_speech(mask, x - mean[None, None, :])).sum(axis=(0, 1))
            variance = squares / count
            self._report("mean", mean * count, count)
            self._report("variance", squares * count / jnp.maximum(count - 1, 1), count)
        factor = jax.lax.rsqrt(variance + _EPSILON) * scale
        return (x - mean[None, None, :]) * factor[None, None, :] + bias[None, None, :]

    def _report(self, name: str, total: Array, count: Array) -> None:
        value = jax.lax.stop_gradient((total, count))
        self.sow(AVERAGES, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)


class Unit(nn.Module):
    """Convolution, ReLU, batch norm; as many frames as the input has."""

    width: int
    taps: int = 1
    dilation: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "rows frames inputs"], mask: FrameMask, training: bool
    ) -> Float[Array, "rows frames outputs"]:
        """The frames; padded ones have no meaning."""
        convolved = _conv(self.width, self.taps, self.dilation, name="conv")(_speech(mask, x))
        return BatchNorm(name="bn")(jax.nn.relu(convolved), mask, training)


class SERes2Block(nn.Module):
    """A Res2 block with squeeze and excitation, plus its input. Each of 8 parts is convolved with the one before."""

    width: int
    dilation: int

    @nn.compact
    def __call__(self, x: Hidden, mask: FrameMask, training: bool) -> Hidden:
        """The frames; padded ones have no meaning."""
        entered = Unit(self.width, name="unit1")(x, mask, training)
        parts = jnp.split(entered, _SCALE, axis=-1)
        heard = [Unit(self.width // _SCALE, 3, self.dilation, name="res2_0")(parts[0], mask, training)]
        for number, part in enumerate(parts[1:-1], start=1):
            unit = Unit(self.width // _SCALE, 3, self.dilation, name=f"res2_{number}")
            heard.append(unit(heard[-1] + part, mask, training))
        left = Unit(self.width, name="unit2")(jnp.concatenate([*heard, parts[-1]], axis=-1), mask, training)
        squeezed = _speech(mask, left).sum(axis=1) / mask.sum(axis=1)[:, None]
        excited = jax.nn.sigmoid(
            nn.Dense(self.width, name="up")(jax.nn.relu(nn.Dense(_BOTTLENECK, name="down")(squeezed)))
        )
        return x + left * excited[:, None, :]


class AttentivePooling(nn.Module):
    """Mean and standard deviation over frames, each feature with its own weights."""

    @nn.compact
    def __call__(self, frames: Frames) -> Float[Array, "rows statistics"]:
        """Means and deviations side by side."""
        x, mask = frames
        logits = _conv(x.shape[-1], name="attend2")(jnp.tanh(_conv(_BOTTLENECK, name="attend1")(x)))
        weights = jax.nn.softmax(jnp.where(mask[:, :, None], logits, -jnp.inf), axis=1)
        mean = (weights * x).sum(axis=1)
        variance = (weights * jnp.square(x - mean[:, None, :])).sum(axis=1)  # the authors' difference of squares rounds
        return jnp.concatenate([mean, jnp.sqrt(jnp.maximum(variance, _LEAST_VARIANCE))], axis=-1)


def instance_norm(frames: Frames) -> Hidden:
    """Each feature of each row with mean 0 and variance 1 over the row's frames; nothing is learned."""
    x, mask = frames
    count = mask.sum(axis=1)[:, None, None]
    centred = x - _speech(mask, x).sum(axis=1, keepdims=True) / count
    variance = jnp.square(_speech(mask, centred)).sum(axis=1, keepdims=True) / count
    return centred * jax.lax.rsqrt(variance + _EPSILON)


def _speech(mask: FrameMask, x: Hidden) -> Hidden:
    return jnp.where(mask[:, :, None], x, 0.0)


def _conv(width: int, taps: int = 1, dilation: int = 1, *, name: str) -> nn.Conv:
    """A convolution that keeps the number of frames; a linear map where it has one tap."""
    spread = nn.initializers.he_normal()
    return nn.Conv(width, (taps,), kernel_dilation=(dilation,), padding="SAME", kernel_init=spread, name=name)
