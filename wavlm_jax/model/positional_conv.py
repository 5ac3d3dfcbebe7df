"""The convolutional position embedding: a grouped convolution over 128 frames with its weight normalised tap by tap."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from wavlm_jax.config import Compute, WavLMConfig
from wavlm_jax.model.elements import gelu
from wavlm_jax.shapes import Hidden

TapWeights = Float[Array, "width group_width taps"]


def grouped_convolution(x: Hidden, weight: TapWeights, groups: int) -> Hidden:
    """Output frame t sums weight[:, :, k] times the group's input frame t + k - taps // 2; frames outside are 0.

    As many frames come out as go in (FACTS A3: 64 before and 63 after for 128 taps).
    """
    taps = weight.shape[-1]
    return jax.lax.conv_general_dilated(
        x,
        weight.transpose(2, 1, 0),
        window_strides=(1,),
        padding=((taps // 2, taps - 1 - taps // 2),),
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=groups,
    )


class WeightNormConvolution(nn.Module):
    """The convolution's parameters in torch's layout: direction v, one gain g a tap, bias."""

    config: WavLMConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        """The convolved frames, with weight g[k] * v[:, :, k] / |v[:, :, k]| computed in float32."""
        config = self.config
        width, taps = config.hidden_size, config.num_conv_pos_embeddings
        groups = config.num_conv_pos_embedding_groups
        spread = nn.initializers.normal(math.sqrt(4 / (taps * width)))
        direction = self.param("weight_v", spread, (width, width // groups, taps))
        norm = jnp.sqrt(jnp.square(direction).sum(axis=(0, 1), keepdims=True))
        gain = self.param("weight_g", lambda _: norm)
        bias = self.param("bias", nn.initializers.zeros, (width,))
        dtype = jnp.dtype(self.compute.dtype)
        weight = (direction * (gain / norm)).astype(dtype)
        return grouped_convolution(x.astype(dtype), weight, groups) + bias.astype(dtype)[None, None, :]


class PositionalConvolution(nn.Module):
    """GELU of the convolution, to be added to its input (FACTS A3)."""

    config: WavLMConfig
    compute: Compute

    def setup(self) -> None:
        """The one convolution, named as Hugging Face's."""
        self.conv = WeightNormConvolution(self.config, self.compute)

    def __call__(self, x: Hidden) -> Hidden:
        """(rows, frames, width), as many frames as in `x`."""
        return gelu(self.conv(x))
