"""The adapter between encoder and head: gated convolutions that halve the frame rate each (FACTS B5)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from wavlm_jax.config import Compute, WavLMConfig
from wavlm_jax.model.frontend import Convolution, prefix_mask
from wavlm_jax.model.head_config import HeadConfig
from wavlm_jax.shapes import Geometry, NumSamples, num_frames

_PADDING = 1
"""Zeros before and after a sequence, whatever the kernel, as in transformers."""


def adapter_num_frames(frames: Any, head: HeadConfig) -> Any:
    """Frames that the adapter makes of `frames` (int or array); 0 stays 0.

    "huggingface" counts as if the kernel were 1, which is the same for the standard kernel of 3.
    """
    for _ in range(head.num_adapter_layers):
        frames = _shortened(frames, head)
    return frames


def head_num_frames(num_samples: Any, config: WavLMConfig, head: HeadConfig) -> Any:
    """Frames that a head reads of so many samples (int or array): behind the adapter, if there is one."""
    frames = num_frames(num_samples, Geometry(config.conv_kernel, config.conv_stride))
    return adapter_num_frames(frames, head) if head.add_adapter else frames


def _shortened(num_frames: Any, head: HeadConfig) -> Any:
    """Frames behind one layer."""
    reach = 0 if head.compat == "huggingface" else head.adapter_kernel_size - 1 - 2 * _PADDING
    shorter = (num_frames - 1 - reach) // head.adapter_stride + 1
    some = num_frames > 0
    return max(shorter, 0) * some if isinstance(shorter, int) else jnp.maximum(shorter, 0) * some


class AdapterLayer(nn.Module):
    """A strided convolution to twice the width, half of which gates the other half."""

    config: WavLMConfig
    head: HeadConfig
    compute: Compute

    def setup(self) -> None:
        """The convolution, named as Hugging Face's."""
        width = self.head.output_hidden_size or self.config.hidden_size
        taps, stride = self.head.adapter_kernel_size, self.head.adapter_stride
        self.conv = Convolution(2 * width, taps, stride, use_bias=True, dtype=jnp.dtype(self.compute.dtype))

    def __call__(self, hidden: Float[Array, "rows frames width"]) -> Float[Array, "rows fewer width"]:
        """Fewer frames of the same width."""
        padded = jnp.pad(hidden, ((0, 0), (_PADDING, _PADDING), (0, 0)))
        values, gate = jnp.split(self.conv(padded), 2, axis=-1)
        return values * jax.nn.sigmoid(gate)


class Adapter(nn.Module):
    """A change of width where one is asked for, then the gated convolutions.

    Never dropped in training: transformers drops a layer with probability `layerdrop`, and then has twice the frames.
    """

    config: WavLMConfig
    head: HeadConfig
    compute: Compute

    def setup(self) -> None:
        """Map, norm and layers, named as Hugging Face's."""
        width = self.head.output_hidden_size
        self.changes_width = width is not None and width != self.config.hidden_size
        if width is not None and self.changes_width:
            spread = nn.initializers.normal(self.config.initializer_range)
            self.proj = nn.Dense(width, dtype=jnp.dtype(self.compute.dtype), kernel_init=spread)
            # transformers builds this norm with torch's own epsilon, whatever the config says
            self.proj_layer_norm = nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False)
        self.layers = [AdapterLayer(self.config, self.head, self.compute) for _ in range(self.head.num_adapter_layers)]

    def __call__(
        self, hidden: Float[Array, "rows frames width"], num_frames: NumSamples
    ) -> tuple[Float[Array, "rows fewer features"], NumSamples]:
        """Frames behind the adapter, and how many of each row are speech.

        In "exact" mode what lies behind a row's end is 0 before every layer, so that no frame depends on it.
        """
        if self.changes_width:
            hidden = self.proj_layer_norm(self.proj(hidden)).astype(hidden.dtype)
        for layer in self.layers:
            if self.head.compat == "exact":
                hidden = jnp.where(prefix_mask(num_frames, hidden.shape[1])[:, :, None], hidden, 0)
            hidden, num_frames = layer(hidden), _shortened(num_frames, self.head)
        return hidden, num_frames
