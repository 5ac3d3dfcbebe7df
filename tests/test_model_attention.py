"""The ways to compute attention agree, gradients included; none lets a padded key through."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from wavlm_jax.model.attention import AttentionDropout, Bias, attend

ROWS, HEADS, HEAD_DIM = 3, 2, 8
OFF = AttentionDropout(0.0, None)


def tensors(num_frames, seed=0):
    generator = np.random.default_rng(seed)
    heads = [generator.standard_normal((ROWS, num_frames, HEADS, HEAD_DIM)) for _ in range(3)]
    profile = generator.standard_normal((HEADS, 2 * num_frames - 1))
    gates = 1 + generator.random((ROWS, num_frames, HEADS))
    return [jnp.asarray(array, jnp.float32) for array in (*heads, profile, gates)]


def run(implementation, with_bias, mask):
    def result(query, key, value, profile, gates):
        bias = Bias(profile, gates) if with_bias else None
        return attend(query, key, value, bias, mask, OFF, implementation)

    return result


@pytest.mark.parametrize("num_frames", [1, 127, 128, 300])
@pytest.mark.parametrize(("with_bias", "masked"), [(True, True), (True, False), (False, True)])
def test_implementations_agree_with_gradients(num_frames, with_bias, masked):
    inputs = tensors(num_frames)
    mask = jnp.arange(num_frames)[None] < jnp.array([num_frames, num_frames // 2, 0])[:, None] if masked else None
    direction = jnp.asarray(np.random.default_rng(1).standard_normal(inputs[0].shape), jnp.float32)
    found = {}
    for implementation in ("dense", "chunked"):
        function = run(implementation, with_bias, mask)
        output, pull = jax.jit(lambda *given, function=function: jax.vjp(function, *given))(*inputs)
        found[implementation] = (output, *pull(direction))
    for dense, chunked in zip(*found.values(), strict=True):
        np.testing.assert_allclose(chunked, dense, atol=1e-5 * max(1, np.abs(dense).max()), rtol=0)
        assert np.isfinite(dense).all()


def test_dense_equals_torch_with_the_bias_written_out():
    query, key, value, profile, gates = tensors(40)
    distance = np.arange(40)[None] - np.arange(40)[:, None] + 39
    bias = np.asarray(gates).transpose(0, 2, 1)[..., None] * np.asarray(profile)[None][:, :, distance]
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(torch.tensor(np.asarray(x)).transpose(1, 2) for x in (query, key, value)),
        attn_mask=torch.tensor(bias),
        scale=1,
    )
    ours = run("dense", True, None)(query, key, value, profile, gates)
    np.testing.assert_allclose(ours, theirs.transpose(1, 2).numpy(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("implementation", ["dense", "chunked"])
def test_padded_keys_have_no_say(implementation):
    query, key, value, profile, gates = tensors(150)
    mask = jnp.arange(150)[None] < jnp.array([150, 100, 60])[:, None]
    changed = jnp.where(mask[:, :, None, None], value, 1e6), jnp.where(mask[:, :, None, None], key, -1e3)
    function = run(implementation, True, mask)
    np.testing.assert_array_equal(
        function(query, key, value, profile, gates), function(query, changed[1], changed[0], profile, gates)
    )


@pytest.mark.parametrize("implementation", ["dense", "chunked"])
def test_dropped_probabilities_leave_the_mean(implementation):
    query, key, _, profile, gates = tensors(200)
    keys = jax.random.split(jax.random.key(0), ROWS)
    value = jnp.ones((ROWS, 200, HEADS, HEAD_DIM))
    output = attend(query, key, value, Bias(profile, gates), None, AttentionDropout(0.3, keys), implementation)
    assert abs(output.mean() - 1) < 0.03
    assert output.std() > 0.05
    rows = attend(
        query[1:], key[1:], value[1:], Bias(profile, gates[1:]), None, AttentionDropout(0.3, keys[1:]), implementation
    )
    np.testing.assert_allclose(rows, output[1:], atol=1e-6)


def test_auto_is_chunked_for_long_audio_and_needs_less_memory():
    """18 s of audio: with its gradient, `auto` must not hold all logits at once."""
    inputs = tensors(900)
    auto, dense = (
        jax.jit(jax.grad(lambda *x, i=i: run(i, True, None)(*x).var(), argnums=(0, 1, 2, 3, 4)))
        for i in ("auto", "dense")
    )
    for ours, expected in zip(auto(*inputs), dense(*inputs), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=0)
    memory = [f.lower(*inputs).compile().memory_analysis().temp_size_in_bytes for f in (auto, dense)]
    assert memory[0] < memory[1] / 2
