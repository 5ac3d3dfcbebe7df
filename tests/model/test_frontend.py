"""The conv encoder against torch, gradients included: strided convolutions, the first layer with its folded norm."""

import copy
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import WavLMConfig
from transformers.models.wavlm.modeling_wavlm import WavLMGroupNormConvLayer, WavLMLayerNormConvLayer

from tests.support.torch_twins import shake
from wavlm_jax.model.frontend import (
    FirstLayerParams,
    direct_convolution,
    group_normed,
    layer_normed,
    patch_convolution,
    strided_convolution,
)
from wavlm_jax.model.layers import gelu

CONVOLUTIONS = [strided_convolution, patch_convolution, direct_convolution]


def convolution_inputs(length, taps, channels=3, features=5):
    generator = np.random.default_rng(0)
    x = generator.standard_normal((2, length, channels)).astype(np.float32)
    kernel = generator.standard_normal((taps, channels, features)).astype(np.float32)
    return x, kernel


def torch_convolution(x, kernel, stride):
    """torch's conv1d in our layout."""
    return torch.nn.functional.conv1d(x.transpose(1, 2), kernel.permute(2, 1, 0), stride=stride).transpose(1, 2)


@pytest.mark.parametrize("convolution", CONVOLUTIONS)
@pytest.mark.parametrize(
    ("taps", "stride", "length"), [(10, 5, 10), (10, 5, 64), (3, 2, 31), (3, 2, 32), (2, 2, 9), (4, 1, 9)]
)
def test_convolution_and_its_gradients_equal_torch(convolution, taps, stride, length):
    x, kernel = convolution_inputs(length, taps)
    theirs = [torch.tensor(array, requires_grad=True) for array in (x, kernel)]
    output = torch_convolution(*theirs, stride)
    direction = np.random.default_rng(1).standard_normal(output.shape).astype(np.float32)
    (output * torch.tensor(direction)).sum().backward()
    ours, pull = jax.vjp(lambda a, b: convolution(a, b, stride), jnp.asarray(x), jnp.asarray(kernel))
    np.testing.assert_allclose(ours, output.detach().numpy(), atol=1e-5, rtol=0)
    for gradient, wanted in zip(pull(jnp.asarray(direction)), theirs, strict=True):
        np.testing.assert_allclose(gradient, wanted.grad.numpy(), atol=2e-5, rtol=0)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 40))
def test_any_geometry_gives_as_many_frames_as_torch(taps, stride, extra):
    x, kernel = convolution_inputs(taps + extra, taps, channels=2, features=2)
    ours = patch_convolution(jnp.asarray(x), jnp.asarray(kernel), stride)
    assert ours.shape[1] == extra // stride + 1
    expected = torch_convolution(torch.tensor(x), torch.tensor(kernel), stride)
    np.testing.assert_allclose(ours, expected.numpy(), atol=1e-5, rtol=0)


OURS = {"group": group_normed, "layer": layer_normed}
THEIRS = {"group": WavLMGroupNormConvLayer, "layer": WavLMLayerNormConvLayer}
CHANNELS, TAPS, STRIDE = 12, 10, 5
QUICK = {"xla_backend_optimization_level": 0}
"""Compiled in a third of the time: these programs run once or a few times."""


def torch_layer(norm, *, conv_bias=False, kernel=None):
    """transformers' layer with random weights, float64: the measure."""
    torch.manual_seed(3)
    config = WavLMConfig(feat_extract_norm=norm, conv_bias=conv_bias, conv_dim=(CHANNELS,) * 7)
    layer = THEIRS[norm](config)
    shake(layer)
    if kernel is not None:
        layer.conv.weight.data = torch.tensor(kernel, dtype=torch.float32).T[:, None]
    return layer.double()


def parameters(layer):
    """The parameters of `torch_layer` as ours."""
    tensors = [layer.conv.weight.permute(2, 1, 0), layer.conv.bias, layer.layer_norm.weight, layer.layer_norm.bias]
    return tuple(None if each is None else jnp.asarray(each.detach().numpy(), jnp.float32) for each in tensors)


def forward(norm, given, waveform, count, dtype=jnp.float32):
    return gelu(OURS[norm](FirstLayerParams(*given, STRIDE, dtype), waveform, count))


