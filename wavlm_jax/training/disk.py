"""The disk: room before it is needed, and changes that a power cut does not undo."""

import contextlib
import errno
import os
import shutil
from pathlib import Path


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
