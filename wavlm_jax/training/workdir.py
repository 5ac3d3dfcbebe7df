"""The small files of a run whose workdir is a bucket: a folder of this machine, uploaded now and then.

Objects cannot be appended to, and metrics.jsonl is. So every process writes into a new folder of its own: what an
earlier session has left in the bucket is fetched at the start, and what has changed is uploaded before each checkpoint
is committed and at the end. A committed checkpoint thus has all lines up to its step beside it, and no machine that
ran an earlier session is needed to go on.

The workdir of a run, a folder or a bucket: opened, and claimed before anything is computed.
"""

import contextlib
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax

from wavlm_jax.training.hosts import agreed, from_first
from wavlm_jax.training.storage import BucketStorage, Files, Storage, open_storage

_PARTIAL = ".partial"
"""Files that are about to be renamed."""


class Mirror:
    """The folder, below TMPDIR, and its home."""

    def __init__(self, home: Files) -> None:
        self.home = home
        self.folder = Path(tempfile.mkdtemp(prefix="wavlm_jax-"))
        self._uploaded: dict[str, tuple[int, int]] = {}
        self.fetched = False
        """Whether the home has shown that it can be read and written; nothing is uploaded before."""

    def fetch(self) -> None:
        """Brings the files directly in the home, but what this session has written already. From now on it uploads."""
        for name in self.home.entries():
            path = self.folder / name
            if not path.exists() and self.home.exists(name):
                path.write_bytes(self.home.read(name))
                self._uploaded[name] = _stamp(path)
        self.fetched = True

    def publish(self) -> None:
        """Uploads what has changed since it was last uploaded or fetched. Safe in any thread."""
        if not self.fetched:
            return
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if not path.is_file() or path.suffix == _PARTIAL:
                continue
            stamp = _stamp(path)  # before reading: what is written meanwhile goes with the next time
            if self._uploaded.get(name) != stamp:
                self.home.write(name, path.read_bytes())
                self._uploaded[name] = stamp

    def close(self) -> None:
        """Uploads the rest and removes the folder; it stays where there is no home for it.

        Raises:
            OSError: they could not be uploaded; the message says where they are.

        """
        try:
            self.publish()
        except OSError as error:
            raise OSError(
                f"{self.folder}: the last lines of the run are here and not in its workdir: {error}"
            ) from error
        if self.fetched:
            shutil.rmtree(self.folder, ignore_errors=True)


def _stamp(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns


_VISIBLE_WITHIN = 90.0
"""Seconds; a network file system may remember for a minute that a file was not there."""


@dataclass(frozen=True)
class Workdir:
    """Where a run lives, as one process sees it."""

    storage: Storage
    folder: Path
    """For the small files: the workdir itself, or a mirror of the bucket (`mirror`)."""
    mirror: Mirror | None = None

    @classmethod
    def at(cls, folder: Path) -> "Workdir":
        """A folder that all hosts share."""
        return cls(open_storage(folder), folder)

    @property
    def place(self) -> str:
        """As a person has written it, for messages."""
        return str(self.folder) if self.mirror is None else self.storage.files.place

    def claim(self, num_bytes: int) -> None:
        """Makes sure that every process can write here, and that all mean the same place. All processes call it.

        Args:
            num_bytes: of a checkpoint; process 0 reserves and frees as many where there is a disk.

        Raises:
            OSError: on all processes; which of them cannot write or looks into another folder.

        """
        claim(self.storage.files, num_bytes)
        if self.mirror is not None:
            _all("files of earlier sessions", self.mirror.fetch)

    def publish(self) -> None:
        """What this process has written into `folder` is in the workdir when this returns."""
        if self.mirror is not None:
            self.mirror.publish()

    def lasting(self, name: str) -> str:
        """Where a file of `folder` is found when the session is over."""
        uploaded = self.mirror is not None and self.mirror.fetched
        return f"{self.place}/{name}" if uploaded else str(self.folder / name)

    def within(self, name: str) -> str:
        """The path or address of something in it that JAX reads and writes by itself."""
        if self.mirror is None or Path(name).is_absolute():
            return str((self.folder / name).absolute())
        return f"{self.place}/{name}"


@contextlib.contextmanager
def open_workdir(workdir: str) -> Iterator[Workdir]:
    """The workdir that a person names; at the end all its files are there.

    Args:
        workdir: a folder, or a gs:// address. Nothing is asked of it yet.

    Raises:
        ValueError: an address of another kind.
        OSError: at the end, where the last files could not be uploaded.

    """
    storage = open_storage(workdir)
    if isinstance(storage, BucketStorage):
        mirror = Mirror(storage.files)
        try:
            yield Workdir(storage, mirror.folder, mirror)
        finally:
            mirror.close()
    elif "://" in workdir:
        raise ValueError(f"--workdir: found {workdir}, expected a folder or a gs:// address")
    else:
        yield Workdir.at(Path(workdir))


def claim(files: Files, num_bytes: int) -> None:
    """See `Workdir.claim`."""
    mark = f".shared-{from_first('name of the mark in the workdir', secrets.token_hex(8))}"
    first = jax.process_index() == 0
    try:
        _all("room in the workdir", lambda: files.check_room(num_bytes if first else 1))
        _all("a mark in the workdir", lambda: files.write(mark, b"") if first else None)
        _all("a workdir that all hosts share", lambda: _find(files, mark))
    finally:
        if first:
            with contextlib.suppress(OSError):
                files.delete(mark)


def _all(name: str, do: Callable[[], None]) -> None:
    complaint = None
    try:
        do()
    except OSError as error:
        complaint = str(error)
    if found := agreed(name, complaint):
        raise OSError(found)


def _find(files: Files, mark: str) -> None:
    end = time.monotonic() + _VISIBLE_WITHIN
    while not files.exists(mark):
        if time.monotonic() > end:
            raise OSError(
                f"{files.place}/{mark}: process 0 has written this file, and it is not here after "
                f"{_VISIBLE_WITHIN:.0f} s; give a --workdir on a file system that all hosts share"
            )
        time.sleep(0.5)
