"""Text files from outside, line by line: UTF-8, bounded, and every wrong line named by its number.

Words with times: CTM, read and written.

Who spoke when: RTTM (turns) and UEM (the parts of a recording that are scored), read and written.

Trial lists of speaker verification: `1|0 path path` (VoxCeleb) or `path path target|nontarget` (Kaldi).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

MOST_LINE = 1 << 16


class RecordError(ValueError):
    """A text file with a line that cannot be right; the message names file, line, what was found and expected."""


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, from 1 on; nothing that is no text is read far.

    Raises:
        RecordError: no such file, a line without end, or bytes that are not UTF-8.

    """
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            while line := file.readline(MOST_LINE):
                number += 1
                if len(line) == MOST_LINE:
                    raise RecordError(f"{path}, line {number}: longer than {MOST_LINE} characters; is it a text file?")
                yield number, line
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}, after line {number}: not UTF-8 ({error.reason}); is it a binary file?") from error


def read_fields(path: Path) -> Iterator[tuple[str, list[str]]]:
    """("file, line n", fields between white space) of each line that is neither empty nor a comment (`;;`)."""
    for number, line in read_lines(path):
        fields = line.split()
        if fields and not fields[0].startswith(";;"):
            yield f"{path}, line {number}", fields


def wrong(where: str, found: object, expected: str) -> NoReturn:
    """Refuse a line.

    Raises:
        RecordError: always.

    """
    raise RecordError(f"{where}: found {str(found)[:100]!r}, expected {expected}")


def number(text: str, where: str, name: str, *, least: float = 0.0) -> float:
    """A finite number, `least` or more.

    Raises:
        RecordError: anything else.

    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < least:
        wrong(where, text, f"{name}: a number, {least:g} or more")
    return value


_CTM_FIELDS = (5, 6)


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
        if len(fields) not in _CTM_FIELDS:
            wrong(where, f"{len(fields)} fields", "recording channel start duration word [confidence]")
        recording, channel, start, duration, word = fields[:5]
        confidence = None
        if len(fields) == max(_CTM_FIELDS) and fields[5] != "NA":
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


_TURN_FIELDS = (9, 10)
_REGION_FIELDS = 4


class Turn(NamedTuple):
    """A stretch of speech of one speaker; seconds."""

    recording: str
    start: float
    duration: float
    speaker: str
    channel: str = "1"

    @property
    def end(self) -> float:
        """Where it ends, in seconds."""
        return float(self.start + self.duration)


class Region(NamedTuple):
    """A part of a recording that is scored; seconds."""

    recording: str
    start: float
    end: float
    channel: str = "1"


def read_rttm(path: Path) -> list[Turn]:
    """The SPEAKER lines of an RTTM file; lines of other types are left out.

    Raises:
        RecordError: a line with too few or many fields, or times that are no times, by its number.

    """
    turns = []
    for where, fields in read_fields(path):
        if fields[0] != "SPEAKER":
            if not fields[0].isupper():
                wrong(where, fields[0], "a line type such as SPEAKER")
            continue
        if len(fields) not in _TURN_FIELDS:
            wrong(
                where, f"{len(fields)} fields", "SPEAKER recording channel start duration <NA> <NA> speaker <NA> <NA>"
            )
        _, recording, channel, start, duration, _, _, speaker = fields[:8]
        turns.append(
            Turn(recording, number(start, where, "start"), number(duration, where, "duration"), speaker, channel)
        )
    return turns


def write_rttm(turns: Iterable[Turn]) -> str:
    """The text of an RTTM file, milliseconds."""
    return "".join(
        f"SPEAKER {turn.recording} {turn.channel} {turn.start:.3f} {turn.duration:.3f} <NA> <NA> {turn.speaker} "
        "<NA> <NA>\n"
        for turn in turns
    )


def read_uem(path: Path) -> list[Region]:
    """The regions of a UEM file.

    Raises:
        RecordError: a line that is not `recording channel start end` with end behind start, by its number.

    """
    regions = []
    for where, fields in read_fields(path):
        if len(fields) != _REGION_FIELDS:
            wrong(where, f"{len(fields)} fields", "recording channel start end")
        recording, channel, start, end = fields
        region = Region(recording, number(start, where, "start"), number(end, where, "end"), channel)
        if region.end <= region.start:
            wrong(where, f"{start} {end}", "an end behind the start")
        regions.append(region)
    return regions


def write_uem(regions: Iterable[Region]) -> str:
    """The text of a UEM file, milliseconds."""
    return "".join(f"{region.recording} {region.channel} {region.start:.3f} {region.end:.3f}\n" for region in regions)


_TRIAL_FIELDS = 3
_LISTED = 5


class Trial(NamedTuple):
    """Two recordings, and whether one speaker is in both."""

    same: bool
    left: str
    right: str


def read_trials(path: Path) -> list[Trial]:
    """The trials of a list.

    Raises:
        RecordError: a line of neither form by its number, or an empty list.

    """
    trials = []
    for where, fields in read_fields(path):
        if len(fields) != _TRIAL_FIELDS:
            wrong(where, f"{len(fields)} fields", "`1 path path`, `0 path path`, or `path path target|nontarget`")
        first, second, third = fields
        if first in ("0", "1"):
            trials.append(Trial(first == "1", second, third))
        elif third in ("target", "nontarget"):
            trials.append(Trial(third == "target", first, second))
        else:
            wrong(where, " ".join(fields), "1 or 0 in front, or target or nontarget behind")
    if not trials:
        raise RecordError(f"{path}: found no trial, expected one a line")
    return trials


def write_trials(trials: Iterable[Trial]) -> str:
    """The text of a list, in VoxCeleb's form."""
    return "".join(f"{int(trial.same)} {trial.left} {trial.right}\n" for trial in trials)


def files_of(trials: Sequence[Trial], root: Path) -> dict[str, Path]:
    """Every recording of a list, once, and its file below `root`.

    Raises:
        RecordError: files that are not there, with the number of the first trial that asks for each.

    """
    first: dict[str, int] = {}
    for number, trial in enumerate(trials, start=1):
        for name in (trial.left, trial.right):
            first.setdefault(name, number)
    missing = [f"{name} (trial {number})" for name, number in first.items() if not (root / name).is_file()]
    if missing:
        more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        raise RecordError(
            f"{root}: {len(missing)} of {len(first)} files of the trials are not there: "
            f"{', '.join(missing[:_LISTED])}{more}; is it the folder that the paths are relative to?"
        )
    return {name: root / name for name in first}
