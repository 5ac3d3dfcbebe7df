"""The workdir of a run: a folder, or an address in Google Cloud Storage (gs://bucket/run).

The first half reads and writes single files below such a place with fsspec, whose calls are the same for a folder and
a bucket. `etils.epath`, which Orbax uses, will not do: asked whether a file exists, it takes any failure of a bucket
for "no", and a checkpoint would be deleted as unfinished; it caches listings for ever, while TensorStore and other
hosts write; and it goes through TensorFlow wherever that is installed.

The second half is the workdir: checked before anything is computed, and, where it is a bucket, with a local folder for
the small files. Objects cannot be appended to, and metrics.jsonl is. So every process writes into a new folder of its
own: what an earlier session has left in the bucket is fetched at the start, what has changed is uploaded before each
checkpoint is committed and at the end. A committed checkpoint thus has all lines up to its step beside it, and no
machine that ran an earlier session is needed to go on.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import jax

from wavlm_jax.extras import MissingExtraError, extra
from wavlm_jax.files import named
from wavlm_jax.training.hosts import all_succeed, broadcast_one_to_all

SCHEME = "gs://"
_PIECE = 2**26
"""Bytes of a file that are in memory at a time while it is hashed."""
_RETRIES = {"gcs_request_retries": {"max_retries": 3, "max_delay": "1s"}}
"""Of the check at the start: TensorStore's own 32 take minutes to say that nobody answers."""
_CURE = (
    "look at the address, at the network, and at who you are to Google (gcloud auth application-default login, or the "
    "service account of this machine): it must be allowed to list, read, write and delete objects here "
    "(roles/storage.objectUser)"
)
_PARTIAL = ".partial"
"""Ending of small files that are about to be renamed."""
_BOUNDARY = "==lease=="
_SMALL = 2**20
"""Bytes below which a file that grew is uploaded whole, by one request."""
VISIBLE_WITHIN = 90.0
"""Seconds; a network file system may remember for a minute that a file was not there."""


def address(path: str | Path) -> str | None:
    """The gs:// address that was written, or None for a path of this machine.

    pathlib makes one slash of two, so "gs:/bucket/run" is understood as well.
    """
    scheme, colon, rest = str(path).partition(":")
    if scheme + colon + "//" != SCHEME or not rest.startswith("/"):
        return None
    return SCHEME + rest.strip("/")


def absolute(workdir: str | Path) -> str:
    """A workdir as the functions below, Orbax and messages take it: an address, or an absolute path."""
    return address(workdir) or str(Path(workdir).absolute())


def list_names(folder: str) -> list[str]:
    """Names of the files and folders directly in `folder`; none where there is no such folder."""
    with _explained(folder, "listed"), contextlib.suppress(FileNotFoundError):
        return sorted(filter(None, (path.rstrip("/").rsplit("/", 1)[-1] for path in _files(folder).ls(folder, False))))
    return []


def file_sizes(folder: str) -> dict[str, int]:
    """Path below `folder` -> bytes, of every file however deep. Objects that stand for a folder are none."""
    with _explained(folder, "listed"):
        found = _files(folder).find(folder, detail=True)
    inside = folder.removeprefix(SCHEME) + "/"
    sizes = {
        path.removeprefix(inside): int(facts["size"]) if facts["type"] == "file" else -1  # a device, a pipe
        for path, facts in sorted(found.items())
    }
    return {name: size for name, size in sizes.items() if name and not name.endswith("/")}


def exists(path: str) -> bool:
    """Whether the file exists now, without any cache. A server that does not answer is an error, not False."""
    return file_size(path) is not None


def file_size(path: str) -> int | None:
    """Bytes of a file now, without any cache; None where there is none."""
    if address(path) is None:
        list_names(path.rpartition("/")[0])  # looking into the folder makes NFS ask its server again
    with _explained(path, "read"), contextlib.suppress(FileNotFoundError):
        facts = _files(path).info(path)
        return int(facts["size"]) if facts["type"] == "file" else None
    return None


def read_bytes(path: str, most: int | None = None) -> bytes:
    """All of a file; FileNotFoundError where there is none, ValueError where it has more than `most` bytes."""
    with _explained(path, "read"):
        content = bytes(_files(path).cat_file(path, end=None if most is None else most + 1))
    if most is not None and len(content) > most:
        raise ValueError(f"{path}: more than {most} bytes")
    return content


