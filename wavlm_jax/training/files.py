"""Files below one place: what checkpoints ask of a folder and of a bucket alike, and how a folder does it."""

import contextlib
import hashlib
import os
import shutil
from pathlib import Path
from typing import Protocol, runtime_checkable

from wavlm_jax.training.disk import check_space


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
        return name in self.entries() or (self.path / name).exists()

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
