"""From waveform to the Transformer's input: normalisation, strided convolutions with norms, projection (FACTS A2).

The first convolution and its norm are computed as one matrix product. The waveform has one channel, so a frame of this
layer is a linear map of its ten samples, its window. Subtracting a mean over time from the frames is the same as
subtracting it from the windows, and a mean over channels is subtracted from the kernel. The norm's factor, one for each
row and channel or for each frame, is multiplied into the kernel or into the windows. So the norm never reads the
frames, which are fifty times as large as the windows (docs/performance.md says what that saves).
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from wavlm_jax.config import Compute, WavLMConfig
from wavlm_jax.model.layers import (
    ACTIVATIONS,
    ChannelNorm,
    Site,
    dropout,
    keep_where,
    layer_norm,
    matrix_product,
    prefix_mask,
)
from wavlm_jax.shapes import Batch, ConvFeatures, FrameMask, Geometry, Hidden, NumSamples, RowKeys, Waveform, num_frames

Windows = Float[Array, "rows taps frames"]
Kernel = Float[Array, "taps channels"]
Vector = Float[Array, " channels"]
EXACT = jax.lax.Precision.HIGHEST
BLOCK = 1024
"""Frames whose squares a CPU sums at a time: 2 MB with Base's 512 channels."""


class FirstLayerParams(NamedTuple):
    """Parameters of the first layer, float32, and how it is computed."""

    kernel: Float[Array, "taps 1 channels"]
    conv_bias: Vector | None
    scale: Vector
    bias: Vector
    stride: int
    dtype: Any
    """Dtype of matrix products and result; statistics are float32."""
    eps: float = 1e-5
    """Added to the variance."""


def group_normed(layer: FirstLayerParams, waveform: Waveform, count: Int[Array, " rows"]) -> ConvFeatures:
    """The first layer with GroupNorm, one group per channel: mean and variance over the valid frames of a row.

    Args:
        layer: a bias of the convolution has no effect, because the norm removes it.
        waveform: float32 (rows, samples).
        count: (rows,) valid frames of each row; the others become 0. A row without any stays finite.

    """
    windows, inside = valid_windows(layer, waveform, count)
    number = jnp.maximum(count, 1)
    for _ in range(2):  # twice: the first mean of a waveform with a large offset is rounded
        windows = jnp.where(inside, windows - windows.sum(axis=2, keepdims=True) / number[:, None, None], 0.0)
    kernel = layer.kernel[:, 0]
    variance = channel_squares(windows.astype(layer.dtype), kernel) / number[:, None]
    gain = jax.lax.rsqrt(variance + layer.eps) * layer.scale[None]
    weights = [kernel[None] * gain[:, None], jnp.broadcast_to(layer.bias, gain.shape)[:, None]]
    return product(layer, [windows, inside], weights)


def layer_normed(layer: FirstLayerParams, waveform: Waveform, count: Int[Array, " rows"]) -> ConvFeatures:
    """The first layer with LayerNorm over the channels of a frame; arguments as for `group_normed`."""
    windows, inside = valid_windows(layer, waveform, count)
    kernel = layer.kernel[:, 0]
    if layer.conv_bias is not None:
        windows = jnp.concatenate([windows, inside.astype(windows.dtype)], axis=1)
        kernel = jnp.concatenate([kernel, layer.conv_bias[None]])
    kernel = kernel - kernel.mean(axis=1, keepdims=True)
    variance = frame_squares(windows.astype(layer.dtype), kernel) / kernel.shape[1]
    normed = windows * jax.lax.rsqrt(variance + layer.eps)[:, None]
    weights = jnp.concatenate([kernel * layer.scale[None], layer.bias[None]])
    rows = (waveform.shape[0], *weights.shape)
    return product(layer, [normed, inside], [jnp.broadcast_to(weights, rows)])


def valid_windows(
    layer: FirstLayerParams, waveform: Waveform, count: Int[Array, " rows"]
) -> tuple[Windows, Bool[Array, "rows 1 frames"]]:
    """[row, k, t] = sample k of frame t, 0 in frames that are not valid; and which frames are valid."""
    taps = layer.kernel.shape[0]
    frames = (waveform.shape[1] - taps) // layer.stride + 1
    span = (frames - 1) * layer.stride + 1
    windows = jnp.stack([waveform[:, first : first + span : layer.stride] for first in range(taps)], axis=1)
    inside = (jnp.arange(frames)[None] < count[:, None])[:, None]
    return jnp.where(inside, windows, 0.0), inside


