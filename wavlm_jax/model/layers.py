"""What the parts of the model are made of: randomness, exact GELU, float32 norms, linear maps, dropout, masks.

Randomness has no state: every random number is a function of a key and of the `Site` that uses it, one key per row.
"""

import math
from collections.abc import Callable, Mapping
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.spmd import logical_to_mesh_axes
from jaxtyping import Array, Bool, Float, Int, UInt32

from wavlm_jax.config import Activation, Compute, WavLMConfig
from wavlm_jax.shapes import (
    ChannelMask,
    FrameMask,
    NumSamples,
    RowKeys,
    StepKey,
    TimeMask,
    huggingface_num_frames,
    microsoft_num_frames,
)
from wavlm_jax.shapes import num_frames as frames_of


class Masks(NamedTuple):
    """SpecAugment of a forward pass: frames to be replaced, channels to be set to 0; None: none."""

    time: TimeMask | None = None
    channel: ChannelMask | None = None


class Keys(NamedTuple):
    """Randomness of a forward pass in training: of the step (layer drop) and of each row (dropout)."""

    step: StepKey
    rows: RowKeys


def mesh_axes(sizes: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Logical axis -> mesh axes over which its size is spread, by the training tower's rules (`RULES`).

    An axis gets none without a mesh, or where its size (under `jax.export` a name) is not a multiple of theirs.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return dict.fromkeys(sizes, ())
    lying = dict(zip(sizes, logical_to_mesh_axes(tuple(sizes)) or (), strict=False))
    found = {}
    for name, size in sizes.items():
        axes = lying.get(name)
        names = (axes,) if isinstance(axes, str) else tuple(axes or ())
        found[name] = names if size % math.prod(mesh.shape[axis] for axis in names) == 0 else ()
    return found


class Site(IntEnum):
    """Places that use random numbers. Each folds its own number into the key, so that no two share a draw."""

    TIME_MASK = 0x5741_0001
    CHANNEL_MASK = 0x5741_0002
    FEATURE_PROJECTION = 0x5741_0003
    ENCODER_INPUT = 0x5741_0004
    ATTENTION = 0x5741_0005
    ATTENTION_OUTPUT = 0x5741_0006
    INTERMEDIATE = 0x5741_0007
    OUTPUT = 0x5741_0008
    LAYERDROP = 0x5741_0009
    FINAL = 0x5741_000A
    TEARING = 0x5741_000B


def site_keys(row_keys: RowKeys, number: Int[Array, ""] | int) -> RowKeys:
    """One new key per row, for the site or the layer `number`."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(row_keys, number)


def dropout(
    x: Float[Array, "rows *rest"], rate: float, row_keys: RowKeys | None, site: Site
) -> Float[Array, "rows *rest"]:
    """`x` with a share `rate` of its values set to 0 and the others scaled up; without keys `x` itself.

    Every row draws from its own key, so the result does not depend on how rows are spread over micro-batches, devices
    and hosts.
    """
    if row_keys is None or rate == 0:
        return x
    if rate == 1:
        return jnp.zeros_like(x)
    threshold = min(round(rate * _RESOLUTION), _RESOLUTION - 1)
    draw = jax.vmap(partial(_random_uint16, shape=x.shape[1:]))
    keep = draw(site_keys(row_keys, site)) >= jnp.asarray(threshold, jnp.uint16)
    return jnp.where(keep, x / (1 - threshold / _RESOLUTION), jnp.zeros((), x.dtype))


_RESOLUTION = 1 << 16
"""Dropout rates are rounded to 1 / 65,536: two decisions from each 32-bit random word, at half the cost."""


def _random_uint16(key: Array, shape: tuple[int, ...]) -> Array:
    """Random 16-bit words, two from each of the generator's 32-bit words along the last axis."""
    last = shape[-1]
    words: UInt32[Array, "..."] = jax.random.bits(key, (*shape[:-1], -(-last // 2)), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16)
    return halves.reshape(*shape[:-1], -1)[..., :last]


@jax.custom_vjp
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The exact (erf) GELU, x Phi(x), of every released WavLM (FACTS A2); computed in float32."""
    wide = x.astype(jnp.float32)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    return gelu(x), x


def _gelu_backward(x: Array, gradient: Array) -> tuple[Array]:
    """The slope Phi(x) + x phi(x), from x alone: the barrier stops XLA from saving erf and exp of the forward pass."""
    wide = jax.lax.optimization_barrier(x).astype(jnp.float32)
    density = jnp.exp(-0.5 * wide * wide) * (2 * jnp.pi) ** -0.5
    slope = _normal_cdf(wide) + wide * density
    return ((gradient.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


def _normal_cdf(x: Array) -> Array:
    return 0.5 + 0.5 * jax.lax.erf(x * 2**-0.5)


def _float32(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda x: function(x.astype(jnp.float32)).astype(x.dtype)


_tanh_gelu = _float32(partial(jax.nn.gelu, approximate=True))
ACTIVATIONS: Mapping[Activation, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "gelu_accurate": _tanh_gelu,
    "quick_gelu": _float32(lambda x: x * jax.nn.sigmoid(1.702 * x)),
    "relu": jax.nn.relu,
    "silu": _float32(jax.nn.silu),
    "swish": _float32(jax.nn.silu),
    "tanh": _float32(jnp.tanh),
}


def scale_gradient(x: Float[Array, "*shape"], factor: float) -> Float[Array, "*shape"]:
    """`x` forward, `factor` times its gradient backward; 0 stops the gradient (FACTS A1 step 3)."""
    if factor == 1:
        return x
    return jax.lax.stop_gradient(x) if factor == 0 else _scale_gradient(x, factor)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _scale_gradient(x: Array, factor: float) -> Array:  # noqa: ARG001 - the factor acts on the derivative only
    return x


@_scale_gradient.defjvp
def _scale_gradient_jvp(factor: float, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return primals[0], tangents[0] * factor


def keep_where(
    mask: Bool[Array, "rows frames"], x: Float[Array, "rows frames width"]
) -> Float[Array, "rows frames width"]:
    """`x` where the mask is True, 0 elsewhere; no gradient flows where it is 0."""
    return jnp.where(mask[:, :, None], x, jnp.zeros((), x.dtype))


def layer_norm(config: WavLMConfig, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm over the last axis, computed and returned in float32."""
    return nn.LayerNorm(epsilon=config.layer_norm_eps, dtype=jnp.float32, use_fast_variance=False, name=name)


class ChannelNorm(nn.Module):
    """The parameters of a norm: one scale and one bias per channel."""

    features: int

    @nn.compact
    def __call__(self) -> tuple[Float[Array, " features"], Float[Array, " features"]]:
        """Scale and bias, float32."""
        shape = (self.features,)
        return self.param("scale", nn.initializers.ones, shape), self.param("bias", nn.initializers.zeros, shape)


def linear(width: int, config: WavLMConfig, compute: Compute) -> nn.Dense:
    """A linear map with bias, initialised as BERT's: N(0, `initializer_range`), bias 0 (FACTS A9)."""
    spread = nn.initializers.normal(config.initializer_range)
    return nn.Dense(width, dtype=jnp.dtype(compute.dtype), kernel_init=spread, dot_general=_matrix_dot_general)


def matrix_product(
    x: Float[Array, "*rows inputs"], kernel: Float[Array, "inputs outputs"]
) -> Float[Array, "*rows outputs"]:
    """`x @ kernel` with all axes but the last (rows and frames) as one.

    Then the kernel's gradient contracts one axis instead of two, and XLA's CPU backend does not transpose both
    activations first.
    """
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def _matrix_dot_general(x: Array, kernel: Array, *_: Any, **__: Any) -> Array:
    """`matrix_product` with the signature of the `lax.dot_general` that nn.Dense calls."""
    return matrix_product(x, kernel)


def frame_mask(num_samples: NumSamples, num_frames: int, padded_samples: int, config: WavLMConfig) -> FrameMask:
    """The frames that are speech, by the padding convention of `config` (FACTS A7).

    Args:
        num_samples: (rows,) real samples of each row.
        num_frames: frames that the conv encoder makes of the padded row.
        padded_samples: samples of a padded row; only "microsoft" needs them.
        config: its `padding` and conv geometry.

    Returns:
        (rows, num_frames), True for speech. "exact": conv length formula, all False below the receptive field.
        "huggingface": the same, but a row below the receptive field counts as valid as a whole. "microsoft": often a
        frame or two more.

    """
    geometry = config.geometry
    if config.padding == "microsoft":
        valid = microsoft_num_frames(num_samples, padded_samples, geometry)
    elif config.padding == "huggingface":
        valid = huggingface_num_frames(num_samples, padded_samples, geometry)
    else:
        valid = frames_of(num_samples, geometry)
    return prefix_mask(valid, num_frames)


def prefix_mask(lengths: NumSamples, total: int) -> FrameMask:
    """(rows, total), True at the first `lengths` places of each row."""
    return jnp.arange(total)[None, :] < lengths[:, None]


def span_mask(
    row_keys: RowKeys,
    valid_frames: Int[Array, "rows"],
    num_frames: int,
    *,
    prob: float,
    length: int,
    min_masks: int,
) -> TimeMask:
    """Spans of frames to be predicted, drawn as in fairseq (FACTS C3).

    A row with n valid frames gets floor(prob * n / length + U), at least `min_masks`, spans at distinct uniform starts;
    spans may overlap. The last valid frame is never masked, and no frame after it. Where n is too small for that many
    distinct starts, the starts come from the first frames and the spans are cut before the last valid frame; a row of
    one frame or none has no mask.

    Args:
        row_keys: one key per row.
        valid_frames: (rows,) frames of speech, at most `num_frames`.
        num_frames: frames of the padded row.
        prob: wanted share of masked frames before overlaps (0.8 gives 0.567).
        length: frames of a span.
        min_masks: least number of spans of a row.

    """

    def one_row(key: Array, valid: Array) -> Array:
        spans = _spans(jax.random.fold_in(key, Site.TIME_MASK), valid, num_frames, prob, length, min_masks)
        return spans & (jnp.arange(num_frames) < valid - 1)

    return jax.vmap(one_row)(row_keys, valid_frames)


def torn(time_mask: TimeMask, row_keys: RowKeys, group: int) -> TimeMask:
    """The mask with single frames dropped at random, until the rows of a group have as many as the one with fewest.

    fairseq does so with the rows of a device, as it gathers masked frames into one array (FACTS C3).

    Args:
        time_mask: (rows, frames).
        row_keys: one key per row.
        group: consecutive rows that are made equal; divides the rows.

    """
    fewest = jnp.repeat(time_mask.sum(axis=1).reshape(-1, group).min(axis=1), group)
    draws = jax.vmap(lambda key: jax.random.uniform(key, time_mask.shape[1:]))(site_keys(row_keys, Site.TEARING))
    rank = jnp.argsort(jnp.argsort(jnp.where(time_mask, draws, 2.0), axis=1), axis=1)
    return time_mask & (rank < fewest[:, None])


def channel_mask(row_keys: RowKeys, width: int, *, prob: float, length: int, min_masks: int) -> ChannelMask:
    """Spans of channels to be set to 0, one mask for all frames of a row; arguments as in `span_mask` (FACTS C3)."""

    def one_row(key: Array) -> Array:
        size = jnp.asarray(width)
        return _spans(jax.random.fold_in(key, Site.CHANNEL_MASK), size, width, prob, length, min_masks)

    return jax.vmap(one_row)(row_keys)


def _spans(key: Array, valid: Array, size: int, prob: float, length: int, min_masks: int) -> Bool[Array, "size"]:
    """The union of the spans of one row of `size` places, of which the first `valid` count."""
    rounding, order = jax.random.split(key)
    wanted = jnp.floor(prob * valid / length + jax.random.uniform(rounding)).astype(jnp.int32)
    wanted = jnp.maximum(wanted, min_masks)
    candidates = jnp.minimum(jnp.where(valid - length <= wanted, wanted + 1, valid - length), valid - 1)
    position = jnp.arange(size)
    score = jnp.where(position < candidates, jax.random.uniform(order, (size,)), 2.0)
    rank = jnp.argsort(jnp.argsort(score))
    started = jnp.cumsum((rank < wanted) & (position < candidates))
    ended = jnp.pad(started, (length, 0))[:size]
    return started > ended
