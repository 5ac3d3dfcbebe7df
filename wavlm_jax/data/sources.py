"""What speech there is: folders of audio, manifests, and whatever `datasets` loads, as one list of utterances.

Names come from outside and may not leave their root: `..`, absolute paths and links that point elsewhere are refused.
Faults of a manifest stop everything and name the line; faults of an audio file are found later and only counted.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

from wavlm_jax.audio.wave import AudioFault, AudioSource

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus", ".oga", ".aif", ".aiff", ".au", ".sph", ".w64"})


ID_COLUMNS = ("id", "utterance_id", "utt_id", "segment_id", "audio_id")
SPEAKER_COLUMNS = ("speaker", "speaker_id", "client_id")
TEXT_COLUMNS = ("text", "transcription", "transcript", "sentence", "normalized_text", "raw_transcription")
"""Names under which data sets keep what a manifest calls id, speaker and text; the first that is there counts."""


class SourceError(ValueError):
    """A source that cannot be read as a whole; names the file and line, what was found, what was expected."""


class Alignment(NamedTuple):
    """Phones of one utterance in samples of its file."""

    symbols: list[str]
    starts: list[int]
    ends: list[int]


class Entry(NamedTuple):
    """One utterance of a source, before anything was decoded."""

    id: str
    audio: str | int
    """Path inside the source's root, or row of a data set."""
    stamp: str = ""
    """Changes when the file changes: size and time."""
    samples: int | None = None
    """What a manifest claims."""
    speaker: str = ""
    text: str = ""
    phones: Alignment | None = None

    @property
    def listing(self) -> str:
        """Everything but the stamp, for digests."""
        return json.dumps(self._replace(stamp=""), ensure_ascii=True)


AudioReader: TypeAlias = Callable[[Entry], AudioSource]
"""How the audio of an entry is reached: bytes, or the path of a file inside the root; else an `AudioFault`. Travels to
worker processes."""


@dataclass(frozen=True)
class Source:
    """A list of utterances with a way to their audio."""

    description: str
    entries: Sequence[Entry]
    reader: AudioReader
    notes: tuple[str, ...] = ()
    """What a person should know about how the source was read."""


@dataclass(frozen=True)
class Files:
    """Audio files under one root, which is resolved."""

    root: Path

    def __call__(self, entry: Entry) -> Path:
        """The file, if no link leads out of the root."""
        path = self.root / str(entry.audio)
        return kept_inside(path, self.root, str(path))


def inside(path: Path, root: Path) -> bool:
    """Whether `path`, all links followed, lies under the folder `root`, which has none in it."""
    return path.resolve().is_relative_to(root)


def kept_inside(path: Path, root: Path, what: str) -> Path:
    """`path`, if it lies under `root`.

    Raises:
        AudioFault: outside_root, about `what`.

    """
    if not inside(path, root):
        raise AudioFault("outside_root", f"{what} leads out of {root}")
    return path


def digest(entries: Iterable[Entry], *extra: str, stamps: bool = False) -> str:
    """SHA-256 (hex) over a list of utterances; `stamps`: over the state of their files too."""
    sha256 = hashlib.sha256("\0".join(extra).encode())
    for entry in entries:
        sha256.update(entry.listing.encode() + (entry.stamp.encode() if stamps else b"") + b"\n")
    return sha256.hexdigest()


def stamp(path: Path) -> str:
    """Size and whole seconds of the last change; "" where there is nothing."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_size}@{int(status.st_mtime)}"


def from_folder(root: Path) -> Source:
    """Every audio file under `root`, in order of its path. The id is the path without suffix.

    Linked folders are not entered (they could lead anywhere, or round in circles), but noted; linked files are taken if
    they lie inside the root.

    Raises:
        SourceError: no audio file there.

    """
    root = root.resolve()
    paths = sorted(_audio_files(root), key=os.fsencode)
    if not paths:
        raise SourceError(f"{root}: no audio file, expected one of *{', *'.join(sorted(AUDIO_SUFFIXES))}")
    stems = [os.path.splitext(path)[0] for path in paths]  # noqa: PTH122  (Path would normalise odd names)
    shared = {stem for stem, count in _counts(stems).items() if count > 1}
    names = [path if stem in shared else stem for path, stem in zip(paths, stems, strict=True)]
    entries = [
        Entry(id=printable(name), audio=path, stamp=stamp(root / path)) for name, path in zip(names, paths, strict=True)
    ]
    return Source(f"folder {root}", entries, Files(root), tuple(_linked_folders(root)))


def has_audio(root: Path) -> bool:
    """Whether there is any file with the suffix of audio below `root`."""
    return next(_audio_files(root), None) is not None


def printable(name: str) -> str:
    """A file name as valid Unicode; bytes that are none become escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _audio_files(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        odd = [name for name in folders if _is_audio(name) and not os.path.islink(os.path.join(folder, name))]  # noqa: PTH114, PTH118
        for name in [*files, *odd]:
            if _is_audio(name):
                yield os.path.relpath(os.path.join(folder, name), root)  # noqa: PTH118


def _linked_folders(root: Path) -> Iterator[str]:
    for folder, folders, _ in os.walk(root):
        for name in folders:
            path = Path(folder, name)
            if path.is_symlink():
                yield f"{path}: a linked folder, not entered; to have its audio, give it as a SOURCE of its own"


def _is_audio(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES and not name.startswith(".")  # noqa: PTH122


def _counts(names: Iterable[str]) -> Mapping[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts
