"""Scores: classification (scikit-learn), speaker verification, diarisation (pyannote.metrics, extra `evaluate`).

Error rates of recognition are counted where they are decoded, inside jit (`wavlm_jax.tasks.ctc`).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from wavlm_jax.extras import extra
from wavlm_jax.text.records import Region, Turn


class ClassificationScore(NamedTuple):
    """Scores of a classifier over a set of utterances."""

    accuracy: float
    macro_f1: float
    """F1 averaged over the classes that occur in the reference or the answers."""
    weighted_f1: float
    """F1 averaged over the classes, weighted by their counts in the reference."""


def classification_score(reference: Sequence[str], answers: Sequence[str]) -> ClassificationScore:
    """The scores of `answers`, one class per utterance.

    Raises:
        ValueError: nothing to score, or lists of different lengths.

    """
    if not reference or len(reference) != len(answers):
        raise ValueError(
            f"answers: found {len(answers)}, expected one for each of {len(reference)} utterances, and some"
        )
    from sklearn.metrics import accuracy_score, f1_score  # noqa: PLC0415 a second, for those who classify

    return ClassificationScore(
        float(accuracy_score(reference, answers)),
        *(float(f1_score(reference, answers, average=kind, zero_division=0.0)) for kind in ("macro", "weighted")),
    )


Scores = Float[np.ndarray, "trials"]
Same = Bool[np.ndarray, "trials"]


class ErrorCurve(NamedTuple):
    """Both error rates at every threshold that changes them, from "accept nothing" to "accept everything"."""

    thresholds: Float[np.ndarray, "points"]
    """A trial is accepted if its score is at least the threshold."""
    misses: Float[np.ndarray, "points"]
    """Share of same-speaker trials that are rejected; descending."""
    false_alarms: Float[np.ndarray, "points"]
    """Share of different-speaker trials that are accepted; ascending."""


class EqualErrorRate(NamedTuple):
    """The rate at which misses and false alarms are equally frequent."""

    rate: float
    threshold: float


def error_curve(scores: Scores, same: Same) -> ErrorCurve:
    """Both error rates at every distinct score.

    Raises:
        ValueError: scores that are not finite, or only trials of one kind.

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
    """The rate at which misses and false alarms are equally frequent, interpolated linearly between two thresholds.

    Args:
        scores: higher means more alike.
        same: whether both sides are one speaker.

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
    """NIST's minimum detection cost, normalised by the cost of always accepting or always rejecting.

    Args:
        scores: higher means more alike.
        same: whether both sides are one speaker.
        target_prior: probability of a same-speaker trial (VoxCeleb: 0.01 or 0.05).
        miss_cost: of rejecting the same speaker.
        false_alarm_cost: of accepting another speaker.

    Raises:
        ValueError: see `error_curve`.

    """
    curve = error_curve(scores, same)
    miss, alarm = miss_cost * target_prior, false_alarm_cost * (1 - target_prior)
    return float(np.min(miss * curve.misses + alarm * curve.false_alarms) / min(miss, alarm))


class DiarizationError(NamedTuple):
    """Seconds, over all recordings together."""

    false_alarm: float
    missed: float
    confusion: float
    total: float
    """Speech of the reference; overlapping speakers count one by one."""

    @property
    def rate(self) -> float:
        """The diarisation error rate."""
        errors = self.false_alarm + self.missed + self.confusion
        return errors / self.total if self.total else (float("inf") if errors else 0.0)


def diarization_error(
    reference: Sequence[Turn],
    hypothesis: Sequence[Turn],
    regions: Sequence[Region],
    *,
    collar: float = 0.0,
    skip_overlap: bool = False,
    window: float | None = None,
) -> DiarizationError:
    """Diarisation error, under the best mapping of speakers within each recording.

    With `window`, under the best mapping within each window instead: this leaves out errors of keeping a speaker's
    identity for longer than a window. Turns of one speaker that overlap or touch count as one.

    Args:
        reference: the true turns.
        hypothesis: the turns to score, with any names of speakers.
        regions: what is scored; recordings without a region are not.
        collar: seconds left out on *each* side of a reference boundary, as in md-eval (0.25 is usual, 0 is strict).
        skip_overlap: whether overlapping speech is left out.
        window: seconds; each region is cut into windows of this length, the last one may be shorter.

    Raises:
        ValueError: turns of recordings without a region; a window or collar that is not positive.
        MissingExtraError: pyannote.metrics is not installed.

    """
    _, pyannote = scorer()
    if window is not None and not window > 0:
        raise ValueError(f"window: found {window} s, expected more than 0")
    if not collar >= 0:
        raise ValueError(f"collar: found {collar} s, expected 0 or more")
    names = {region.recording for region in regions}
    for kind, turns in (("reference", reference), ("hypothesis", hypothesis)):
        stray = sorted({turn.recording for turn in turns} - names)
        if stray:
            raise ValueError(f"{kind}: {', '.join(stray[:5])} has turns but no region to score; add it to the UEM")
    metric = pyannote.DiarizationErrorRate(collar=2 * collar, skip_overlap=skip_overlap)
    sums = dict.fromkeys(("false alarm", "missed detection", "confusion", "total"), 0.0)
    for name in sorted(names):
        wanted, found = _annotation(reference, name), _annotation(hypothesis, name)
        for scored in _scored([region for region in regions if region.recording == name], window):
            parts: Any = metric(wanted, found, uem=scored, detailed=True)
            sums = {part: total + float(parts[part]) for part, total in sums.items()}
    return DiarizationError(*sums.values())


def scorer() -> tuple[Any, Any]:
    """Pyannote's modules `core` and `metrics.diarization`.

    Raises:
        MissingExtraError: it is not installed.

    """
    with extra("evaluate", "the diarisation error rate"):
        from pyannote import core  # noqa: PLC0415
        from pyannote.metrics import diarization  # noqa: PLC0415
    return core, diarization


def one_speaker(regions: Sequence[Region]) -> list[Turn]:
    """Baseline: one speaker all the time."""
    return [Turn(region.recording, region.start, region.end - region.start, "one") for region in regions]


def one_voice(reference: Sequence[Turn]) -> list[Turn]:
    """Baseline: true speech activity, one speaker."""
    return _merged(turn._replace(speaker="one") for turn in reference)


def _merged(turns: Iterable[Turn]) -> list[Turn]:
    """Turns of one speaker that overlap or touch become one, as in md-eval and dscore: nobody speaks twice at once."""
    merged: list[Turn] = []
    for turn in sorted(turns, key=lambda turn: (turn.recording, turn.speaker, turn.start)):
        last = merged[-1] if merged else None
        if last and (last.recording, last.speaker) == (turn.recording, turn.speaker) and turn.start <= last.end:
            merged[-1] = last._replace(duration=max(last.end, turn.end) - last.start)
        else:
            merged.append(turn)
    return merged


def _scored(regions: Sequence[Region], window: float | None) -> Iterator[Any]:
    """Timelines of one recording, each of which gets its own mapping of speakers."""
    core, _ = scorer()
    whole = core.Timeline([core.Segment(region.start, region.end) for region in regions]).support()
    if window is None:
        yield whole
        return
    for region in whole:
        for number in range(math.ceil(region.duration / window)):
            start = region.start + number * window
            yield core.Timeline([core.Segment(start, min(start + window, region.end))])


def _annotation(turns: Sequence[Turn], recording: str) -> Any:
    core, _ = scorer()
    annotation = core.Annotation(uri=recording)
    spoken = (turn for turn in turns if turn.recording == recording and turn.duration > 0)
    for number, turn in enumerate(_merged(spoken)):
        annotation[core.Segment(turn.start, turn.end), number] = turn.speaker
    return annotation
