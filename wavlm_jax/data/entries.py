"""Entries of a source: one per utterance, not decoded yet, and how their audio is read.

Names come from outside and may not leave their root: `..`, absolute paths and links that point elsewhere are refused.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

from wavlm_jax.audio.wave import AudioFault, AudioSource

COLUMNS = {
    "id": ("id", "utterance_id", "utt_id", "segment_id", "audio_id"),
    "path": ("path", "file_name"),
    "samples": ("samples",),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "text": ("text", "transcription", "transcript", "sentence", "normalized_text", "raw_transcription"),
    "phones": ("phones",),
}
"""Names of columns in manifests and data sets; the first that exists is taken."""


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

    @property
    def listing(self) -> str:
        """Everything but the stamp, for digests."""
        return json.dumps(self._replace(stamp=""), ensure_ascii=True)


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

    def __call__(self, entry: Entry) -> Path:
        """The file, unless a link leads out of the root."""
        path = self.root / str(entry.audio)
        return kept_inside(path, self.root, str(path))


def inside(path: Path, root: Path) -> bool:
    """Whether `path`, with all links followed, lies under the resolved folder `root`."""
    return path.resolve().is_relative_to(root)


def kept_inside(path: Path, root: Path, what: str) -> Path:
    """`path` if it lies under `root`, else an `AudioFault` outside_root about `what`."""
    if not inside(path, root):
        raise AudioFault("outside_root", f"{what} leads out of {root}")
    return path


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


def printable(name: str) -> str:
    """A file name as valid Unicode; invalid bytes become escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
