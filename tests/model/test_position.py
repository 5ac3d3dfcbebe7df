"""Buckets, Toeplitz matrices, the gate, and the positional convolution."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

from tests.support.torch_twins import small_config, torch_model
from wavlm_jax.config import Compute, WavLMConfig
from wavlm_jax.model.position import (
    GateProjection,
    PositionalConvolution,
    RelativePositionTable,
    block_convolution,
    direct_convolution,
    gate,
    grouped_convolution,
    relative_buckets,
    spectral_convolution,
    toeplitz,
)

KNOWN_BUCKETS = {
    0: 0, -1: 1, 1: 161, 2: 162, 79: 239, 80: 240, 81: 240, 82: 240, 83: 241, 100: 247, -100: 87, 400: 295, 799: 319,
    1600: 319, -800: 159,
}  # fmt: skip


def test_buckets_of_the_sources():
    found = relative_buckets(np.array(list(KNOWN_BUCKETS)), 320, 800)
    assert found.tolist() == list(KNOWN_BUCKETS.values())


@pytest.mark.parametrize(("buckets", "distance"), [(320, 800), (320, 1280), (32, 80), (32, 40)])
def test_buckets_equal_transformers_for_every_distance(buckets, distance):
    theirs = torch_model(small_config(num_buckets=buckets, max_bucket_distance=distance)).encoder.layers[0].attention
    distances = np.arange(-2000, 2001)
    expected = theirs._relative_positions_bucket(torch.tensor(distances))
    np.testing.assert_array_equal(relative_buckets(distances, buckets, distance), expected.numpy())


@pytest.mark.parametrize(
    ("buckets", "distance"),
    [(4, 2), (4, 9), (8, 72), (8, 450), (16, 64), (16, 400), (20, 160), (32, 128), (320, 81), (152, 1550), (128, 1997)],
)
def test_edges_of_buckets_equal_transformers_where_float64_has_others(buckets, distance):
    theirs = SimpleNamespace(num_buckets=buckets, max_distance=distance)
    distances = np.arange(-2 * distance, 2 * distance)
    expected = WavLMAttention._relative_positions_bucket(theirs, torch.tensor(distances))
    np.testing.assert_array_equal(relative_buckets(distances, buckets, distance), expected.numpy())


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 5), (5, 1), (4, 7), (7, 4), (6, 6)])
def test_toeplitz_matrix_and_its_gradient(queries, keys):
    window = np.random.default_rng(0).standard_normal((2, queries + keys - 1)).astype(np.float32)
    query, key = np.mgrid[:queries, :keys]
    expected = window[:, queries - 1 - query + key]
    np.testing.assert_array_equal(toeplitz(jnp.asarray(window), queries, keys), expected)
    weights = np.random.default_rng(1).standard_normal(expected.shape).astype(np.float32)
    gradient = jax.grad(lambda w: (toeplitz(w, queries, keys) * weights).sum())(jnp.asarray(window))
    wanted = np.zeros_like(window)
    np.add.at(wanted, (slice(None), queries - 1 - query + key), weights)
    np.testing.assert_allclose(gradient, wanted, atol=1e-6)


def test_bias_of_all_pairs_equals_transformers():
    config = small_config()
    theirs = torch_model(config).encoder.layers[0].attention
    table = {"params": {"embedding": jnp.asarray(theirs.rel_attn_embed.weight.detach().numpy())}}
    profile = RelativePositionTable(config).apply(table, 60)
    assert profile.shape == (2, 119)
    np.testing.assert_array_equal(toeplitz(profile, 60, 60), theirs.compute_bias(60, 60).detach().numpy())


def test_gate_at_initialisation_is_about_one_and_three_quarters():
    config = WavLMConfig.base()
    hidden = jax.random.normal(jax.random.key(0), (2, 50, 768))
    projection = GateProjection(config)
    logits = projection.apply(projection.init(jax.random.key(1), hidden), hidden)
    values = gate(logits, jnp.ones(12))
    assert abs(values.mean() - 1.75) < 0.01
    assert (values > 1).all()
    assert (values < 2).all()


CONVOLUTIONS = [grouped_convolution, block_convolution, direct_convolution, spectral_convolution]


@pytest.mark.parametrize("convolution", CONVOLUTIONS)
@pytest.mark.parametrize(("taps", "num_frames"), [(16, 49), (16, 1), (16, 5), (9, 30), (128, 60)])
def test_grouped_convolution_and_its_gradients_equal_torch(convolution, taps, num_frames):
    generator = np.random.default_rng(0)
    x = generator.standard_normal((2, num_frames, 24)).astype(np.float32)
    weight = generator.standard_normal((24, 6, taps)).astype(np.float32) / np.float32(np.sqrt(6 * taps))
    direction = generator.standard_normal(x.shape).astype(np.float32)

    theirs = [torch.tensor(array, requires_grad=True) for array in (x, weight)]
    output = torch.nn.functional.conv1d(theirs[0].transpose(1, 2), theirs[1], padding=taps // 2, groups=4)
    output = output[:, :, :num_frames].transpose(1, 2)
    (output * torch.tensor(direction)).sum().backward()

    @jax.jit
    def values_and_gradients(x, weight):
        output, pull = jax.vjp(lambda a, b: convolution(a, b, 4), x, weight)
        return output, pull(jnp.asarray(direction))

    ours, gradients = values_and_gradients(x, weight)
    np.testing.assert_allclose(ours, output.detach().numpy(), atol=1e-5, rtol=0)
    for gradient, wanted in zip(gradients, theirs, strict=True):
        scale = wanted.grad.abs().max().item()
        np.testing.assert_allclose(gradient, wanted.grad.numpy(), atol=1e-5 * scale, rtol=0)


def test_positional_convolution_starts_as_published():
    """v ~ N(0, 4 / (taps * width)), g its norm tap by tap, so that the weight is v; as many frames out as in."""
    config = WavLMConfig.base()
    module = PositionalConvolution(config, Compute())
    params = module.init(jax.random.key(0), jnp.zeros((1, 7, 768)))["params"]["conv"]
    assert params["weight_v"].shape == (768, 48, 128)
    assert abs(params["weight_v"].std() / np.sqrt(4 / (128 * 768)) - 1) < 0.01
    norm = np.sqrt(np.square(params["weight_v"]).sum(axis=(0, 1)))
    np.testing.assert_allclose(params["weight_g"][0, 0], norm, rtol=1e-5)
    output = jax.eval_shape(lambda x: module.apply({"params": {"conv": params}}, x), jnp.zeros((1, 7, 768)))
    assert output.shape == (1, 7, 768)
