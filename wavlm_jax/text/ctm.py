"""Words with times: CTM, read and written."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from wavlm_jax.text.lines import number, read_fields, wrong

_FIELDS = (5, 6)


class TimedWord(NamedTuple):
    """A word and when it was said; seconds."""

    recording: str
    start: float
    duration: float
    word: str
    confidence: float | None = None
    channel: str = "1"


def read_ctm(path: Path) -> list[TimedWord]:
    """The words of a CTM file.

    Raises:
        RecordError: a line that is not `recording channel start duration word [confidence]`, by its number.

    """
    words = []
    for where, fields in read_fields(path):
        if len(fields) not in _FIELDS:
            wrong(where, f"{len(fields)} fields", "recording channel start duration word [confidence]")
        recording, channel, start, duration, word = fields[:5]
        confidence = None
        if len(fields) == max(_FIELDS) and fields[5] != "NA":
            confidence = number(fields[5], where, "confidence")
            if confidence > 1:
                wrong(where, fields[5], "confidence: a number from 0 to 1")
        words.append(
            TimedWord(
                recording, number(start, where, "start"), number(duration, where, "duration"), word, confidence, channel
            )
        )
    return words


def write_ctm(words: Iterable[TimedWord]) -> str:
    """The text of a CTM file: milliseconds, four places of confidence."""
    lines = []
    for word in words:
        confidence = "" if word.confidence is None else f" {word.confidence:.4f}"
        lines.append(f"{word.recording} {word.channel} {word.start:.3f} {word.duration:.3f} {word.word}{confidence}\n")
    return "".join(lines)
