"""Padding never changes a valid frame; the conventions of the sources are there on request."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.torch_twins import Twins, attention_mask, small_config, torch_model, twins, waveforms
from wavlm_jax.model.frontend import normalize_waveform
from wavlm_jax.model.wavlm import WavLM
from wavlm_jax.shapes import num_frames

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # transformers' own call
PADDED = 6000


@pytest.fixture(scope="module", params=["base", "large"])
def exact(request) -> Twins:
    """A small Base or Large with exact padding, and transformers' model with its weights."""
    large = request.param == "large"
    return twins(
        small_config(
            feat_extract_norm="layer" if large else "group",
            do_stable_layer_norm=large,
            padding="exact",
            num_hidden_layers=1,
        )
    )


@partial(jax.jit, static_argnums=0)
def apply(model, params, waveform, num_samples):
    return model.apply({"params": params}, waveform, num_samples, output_hidden_states=True)


def hidden_states(model, params, waveform, num_samples):
    return apply(model, params, jnp.asarray(waveform), jnp.asarray(num_samples))


def test_padded_batch_equals_transformers_on_each_row_alone(exact):
    @settings(deadline=None, max_examples=60)
    @given(st.lists(st.integers(400, PADDED), min_size=3, max_size=3), st.integers(0, 2**31 - 1))
    def check(lengths, seed):
        waveform = waveforms(lengths, PADDED, seed)
        output = hidden_states(exact.model, exact.params, waveform, lengths)
        for row, length in enumerate(lengths):
            with torch.no_grad():
                alone = exact.torch(torch.tensor(waveform[row : row + 1, :length]), output_hidden_states=True)
            valid = num_frames(length)
            assert output.frame_mask[row].sum() == valid
            for ours, theirs in zip(output.hidden_states, alone.hidden_states, strict=True):
                np.testing.assert_allclose(ours[row, :valid], theirs[0].numpy(), atol=1e-5, rtol=0)

    check()


@pytest.mark.parametrize("content", [1e6, -3.0, np.nan])
def test_what_a_row_is_padded_with_changes_no_bit(exact, content):
    lengths = np.array([6000, 4321, 400])
    clean = waveforms(lengths)
    dirty = np.where(np.arange(PADDED)[None] < lengths[:, None], clean, np.float32(content))
    for ours, same in zip(
        jax.tree.leaves(hidden_states(exact.model, exact.params, clean, lengths)),
        jax.tree.leaves(hidden_states(exact.model, exact.params, dirty, lengths)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, same)


def test_more_trailing_padding_changes_no_valid_frame(exact):
    lengths = np.array([3000, 5000])
    short = hidden_states(exact.model, exact.params, waveforms(lengths, 5000), lengths)
    long = hidden_states(exact.model, exact.params, waveforms(lengths, 9000), lengths)
    for row, valid in enumerate(num_frames(lengths)):
        np.testing.assert_allclose(
            short.hidden_states[:, row, :valid], long.hidden_states[:, row, :valid], atol=1e-5, rtol=0
        )


def test_rows_without_a_frame_give_no_nan_in_value_or_gradient(exact):
    lengths = jnp.array([PADDED, 0, 399, 1])
    waveform = jnp.asarray(waveforms(lengths.tolist(), PADDED))

    def loss(params, waveform):
        output = exact.model.apply({"params": params}, waveform, lengths, output_hidden_states=True)
        return jnp.square(output.hidden_states).sum() + jnp.square(output.last_hidden_state).sum(), output

    gradients, output = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(exact.params, waveform)
    assert output.frame_mask.sum(axis=1).tolist() == [18, 0, 0, 0]
    for leaf in jax.tree.leaves((gradients, output)):
        assert np.isfinite(leaf).all()


def test_group_norm_of_the_sources_sees_the_padding_and_ours_does_not():
    """FACTS E9: with Base's norm the sources' features of an utterance depend on how much it is padded."""
    twin = twins(small_config(num_hidden_layers=1))
    lengths = np.array([3000])
    ours = WavLM(small_config(num_hidden_layers=1, padding="exact"))
    for model, moves in ((twin.model, True), (ours, False)):
        short = hidden_states(model, twin.params, waveforms(lengths), lengths).last_hidden_state
        long = hidden_states(model, twin.params, waveforms(lengths, 9000), lengths).last_hidden_state
        assert (np.abs(short - long[:, : short.shape[1]]).max() > 1e-2) == moves


@pytest.mark.parametrize("large", [False, True])
def test_microsoft_mode_equals_the_authors_masking(large):
    """transformers' model under the authors' frame rule: a frame is padding if all samples of its block are."""
    config = small_config(
        feat_extract_norm="layer" if large else "group", do_stable_layer_norm=large, padding="microsoft"
    )
    twin = twins(config)
    lengths, padded = (16000, 8000, 5000, 400), 16000
    count = num_frames(padded)

    def authors_rule(_, mask, add_adapter=None):  # noqa: ARG001 - called by name
        return mask[:, : padded - padded % count].reshape(len(mask), count, -1).any(-1)

    twin.torch._get_feature_vector_attention_mask = authors_rule
    waveform = waveforms(lengths)
    with torch.no_grad():
        theirs = twin.torch(
            torch.tensor(waveform), attention_mask=attention_mask(lengths, padded), output_hidden_states=True
        )
    ours = hidden_states(twin.model, twin.params, waveform, lengths)
    assert ours.frame_mask.sum(axis=1).tolist() == [49, 25, 16, 2]
    np.testing.assert_allclose(ours.hidden_states, torch.stack(theirs.hidden_states).numpy(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("eps", [1e-5, 1e-7])
def test_waveforms_are_normalised_over_real_samples_only(eps):
    lengths = np.array([6000, 1234, 400])
    waveform = waveforms(lengths) + np.float32(0.1)
    ours = normalize_waveform(jnp.asarray(waveform), jnp.asarray(lengths), eps)
    for row, length in enumerate(lengths):
        real = torch.tensor(waveform[row, :length])
        expected = torch.nn.functional.layer_norm(real, real.shape, eps=eps)
        np.testing.assert_allclose(ours[row, :length], expected.numpy(), atol=1e-5, rtol=0)
        assert not ours[row, length:].any()


def test_constant_and_empty_waveforms_become_zeros():
    waveform = jnp.full((3, 500), 0.25)
    assert not normalize_waveform(waveform, jnp.array([500, 100, 0])).any()
    assert not normalize_waveform(waveform).any()


def test_rows_shorter_than_a_frame_are_refused(exact):
    with pytest.raises(ValueError, match="found rows of 399 samples, expected at least 400"):
        exact.model.apply({"params": exact.params}, jnp.zeros((2, 399)))


def test_source_modes_keep_short_rows_as_the_sources_do():
    """transformers takes a row below the receptive field for valid as a whole (FACTS E6)."""
    model = torch_model(small_config(num_hidden_layers=1))
    ours = twins(small_config(num_hidden_layers=1))
    waveform = waveforms((6000, 399))
    with torch.no_grad():
        theirs = model(torch.tensor(waveform), attention_mask=attention_mask((6000, 399), 6000).long())
    output = hidden_states(ours.model, ours.params, waveform, (6000, 399))
    np.testing.assert_allclose(output.last_hidden_state, theirs.last_hidden_state.numpy(), atol=1e-5, rtol=0)
