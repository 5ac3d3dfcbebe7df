"""The ways to compute attention agree, gradients and dropout included; none lets a padded key through."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.support.attention_cases import DROP, assert_agree, inputs_and_direction, ragged, run, values_and_gradients
from wavlm_jax.config import Compute, WavLMConfig
from wavlm_jax.model.attention import KERNEL_KINDS, Device, attend, choose, describe
from wavlm_jax.model.fused_attention import NO_DROPOUT, attention_dropout, kept
from wavlm_jax.model.position import Bias
from wavlm_jax.settings import SettingsError, read

BASE = WavLMConfig.base()
V5E, CPU, H100 = Device("tpu", "TPU v5 lite"), Device("cpu", "cpu"), Device("gpu", "NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize("num_frames", [1, 127, 128, 300])
@pytest.mark.parametrize(
    ("with_bias", "masked", "drop"), [(True, True, DROP), (True, False, NO_DROPOUT), (False, True, DROP)]
)
def test_chunked_equals_dense(num_frames, with_bias, masked, drop):
    inputs, direction = inputs_and_direction(num_frames)
    mask = ragged(num_frames) if masked else None
    dense, chunked = (
        values_and_gradients(run(name, with_bias, mask, drop), inputs, direction) for name in ("dense", "chunked")
    )
    assert_agree(chunked, dense, 1e-5)


def test_dense_equals_torch_with_the_bias_written_out():
    (query, key, value, profile, gates), _ = inputs_and_direction(40)
    distance = np.arange(40)[None] - np.arange(40)[:, None] + 39
    bias = np.asarray(gates).transpose(0, 2, 1)[..., None] * np.asarray(profile)[None][:, :, distance]
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(torch.tensor(np.asarray(x)).transpose(1, 2) for x in (query, key, value)),
        attn_mask=torch.tensor(bias),
        scale=1,
    )
    ours = run("dense", True, None, NO_DROPOUT)(query, key, value, profile, gates)
    np.testing.assert_allclose(ours, theirs.transpose(1, 2).numpy(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("implementation", ["dense", "chunked"])
def test_padded_keys_have_no_say(implementation):
    (query, key, value, profile, gates), _ = inputs_and_direction(150)
    mask = jnp.arange(150)[None] < jnp.array([150, 100, 60])[:, None]
    changed = jnp.where(mask[:, :, None, None], value, 1e6), jnp.where(mask[:, :, None, None], key, -1e3)
    function = run(implementation, True, mask, DROP)
    np.testing.assert_array_equal(
        function(query, key, value, profile, gates), function(query, changed[1], changed[0], profile, gates)
    )


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
def test_probabilities_are_dropped_at_their_rate_and_independently(rate):
    drop = attention_dropout(rate, jax.random.split(jax.random.key(3), 3), 4)
    keep = np.asarray(kept(drop.threshold, drop.seeds, jnp.arange(512), jnp.arange(700)))
    assert keep.shape == (3, 4, 512, 700)
    sigma = np.sqrt(rate * (1 - rate))
    centred = (keep - (1 - rate)) / sigma
    for axis, size in ((None, keep.size), (3, 700), (2, 512)):
        means = centred.mean(axis=axis) * np.sqrt(size)
        assert np.abs(means).max() < 6, f"mean over axis {axis}"
        assert axis is None or abs(means.std() - 1) < 0.05, f"spread of means over axis {axis}"
    for lag in ((1, 0), (0, 1), (64, 0), (128, 0), (1, 1), (1, -1), (64, 1), (0, 128), (2, 0)):
        shifted = np.roll(centred, lag, axis=(2, 3))
        assert abs((centred * shifted).mean()) * np.sqrt(keep.size) < 5, f"draws {lag} apart are correlated"
    flat = centred.reshape(12, -1)
    correlation = flat @ flat.T / flat.shape[1]
    assert np.abs(correlation[~np.eye(12, dtype=bool)]).max() < 5 / np.sqrt(flat.shape[1]), "rows or heads share draws"


def test_dropped_probabilities_leave_the_mean_and_a_row_draws_for_itself():
    (query, key, _, profile, gates), _ = inputs_and_direction(200)
    keys = jax.random.split(jax.random.key(0), 3)
    value = jnp.ones_like(query)
    output = attend(query, key, value, Bias(profile, gates), None, attention_dropout(0.3, keys, 2), "dense")
    assert abs(output.mean() - 1) < 0.03
    assert output.std() > 0.05
    rest = attention_dropout(0.3, keys[1:], 2)
    rows = attend(query[1:], key[1:], value[1:], Bias(profile, gates[1:]), None, rest, "dense")
    np.testing.assert_allclose(rows, output[1:], atol=1e-6)


def test_chunked_needs_memory_for_a_block_only():
    """18 s of audio: with its gradient, all logits must not be held at once."""
    inputs, _ = inputs_and_direction(900)
    memory = []
    for name in ("chunked", "dense"):
        loss = lambda *x, name=name: run(name, True, None, NO_DROPOUT)(*x).var()  # noqa: E731
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4))).lower(*inputs).compile()
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
    assert memory[0] < memory[1] / 2


@pytest.mark.parametrize(
    ("device", "wanted", "frames", "dtype", "expected", "because"),
    [
        (CPU, "auto", 768, "float32", "dense", "up to 800 frames"),
        (CPU, "auto", 801, "float32", "chunked", "above 800 frames"),
        (CPU, "chunked", 10, "float32", "chunked", "as configured"),
        (V5E, "auto", 768, "bfloat16", "pallas_tpu", "TPU v5 lite, a fused kernel"),
        (V5E, "auto", 5000, "float32", "pallas_tpu", "a fused kernel"),
        (V5E, "auto", 6000, "bfloat16", "chunked", "above 5120 frames"),
        (V5E, "dense", 768, "bfloat16", "dense", "as configured"),
        (Device("tpu", "TPU v3"), "auto", 900, "bfloat16", "chunked", "TPU v3, above 800"),
        (H100, "auto", 1500, "bfloat16", "pallas_gpu", "NVIDIA H100 80GB HBM3, fused kernels"),
        (H100, "auto", 768, "float32", "dense", "up to 800 frames"),
        (H100, "auto", 6000, "bfloat16", "chunked", "above 800 frames"),
        (H100, "pallas_gpu", 6000, "bfloat16", "chunked", "take up to 5120 frames, these are 6000"),
        (H100, "pallas_gpu", 300, "float32", "pallas_gpu", "as configured"),
        (Device("gpu", "Tesla V100-SXM2-16GB"), "auto", 768, "float32", "dense", "up to 800 frames"),
        (Device("gpu", "NVIDIA GeForce RTX 2080"), "pallas_gpu", 9, "float32", "chunked", "from Ampere on"),
    ],
)
def test_choice_depends_on_device_length_and_dtype(device, wanted, frames, dtype, expected, because):
    compute = Compute(dtype=dtype, attention=wanted)
    choice = choose(BASE, compute, frames, device)
    assert choice.implementation == expected
    assert because in choice.reason


def test_start_of_a_run_says_what_was_chosen_or_that_it_cannot_be():
    lines = describe(BASE, Compute(), (512, 768, 900), CPU)
    assert lines == [
        "attention for 512, 768 frames: dense (cpu, up to 800 frames)",
        "attention for 900 frames: chunked (cpu, above 800 frames)",
    ]
    with pytest.raises(ValueError, match="'pallas_tpu' needs a TPU, found cpu; 'auto' takes what suits"):
        describe(BASE, Compute(attention="pallas_tpu"), (768,), CPU)
    with pytest.raises(ValueError, match="'pallas_gpu' needs a GPU, found TPU v5 lite"):
        describe(BASE, Compute(attention="pallas_gpu"), (768,), V5E)
    odd = dataclasses.replace(BASE, hidden_size=12 * 48)
    assert choose(odd, Compute(dtype="bfloat16"), 768, H100).implementation == "dense"
    assert "heads are 48 wide" in choose(odd, Compute(attention="pallas_gpu"), 768, H100).reason
    assert V5E.kind in KERNEL_KINDS


def test_auto_is_no_implementation():
    (query, key, value, _, _), _ = inputs_and_direction(4)
    with pytest.raises(ValueError, match="attend: found 'auto', expected an implementation"):
        attend(query, key, value, None, None, NO_DROPOUT, "auto")


def test_cudnn_which_once_was_one_is_refused_and_the_others_are_named():
    with pytest.raises(
        SettingsError, match=r"config\.compute\.attention: found 'cudnn', expected one of 'auto', 'dense'"
    ):
        read({"attention": "cudnn"}, Compute, "compute")
