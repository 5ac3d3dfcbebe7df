"""Folders of audio: which of their files are audio that can be read, and a word for each kind that is left out."""

import os
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

LIBSNDFILE_SUFFIXES = frozenset(
    ".wav .flac .mp3 .ogg .opus .oga .aif .aiff .aifc .au .snd .caf .rf64 .w64 .sph .nist".split()  # noqa: SIM905
)
PYAV_SUFFIXES = frozenset(".m4a .m4b .aac .mp4 .mov .3gp .webm .mkv .mka .wma .amr".split())  # noqa: SIM905
"""Read where the extra `containers` is installed."""
AUDIO_SUFFIXES = LIBSNDFILE_SUFFIXES | (PYAV_SUFFIXES if find_spec("av") else frozenset())
UNREAD_SUFFIXES = PYAV_SUFFIXES.union(".avi .ac3 .ape .wv .tta .shn .mp2 .raw .pcm".split()) - AUDIO_SUFFIXES  # noqa: SIM905
"""Sound (or video with sound) that is not read; a folder that has such files says so."""
_SYSTEM_FOLDERS = frozenset({"__MACOSX", "lost+found", "$RECYCLE.BIN", "@eaDir"})
_NAMED = 3


class AudioFolder(NamedTuple):
    """What lies under a folder; all paths are relative to it."""

    root: Path
    audio: list[str]
    """Files (and odd folders) with an ending of audio, sorted by bytes."""
    others: list[str]
    """All other files that are not hidden, sorted by bytes: transcripts and the like."""
    unread: list[str]
    """Those of `others` that are audio of a kind that is not read."""
    notes: tuple[str, ...]
    """For people: what was left out."""


def walk(root: Path) -> AudioFolder:
    """The audio files under `root`.

    Links to folders are not entered (they could lead anywhere, or in circles). Hidden folders such as .Trash, what
    operating systems leave (__MACOSX), and hidden files (macOS's ._x.wav) are no part of it. All of these are noted.
    """
    audio, others, hidden, notes = list[str](), list[str](), list[str](), list[str]()
    refused: list[OSError] = []
    for folder, folders, files in os.walk(root, onerror=refused.append):
        inner = os.path.relpath(folder, root)
        place = "" if inner == "." else inner + os.sep
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]  # noqa: PTH114, PTH118
        notes += [f"{folder}/{name}: a linked folder, not entered; give it as an input of its own" for name in links]
        odd = [name for name in folders if _has(name, AUDIO_SUFFIXES) and name not in links]
        hidden += [place + name + os.sep for name in folders if _is_hidden(name)]
        folders[:] = [name for name in folders if not _is_hidden(name)]
        for name in [*files, *odd]:
            if name.startswith("."):
                hidden += [place + name] if _has(name, AUDIO_SUFFIXES | UNREAD_SUFFIXES) else []
            else:
                (audio if _has(name, AUDIO_SUFFIXES) else others).append(place + name)
    audio.sort(key=os.fsencode)
    others.sort(key=os.fsencode)
    unread = [name for name in others if _has(name, UNREAD_SUFFIXES)]
    if hidden:
        notes.append(f"{root}: left out as hidden: {_some(hidden)}")
    if unread:
        notes.append(f"{root}: left out, not read: {counted(unread)}; {cure_of(unread)}")
    notes += [f"{error.filename}: left out: {error.strerror}" for error in refused]
    return AudioFolder(root, audio, others, unread, tuple(notes))


def counted(names: Iterable[str]) -> str:
    """How many files have which ending: `2 .m4a, 1 .webm`."""
    endings = Counter(_ending(name) for name in names)
    return ", ".join(f"{count} {ending}" for ending, count in endings.most_common())


def cure_of(unread: Iterable[str]) -> str:
    """What to do about files that are not read."""
    extra = "pip install 'wavlm-jax[containers]', or " if any(_has(name, PYAV_SUFFIXES) for name in unread) else ""
    return f"{extra}convert them, for example to flac"


def _some(names: list[str]) -> str:
    named = ", ".join(os.fsencode(name).decode("utf-8", "backslashreplace") for name in sorted(names)[:_NAMED])
    return named + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122  (Path would normalise odd names)


def _has(name: str, endings: frozenset[str]) -> bool:
    return _ending(name) in endings


def _is_hidden(folder: str) -> bool:
    return folder.startswith(".") or folder in _SYSTEM_FOLDERS