def sha256(path: str, size: int) -> str:
    """Of a file of `size` bytes, in hexadecimal, read piece by piece."""
    result = hashlib.sha256()
    for start in range(0, size, _PIECE):
        with _explained(path, "read"):
            result.update(_files(path).cat_file(path, start=start, end=min(start + _PIECE, size)))
    return result.hexdigest()


def write_object(path: str, content: bytes) -> None:
    """A whole file, durable when this returns. An object is there whole or not at all."""
    with _explained(path, "written"):
        _files(path).pipe_file(path, content)
    fsync(path)


def append(path: str, size: int, content: bytes) -> bool:
    """Appends to a file of just `size` bytes; returns False, and does nothing, if it is small or has another size.

    In a bucket the new part is uploaded as an object beside it, and Google joins the two: readers see old or new.
    """
    if size < _SMALL or file_size(path) != size:
        return False
    if not content:
        return True
    with _explained(path, "written"):
        if address(path) is None:
            with Path(path).open("ab") as file:
                file.write(content)
            fsync(path)
            return True
        folder, _, name = path.rpartition("/")
        _files(path).pipe_file(tail := f"{folder}/.{name}.tail", content)
        _files(path).merge(path, [path, tail])
    remove(tail)
    return True


def swap(path: str, before: bytes | None, after: bytes | None) -> bool:
    """Compare-and-swap: replaces the content of a small file if it still is `before`. None: there is no such file.

    Returns:
        Whether it was replaced. Of several processes that try at the same moment, one succeeds.

    """
    with _explained(path, "written"):
        return (_swap_file if address(path) is None else _swap_object)(path, before, after)


def _swap_file(path: str, before: bytes | None, after: bytes | None) -> bool:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as file:  # noqa: PTH123
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if not Path(path).exists() or not os.path.samestat(Path(path).stat(), os.fstat(file.fileno())):
            return False  # deleted, and perhaps made anew, before it was locked
        if file.read() != (before or b""):
            return False
        if after is None:
            Path(path).unlink()
        else:
            file.seek(0)
            file.write(after)
            file.truncate()
        return True


def _swap_object(path: str, before: bytes | None, after: bytes | None) -> bool:
    """On condition of the object's generation, a number that changes whenever it is written."""
    files = _files(path)
    bucket, _, name = path.removeprefix(SCHEME).partition("/")
    try:
        generation = files.info(path)["generation"]
        if bytes(files.cat_file(path)) != before:
            return False
    except FileNotFoundError:
        generation = "0"
        if before is not None:
            return False
    try:
        if after is None:
            files.call("DELETE", "b/{}/o/{}", bucket, name, ifGenerationMatch=generation)
        else:
            parts = [b"Content-Type: application/json\n\n" + json.dumps({"name": name}).encode()]
            parts += [b"Content-Type: application/octet-stream\n\n" + after]
            files.call(  # pipe_file knows no other condition than that there is no such object
                "POST",
                f"{files._location}/upload/storage/v1/b/{bucket}/o",  # noqa: SLF001 gcsfs has no public name for it
                uploadType="multipart",
                ifGenerationMatch=generation,
                headers={"Content-Type": f'multipart/related; boundary="{_BOUNDARY}"'},
                data=b"".join(f"--{_BOUNDARY}\n".encode() + part + b"\n" for part in parts)
                + f"--{_BOUNDARY}--".encode(),
            )
    except (FileNotFoundError, FileExistsError):  # gone, or written by another
        return False
    return True


def fsync(path: str) -> None:
    """Makes a file durable (fsync), or a folder after a rename in it. Objects are durable as soon as they are there."""
    if address(path) is None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: str) -> None:
    """A file or a whole folder, if it is there."""
    with _explained(path, "deleted"), contextlib.suppress(FileNotFoundError):
        _files(path).rm(path, recursive=True)


def _files(path: str) -> Any:
    """The file system that `path` is on. Nothing is cached: others may have written a moment ago."""
    if address(path) is None:
        return fsspec.filesystem("file")
    with extra("gcs", "gs://", ", or give a folder"):
        return fsspec.filesystem("gcs", use_listings_cache=False)


