"""Entries of a source: one per utterance, not decoded yet, and how their audio is read.

Names come from outside and may not leave their root, whatever leads there: `..`, an absolute path or a link. The root
is the folder of the source, or what the user says (`--root`).
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from wavlm_jax.audio.wave import AudioFault, AudioSource, Span, cut

COLUMNS = {
    "id": ("id", "utterance_id", "utt_id", "segment_id", "audio_id"),
    "path": ("path", "file_name", "audio_filepath"),
    "samples": ("samples",),
    "speaker": ("speaker", "speaker_id", "client_id", "spk_id"),
    "text": ("text", "transcription", "transcript", "sentence", "normalized_text", "raw_transcription"),
    "phones": ("phones",),
}
"""Names of columns in manifests and data sets; the first that exists is taken."""
Chosen: TypeAlias = Mapping[str, str]
"""Key of `COLUMNS` -> the column that a user has named for it, "" for none."""
_NESTED = ("speaker", "text")
_MOST_LISTED = 20
_MOST_SHOWN = 80


class SourceError(ValueError):
    """A source that cannot be read; names file and line, what was found, what was expected."""


class PhoneTimes(NamedTuple):
    """Phones of one utterance as a manifest gives them; samples at 16 kHz."""

    symbols: list[str]
    starts: list[int]
    ends: list[int]


class Entry(NamedTuple):
    """One utterance of a source; nothing was decoded yet."""

    id: str
    audio: str | int
    """Path inside the source's root, or row of a data set."""
    stamp: str = ""
    """Size and time of the file: changes when the file changes."""
    samples: int | None = None
    """Length that a manifest claims."""
    speaker: str = ""
    text: str = ""
    phones: PhoneTimes | None = None
    span: Span | None = None
    """The part of the file that is meant; None: all of it."""

    @property
    def listing(self) -> str:
        """All fields but the stamp as JSON, for digests; no span is left out, as when entries had none."""
        fields = tuple(self._replace(stamp=""))
        return json.dumps(fields if self.span else fields[:-1], ensure_ascii=True)


def names_in(row: Mapping[str, Any]) -> dict[str, None]:
    """Column names of a row (or of a mapping from columns to types): its keys, and `key.inner` of nested mappings."""
    inner = (f"{key}.{name}" for key, value in row.items() if isinstance(value, Mapping) for name in value)
    return dict.fromkeys([*row, *inner])


def value_at(row: Mapping[str, Any], name: str) -> Any:
    """The cell of a row that a name of `names_in` stands for."""
    if name in row:
        return row[name]
    key, _, inner = name.partition(".")
    return None if row[key] is None else row[key][inner]


def choose_columns(available: Iterable[str], chosen: Chosen, where: str) -> dict[str, str]:
    """Key of `COLUMNS` -> its column: the one that the user names, else the first known one, nested ones last.

    Raises:
        SourceError: there is no column of the name that the user gave.

    """
    found, taken = dict.fromkeys(available), {}
    for key, names in COLUMNS.items():
        nested = [name for name in found if key in _NESTED and "." in name and name.rpartition(".")[2] in names]
        name = chosen.get(key, next((name for name in (*names, *nested) if name in found), ""))
        if name and name not in found:
            raise SourceError(f"{where}: no column {name!r} for the {key}; found {listed(found)}")
        if name:
            taken[key] = name
    return taken


def listed(names: Iterable[str]) -> str:
    """Names for a message of bounded length."""
    known = [name[:_MOST_LISTED] for name in names]
    more = f" and {len(known) - _MOST_LISTED} more" if len(known) > _MOST_LISTED else ""
    return ", ".join(known[:_MOST_LISTED]) + more


def text_of(value: Any) -> str:
    """A cell as text: numbers without a needless point, "" for nothing and NaN.

    Raises:
        ValueError: a list, an object, or half a character, which JSON can spell and UTF-8 cannot.

    """
    if value is None or value != value:  # noqa: PLR0124  (NaN)
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int | float):
        raise ValueError(f"is {str(value)[:_MOST_SHOWN]!r}, expected text")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"is {text[:_MOST_SHOWN]!r}, expected text") from error
    return text


def one_line(text: str) -> str:
    """A transcript whose line breaks are blanks."""
    return " ".join(line for line in text.splitlines() if line)


AudioReader: TypeAlias = Callable[[Entry], AudioSource]
"""Entry -> its audio: bytes, or the path of a file; raises `AudioFault`. Picklable, for worker processes."""


@dataclass(frozen=True)
class UtteranceSource:
    """A list of utterances, and how to read their audio."""

    description: str
    entries: Sequence[Entry]
    reader: AudioReader
    notes: tuple[str, ...] = ()
    """For people: how the source was understood."""


@dataclass(frozen=True)
class FileReader:
    """Audio files under `root`, a resolved path. An `AudioReader`."""

    root: Path
    folder: Path | None = None
    """What relative paths start from; None: the root."""

    def __call__(self, entry: Entry) -> Path | bytes:
        """The file or the part of it that is meant, unless its path or a link leads out of the root."""
        path = (self.folder or self.root) / str(entry.audio)
        kept = kept_inside(path, self.root, str(path))
        return kept if entry.span is None else cut(kept, entry.span)


def inside(path: Path, root: Path) -> bool:
    """Whether `path`, with all links followed, lies under the resolved folder `root`."""
    return path.resolve().is_relative_to(root)


def kept_inside(path: Path, root: Path, what: str) -> Path:
    """`path` if it lies under `root`, else an `AudioFault` outside_root about `what`."""
    if not inside(path, root):
        raise AudioFault("outside_root", f"{what} leads out of {root}; {root_cure([path])}")
    return path


def root_cure(paths: Iterable[Path]) -> str:
    """What makes files outside of the root readable, for messages."""
    common = os.path.commonpath([path.resolve().parent for path in paths])
    return f"if the source is to be trusted with it: --root {common}, or another folder that has all audio"


def digest(entries: Iterable[Entry], *extra: str, stamps: bool = False) -> str:
    """SHA-256 (hex) over a list of utterances and `extra`; with `stamps` also over the state of their files."""
    sha256 = hashlib.sha256("\0".join(extra).encode())
    for entry in entries:
        sha256.update(entry.listing.encode() + (entry.stamp.encode() if stamps else b"") + b"\n")
    return sha256.hexdigest()


def stamp_of(path: Path) -> str:
    """Size and modification time in whole seconds; "" if the file does not exist."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_size}@{int(status.st_mtime)}"
