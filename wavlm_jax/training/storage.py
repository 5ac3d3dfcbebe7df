"""Files below one place: what checkpoints ask of a folder (`disk`) and of a bucket (`bucket`) alike.

The disk: files in a folder, room before it is needed, and changes that a power cut does not undo.

A bucket: the objects below a gs:// address, through gcsfs.

Orbax writes arrays into it with TensorStore's driver and its own small files through etils.epath, which asks gcsfs too.

Where the checkpoints of a run are, and how one comes into being there all at once.

    folder/checkpoints/1000/{params,train,manifest.json,...}   committed by one rename
    folder/checkpoints/.unfinished/2000                        being written

A bucket has no rename. There the manifest, an object of its own, is written last, and its folder is a checkpoint from
then on:

    gs://bucket/run/checkpoints/1000/{params,train,manifest.json,...}
    gs://bucket/run/checkpoints/2000/{params,...}              being written
    gs://bucket/run/checkpoints/.manifest-last                 says so, and that what has no manifest may go
"""

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Files(Protocol):
    """Files below `place`, each named by its path from there ("params/d/0"). What goes wrong is an OSError."""

    place: str
    """As people and Orbax know it."""
    readers: int
    """How many files are worth reading at a time."""

    def below(self, name: str) -> "Files":
        """The files of a folder in here."""
        ...

    def entries(self) -> list[str]:
        """Names of the files and folders directly in here; none where there is no such place."""
        ...

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of every file, however deep."""
        ...

    def exists(self, name: str) -> bool:
        """Whether there is such a file now, whoever wrote it."""
        ...

    def read(self, name: str) -> bytes:
        """All of a file; FileNotFoundError where there is none."""
        ...

    def digest(self, name: str, size: int) -> str:
        """SHA-256 of a file of `size` bytes, in hexadecimal."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """A whole file, durable when this returns."""
        ...

    def delete(self, name: str) -> None:
        """One file, if it is there."""
        ...

    def clear(self) -> None:
        """Everything."""
        ...

    def settle(self) -> None:
        """What others have written here is durable when this returns."""
        ...

    def check_room(self, num_bytes: int) -> None:
        """Really writes and removes something; the message of the OSError names the place and what to do."""
        ...


class Folder:
    """`Files` of a folder."""

    readers = 1

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.place = str(self.path)

    def below(self, name: str) -> "Folder":
        """See `Files`."""
        return Folder(self.path / name)

    def entries(self) -> list[str]:
        """See `Files`."""
        return sorted(path.name for path in self.path.iterdir()) if self.path.is_dir() else []

    def sizes(self) -> dict[str, int]:
        """See `Files`."""
        paths = (path for path in sorted(self.path.rglob("*")) if path.is_file())
        return {path.relative_to(self.path).as_posix(): path.stat().st_size for path in paths}

    def exists(self, name: str) -> bool:
        """See `Files`. Looking into the folder makes NFS ask its server again."""
        path = self.path / name
        if not path.is_file():
            self.entries()
        return path.is_file()

    def read(self, name: str) -> bytes:
        """See `Files`."""
        return (self.path / name).read_bytes()

    def digest(self, name: str, size: int) -> str:  # noqa: ARG002 a bucket asks for ranges, and has to know
        """See `Files`."""
        with (self.path / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def write(self, name: str, content: bytes) -> None:
        """See `Files`."""
        with (self.path / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def delete(self, name: str) -> None:
        """See `Files`."""
        with contextlib.suppress(FileNotFoundError):
            (self.path / name).unlink()

    def clear(self) -> None:
        """See `Files`."""
        shutil.rmtree(self.path, ignore_errors=True)

    def settle(self) -> None:
        """See `Files`."""
        for name in self.sizes():
            with (self.path / name).open("rb") as file:
                os.fsync(file.fileno())

    def check_room(self, num_bytes: int) -> None:
        """See `Files`; reserves and frees as many bytes."""
        check_space(self.path, num_bytes)


def push(folder: Path) -> None:
    """A rename in `folder`, onto the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_space(workdir: Path, num_bytes: int) -> None:
    """Reserves and frees room for one checkpoint, really.

    Raises:
        OSError: not writable, full, over quota; the message names the folder and the bytes.

    """
    probe = workdir / f".space-{os.getpid()}"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            file.write(b"\0")
            file.flush()
            _reserve(file.fileno(), workdir, num_bytes)
    except OSError as error:
        raise OSError(
            f"{workdir}: a checkpoint of {num_bytes / 2**20:,.0f} MiB cannot be written here ({error.strerror}); "
            f"make room or choose another --workdir"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _reserve(descriptor: int, folder: Path, num_bytes: int) -> None:
    """Blocks for `num_bytes`; where the system has no such call (macOS), a look at the free ones."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, max(num_bytes, 1))
    elif shutil.disk_usage(folder).free < num_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


SCHEME = "gs://"
_PIECE = 2**26
"""Bytes of an object that are in memory at a time, for each reader."""
_RETRIES = {"gcs_request_retries": {"max_retries": 3, "max_delay": "1s"}}
"""Of the probe: TensorStore's own 32 take minutes to say that nobody is there."""
_CURE = (
    "look at the address, at the network, and at who you are to Google (gcloud auth application-default login, or the "
    "service account of this machine): it must be allowed to list, read, write and delete objects here "
    "(roles/storage.objectUser)"
)


def address(path: str | Path) -> str | None:
    """The gs:// address that was written, or None for a path of this machine.

    pathlib makes one slash of two, so "gs:/bucket/run" is understood as well.
    """
    scheme, colon, rest = str(path).partition(":")
    if scheme + colon + "//" != SCHEME or not rest.startswith("/"):
        return None
    return SCHEME + rest.strip("/")


class Bucket:
    """`Files` of an address. Nothing is cached: another host or TensorStore may have written a moment ago."""

    readers = 8

    def __init__(self, place: str) -> None:
        """An address as `address` gives it, for instance "gs://bucket/runs/base"."""
        self.place = place

    def below(self, name: str) -> "Bucket":
        """See `Files`."""
        return Bucket(f"{self.place}/{name}")

    def entries(self) -> list[str]:
        """See `Files`."""
        with self._explained("listed"), contextlib.suppress(FileNotFoundError):
            return sorted(name for path in _gcs().ls(self.place, detail=False) if (name := _last(path)))
        return []

    def sizes(self) -> dict[str, int]:
        """See `Files`. Objects that stand for a folder are none."""
        inside = self.place.removeprefix(SCHEME) + "/"
        with self._explained("listed"):
            found = _gcs().find(self.place, detail=True)
        names = {path.removeprefix(inside): facts["size"] for path, facts in sorted(found.items())}
        return {name: int(size) for name, size in names.items() if name and not name.endswith("/")}

    def exists(self, name: str) -> bool:
        """See `Files`. Only the bucket's own word counts: gcsfs's isfile takes every failure for a no."""
        with self._explained("read", name), contextlib.suppress(FileNotFoundError):
            return bool(_gcs().info(f"{self.place}/{name}")["type"] == "file")
        return False

    def read(self, name: str) -> bytes:
        """See `Files`."""
        with self._explained("read", name):
            return bytes(_gcs().cat_file(f"{self.place}/{name}"))

    def digest(self, name: str, size: int) -> str:
        """See `Files`. The bytes come back from the bucket: it is what is stored that counts."""
        result = hashlib.sha256()
        for start in range(0, size, _PIECE):
            with self._explained("read", name):
                piece = _gcs().cat_file(f"{self.place}/{name}", start=start, end=min(start + _PIECE, size))
            result.update(piece)
        return result.hexdigest()

    def write(self, name: str, content: bytes) -> None:
        """See `Files`. An object is there whole or not at all."""
        with self._explained("written", name):
            _gcs().pipe_file(f"{self.place}/{name}", content)

    def delete(self, name: str) -> None:
        """See `Files`."""
        with self._explained("deleted", name), contextlib.suppress(FileNotFoundError):
            _gcs().rm_file(f"{self.place}/{name}")

    def clear(self) -> None:
        """See `Files`."""
        with self._explained("deleted"), contextlib.suppress(FileNotFoundError):
            _gcs().rm(self.place, recursive=True)

    def settle(self) -> None:
        """See `Files`. Objects are durable as soon as they are there."""

    def check_room(self, num_bytes: int) -> None:  # noqa: ARG002 a bucket has room for as many as wanted
        """Writes as arrays are written, reads and deletes as everything else is.

        Raises:
            OSError: the packages are missing, or any of the three cannot be done.

        """
        probe = f".probe-{secrets.token_hex(8)}"
        _gcs()
        try:
            self._write_like_arrays(probe, b"a probe of wavlm_jax")
            self.read(probe)
            self.delete(probe)
        except OSError as error:
            raise OSError(f"{self.place}: a checkpoint cannot be written here ({error}); {_CURE}") from error

    def _write_like_arrays(self, name: str, content: bytes) -> None:
        import tensorstore  # noqa: PLC0415 Orbax's, and slow to import

        bucket, _, path = self.place.removeprefix(SCHEME).partition("/")
        spec = {"driver": "gcs", "bucket": bucket, "path": f"{path}/" if path else ""}
        try:
            store = tensorstore.KvStore.open(spec, context=tensorstore.Context(_RETRIES)).result()
            store.write(name, content).result()
        except (ValueError, RuntimeError) as error:  # as TensorStore hands statuses over
            raise OSError(str(error)) from error

    @contextlib.contextmanager
    def _explained(self, done: str, name: str = "") -> Iterator[None]:
        """Whatever gcsfs, aiohttp and google.auth raise as an OSError that names the object."""
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:
            what = f"{self.place}/{name}" if name else self.place
            raise OSError(f"{what}: cannot be {done} ({type(error).__name__}: {error})") from error


def _gcs() -> Any:
    """The file system of gcsfs, one for all threads; it keeps its connections."""
    import fsspec  # noqa: PLC0415 an extra

    try:
        return fsspec.filesystem("gcs", use_listings_cache=False)
    except ImportError as error:
        raise OSError(
            f"gs:// needs packages that are not here ({error}); pip install 'wavlm-jax[gcs]', or give a folder"
        ) from error


def _last(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


FOLDER = "checkpoints"
NAME = "manifest.json"
UNFINISHED = ".unfinished"
MARK = ".manifest-last"
_MARK_TEXT = (
    b"A numbered folder without manifest.json is an unfinished checkpoint; the next start of the run removes it.\n"
)


@runtime_checkable
class Storage(Protocol):
    """The checkpoints of one run. Readers call the first three; of several processes only the first one changes it."""

    files: Files
    """All of the run."""

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, valid or not, oldest first."""
        ...

    def checkpoint(self, step: int) -> Files:
        """One of them."""
        ...

    def draft(self, step: int) -> Files:
        """Where Orbax writes one that is to be committed."""
        ...

    def sweep(self) -> None:
        """Removes what unfinished saves have left. Called once, before the first save."""
        ...

    def commit(self, step: int) -> None:
        """The draft, manifest and all, takes the place of whatever was there."""
        ...

    def discard(self, step: int) -> None:
        """Removes a draft that came to nothing."""
        ...

    def remove(self, step: int) -> None:
        """A kill in the middle leaves no half of a checkpoint."""
        ...


def open_storage(workdir: str | Path) -> Storage:
    """Of a workdir as a person writes it: a folder or a gs:// address. Touches nothing."""
    found = address(workdir)
    return FolderStorage(Path(workdir)) if found is None else BucketStorage(found)


class FolderStorage:
    """`Storage` in a folder."""

    def __init__(self, workdir: Path) -> None:
        self.files: Files = Folder(workdir)
        self._folder = workdir.absolute() / FOLDER

    def steps(self) -> list[int]:
        """See `Storage`."""
        return _numbered(self.files.below(FOLDER).entries())

    def checkpoint(self, step: int) -> Files:
        """See `Storage`."""
        return self.files.below(f"{FOLDER}/{step}")

    def draft(self, step: int) -> Files:
        """See `Storage`."""
        return self.files.below(f"{FOLDER}/{UNFINISHED}/{step}")

    def sweep(self) -> None:
        """See `Storage`."""
        shutil.rmtree(self._folder / UNFINISHED, ignore_errors=True)
        (self._folder / UNFINISHED).mkdir(parents=True, exist_ok=True)

    def commit(self, step: int) -> None:
        """See `Storage`."""
        final = self._folder / str(step)
        if final.exists():  # refused before, and written again
            self.remove(step)
        (self._folder / UNFINISHED / str(step)).rename(final)
        push(self._folder)

    def discard(self, step: int) -> None:
        """See `Storage`."""
        self.draft(step).clear()

    def remove(self, step: int) -> None:
        """See `Storage`: out of sight by one rename first."""
        hidden = self._folder / UNFINISHED / f"removed-{step}-{time.monotonic_ns()}"
        (self._folder / str(step)).rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


class BucketStorage:
    """`Storage` below a gs:// address."""

    def __init__(self, place: str) -> None:
        self.files: Files = Bucket(place)
        self._checkpoints = self.files.below(FOLDER)

    def steps(self) -> list[int]:
        """See `Storage`. Where nobody has left the mark, folders without a manifest are not ours to ignore."""
        entries = self._checkpoints.entries()
        return [step for step in _numbered(entries) if MARK not in entries or self._is_committed(step)]

    def checkpoint(self, step: int) -> Files:
        """See `Storage`."""
        return self._checkpoints.below(str(step))

    def draft(self, step: int) -> Files:
        """See `Storage`."""
        return self.checkpoint(step)

    def sweep(self) -> None:
        """See `Storage`."""
        entries = self._checkpoints.entries()
        if MARK not in entries:
            self._checkpoints.write(MARK, _MARK_TEXT)
            return
        for step in _numbered(entries):
            self.discard(step)

    def commit(self, step: int) -> None:
        """See `Storage`: the manifest was it."""

    def discard(self, step: int) -> None:
        """See `Storage`. What got its manifest is no draft any more, whatever went wrong afterwards."""
        if not self._is_committed(step):
            self.checkpoint(step).clear()

    def remove(self, step: int) -> None:
        """See `Storage`: without its manifest it is none any more."""
        self.checkpoint(step).delete(NAME)
        self.checkpoint(step).clear()

    def _is_committed(self, step: int) -> bool:
        return self.checkpoint(step).exists(NAME)


def _numbered(entries: Sequence[str]) -> list[int]:
    """Steps among the names in a folder of checkpoints, oldest first."""
    return sorted(int(name) for name in entries if name.isdecimal())
