"""The disk: files in a folder, room before it is needed, and changes that a power cut does not undo."""

import contextlib
import errno
import hashlib
import os
import shutil
from pathlib import Path


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