run = jax.jit(forward, static_argnames=("norm", "dtype"), compiler_options=QUICK)


@partial(jax.jit, static_argnames=("norm", "dtype"), compiler_options=QUICK)
def gradients(norm, given, waveform, count, direction, dtype=jnp.float32):
    """Of the parameters, then of the wave."""
    _, pull = jax.vjp(lambda given, waveform: forward(norm, given, waveform, count, dtype), given, waveform)
    return pull(direction.astype(dtype))


def reference(layer, waveform, counts, direction):
    """(values, gradients of the parameters, of the wave) of torch, each row alone and cut to its valid frames.

    In the layer's own precision.
    """
    dtype = layer.conv.weight.dtype
    values, to_wave = np.zeros(direction.shape), np.zeros(waveform.shape)
    layer.zero_grad()
    for row, count in enumerate(counts):
        length = (count - 1) * STRIDE + TAPS
        alone = torch.tensor(waveform[row, :length], dtype=dtype, requires_grad=True)
        output = layer(alone[None, None])[0].T
        (output * torch.tensor(direction[row, :count], dtype=dtype)).sum().backward()
        values[row, :count], to_wave[row, :length] = output.detach().numpy(), alone.grad.numpy()
    kernel = layer.conv.weight.grad.permute(2, 1, 0)
    bias = None if layer.conv.bias is None else layer.conv.bias.grad
    given = (kernel, bias, layer.layer_norm.weight.grad, layer.layer_norm.bias.grad)
    return values, tuple(None if each is None else each.numpy() for each in given), to_wave


