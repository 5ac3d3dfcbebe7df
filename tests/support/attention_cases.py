"""Inputs of attention, ragged masks, and values with all gradients of an implementation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from wavlm_jax.model.attention import attend
from wavlm_jax.model.fused_attention import NO_DROPOUT, attention_dropout
from wavlm_jax.model.position import Bias
from wavlm_jax.training.sharding import RULES

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


def compare_with_dense(
    implementation,
    num_frames,
    *,
    head_dim,
    mask=None,
    drop=NO_DROPOUT,
    with_bias=True,
    dtype=jnp.float32,
    tolerance=1e-5,
):
    """Values and gradients of an implementation are those of "dense", in the same dtypes."""
    inputs, direction = inputs_and_direction(num_frames, head_dim, dtype)
    dense, found = (
        values_and_gradients(run(name, with_bias, mask, drop), inputs, direction) for name in ("dense", implementation)
    )
    assert [x.dtype for x in found] == [x.dtype for x in dense]
    assert_agree(found, dense, tolerance)


def compare_under_a_mesh(implementation):
    """Rows over data and fsdp, heads over tensor: as "dense" on one device, and every row and head in its place."""
    inputs, direction = jax.tree.map(lambda x: x[:2] if x.shape[0] == ROWS else x, inputs_and_direction(130))
    drop = DROP._replace(seeds=DROP.seeds[:2])
    mask = ragged(130)[:2]
    dense = values_and_gradients(run("dense", True, mask, drop), inputs, direction)
    mesh = jax.make_mesh((1, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        sharded = values_and_gradients(run(implementation, True, mask, drop), inputs, direction)
    assert_agree(sharded, dense, 1e-5)
    assert sharded[0].sharding.shard_shape(sharded[0].shape) == (1, 130, 1, 8)
