"""Equal error rate and minimum detection cost of speaker verification."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

Scores = Float[np.ndarray, "trials"]
Same = Bool[np.ndarray, "trials"]


class ErrorCurve(NamedTuple):
    """The two errors at every threshold that changes them, from "accept nothing" to "accept everything"."""

    thresholds: Float[np.ndarray, "points"]
    """A trial is accepted where its score is the threshold or more."""
    misses: Float[np.ndarray, "points"]
    """Share of same-speaker trials that are rejected; falls."""
    false_alarms: Float[np.ndarray, "points"]
    """Share of different-speaker trials that are accepted; rises."""


class EqualErrorRate(NamedTuple):
    """Where both errors are the same."""

    rate: float
    threshold: float


def error_curve(scores: Scores, same: Same) -> ErrorCurve:
    """Both errors at every distinct score.

    Raises:
        ValueError: scores that are not finite, or trials of one kind alone.

    """
    if not np.isfinite(scores).all():
        raise ValueError(f"scores: trial {int(np.argmin(np.isfinite(scores))) + 1} is NaN or infinite")
    targets = int(same.sum())
    if not 0 < targets < len(same):
        raise ValueError(f"trials: found {targets} of one speaker among {len(same)}, expected some of both kinds")
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order].astype(np.float64), same[order]
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    accepted_same = np.cumsum(hits)[last]
    accepted_other = last + 1 - accepted_same
    return ErrorCurve(
        np.concatenate([[np.inf], ranked[last]]),
        np.concatenate([[1.0], 1 - accepted_same / targets]),
        np.concatenate([[0.0], accepted_other / (len(same) - targets)]),
    )


def equal_error_rate(scores: Scores, same: Same) -> EqualErrorRate:
    """Where misses and false alarms are equally frequent, linear between two thresholds.

    Args:
        scores: higher where the speakers seem to be the same.
        same: whether they are.

    Raises:
        ValueError: see `error_curve`.

    """
    curve = error_curve(scores, same)
    gap = curve.false_alarms - curve.misses
    after = int(np.argmax(gap >= 0))
    before = after - 1
    share = -gap[before] / (gap[after] - gap[before])
    rate = curve.misses[before] + share * (curve.misses[after] - curve.misses[before])
    return EqualErrorRate(float(rate), float(curve.thresholds[after]))


def minimum_detection_cost(
    scores: Scores, same: Same, *, target_prior: float = 0.01, miss_cost: float = 1.0, false_alarm_cost: float = 1.0
) -> float:
    """NIST's detection cost at the best threshold, over the cost of the better of two blind decisions.

    Args:
        scores: higher where the speakers seem to be the same.
        same: whether they are.
        target_prior: probability that they are (VoxCeleb: 0.01 or 0.05).
        miss_cost: of rejecting the right speaker.
        false_alarm_cost: of accepting another.

    Raises:
        ValueError: see `error_curve`.

    """
    curve = error_curve(scores, same)
    miss, alarm = miss_cost * target_prior, false_alarm_cost * (1 - target_prior)
    return float(np.min(miss * curve.misses + alarm * curve.false_alarms) / min(miss, alarm))
