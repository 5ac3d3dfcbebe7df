"""Word and character error rates over a corpus (jiwer, extra `evaluate`).

Accuracy and F1 of classifiers (scikit-learn).

Equal error rate and minimum detection cost of speaker verification.

Diarisation error rate (pyannote.metrics, extra `evaluate`).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from wavlm_jax.text.records import Region, Turn


class ErrorRate(NamedTuple):
    """Errors over the words (or characters) of all references together, not the mean over utterances."""

    substitutions: int
    deletions: int
    insertions: int
    reference: int
    """Words (characters) of the references."""

    @property
    def rate(self) -> float:
        """Errors per word of the reference; 0 where nothing was said and nothing heard, infinite where only heard."""
        errors = self.substitutions + self.deletions + self.insertions
        return errors / self.reference if self.reference else (float("inf") if errors else 0.0)


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRate:
    """Word errors; nothing is normalised, white space separates words.

    Raises:
        ValueError: lists of different lengths.

    """
    import jiwer  # noqa: PLC0415 an extra

    return _counted(jiwer.process_words(*_paired(references, hypotheses)))


def character_errors(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRate:
    """Character errors; one space between words counts as a character.

    Raises:
        ValueError: lists of different lengths.

    """
    import jiwer  # noqa: PLC0415 an extra

    return _counted(jiwer.process_characters(*_paired(references, hypotheses)))


def _paired(references: Sequence[str], hypotheses: Sequence[str]) -> tuple[list[str], list[str]]:
    if len(references) != len(hypotheses):
        raise ValueError(f"references: found {len(references)}, expected one for each of {len(hypotheses)} hypotheses")
    return [" ".join(text.split()) for text in references], [" ".join(text.split()) for text in hypotheses]


def _counted(output: "object") -> ErrorRate:
    counts = {name: int(getattr(output, name)) for name in ("substitutions", "deletions", "insertions", "hits")}
    total = counts["hits"] + counts["substitutions"] + counts["deletions"]
    return ErrorRate(counts["substitutions"], counts["deletions"], counts["insertions"], total)


class ClassificationScore(NamedTuple):
    """How often a classifier is right."""

    accuracy: float
    macro_f1: float
    """Mean over the classes that the reference or the answers have."""
    weighted_f1: float
    """Mean over the classes, by how often the reference has them."""


def classification_score(reference: Sequence[str], answers: Sequence[str]) -> ClassificationScore:
    """The scores of `answers`.

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
    """How much of the time is given to the wrong speaker, under the best mapping of speakers within each recording.

    With `window` under the best mapping within each stretch of so many seconds: what is left are the errors that are no
    matter of following a speaker for longer than that.

    Args:
        reference: the truth.
        hypothesis: what was found; any names of speakers.
        regions: what is scored; a recording without a region is not.
        collar: seconds left out on *each* side of a reference boundary, as in md-eval (0.25 is usual, 0 strict).
        skip_overlap: whether speech of several speakers is left out.
        window: seconds; each region is cut into windows of this length from its start on, the last one is shorter.

    Raises:
        ValueError: turns of recordings that have no region, named; a window or a collar that cannot be.

    """
    from pyannote.metrics.diarization import DiarizationErrorRate  # noqa: PLC0415 an extra

    if window is not None and not window > 0:
        raise ValueError(f"window: found {window} s, expected more than 0")
    if not collar >= 0:
        raise ValueError(f"collar: found {collar} s, expected 0 or more")
    names = {region.recording for region in regions}
    for kind, turns in (("reference", reference), ("hypothesis", hypothesis)):
        stray = sorted({turn.recording for turn in turns} - names)
        if stray:
            raise ValueError(f"{kind}: {', '.join(stray[:5])} has turns but no region to score; add it to the UEM")
    metric = DiarizationErrorRate(collar=2 * collar, skip_overlap=skip_overlap)
    sums = dict.fromkeys(("false alarm", "missed detection", "confusion", "total"), 0.0)
    for name in sorted(names):
        wanted, found = _annotation(reference, name), _annotation(hypothesis, name)
        for scored in _scored([region for region in regions if region.recording == name], window):
            parts: Any = metric(wanted, found, uem=scored, detailed=True)
            sums = {part: total + float(parts[part]) for part, total in sums.items()}
    return DiarizationError(*sums.values())


def one_speaker(regions: Sequence[Region]) -> list[Turn]:
    """The answer of whoever heard nothing: one speaker all the time."""
    return [Turn(region.recording, region.start, region.end - region.start, "one") for region in regions]


def one_voice(reference: Sequence[Turn]) -> list[Turn]:
    """The answer of whoever knows when there is speech, and nothing of speakers: one, wherever somebody speaks."""
    merged: list[Turn] = []
    for turn in sorted(reference):
        if merged and merged[-1].recording == turn.recording and turn.start <= merged[-1].end:
            end = max(merged[-1].end, turn.end)
            merged[-1] = merged[-1]._replace(duration=end - merged[-1].start)
        else:
            merged.append(turn._replace(speaker="one"))
    return merged


def _scored(regions: Sequence[Region], window: float | None) -> Iterator[Any]:
    """The stretches of one recording that have a mapping of speakers each."""
    from pyannote.core import Segment, Timeline  # noqa: PLC0415 an extra

    whole = Timeline([Segment(region.start, region.end) for region in regions]).support()
    if window is None:
        yield whole
        return
    for region in whole:
        for number in range(math.ceil(region.duration / window)):
            start = region.start + number * window
            yield Timeline([Segment(start, min(start + window, region.end))])


def _annotation(turns: Sequence[Turn], recording: str) -> Any:
    from pyannote.core import Annotation, Segment  # noqa: PLC0415 an extra

    annotation = Annotation(uri=recording)
    for number, turn in enumerate(turns):
        if turn.recording == recording and turn.duration > 0:
            annotation[Segment(turn.start, turn.end), number] = turn.speaker
    return annotation
