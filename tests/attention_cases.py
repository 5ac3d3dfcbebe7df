"""Inputs of attention, ragged masks, and values with all gradients of an implementation."""

import jax
import jax.numpy as jnp
import numpy as np

from wavlm_jax.model.attention import attend
from wavlm_jax.model.attention_rules import attention_dropout
from wavlm_jax.model.position import Bias

ROWS, HEADS, HEAD_DIM = 3, 2, 8
DROP = attention_dropout(0.2, jax.random.split(jax.random.key(5), ROWS), HEADS)
NAMES = ("values", "query", "key", "value", "profile", "gate")


def inputs_and_direction(num_frames, head_dim=HEAD_DIM, dtype=jnp.float32):
    """(query, key, value, profile, gates), and a direction in which to differentiate."""
    generator = np.random.default_rng(num_frames)
    heads = [generator.standard_normal((ROWS, num_frames, HEADS, head_dim)) for _ in range(4)]
    heads[0] *= np.sqrt(8 / head_dim)
    profile = generator.standard_normal((HEADS, 2 * num_frames - 1))
    gates = 1 + generator.random((ROWS, num_frames, HEADS))
    query, key, value, direction = (jnp.asarray(array, dtype) for array in heads)
    return (query, key, value, jnp.asarray(profile, jnp.float32), jnp.asarray(gates, jnp.float32)), direction


def ragged(num_frames):
    """A full row, a half row, and one without a valid frame."""
    return jnp.arange(num_frames)[None] < jnp.array([num_frames, num_frames // 2, 0])[:, None]


def run(implementation, with_bias, mask, drop):
    """`attend` as a function of the five inputs that have gradients."""

    def result(query, key, value, profile, gates):
        bias = Bias(profile, gates) if with_bias else None
        return attend(query, key, value, bias, mask, drop, implementation)

    return result


def values_and_gradients(function, inputs, direction):
    """Values, then the gradients of query, key, value, profile, gates."""

    @jax.jit
    def both(inputs, direction):
        output, pull = jax.vjp(function, *inputs)
        return (output, *pull(direction))

    return both(inputs, direction)


def assert_agree(found, expected, tolerance):
    """Equal within `tolerance` of the largest number of each, and finite."""
    for name, pair in zip(NAMES, zip(found, expected, strict=True), strict=True):
        ours, theirs = (np.asarray(x, np.float32) for x in pair)
        scale = max(np.abs(theirs).max(), 1e-3)
        np.testing.assert_allclose(ours / scale, theirs / scale, atol=tolerance, rtol=0, err_msg=name)
        assert np.isfinite(theirs).all()
