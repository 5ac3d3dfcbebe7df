"""Trial lists of speaker verification: `1|0 path path` (VoxCeleb) or `path path target|nontarget` (Kaldi)."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from wavlm_jax.text.lines import RecordError, read_fields, wrong

_FIELDS = 3
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
        if len(fields) != _FIELDS:
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
