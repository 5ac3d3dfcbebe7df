"""Dropout, layer drop, recomputation, precision, devices: training changes nothing that it should not."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.support.torch_twins import small_config, waveforms
from wavlm_jax.config import Compute
from wavlm_jax.model.encoder import kept_layers
from wavlm_jax.model.layers import Site, dropout, gelu, scale_gradient
from wavlm_jax.model.wavlm import WavLM

DROPPING = {
    "padding": "exact",
    "hidden_dropout": 0.2,
    "attention_dropout": 0.2,
    "activation_dropout": 0.2,
    "feat_proj_dropout": 0.2,
    "layerdrop": 0.3,
    "num_hidden_layers": 4,
}
LENGTHS = np.array([4000, 3000, 4000, 399, 4000, 2000, 4000, 1234])
STEP = jax.random.key(7)
ROWS = jax.vmap(partial(jax.random.fold_in, STEP))(jnp.arange(8))


@pytest.fixture(scope="module")
def model():
    return WavLM(small_config(**DROPPING))


@pytest.fixture(scope="module")
def params(model):
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 400)))["params"]


@partial(jax.jit, static_argnums=0)
def run(model, params, waveform, num_samples, step_key, row_keys):
    return model.apply(
        {"params": params}, waveform, num_samples, step_key=step_key, row_keys=row_keys, output_hidden_states=True
    )


@partial(jax.jit, static_argnums=0)
def gradients(model, params, waveform, num_samples, step_key, row_keys):
    def loss(params):
        output = run(model, params, waveform, num_samples, step_key, row_keys)
        direction = jnp.sin(jnp.arange(output.last_hidden_state.size)).reshape(output.last_hidden_state.shape)
        return (output.last_hidden_state * direction).sum(), output.last_hidden_state

    return jax.grad(loss, has_aux=True)(params)


def batch():
    return jnp.asarray(waveforms(LENGTHS)), jnp.asarray(LENGTHS)


def assert_same(ours, others, tolerance):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(others), strict=True):
        scale = max(float(np.abs(b).max()), 1e-3)
        np.testing.assert_allclose(a, b, atol=tolerance * scale, rtol=0)


@pytest.fixture(scope="module")
def trained(model, params):
    """Gradients and output with every dropout on: what the other ways to compute must equal."""
    return gradients(model, params, *batch(), STEP, ROWS)


@pytest.mark.parametrize("compute", [Compute(remat="full"), Compute(remat="dots", unroll=2), Compute(unroll=4)])
def test_recomputing_and_unrolling_change_nothing(model, params, trained, compute):
    assert_same(gradients(model.clone(compute=compute), params, *batch(), STEP, ROWS), trained, 1e-5)


def test_eight_devices_compute_what_one_does(model, params, trained):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    waveform, lengths, keys = jax.device_put((*batch(), ROWS), NamedSharding(mesh, PartitionSpec("data")))
    with jax.set_mesh(mesh):
        sharded = gradients(model, params, waveform, lengths, STEP, keys)
    assert len(sharded[1].sharding.device_set) == 8
    assert_same(sharded, trained, 1e-5)


def test_dropout_does_not_depend_on_how_rows_are_split(model, params, trained):
    waveform, lengths = batch()
    parts = [slice(0, 3), slice(3, 8)]
    split = [run(model, params, waveform[p], lengths[p], STEP, ROWS[p]).last_hidden_state for p in parts]
    assert_same(jnp.concatenate(split), trained[1], 1e-5)


def test_training_is_a_function_of_the_keys_and_evaluation_needs_none(model, params, trained):
    again = gradients(model, params, *batch(), STEP, ROWS)
    jax.tree.map(np.testing.assert_array_equal, again, trained)
    other = run(model, params, *batch(), STEP, jax.random.split(jax.random.key(8), 8))
    assert np.abs(other.last_hidden_state - trained[1]).max() > 0.1
    evaluated = [run(model, params, *batch(), None, None) for _ in range(2)]
    assert evaluated[0].hidden_states.shape[0] == 5
    jax.tree.map(np.testing.assert_array_equal, *evaluated)


def test_one_key_without_the_other_is_refused(model, params):
    with pytest.raises(ValueError, match="found row_keys alone"):
        model.apply({"params": params}, batch()[0], row_keys=ROWS)


def test_dropped_layers_hand_their_input_on_and_the_list_keeps_its_length(model, params):
    seen = set()
    quiet = {name: 0.0 for name in DROPPING if name.endswith("dropout")}
    model = WavLM(small_config(**(DROPPING | quiet)))
    for seed in range(6):
        step = jax.random.key(seed)
        keep = kept_layers(model.config, step)
        states = run(model, params, *batch(), step, ROWS).hidden_states
        assert states.shape[0] == 5
        for layer in range(4):
            assert bool((states[layer] == states[layer + 1]).all()) == (not keep[layer])
        seen |= set(np.flatnonzero(~keep))
    assert 0 in seen, "layer 0 can be dropped too"


def test_layers_are_dropped_at_the_configured_rate():
    keys = jax.random.split(jax.random.key(1), 4000)
    config = small_config(layerdrop=0.3, num_hidden_layers=8)
    kept = jax.vmap(partial(kept_layers, config))(keys)
    sigma = np.sqrt(0.3 * 0.7 / 4000)
    np.testing.assert_allclose(kept.mean(axis=0), 0.7, atol=4.5 * sigma)
    spared = jax.vmap(partial(kept_layers, small_config(layerdrop=0.3, layerdrop_first=False)))(keys)
    assert spared[:, 0].all()
    assert not spared[:, 1].all()


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(rate):
    ones = jnp.ones((8, 101, 999))
    result = np.asarray(dropout(ones, rate, ROWS, Site.OUTPUT))
    sigma = np.sqrt(rate * (1 - rate) / (101 * 999))
    np.testing.assert_allclose((result == 0).mean(axis=(1, 2)), rate, atol=4.5 * sigma)
    np.testing.assert_allclose(result[result != 0], 1 / (1 - rate), rtol=1e-4)
    assert dropout(ones, rate, None, Site.OUTPUT) is ones


def test_every_site_and_row_draws_for_itself():
    ones = jnp.ones((8, 4000))
    draws = np.concatenate([dropout(ones, 0.5, ROWS, site) == 0 for site in Site])
    correlation = np.corrcoef(draws)
    assert np.abs(correlation[~np.eye(len(draws), dtype=bool)]).max() < 0.1


def test_feature_gradient_is_multiplied_and_the_forward_pass_is_not():
    features = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4)))
    for factor, expected in itertools.product((0.0, 0.1, 1.0), (2.0,)):
        np.testing.assert_array_equal(scale_gradient(features, factor), features)
        gradient = jax.grad(lambda x, factor=factor: (2 * scale_gradient(x, factor)).sum())(features)
        np.testing.assert_allclose(gradient, expected * factor, rtol=1e-6)


def test_gelu_and_its_slope_are_exact():
    x = jnp.linspace(-12, 12, 2001)
    np.testing.assert_allclose(gelu(x), jax.nn.gelu(x, approximate=False), atol=2e-6)
    slope = jax.vmap(jax.grad(lambda v: jax.nn.gelu(v, approximate=False)))(x)
    np.testing.assert_allclose(jax.vmap(jax.grad(gelu))(x), slope, atol=2e-6)


@pytest.mark.parametrize("large", [False, True])
def test_bfloat16_stays_close_in_every_layer(large):
    config = small_config(
        num_hidden_layers=4,
        hidden_size=64,
        feat_extract_norm="layer" if large else "group",
        do_stable_layer_norm=large,
        padding="exact",
    )
    full, half = WavLM(config), WavLM(config, Compute(dtype="bfloat16"))
    params = jax.jit(full.init)(jax.random.key(0), jnp.zeros((1, 400)))["params"]
    exact = run(full, params, *batch(), None, None)
    rough = run(half, params, *batch(), None, None)
    assert rough.last_hidden_state.dtype == jnp.bfloat16
    valid = np.asarray(exact.frame_mask)
    for layer in range(5):
        a, b = (np.asarray(output.hidden_states[layer], np.float32)[valid] for output in (exact, rough))
        assert (a * b).sum() / np.sqrt(np.square(a).sum() * np.square(b).sum()) > 0.999, f"layer {layer}"