@contextlib.contextmanager
def _explained(path: str, done: str) -> Iterator[None]:
    """Whatever gcsfs, aiohttp and google.auth raise as an OSError that names the object."""
    try:
        yield
    except (FileNotFoundError, MissingExtraError):
        raise
    except Exception as error:
        if address(path) is None:
            raise
        raise OSError(f"{path}: cannot be {done} ({type(error).__name__}: {error})") from error


def check_room(place: str, num_bytes: int) -> None:
    """Checks that a checkpoint can be written to `place`, by trying it.

    In a folder `num_bytes` are reserved and freed. In a bucket an object is written as arrays are, read and deleted as
    everything else is: TensorStore and gcsfs find their credentials apart from each other.

    Raises:
        OSError: not writable, full, over quota, packages missing; the message names the place and what to do.

    """
    if address(place) is None:
        _check_folder(place, num_bytes)
    else:
        _check_bucket(place)


def cure(place: str) -> str:
    """What to do where nothing can be written, for messages."""
    return "make room or choose another --workdir (--out)" if address(place) is None else _CURE


def _check_folder(folder: str, num_bytes: int) -> None:
    probe = Path(folder) / f".space-{os.getpid()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            file.write(b"\0")
            file.flush()
            _reserve(file.fileno(), folder, num_bytes)
    except OSError as error:
        raise OSError(
            f"{folder}: a checkpoint of {num_bytes / 2**20:,.0f} MiB cannot be written here ({error.strerror}); "
            f"{cure(folder)}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _reserve(descriptor: int, folder: str, num_bytes: int) -> None:
    """Reserves disk blocks for `num_bytes`; where the system has no such call (macOS), asks for the free space."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, max(num_bytes, 1))
    elif shutil.disk_usage(folder).free < num_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _check_bucket(place: str) -> None:
    _files(place)
    name = f".probe-{secrets.token_hex(8)}"
    try:
        _write_by_tensorstore(place, name)
        read_bytes(f"{place}/{name}")
        remove(f"{place}/{name}")
    except OSError as error:
        raise OSError(f"{place}: a checkpoint cannot be written here ({error}); {cure(place)}") from error


def _write_by_tensorstore(place: str, name: str) -> None:
    import tensorstore  # noqa: PLC0415 Orbax's, and slow to import

    bucket, _, path = place.removeprefix(SCHEME).partition("/")
    spec = {"driver": "gcs", "bucket": bucket, "path": f"{path}/" if path else ""}
    try:
        store = tensorstore.KvStore.open(spec, context=tensorstore.Context(_RETRIES)).result()
        store.write(name, b"a probe of wavlm_jax").result()
    except (ValueError, RuntimeError) as error:  # as TensorStore hands statuses over
        raise OSError(str(error)) from error


@dataclass(frozen=True)
class _Uploaded:
    """What is known of a file that is in the workdir."""

    stamp: tuple[int, int]
    size: int
    digest: bytes

    @classmethod
    def of(cls, path: Path, content: bytes) -> "_Uploaded":
        return cls(_stamp(path), len(content), hashlib.sha256(content).digest())

    def begins(self, content: bytes) -> bool:
        return hashlib.sha256(content[: self.size]).digest() == self.digest


class Workdir:
    """Where a run lives, as one process sees it.

    Args:
        place: a folder that all hosts share, or a gs:// address.
        mirror: a folder of this process for the small files; None: they are written into `place` itself.

    """

    def __init__(self, place: str | Path, mirror: Path | None = None) -> None:
        self.place = str(place)
        """As a person has written it, for messages."""
        self.folder = Path(place) if mirror is None else mirror
        """Where this process writes its small files."""
        self._home = None if mirror is None else absolute(place)
        self._uploaded: dict[str, _Uploaded] = {}
        self._fetched = False
        """Whether the place has shown that it can be read and written; nothing is uploaded before."""
        self.guard: Callable[[], None] | None = None
        """Raises an OSError where the place belongs to another process by now; None: nobody owns it (`lease`)."""

    def claim(self, num_bytes: int) -> None:
        """Makes sure that every process can write here, and that all mean the same place. All processes call it.

        Args:
            num_bytes: of a checkpoint; process 0 reserves and frees as many where there is a disk.

        Raises:
            OSError: on all processes; which of them cannot write or looks into another folder.

        """
        first, place = jax.process_index() == 0, absolute(self.place)
        mark = f"{place}/.shared-{broadcast_one_to_all('name of the mark in the workdir', secrets.token_hex(8))}"
        try:
            all_succeed("room in the workdir", lambda: check_room(place, num_bytes if first else 1))
            all_succeed("a mark in the workdir", lambda: write_object(mark, b"") if first else None)
            all_succeed("a workdir that all hosts share", lambda: _find(mark))
        finally:
            if first:
                with contextlib.suppress(OSError):
                    remove(mark)
        all_succeed("files of earlier sessions", self.fetch)

    def fetch(self) -> None:
        """Copies the files directly in the place into the mirror, but those that this session has written already."""
        if self._home is None:
            return
        for name in list_names(self._home):
            path = self.folder / name
            hidden = name.startswith(".")  # what `claim` writes and removes, on other hosts at this moment
            if not hidden and not path.exists() and exists(f"{self._home}/{name}"):
                content = read_bytes(f"{self._home}/{name}")
                path.write_bytes(content)
                self._uploaded[name] = _Uploaded.of(path, content)
        self._fetched = True

    def publish(self) -> None:
        """Uploads what has changed in the mirror since it was last uploaded or fetched. Safe in any thread.

        Raises:
            OSError: nothing is published, as the place belongs to another process by now; or no answer.

        """
        if self.guard is not None:
            self.guard()
        if self._home is None or not self._fetched:
            return
        for folder, _, names in os.walk(self.folder):
            for path in (Path(folder, name) for name in sorted(names) if not name.endswith(_PARTIAL)):
                with contextlib.suppress(FileNotFoundError):  # a tracker's own, which has gone meanwhile
                    self._upload(path, path.relative_to(self.folder).as_posix())

    def _upload(self, path: Path, name: str) -> None:
        """A file that grew sends what is new."""
        target, before, stamp = f"{self._home}/{name}", self._uploaded.get(name), _stamp(path)
        if before is None or before.stamp != stamp:
            content = path.read_bytes()  # what is written meanwhile goes with the next time
            if before is None or not before.begins(content) or not append(target, before.size, content[before.size :]):
                write_object(target, content)
            self._uploaded[name] = replace(_Uploaded.of(path, content), stamp=stamp)

    def close(self) -> None:
        """Uploads the rest and removes the mirror, which stays where nothing could be uploaded.

        Raises:
            OSError: they could not be uploaded; the message says where they are.

        """
        try:
            self.publish()
        except OSError as error:
            raise OSError(
                f"{self.folder}: the last lines of the run are here and not in its workdir: {error}"
            ) from error
        if self._fetched or (self._home is not None and not any(self.folder.iterdir())):
            shutil.rmtree(self.folder, ignore_errors=True)

    def lasting(self, name: str) -> str:
        """The path or address under which a file of `folder` is found after the session."""
        return f"{self.place}/{name}" if self._fetched else str(self.folder / name)

    def within(self, name: str) -> str:
        """Path or address of `name` in the workdir, for what JAX itself reads and writes (its compilation cache)."""
        return str(Path(name)) if Path(name).is_absolute() else f"{absolute(self.place)}/{name}"


@contextlib.contextmanager
def open_workdir(workdir: str) -> Iterator[Workdir]:
    """The workdir that a person names; at the end all its files are there.

    Args:
        workdir: a folder, or a gs:// address. Nothing is asked of it yet.

    Raises:
        ValueError: an address of another kind.
        OSError: at the end, where the last files could not be uploaded.

    """
    place = address(workdir)
    if place is None and "://" in workdir:
        raise ValueError(f"--workdir: found {workdir}, expected a folder or a gs:// address")
    mirror = None if place is None else Path(tempfile.mkdtemp(prefix="wavlm_jax-"))
    opened = Workdir(place or named(workdir), mirror)
    try:
        yield opened
    finally:
        opened.close()


def _find(mark: str) -> None:
    end = time.monotonic() + VISIBLE_WITHIN
    while not exists(mark):
        if time.monotonic() > end:
            raise OSError(
                f"{mark}: process 0 has written this file, and it is not here after {VISIBLE_WITHIN:.0f} s; give a "
                "--workdir on a file system that all hosts share"
            )
        time.sleep(0.5)


def _stamp(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns
