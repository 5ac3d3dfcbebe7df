"""What every part of the model is made of: exact GELU, float32 norms, linear maps, dropout on row keys."""

from enum import IntEnum
from functools import partial
from typing import Any

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
    FINAL = 0x5741_000A


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


@jax.custom_vjp
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The exact (erf) GELU, x Phi(x), that every released WavLM uses (FACTS A2); float32 inside."""
    wide = x.astype(jnp.float32)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    return gelu(x), x


def _gelu_backward(x: Array, gradient: Array) -> tuple[Array]:
    """The slope Phi(x) + x phi(x), from x alone: the barrier keeps XLA from saving erf and exp of the forward pass."""
    wide = jax.lax.optimization_barrier(x).astype(jnp.float32)
    density = jnp.exp(-0.5 * wide * wide) * (2 * jnp.pi) ** -0.5
    slope = _normal_cdf(wide) + wide * density
    return ((gradient.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


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
    spread = nn.initializers.normal(config.initializer_range)
    return nn.Dense(width, dtype=jnp.dtype(compute.dtype), kernel_init=spread, dot_general=_matrix_dot_general)


def matrix_product(
    x: Float[Array, "*rows inputs"], kernel: Float[Array, "inputs outputs"]
) -> Float[Array, "*rows outputs"]:
    """`x @ kernel` with all axes but the last (rows and frames) as one.

    So the kernel's gradient contracts one axis instead of two, which XLA's CPU backend does without first transposing
    both activations.
    """
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def _matrix_dot_general(x: Array, kernel: Array, *_: Any, **__: Any) -> Array:
    """`matrix_product` in the place of the `lax.dot_general` that nn.Dense calls."""
    return matrix_product(x, kernel)
