"""Text files of records: CTM (words with times), RTTM (speaker turns), UEM (scored regions), lists of trials.

Files from outside are read line by line: UTF-8 (a byte order mark is no part of the first line), of bounded length, and
every wrong line is named by its number.
Trial lists of speaker verification have either VoxCeleb's form, `1|0 path path`, or Kaldi's,
`path path target|nontarget`.
"""

import gzip
import io
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from wavlm_jax.files import open_regular

MOST_LINE = 1 << 16
_GZIP = b"\x1f\x8b"


class RecordError(ValueError):
    """A text file with a line that cannot be right; the message names file, line, what was found and expected."""


def read_lines(path: Path, *, unpack: bool = False) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, from 1 on; reading stops at the first sign that the file is not text.

    Args:
        path: the file.
        unpack: whether it may be gzipped; of unbounded length then.

    Raises:
        RecordError: no such file, one that is no regular file, a line that is too long, or bytes that are not UTF-8.

    """
    number = 0
    try:
        with io.BufferedReader(open_regular(path)) as stored:
            packed = unpack and stored.peek(2)[:2] == _GZIP
            file = io.TextIOWrapper(gzip.GzipFile(fileobj=stored) if packed else stored, encoding="utf-8-sig")
            while line := file.readline(MOST_LINE):
                number += 1
                if len(line) == MOST_LINE:
                    raise RecordError(f"{path}, line {number}: longer than {MOST_LINE} characters; is it a text file?")
                yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise RecordError(f"{path}, after line {number}: gzip data that are damaged or cut off ({error})") from error
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}, after line {number}: not UTF-8 ({error.reason}); is it a binary file?") from error


def _read_fields(path: Path) -> Iterator[tuple[str, list[str]]]:
    """("file, line n", white-space separated fields) of each line that is neither empty nor a comment (`;;`)."""
    for number, line in read_lines(path):
        fields = line.split()
        if fields and not fields[0].startswith(";;"):
            yield f"{path}, line {number}", fields


def _refuse(where: str, found: object, expected: str) -> NoReturn:
    raise RecordError(f"{where}: found {str(found)[:100]!r}, expected {expected}")


def _seconds(text: str, where: str, name: str) -> float:
    """A finite number, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        _refuse(where, text, f"{name}: a number, 0 or more")
    return value


class TimedWord(NamedTuple):
    """A word and when it was said; seconds."""

    recording: str
    start: float
    duration: float
    word: str


def write_ctm(words: Iterable[TimedWord]) -> str:
    """The text of a CTM file, times in milliseconds, channel 1."""
    return "".join(f"{word.recording} 1 {word.start:.3f} {word.duration:.3f} {word.word}\n" for word in words)


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
    for where, fields in _read_fields(path):
        if fields[0] != "SPEAKER":
            if not fields[0].isupper():
                _refuse(where, fields[0], "a line type such as SPEAKER")
            continue
        if len(fields) not in _TURN_FIELDS:
            _refuse(
                where, f"{len(fields)} fields", "SPEAKER recording channel start duration <NA> <NA> speaker <NA> <NA>"
            )
        _, recording, channel, start, duration, _, _, speaker = fields[:8]
        turns.append(
            Turn(recording, _seconds(start, where, "start"), _seconds(duration, where, "duration"), speaker, channel)
        )
    return turns


def write_rttm(turns: Iterable[Turn]) -> str:
    """The text of an RTTM file, times in milliseconds; white space in names becomes _, as fields end there.

    Raises:
        RecordError: two recordings, or two speakers of one, that would have the same name then.

    """
    lines: list[str] = []
    names: dict[tuple[str, ...], tuple[str, ...]] = {}
    for turn in turns:
        recording, speaker = ("_".join(name.split()) for name in (turn.recording, turn.speaker))
        for written, name in (
            ((recording,), (turn.recording,)),
            ((recording, speaker), (turn.recording, turn.speaker)),
        ):
            if names.setdefault(written, name) != name:
                raise RecordError(
                    f"RTTM: {names[written][-1]!r} and {name[-1]!r} would both be {written[-1]}; rename one"
                )
        times = f"{turn.start:.3f} {turn.duration:.3f}"
        lines.append(f"SPEAKER {recording} {turn.channel} {times} <NA> <NA> {speaker} <NA> <NA>\n")
    return "".join(lines)


def read_uem(path: Path) -> list[Region]:
    """The regions of a UEM file.

    Raises:
        RecordError: a line that is not `recording channel start end` with end behind start, by its number.

    """
    regions = []
    for where, fields in _read_fields(path):
        if len(fields) != _REGION_FIELDS:
            _refuse(where, f"{len(fields)} fields", "recording channel start end")
        recording, channel, start, end = fields
        region = Region(recording, _seconds(start, where, "start"), _seconds(end, where, "end"), channel)
        if region.end <= region.start:
            _refuse(where, f"{start} {end}", "an end behind the start")
        regions.append(region)
    return regions


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
    for where, fields in _read_fields(path):
        if len(fields) != _TRIAL_FIELDS:
            _refuse(where, f"{len(fields)} fields", "`1 path path`, `0 path path`, or `path path target|nontarget`")
        first, second, third = fields
        if first in ("0", "1"):
            trials.append(Trial(first == "1", second, third))
        elif third in ("target", "nontarget"):
            trials.append(Trial(third == "target", first, second))
        else:
            _refuse(where, " ".join(fields), "1 or 0 in front, or target or nontarget behind")
    if not trials:
        raise RecordError(f"{path}: found no trial, expected one per line")
    return trials


def trial_files(trials: Sequence[Trial], root: Path) -> dict[str, Path]:
    """Every recording of a list, once, and its file below `root`.

    Raises:
        RecordError: files that do not exist, each with the number of the first trial that names it.

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
