"""Model inputs against transformers' Wav2Vec2FeatureExtractor, and the two things that it gets wrong."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Wav2Vec2FeatureExtractor

from wavlm_jax.audio.recordings import check_rate, normalize, pad, statistics
from wavlm_jax.config import WavLMConfig

LARGE = WavLMConfig.tiny(do_normalize=True, normalize_eps=1e-7)
BASE = WavLMConfig.tiny(do_normalize=False, normalize_eps=1e-7)


def _waves(lengths, scale=0.1, offset=0.03):
    random = np.random.default_rng(1)
    return [(random.normal(size=n) * scale + offset).astype(np.float32) for n in lengths]


def _theirs(waves, ours, **how):
    extractor = Wav2Vec2FeatureExtractor(do_normalize=ours.do_normalize, return_attention_mask=True)
    return extractor(waves, sampling_rate=16_000, padding=True, return_tensors="np", **how)


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 3_000), min_size=1, max_size=5), multiple=st.sampled_from([None, 320, 1_000]))
def test_rows_are_those_of_transformers(lengths, multiple):
    waves = _waves(lengths)
    for kind in (LARGE, BASE):
        theirs = _theirs(waves, kind, pad_to_multiple_of=multiple)
        ours = pad([normalize(wave, kind) for wave in waves], theirs.input_values.shape[1])
        np.testing.assert_allclose(ours.waveform, theirs.input_values, atol=1e-5)
        np.testing.assert_array_equal(ours.num_samples, theirs.attention_mask.sum(axis=1))


def test_batch_mates_and_padding_change_nothing():
    waves = _waves([400, 5_000])
    together = pad([normalize(wave, LARGE) for wave in waves], 8_000).waveform
    np.testing.assert_array_equal(together[0, :400], normalize(waves[0], LARGE))
    assert not together[0, 400:].any()
    blind = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False)
    theirs = blind(waves, sampling_rate=16_000, padding=True, return_tensors="np").input_values
    assert np.abs(theirs[0, :400] - together[0, :400]).max() > 0.1  # their trap: the padding counts


def test_a_piece_is_normalised_by_the_whole():
    (wave,) = _waves([4_000])
    pieces = [normalize(wave[start : start + 1_000], LARGE, statistics(wave)) for start in range(0, 4_000, 1_000)]
    np.testing.assert_array_equal(np.concatenate(pieces), normalize(wave, LARGE))


def test_eps_follows_the_source():
    (quiet,) = _waves([4_000], scale=1e-3, offset=0.0)
    authors = WavLMConfig.tiny(do_normalize=True, normalize_eps=1e-5)
    assert normalize(quiet, authors).std() == pytest.approx(np.sqrt(1e-6 / 1.1e-5), rel=0.05)
    assert not normalize(np.full(500, 0.5, np.float32), LARGE).any()  # a constant wave is silence, not NaN


def test_wrong_inputs_are_refused():
    with pytest.raises(ValueError, match=r"a\.wav: found 44100 Hz, expected 16000 Hz; resample it"):
        check_rate(44_100, "a.wav")
    with pytest.raises(ValueError, match="the longest has 500 samples, expected at most 400"):
        pad(_waves([500]), 400)
    assert pad([]).waveform.shape == (0, 0)