def product(layer: FirstLayerParams, windows: list[Array], weights: list[Array]) -> ConvFeatures:
    """[r, t, c] = sum over k of windows[r, k, t] * weights[r, k, c], the parts of both concatenated along k."""
    left, right = (
        jnp.concatenate([part.astype(layer.dtype) for part in parts], axis=1) for parts in (windows, weights)
    )
    return jnp.einsum("rkt,rkc->rtc", left, right)


@jax.custom_vjp
def channel_squares(windows: Windows, kernel: Kernel) -> Float[Array, "rows channels"]:
    """The sum over time of the squared frames (windows times kernel), float32.

    The squares themselves are summed. Computed from the windows' second moments, the variance of a channel with little
    energy would be lost in rounding. The gradient has no such cancellation and is computed from the moments.
    """
    return jax.lax.platform_dependent(
        windows,
        kernel,
        cpu=_channel_squares_in_blocks,
        default=lambda windows, kernel: jnp.square(_frames(windows, kernel)).sum(axis=1),
    )


def _channel_squares_in_blocks(windows: Windows, kernel: Kernel) -> Float[Array, "rows channels"]:
    """A block of frames at a time, which fits a core's cache: a CPU writes the product out before it squares it."""
    rows, taps, frames = windows.shape
    blocks = -(-frames // BLOCK)
    padded = jnp.pad(windows, ((0, 0), (0, 0), (0, blocks * BLOCK - frames)))
    parts = padded.reshape(rows, taps, blocks, BLOCK).transpose(2, 0, 1, 3)
    return jax.lax.map(lambda part: jnp.square(_frames(part, kernel)).sum(axis=1), parts).sum(axis=0)


def _channel_forward(windows: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return channel_squares(windows, kernel), (windows, kernel)


def _channel_backward(saved: tuple[Array, Array], direction: Array) -> tuple[Array, Array]:
    windows, kernel = saved
    moments = jnp.einsum("rkt,rlt->rkl", windows, windows, precision=EXACT, preferred_element_type=jnp.float32)
    to_kernel = 2 * jnp.einsum("rc,rkl,lc->kc", direction, moments, kernel, precision=EXACT)
    mixed = 2 * jnp.einsum("kc,rc,lc->rkl", kernel, direction, kernel, precision=EXACT)
    return jnp.einsum("rkl,rlt->rkt", mixed, windows, precision=EXACT).astype(windows.dtype), to_kernel


channel_squares.defvjp(_channel_forward, _channel_backward)


@jax.custom_vjp
def frame_squares(windows: Windows, kernel: Kernel) -> Float[Array, "rows frames"]:
    """The sum over channels of the squared frames (windows times kernel), float32; see `channel_squares`."""
    return jnp.square(_frames(windows, kernel)).sum(axis=2)


def _frame_forward(windows: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return frame_squares(windows, kernel), (windows, kernel)


def _frame_backward(saved: tuple[Array, Array], direction: Array) -> tuple[Array, Array]:
    windows, kernel = saved
    weighted = 2 * windows.astype(jnp.float32) * direction[:, None]
    moments = jnp.einsum("rkt,rlt->kl", weighted, windows.astype(jnp.float32), precision=EXACT)
    mixed = jnp.matmul(kernel, kernel.T, precision=EXACT)
    to_windows = jnp.einsum("kl,rlt->rkt", mixed, weighted, precision=EXACT)
    return to_windows.astype(windows.dtype), jnp.matmul(moments, kernel, precision=EXACT)


frame_squares.defvjp(_frame_forward, _frame_backward)


def _frames(windows: Array, kernel: Array) -> Array:
    return jnp.einsum("rkt,kc->rtc", windows, kernel.astype(windows.dtype), preferred_element_type=jnp.float32)


def normalize_waveform(waveform: Waveform, num_samples: NumSamples | None = None, eps: float = 1e-5) -> Waveform:
    """Each row normalised to mean 0 and variance 1 over its real samples; padding becomes 0 (FACTS B6, E13).

    Args:
        waveform: float32 (rows, samples), 16 kHz.
        num_samples: (rows,) real samples of each row; None: all of them.
        eps: added to the (population) variance; 1e-5 in the authors' code, 1e-7 in Hugging Face's feature extractor.

    Returns:
        float32 (rows, samples). A constant or empty row becomes zeros.

    """
    total = waveform.shape[1]
    real = prefix_mask(jnp.full(waveform.shape[:1], total) if num_samples is None else num_samples, total)
    waveform = jnp.where(real, waveform, 0.0)
    count = jnp.maximum(real.sum(axis=1, keepdims=True), 1)
    centred = jnp.where(real, waveform - waveform.sum(axis=1, keepdims=True) / count, 0.0)
    variance = jnp.square(centred).sum(axis=1, keepdims=True) / count
    return centred * jax.lax.rsqrt(variance + eps)


INT16_SCALE = 32_768.0
"""int16 samples of a batch are divided by this: [-1, 1)."""


def model_waveform(batch: Batch, config: WavLMConfig) -> Waveform:
    """The int16 rows of a batch as the model's input: float32 (rows, samples).

    Where `config.do_normalize` says so, normalised by the statistics of the *whole* utterance (FACTS C4).

    Args:
        batch: `waveform` int16 (rows, samples), `num_samples`; `mean` and `variance` of each whole utterance.
        config: `do_normalize`, `normalize_eps`.

    """
    waveform: Waveform = batch["waveform"].astype(jnp.float32) / INT16_SCALE
    if not config.do_normalize:
        return waveform
    deviation = jnp.sqrt(batch["variance"] + config.normalize_eps)
    normalised = (waveform - batch["mean"][:, None]) / deviation[:, None]
    real = jnp.arange(waveform.shape[1])[None, :] < batch["num_samples"][:, None]
    return jnp.where(real, normalised, 0.0)


def strided_convolution(
    x: Float[Array, "rows length channels"], kernel: Float[Array, "taps channels features"], stride: int
) -> Float[Array, "rows frames features"]:
    """A convolution without padding: floor((length - taps) / stride) + 1 frames.

    On a CPU as matrix products, elsewhere as XLA's convolution, whose gradient is slow on a CPU (docs/LOG.md).
    """
    return jax.lax.platform_dependent(
        x, kernel, cpu=partial(patch_convolution, stride=stride), default=partial(direct_convolution, stride=stride)
    )


def direct_convolution(x: Array, kernel: Array, stride: int) -> Array:
    """`strided_convolution` as one XLA convolution."""
    layout = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride,), "VALID", dimension_numbers=layout)


def patch_convolution(x: Array, kernel: Array, stride: int) -> Array:
    """`strided_convolution` as matrix products.

    The input is cut into blocks of `stride` steps. A patch is a block and the first steps of the blocks that follow it.
    Each of these parts has its own product, and a frame is their sum; a single product would need the patches written
    out in memory.
    """
    rows, length, channels = x.shape
    taps, _, features = kernel.shape
    num_frames = (length - taps) // stride + 1
    num_blocks = num_frames - 1 + -(-taps // stride)
    fitted = jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (0, num_blocks * stride - length, 0), (0, 0, 0)))
    blocks = fitted.reshape(rows, num_blocks, stride * channels)
    flat = kernel.reshape(taps * channels, features)

    def part(first: int) -> Array:
        width = min(stride, taps - first) * channels
        start = first // stride
        weights = flat[first * channels : first * channels + width]
        return matrix_product(blocks[:, start : start + num_frames, :width], weights)

    return sum((part(first) for first in range(stride, taps, stride)), part(0))


