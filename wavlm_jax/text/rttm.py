"""Who spoke when: RTTM (turns) and UEM (the parts of a recording that are scored), read and written."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from wavlm_jax.text.lines import number, read_fields, wrong

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
