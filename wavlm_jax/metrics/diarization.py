"""Diarisation error rate (pyannote.metrics, extra `evaluate`)."""

import math
from collections.abc import Iterator, Sequence
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