class Convolution(nn.Module):
    """A strided 1-D convolution without padding; kernel (taps, channels, features), Kaiming-normal initialisation."""

    features: int
    taps: int
    stride: int
    use_bias: bool
    dtype: Any

    def __call__(self, x: Float[Array, "rows length channels"]) -> Float[Array, "rows frames features"]:
        """The convolved frames, floor((length - taps) / stride) + 1 of them."""
        kernel, bias = self.parameters(x.shape[-1])
        y = strided_convolution(x.astype(self.dtype), kernel.astype(self.dtype), self.stride)
        return y if bias is None else y + bias.astype(self.dtype)[None, None, :]

    @nn.compact
    def parameters(
        self, channels: int
    ) -> tuple[Float[Array, "taps channels features"], Float[Array, " features"] | None]:
        """Kernel and, where there is one, bias, float32."""
        shape = (self.taps, channels, self.features)
        kernel = self.param("kernel", nn.initializers.variance_scaling(2.0, "fan_in", "normal"), shape)
        if not self.use_bias:
            return kernel, None
        return kernel, self.param("bias", uniform(1 / math.sqrt(self.taps * channels)), (self.features,))


class FirstLayer(nn.Module):
    """Convolution of the waveform, norm, GELU, as one matrix product (see the top of this module)."""

    config: WavLMConfig
    compute: Compute

    def setup(self) -> None:
        """The parameters, named as Hugging Face's."""
        features, taps, self.stride = self.config.conv_layers[0]
        self.dtype = jnp.dtype(self.compute.dtype)
        self.conv = Convolution(features, taps, self.stride, self.config.conv_bias, self.dtype)
        self.layer_norm = ChannelNorm(features)

    def __call__(self, x: Float[Array, "rows samples 1"], mask: FrameMask | None) -> ConvFeatures:
        """The layer's frames; those outside of the mask (rows, frames) are 0 and count in no statistic (FACTS E9)."""
        kernel, bias = self.conv.parameters(1)
        layer = FirstLayerParams(kernel, bias, *self.layer_norm(), self.stride, self.dtype)
        frames = num_frames(x.shape[1], Geometry((kernel.shape[0],), (self.stride,)))
        count = jnp.full(x.shape[:1], frames) if mask is None else mask.sum(axis=1)
        normed = layer_normed if self.config.feat_extract_norm == "layer" else group_normed
        return ACTIVATIONS[self.config.feat_extract_activation](normed(layer, x[:, :, 0], count))


