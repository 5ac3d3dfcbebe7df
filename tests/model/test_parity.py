"""The model against transformers' own torch classes: every hidden state, every gradient."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.support.memory import give_memory_back
from tests.support.torch_twins import attention_mask, our_parameters, small_config, torch_model, twins, waveforms
from wavlm_jax.config import WavLMConfig
from wavlm_jax.convert.state_dict import to_torch
from wavlm_jax.model.wavlm import WavLM

GRID = list(itertools.product(("group", "layer"), (False, True), (True, False)))
LENGTHS = (16000, 12345, 9000)
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # transformers' own call


def torch_states(model, waveform, num_samples=None, time_mask=None):
    """transformers' hidden states and its last hidden state, with gradients attached."""
    mask = None if num_samples is None else attention_mask(num_samples, waveform.shape[1]).long()
    output = model(
        torch.tensor(waveform),
        attention_mask=mask,
        mask_time_indices=None if time_mask is None else torch.tensor(time_mask),
        output_hidden_states=True,
    )
    return torch.stack([*output.hidden_states, output.last_hidden_state])


def our_states(model, params, waveform, num_samples, time_mask):
    """The same of ours."""
    given = None if num_samples is None else jnp.array(num_samples)
    output = model.apply({"params": params}, jnp.array(waveform), given, time_mask=time_mask, output_hidden_states=True)
    return jnp.concatenate([output.hidden_states, output.last_hidden_state[None]])


def assert_parity(twin, waveform, num_samples, time_mask):
    """Hidden states within 1e-4, gradients of a random projection of them all within 1e-4 of their largest entry."""
    reference = torch_states(twin.torch, waveform, num_samples, time_mask)
    direction = np.random.default_rng(1).standard_normal(reference.shape).astype(np.float32)
    (reference * torch.tensor(direction)).mean().backward()

    def loss(params):
        states = our_states(
            twin.model, params, waveform, num_samples, None if time_mask is None else jnp.array(time_mask)
        )
        return (states * direction).mean(), states

    gradients, states = jax.jit(jax.grad(loss, has_aux=True))(twin.params)
    np.testing.assert_allclose(states, reference.detach().numpy(), atol=1e-4, rtol=0)
    ours = to_torch(gradients)
    reference = {name: parameter.grad for name, parameter in twin.torch.named_parameters()}
    if time_mask is None:
        assert reference.pop("masked_spec_embed") is None
    for name, gradient in reference.items():
        # A key bias shifts all logits of a softmax alike: its true gradient is 0, so it is held to its weight's scale.
        scale = np.abs(reference[name.replace("k_proj.bias", "k_proj.weight")].numpy()).max()
        np.testing.assert_allclose(ours[name], gradient.numpy(), atol=1e-4 * scale, rtol=0, err_msg=name)


@pytest.mark.parametrize(("norm", "stable", "bias"), GRID)
def test_equals_transformers_on_ragged_masked_batch(norm, stable, bias):
    twin = twins(small_config(feat_extract_norm=norm, do_stable_layer_norm=stable, position_bias=bias))
    time_mask = np.random.default_rng(2).random((3, 49)) < 0.4
    assert_parity(twin, waveforms(LENGTHS), LENGTHS, time_mask)


@pytest.mark.parametrize(("norm", "stable"), [("group", False), ("layer", True)])
def test_equals_transformers_without_padding_and_mask(norm, stable):
    twin = twins(small_config(feat_extract_norm=norm, do_stable_layer_norm=stable), seed=1)
    assert_parity(twin, waveforms((16000, 16000)), None, None)


@pytest.mark.parametrize("stable", [False, True])
def test_one_layer_within_1e5(stable):
    twin = twins(small_config(num_hidden_layers=1, do_stable_layer_norm=stable), seed=2)
    waveform = waveforms((16000,))
    ours = jax.jit(lambda params: our_states(twin.model, params, waveform, None, None))(twin.params)
    np.testing.assert_allclose(ours, torch_states(twin.torch, waveform).detach().numpy(), atol=1e-5, rtol=0)


def test_base_shape_with_gradients():
    config = WavLMConfig.base(padding="huggingface", feature_grad_mult=1.0)
    assert_parity(twins(config), waveforms((8000,)), None, np.arange(24)[None] % 3 == 0)


def test_large_shape():
    give_memory_back()
    config, waveform = WavLMConfig.large(padding="huggingface"), waveforms((6000,))
    theirs = torch_model(config)
    with torch.no_grad():
        reference = torch_states(theirs, waveform).numpy()
    params = our_parameters(theirs, config)
    del theirs  # 1.3 GB
    give_memory_back()
    ours = jax.jit(lambda params: our_states(WavLM(config), params, waveform, None, None))(params)
    np.testing.assert_allclose(ours, reference, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("config", "parameters"), [(WavLMConfig.base(), 94_381_936), (WavLMConfig.large(), 315_453_120)]
)
def test_parameter_counts_are_the_published_ones(config, parameters):
    shapes = jax.eval_shape(WavLM(config).init, jax.random.key(0), jnp.zeros((1, 400)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


def test_hubert_is_wavlm_without_gates_and_table():
    base = sum(
        x.size
        for x in jax.tree.leaves(
            jax.eval_shape(WavLM(WavLMConfig.base(position_bias=False)).init, jax.random.key(0), jnp.zeros((1, 400)))
        )
    )
    assert 94_381_936 - base == 10_224


def test_channel_mask_follows_time_mask():
    """As in transformers, the channel mask acts on the mask vector too: a masked channel is 0 in every frame."""
    twin = twins(small_config(num_hidden_layers=1, mask_feature_prob=0.5))
    waveform, width = waveforms((16000,)), 32
    time_mask = np.arange(49)[None] < 20
    channels = np.arange(width)[None] < 10

    def masked(hidden, mask_time_indices=None, attention_mask=None):  # noqa: ARG001 - transformers passes it by name
        hidden[mask_time_indices] = twin.torch.masked_spec_embed
        hidden[torch.tensor(channels)[:, None].expand_as(hidden)] = 0
        return hidden

    twin.torch._mask_hidden_states = masked
    reference = torch_states(twin.torch, waveform, time_mask=time_mask)[:-1].detach().numpy()
    ours = jax.jit(twin.model.apply, static_argnames="output_hidden_states")(
        {"params": twin.params},
        jnp.array(waveform),
        time_mask=jnp.array(time_mask),
        channel_mask=jnp.array(channels),
        output_hidden_states=True,
    ).hidden_states
    np.testing.assert_allclose(ours, reference, atol=1e-5, rtol=0)


def test_attention_maps_are_those_of_each_head():
    """transformers gives the mean over heads; ours are the heads themselves, rows summing to 1."""
    twin = twins(small_config(), seed=3)
    waveform = waveforms((16000, 9000))
    with torch.no_grad():
        given = twin.torch(
            torch.tensor(waveform), attention_mask=attention_mask((16000, 9000), 16000).long(), output_attentions=True
        ).attentions
    maps = jax.jit(twin.model.apply, static_argnames="output_attentions")(
        {"params": twin.params}, jnp.array(waveform), jnp.array((16000, 9000)), output_attentions=True
    ).attentions
    assert maps.shape == (2, 2, 2, 49, 49)
    np.testing.assert_allclose(maps.mean(axis=2), torch.stack(given)[:, :, 0].numpy(), atol=1e-5, rtol=0)
    np.testing.assert_allclose(maps.sum(axis=-1), 1, atol=1e-5)
    assert np.abs(maps[:, :, 0] - maps[:, :, 1]).max() > 0.01
