"""Span masks: fairseq's rule, whatever the length; padding masks of the three conventions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.torch_twins import attention_mask, small_config, torch_model
from wavlm_jax.config import WavLMConfig
from wavlm_jax.model import layers
from wavlm_jax.model.layers import frame_mask

PRETRAINING = {"prob": 0.8, "length": 10, "min_masks": 2}


span_mask = jax.jit(layers.span_mask, static_argnums=2, static_argnames=PRETRAINING)
channel_mask = jax.jit(layers.channel_mask, static_argnums=1, static_argnames=PRETRAINING)


def masks(valid, num_frames, seed=0, **settings_):
    keys = jax.random.split(jax.random.key(seed), len(valid))
    return np.asarray(span_mask(keys, jnp.array(valid), num_frames, **(PRETRAINING | settings_)))


def fairseq_span_count(valid: int, prob: float, length: int, rounding: float, min_masks: int) -> int:
    return max(int(prob * valid / length + rounding), min_masks)


def fairseq_mask(valid: int, prob: float, length: int, min_masks: int, generator) -> np.ndarray:
    """The rule of FACTS C3 on the host, for lengths where it needs no special case."""
    count = fairseq_span_count(valid, prob, length, generator.random(), min_masks)
    starts = generator.choice(valid - length, count, replace=False)
    mask = np.zeros(valid, bool)
    for start in starts:
        mask[start : start + length] = True
    return mask


def test_share_and_spread_are_fairseqs():
    ours = masks([500] * 4000, 500).mean(axis=1)
    generator = np.random.default_rng(0)
    theirs = np.array([fairseq_mask(500, generator=generator, **PRETRAINING).mean() for _ in range(4000)])
    assert abs(ours.mean() - 0.567) < 0.003
    assert abs(ours.mean() - theirs.mean()) < 0.003
    assert abs(ours.std() - 0.03) < 0.004
    assert abs(ours.std() - theirs.std()) < 0.002


def test_every_frame_is_masked_as_often_as_fairseq_masks_it():
    ours = masks([60] * 20000, 60).mean(axis=0)
    generator = np.random.default_rng(1)
    theirs = np.mean([fairseq_mask(60, generator=generator, **PRETRAINING) for _ in range(20000)], axis=0)
    np.testing.assert_allclose(ours, theirs, atol=5 * np.sqrt(0.5 / 20000))


def test_defined_for_every_length_up_to_2000():
    lengths = np.arange(2001)
    result = masks(lengths, 2000)
    position = np.arange(2000)
    assert not (result & (position[None] >= lengths[:, None] - 1)).any(), "padding or the last valid frame is masked"
    assert not result[:2].any(), "a row of one frame or none has a mask"
    assert result[2:].any(axis=1).all(), "min_masks 2 leaves no longer row without a mask"
    long = result[30:]
    share = long.sum(axis=1) / lengths[30:]
    assert (share > 0.3).all()
    assert (share < 0.8).all()


@settings(deadline=None, max_examples=50)
@given(st.integers(30, 400), st.integers(0, 2**31 - 1))
def test_spans_are_whole_and_as_many_as_wanted(valid, seed):
    """With spans of one frame, starts are visible: their number is floor(p n / l + U), all distinct."""
    count = masks([valid], 400, seed, prob=0.3, length=1, min_masks=0).sum()
    assert count in (int(0.3 * valid), int(0.3 * valid) + 1)
    spans = np.flatnonzero(np.diff(np.pad(masks([valid], 400, seed)[0].astype(int), 1)))
    assert (spans[1::2] - spans[::2] >= 10).all(), "a span was cut"


def test_mask_of_a_row_does_not_depend_on_its_batch():
    keys = jax.random.split(jax.random.key(3), 5)
    valid = jnp.array([300, 20, 7, 250, 111])
    together = span_mask(keys, valid, 300, **PRETRAINING)
    for row in range(5):
        alone = span_mask(keys[row : row + 1], valid[row : row + 1], 300, **PRETRAINING)
        np.testing.assert_array_equal(together[row], alone[0])


def share_of_short_runs(masks: np.ndarray) -> float:
    edges = np.flatnonzero(np.diff(np.pad(masks, ((0, 0), (1, 1))).astype(int).ravel()))
    return float((edges[1::2] - edges[::2] < 10).mean())


@pytest.mark.parametrize(("frames", "share"), [(768, 0.540), (100, 0.502)])
def test_torn_masks_are_those_of_the_authors_batches_of_four_rows(frames, share):
    """The shares were measured with UniSpeech's own function (issue 15); its rule is replayed here."""
    generator = np.random.default_rng(0)
    theirs = np.array([fairseq_mask(frames, generator=generator, **PRETRAINING) for _ in range(1200)])
    for batch in theirs.reshape(-1, 4, frames):
        for row in batch:
            row[generator.permutation(np.flatnonzero(row))[batch.sum(axis=1).min() :]] = False
    keys = jax.random.split(jax.random.key(5), 2000)
    whole = span_mask(keys, jnp.full(2000, frames), frames, **PRETRAINING)
    result = np.asarray(jax.jit(layers.torn, static_argnums=2)(whole, keys, 4))
    assert (result <= np.asarray(whole)).all()
    counts = result.sum(axis=1).reshape(-1, 4)
    np.testing.assert_array_equal(
        counts, np.asarray(whole).sum(axis=1).reshape(-1, 4).min(axis=1, keepdims=True) + 0 * counts
    )
    assert abs(result.mean() - share) < 0.003
    assert abs(theirs.mean() - share) < 0.004
    assert abs(share_of_short_runs(result) - share_of_short_runs(theirs)) < 0.015
    np.testing.assert_array_equal(layers.torn(whole[4:8], keys[4:8], 4), result[4:8])


def test_channel_masks_have_whole_spans_and_the_wanted_share():
    keys = jax.random.split(jax.random.key(4), 2000)
    result = np.asarray(channel_mask(keys, 768, prob=0.5, length=64, min_masks=0))
    assert abs(result.mean() - (1 - np.exp(-0.5))) < 0.03
    edges = np.flatnonzero(np.diff(np.pad(result[0].astype(int), 1)))
    assert (edges[1::2] - edges[::2] >= 64).all()
    assert not channel_mask(keys, 32, prob=0.0, length=10, min_masks=0).any()


@pytest.mark.parametrize(
    ("padding", "lengths", "expected"),
    [
        ("exact", (16000, 8000, 5000, 400, 399, 0), (49, 24, 15, 1, 0, 0)),
        ("huggingface", (16000, 8000, 5000, 400, 399), (49, 24, 15, 1, 49)),
        ("microsoft", (16000, 8000, 5000, 400, 399, 0), (49, 25, 16, 2, 2, 0)),
    ],
)
def test_frame_masks_of_the_three_conventions(padding, lengths, expected):
    config = WavLMConfig.tiny(padding=padding)
    mask = frame_mask(jnp.array(lengths), 49, 16000, config)
    assert mask.sum(axis=1).tolist() == list(expected)
    assert (jnp.diff(mask.astype(int), axis=1) <= 0).all(), "valid frames come first"


def test_huggingface_frame_mask_equals_transformers():
    lengths = [16000, 15999, 12345, 720, 719, 400, 399, 100, 10, 1]
    theirs = torch_model(small_config())._get_feature_vector_attention_mask(49, attention_mask(lengths, 16000).long())
    ours = frame_mask(jnp.array(lengths), 49, 16000, small_config())
    np.testing.assert_array_equal(ours, theirs.numpy())
