"""Diarisation error rate (pyannote.metrics, extra `evaluate`)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from wavlm_jax.text.rttm import Region, Turn


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

    def describe(self) -> str:
        """One line for people."""
        parts = (("missed", self.missed), ("false alarm", self.false_alarm), ("confusion", self.confusion))
        shares = ", ".join(f"{name} {100 * part / max(self.total, 1e-9):.2f}" for name, part in parts)
        return f"DER {100 * self.rate:.2f} % of {self.total:.1f} s ({shares})"


def diarization_error(
    reference: Sequence[Turn],
    hypothesis: Sequence[Turn],
    regions: Sequence[Region],
    *,
    collar: float = 0.0,
    skip_overlap: bool = False,
) -> DiarizationError:
    """How much of the time is given to the wrong speaker, under the best mapping of speakers within each recording.

    Args:
        reference: the truth.
        hypothesis: what was found; any names of speakers.
        regions: what is scored; a recording without a region is not.
        collar: seconds left out on *each* side of a reference boundary, as in md-eval (0.25 is usual, 0 strict).
        skip_overlap: whether speech of several speakers is left out.

    Raises:
        ValueError: turns of recordings that have no region, named.

    """
    from pyannote.core import Segment, Timeline  # noqa: PLC0415 an extra
    from pyannote.metrics.diarization import DiarizationErrorRate  # noqa: PLC0415 an extra

    names = {region.recording for region in regions}
    for kind, turns in (("reference", reference), ("hypothesis", hypothesis)):
        stray = sorted({turn.recording for turn in turns} - names)
        if stray:
            raise ValueError(f"{kind}: {', '.join(stray[:5])} has turns but no region to score; add it to the UEM")
    metric = DiarizationErrorRate(collar=2 * collar, skip_overlap=skip_overlap)
    sums = dict.fromkeys(("false alarm", "missed detection", "confusion", "total"), 0.0)
    for name in sorted(names):
        scored = Timeline([Segment(region.start, region.end) for region in regions if region.recording == name])
        parts: Any = metric(
            _annotation(reference, name), _annotation(hypothesis, name), uem=scored.support(), detailed=True
        )
        sums = {part: total + float(parts[part]) for part, total in sums.items()}
    return DiarizationError(*sums.values())


def _annotation(turns: Sequence[Turn], recording: str) -> Any:
    from pyannote.core import Annotation, Segment  # noqa: PLC0415 an extra

    annotation = Annotation(uri=recording)
    for number, turn in enumerate(turns):
        if turn.recording == recording and turn.duration > 0:
            annotation[Segment(turn.start, turn.end), number] = turn.speaker
    return annotation
