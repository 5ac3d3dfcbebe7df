"""The first conv layer, from the wave up to its GELU: convolution and norm, over time in Base, over channels in Large.

The wave has one channel, so a frame of the layer is a linear map of its ten samples, its window. A mean over time is
taken off the windows, a mean over channels off the kernel, which is the same as taking it off the frames; and what else
a norm does, a factor for each row and channel or for each frame, goes into the kernel or into the windows. So the layer
is one matrix product, and the norm never sees the frames, which are fifty times as large as the windows.
docs/performance.md has what that saves.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from wavlm_jax.shapes import ConvFeatures, Waveform

Windows = Float[Array, "rows taps frames"]
Kernel = Float[Array, "taps channels"]
Vector = Float[Array, " channels"]
EXACT = jax.lax.Precision.HIGHEST
BLOCK = 1024
"""Frames whose squares a CPU sums at a time: 2 MB of Base's 512 channels."""


class Layer(NamedTuple):
    """The layer's parameters, float32, and how it is computed."""

    kernel: Float[Array, "taps 1 channels"]
    conv_bias: Vector | None
    scale: Vector
    bias: Vector
    stride: int
    dtype: Any
    """Of matrix products and result; statistics are float32."""
    eps: float = 1e-5
    """Added to the variance."""


def group_normed(layer: Layer, waveform: Waveform, count: Int[Array, " rows"]) -> ConvFeatures:
    """With GroupNorm, one group a channel: mean and variance over the valid frames of a row.

    Args:
        layer: its bias of the convolution changes nothing, the norm removes it.
        waveform: float32 (rows, samples).
        count: (rows,) valid frames a row; those past them are 0. A row without any is finite.

    """
    windows, inside = valid_windows(layer, waveform, count)
    number = jnp.maximum(count, 1)
    for _ in range(2):  # the first mean of a wave with a large offset is itself rounded
        windows = jnp.where(inside, windows - windows.sum(axis=2, keepdims=True) / number[:, None, None], 0.0)
    kernel = layer.kernel[:, 0]
    variance = channel_squares(windows.astype(layer.dtype), kernel) / number[:, None]
    gain = jax.lax.rsqrt(variance + layer.eps) * layer.scale[None]
    weights = [kernel[None] * gain[:, None], jnp.broadcast_to(layer.bias, gain.shape)[:, None]]
    return product(layer, [windows, inside], weights)


def layer_normed(layer: Layer, waveform: Waveform, count: Int[Array, " rows"]) -> ConvFeatures:
    """With LayerNorm over the channels of a frame; arguments as of `group_normed`."""
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
    layer: Layer, waveform: Waveform, count: Int[Array, " rows"]
) -> tuple[Windows, Bool[Array, "rows 1 frames"]]:
    """[r, k, t] = sample k of frame t, 0 in frames that are not valid; and which are."""
    taps = layer.kernel.shape[0]
    frames = (waveform.shape[1] - taps) // layer.stride + 1
    span = (frames - 1) * layer.stride + 1
    windows = jnp.stack([waveform[:, first : first + span : layer.stride] for first in range(taps)], axis=1)
    inside = (jnp.arange(frames)[None] < count[:, None])[:, None]
    return jnp.where(inside, windows, 0.0), inside


def product(layer: Layer, windows: list[Array], weights: list[Array]) -> ConvFeatures:
    """[r, t, c] = the sum over k of windows[r, k, t] * weights[r, k, c], the parts of both put together."""
    left, right = (
        jnp.concatenate([part.astype(layer.dtype) for part in parts], axis=1) for parts in (windows, weights)
    )
    return jnp.einsum("rkt,rkc->rtc", left, right)


@jax.custom_vjp
def channel_squares(windows: Windows, kernel: Kernel) -> Float[Array, "rows channels"]:
    """Of the frames (windows times kernel), the sum over time of the squares, float32.

    Squares are summed as they are: from the moments of the windows, a channel that listens to what is soft in a wave
    would be lost in rounding. The gradient has no such difference in it and is made of the moments alone.
    """
    return jax.lax.platform_dependent(
        windows,
        kernel,
        cpu=_channel_squares_in_blocks,
        default=lambda windows, kernel: jnp.square(_frames(windows, kernel)).sum(axis=1),
    )


def _channel_squares_in_blocks(windows: Windows, kernel: Kernel) -> Float[Array, "rows channels"]:
    """A block of frames at a time, which stays in a core's cache: a CPU writes the product out before it squares it."""
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
    """Of the frames (windows times kernel), the sum over channels of the squares, float32; see `channel_squares`."""
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