class ConvLayer(nn.Module):
    """A later layer: convolution, norm over channels (Large has it), GELU."""

    config: WavLMConfig
    compute: Compute
    index: int

    def setup(self) -> None:
        """The convolution, and the norm where this layer has one."""
        features, taps, stride = self.config.conv_layers[self.index]
        dtype = jnp.dtype(self.compute.dtype)
        self.conv = Convolution(features, taps, stride, self.config.conv_bias, dtype)
        if self.config.feat_extract_norm == "layer":
            self.layer_norm = nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False)

    def __call__(self, x: Float[Array, "rows length inputs"], mask: FrameMask | None) -> ConvFeatures:
        """The layer's frames; those outside the mask (rows, frames) are 0."""
        y = self.conv(x)
        if self.config.feat_extract_norm == "layer":
            y = self.layer_norm(y).astype(y.dtype)
        y = ACTIVATIONS[self.config.feat_extract_activation](y)
        return y if mask is None else keep_where(mask, y)


class FeatureExtractor(nn.Module):
    """The conv encoder: 20-ms frames of `conv_dim[-1]` channels from 16 kHz samples (FACTS A2)."""

    config: WavLMConfig
    compute: Compute

    def setup(self) -> None:
        """One module per conv layer, named as Hugging Face's."""
        later = range(1, len(self.config.conv_dim))
        layers = [ConvLayer(self.config, self.compute, i) for i in later]
        self.conv_layers = [FirstLayer(self.config, self.compute), *layers]

    def __call__(self, waveform: Waveform, num_samples: NumSamples | None) -> ConvFeatures:
        """Conv features (rows, frames, channels).

        With `num_samples`, samples behind a row's end become 0 before the first layer and frames behind it after every
        layer, so that no result depends on what a row is padded with.
        """
        if num_samples is not None:
            waveform = jnp.where(prefix_mask(num_samples, waveform.shape[1]), waveform, 0.0)
        x = waveform[:, :, None]
        for layer, kernel, stride in zip(
            self.conv_layers, self.config.conv_kernel, self.config.conv_stride, strict=True
        ):
            mask = None
            if num_samples is not None:
                step = Geometry((kernel,), (stride,))
                num_samples = num_frames(num_samples, step)
                mask = prefix_mask(num_samples, num_frames(x.shape[1], step))
            x = layer(x, mask)
        return x


class FeatureProjection(nn.Module):
    """LayerNorm, linear map to the Transformer's width, dropout."""

    config: WavLMConfig
    compute: Compute

    def setup(self) -> None:
        """Norm and projection; the projection is initialised as torch's default linear map (FACTS A9)."""
        bound = uniform(1 / math.sqrt(self.config.conv_dim[-1]))
        dtype = jnp.dtype(self.compute.dtype)
        self.layer_norm = layer_norm(self.config)
        self.projection = nn.Dense(self.config.hidden_size, dtype=dtype, kernel_init=bound, bias_init=bound)

    def __call__(self, features: ConvFeatures, row_keys: RowKeys | None) -> Hidden:
        """Hidden states (rows, frames, width) before masking."""
        hidden = self.projection(self.layer_norm(features))
        return dropout(hidden, self.config.feat_proj_dropout, row_keys, Site.FEATURE_PROJECTION)


def uniform(bound: float) -> nn.initializers.Initializer:
    """An initialiser that draws from [-bound, bound)."""

    def initialise(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return initialise
