"""Metrics against implementations that we did not write, and small cases by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn.metrics import roc_curve

from wavlm_jax.metrics import (
    DiarizationError,
    classification_score,
    diarization_error,
    equal_error_rate,
    error_curve,
    minimum_detection_cost,
)
from wavlm_jax.text.records import Region, Turn


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), trials=st.integers(4, 200), ties=st.booleans())
def test_verification_errors_are_those_of_the_roc_curve_of_scikit_learn(seed, trials, ties):
    random = np.random.default_rng(seed)
    same = random.random(trials) < 0.4
    same[:2] = True, False
    scores = random.normal(size=trials) + same
    scores = np.round(scores) if ties else scores
    alarms, hits, _ = roc_curve(same, scores, drop_intermediate=False)
    curve = error_curve(scores, same)
    np.testing.assert_allclose(curve.false_alarms, alarms, atol=1e-12)
    np.testing.assert_allclose(curve.misses, 1 - hits, atol=1e-12)
    # along the ROC polygon, so the crossing is the one of the polygon with the diagonal
    along = np.arange(len(alarms))
    gap = interp1d(along, alarms - (1 - hits))
    expected = float(interp1d(along, alarms)(brentq(gap, 0, along[-1])))
    assert equal_error_rate(scores, same).rate == pytest.approx(expected, abs=1e-9)
    cost = min(0.05 * (1 - hits) + 0.95 * alarms) / 0.05
    assert minimum_detection_cost(scores, same, target_prior=0.05) == pytest.approx(cost)


def test_verification_errors_by_hand():
    same = np.array([True, True, False, False])
    assert equal_error_rate(np.array([4.0, 3, 2, 1]), same) == (0.0, 3.0)
    assert equal_error_rate(np.array([4.0, 1, 2, 0]), same).rate == 0.5
    assert minimum_detection_cost(np.array([1.0, 2, 3, 4]), same) == 1.0  # no better than deciding blindly
    with pytest.raises(ValueError, match="found 0 of one speaker among 2"):
        equal_error_rate(np.array([1.0, 2]), np.array([False, False]))
    with pytest.raises(ValueError, match="trial 2 is NaN"):
        equal_error_rate(np.array([1.0, np.nan]), np.array([True, False]))


def test_classification_by_hand():
    found = classification_score(["a", "a", "b", "c"], ["a", "b", "b", "a"])
    assert found.accuracy == 0.5
    assert found.macro_f1 == pytest.approx((0.5 + 2 / 3 + 0) / 3)
    assert found.weighted_f1 == pytest.approx((2 * 0.5 + 2 / 3) / 4)
    with pytest.raises(ValueError, match="found 1, expected one for each of 0"):
        classification_score([], ["a"])


REGION = [Region("r", 0.0, 10.0)]


def test_diarization_by_hand():
    reference = [Turn("r", 0, 4, "A"), Turn("r", 4, 4, "B")]
    assert diarization_error(reference, [Turn("r", 0, 4, "x"), Turn("r", 4, 4, "y")], REGION).rate == 0
    shifted = [Turn("r", 0, 5, "x"), Turn("r", 5, 4, "y")]
    assert diarization_error(reference, shifted, REGION) == pytest.approx(DiarizationError(1, 0, 1, 8))
    # a collar of 1 s on each side of 0, 4 and 8 leaves 1-3 and 5-7
    assert diarization_error(reference, shifted, REGION, collar=1.0) == pytest.approx(DiarizationError(0, 0, 0, 4))
    overlap = [*reference, Turn("r", 2, 2, "B")]
    assert diarization_error(overlap, reference, REGION) == pytest.approx(DiarizationError(0, 2, 0, 10))
    assert diarization_error(overlap, reference, REGION, skip_overlap=True).rate == 0
    assert diarization_error(reference, [], [Region("r", 0, 1)]) == pytest.approx(DiarizationError(0, 1, 0, 1))


def test_turns_of_one_speaker_that_overlap_are_one_voice():
    for reference, answer in (
        ([Turn("r", 0, 6, "A"), Turn("r", 3, 6, "A")], [Turn("r", 0, 9, "x")]),
        ([Turn("r", 0, 9, "A")], [Turn("r", 0, 6, "x"), Turn("r", 3, 6, "x")]),
        ([Turn("r", 0, 9, "A")] * 2, [Turn("r", 0, 9, "x")]),
        ([Turn("r", 0, 5, "A"), Turn("r", 5, 4, "A")], [Turn("r", 0, 9, "x")]),
    ):
        assert diarization_error(reference, answer, REGION) == pytest.approx(DiarizationError(0, 0, 0, 9))


def test_speakers_are_mapped_within_each_recording():
    regions = [*REGION, Region("s", 0.0, 10.0)]
    reference = [Turn("r", 0, 5, "A"), Turn("r", 5, 5, "B"), Turn("s", 0, 5, "A")]
    hypothesis = [Turn("r", 0, 5, "1"), Turn("r", 5, 5, "2"), Turn("s", 0, 4, "2")]
    assert diarization_error(reference, hypothesis, regions) == pytest.approx(DiarizationError(0, 1, 0, 15))
    with pytest.raises(ValueError, match="hypothesis: s has turns but no region"):
        diarization_error([], hypothesis, REGION)