def case(counts, seed=0):
    """(waves with something loud behind their end, a direction in which to differentiate)."""
    generator = np.random.default_rng(seed)
    longest = (max(counts) - 1) * STRIDE + TAPS + 3
    direction = generator.standard_normal((len(counts), (longest - TAPS) // STRIDE + 1, CHANNELS))
    return generator.standard_normal((len(counts), longest)).astype(np.float32), direction.astype(np.float32)


def close(ours, double, single):
    """Within 1e-5 of torch's float64, and what float32 costs torch itself: two frames may have hardly any variance."""
    for found, wanted, rounded in zip(*map(jax.tree.leaves, (ours, double, single)), strict=True):
        tolerance = 1e-5 * max(1.0, np.abs(wanted).max()) + np.abs(rounded - wanted).max()
        np.testing.assert_allclose(np.asarray(found, np.float64), wanted, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("norm", "conv_bias"), [("group", False), ("layer", False), ("layer", True)])
def test_values_and_gradients_equal_torch_on_each_row_alone(norm, conv_bias):
    layer = torch_layer(norm, conv_bias=conv_bias)
    rounding, weights = copy.deepcopy(layer).float(), parameters(layer)

    @settings(deadline=None, max_examples=20)
    @given(st.lists(st.integers(2, 70), min_size=2, max_size=2), st.integers(0, 2**31 - 1))
    def check(counts, seed):
        waveform, direction = case([*counts, 70], seed)
        double, single = (reference(each, waveform, [*counts, 70], direction) for each in (layer, rounding))
        # Two frames may have hardly any variance; what float32 costs there is a matter of luck, torch's and ours.
        pairs = zip(jax.tree.leaves(double), jax.tree.leaves(single), strict=True)
        assume(all(np.abs(wanted - rounded).max() < 1e-6 * np.abs(wanted).max() for wanted, rounded in pairs))
        arguments = (norm, weights, jnp.asarray(waveform), jnp.array([*counts, 70]))
        close((run(*arguments), *gradients(*arguments, jnp.asarray(direction))), double, single)

    check()


def test_a_bias_before_the_group_norm_changes_nothing():
    kernel, _, scale, bias = parameters(torch_layer("group"))
    waveform, direction = map(jnp.asarray, case([40, 30]))
    given, count = (kernel, jnp.arange(12.0), scale, bias), jnp.array([40, 30])
    np.testing.assert_array_equal(
        run("group", given, waveform, count), run("group", (kernel, None, scale, bias), waveform, count)
    )
    assert not gradients("group", given, waveform, count, direction)[0][1].any()


@pytest.mark.parametrize("norm", OURS)
def test_bfloat16_is_near_float32(norm):
    given = parameters(torch_layer(norm))
    waveform, direction = map(jnp.asarray, case([300, 200]))
    count = jnp.array([300, 200])
    wide, narrow = (
        (run(norm, given, waveform, count, dtype), gradients(norm, given, waveform, count, direction, dtype))
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert narrow[0].dtype == jnp.bfloat16
    assert all(each.dtype == jnp.float32 for each in jax.tree.leaves(narrow[1]))
    for found, wanted in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        assert np.linalg.norm(np.asarray(found, np.float32) - wanted) < 2e-2 * np.linalg.norm(wanted)


WAVES = {
    "an offset of 1000": lambda noise, _: 1000 + noise,
    "a constant": lambda noise, _: np.full_like(noise, 12345.678),
    "silence": lambda noise, _: np.zeros_like(noise),
    "very soft": lambda noise, _: 1e-4 * noise,
    "very loud": lambda noise, _: 1e4 * noise,
    "a click at the start": lambda noise, time: noise + 1e4 * (time == 0),
    "a loud low tone": lambda noise, time: 30 * np.sin(2 * np.pi * time * 50 / 16_000) + 3e-3 * noise,
}


@pytest.mark.parametrize("wave", WAVES)
@pytest.mark.parametrize("norm", OURS)
def test_hostile_waves_lose_no_more_than_in_torch(norm, wave):
    """Half of the channels hear only what is soft and high: moments of the wave alone would lose them in rounding."""
    kernel = np.random.default_rng(4).standard_normal((TAPS, CHANNELS))
    kernel[:, ::2] = 0
    kernel[3:6, ::2] = np.array([1.0, -2.0, 1.0])[:, None] * np.linspace(1, 2, CHANNELS // 2)
    layer = torch_layer(norm, kernel=kernel)
    noise, direction = case([400, 400])
    waveform = WAVES[wave](noise, np.arange(noise.shape[1])[None]).astype(np.float32)
    count = jnp.array([400, 400])
    ours = run(norm, parameters(layer), jnp.asarray(waveform), count)
    values, *_ = reference(layer, waveform, [400, 400], direction)
    with torch.no_grad():
        single = layer.float()(torch.tensor(waveform)[:, None]).swapaxes(1, 2)[:, :400].numpy()
    theirs = np.abs(single - values[:, :400]).max()
    assert np.abs(ours[:, :400] - values[:, :400]).max() < 1e-5 + 2 * theirs
    found = gradients(norm, parameters(layer), jnp.asarray(waveform), count, jnp.asarray(direction))
    assert all(np.isfinite(each).all() for each in jax.tree.leaves(found))


@pytest.mark.parametrize("norm", OURS)
def test_what_is_no_frame_is_nothing(norm):
    """A row without a frame gives zeros and finite gradients, and what a wave is padded with reaches nothing."""
    given = parameters(torch_layer(norm))
    waveform, direction = map(jnp.asarray, case([40, 30]))
    count = jnp.array([0, 20])
    values = run(norm, given, waveform, count)
    assert not values[0].any()
    assert not values[1, 20:].any()
    padded = jnp.where(jnp.arange(waveform.shape[1]) < 19 * STRIDE + TAPS, waveform, jnp.nan)
    np.testing.assert_array_equal(run(norm, given, padded, count), values)
    to_parameters, to_wave = gradients(norm, given, waveform, count, direction)
    assert all(np.isfinite(each).all() for each in jax.tree.leaves(to_parameters))
    assert np.isfinite(to_wave).all()
    assert not to_wave[0].any()


def test_one_frame_has_no_variance():
    """torch refuses it; the limit of its formula is the norm's bias."""
    given = parameters(torch_layer("group"))
    waveform, _ = case([1, 1])
    values = run("group", given, jnp.asarray(waveform), jnp.array([1, 1]))
    expected = torch.nn.functional.gelu(torch.tensor(np.asarray(given[3]))).numpy()
    np.testing.assert_allclose(values, np.broadcast_to(expected, values.shape), atol=1e-6, rtol=0)
