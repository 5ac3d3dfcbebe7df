"""What every part of the model is made of: exact GELU, float32 norms, linear maps, dropout on row keys."""

from enum import IntEnum
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, UInt32

from wavlm_jax.config import Compute, WavLMConfig
from wavlm_jax.shapes import RowKeys


class Site(IntEnum):
    """Where a random number is used. Each site folds its own number into the key, so no two sites share a draw."""

    TIME_MASK = 0x5741_0001
    CHANNEL_MASK = 0x5741_0002
    FEATURE_PROJECTION = 0x5741_0003
    ENCODER_INPUT = 0x5741_0004
    ATTENTION = 0x5741_0005
    ATTENTION_OUTPUT = 0x5741_0006
    INTERMEDIATE = 0x5741_0007
    OUTPUT = 0x5741_0008
    LAYERDROP = 0x5741_0009


def site_keys(row_keys: RowKeys, number: Int[Array, ""] | int) -> RowKeys:
    """One new key a row, for the site or the layer `number`."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(row_keys, number)


def dropout(
    x: Float[Array, "rows *rest"], rate: float, row_keys: RowKeys | None, site: Site
) -> Float[Array, "rows *rest"]:
    """`x` with a share `rate` of its values set to 0 and the others scaled up; `x` itself without keys.

    Every row draws from its own key, so what is dropped does not depend on how rows are spread over micro-batches,
    devices and hosts.
    """
    if row_keys is None or rate == 0:
        return x
    threshold = min(round(rate * _RESOLUTION), _RESOLUTION - 1)
    draw = jax.vmap(partial(_random_uint16, shape=x.shape[1:]))
    keep = draw(site_keys(row_keys, site)) >= jnp.asarray(threshold, jnp.uint16)
    return jnp.where(keep, x / (1 - threshold / _RESOLUTION), jnp.zeros((), x.dtype))


_RESOLUTION = 1 << 16
"""Dropout probabilities are rounded to 1 / 65,536: two decisions out of each 32-bit random word, half the cost."""


def _random_uint16(key: Array, shape: tuple[int, ...]) -> Array:
    """Random 16-bit words, two from each of the generator's 32-bit words along the last axis."""
    last = shape[-1]
    words: UInt32[Array, "..."] = jax.random.bits(key, (*shape[:-1], -(-last // 2)), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16)
    return halves.reshape(*shape[:-1], -1)[..., :last]


@jax.custom_jvp
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The exact (erf) GELU, x Phi(x), that every released WavLM uses (FACTS A2); float32 inside."""
    wide = x.astype(jnp.float32)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """One saved array, the slope Phi(x) + x phi(x), where automatic differentiation would save several."""
    wide = primals[0].astype(jnp.float32)
    density = jnp.exp(-0.5 * wide * wide) * (2 * jnp.pi) ** -0.5
    slope = (_normal_cdf(wide) + wide * density).astype(primals[0].dtype)
    return gelu(primals[0]), slope * tangents[0]


def _normal_cdf(x: Array) -> Array:
    return 0.5 + 0.5 * jax.lax.erf(x * 2**-0.5)


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


def linear(width: int, config: WavLMConfig, compute: Compute) -> nn.Dense:
    """A linear map with bias, initialised as BERT's: N(0, `initializer_range`), bias 0 (FACTS A9)."""
    return nn.Dense(width, dtype=jnp.dtype(compute.dtype), kernel_init=nn.initializers.normal(config.initializer_range))
