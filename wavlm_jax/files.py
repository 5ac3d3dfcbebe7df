"""Small files: written whole or not at all, and JSON from outside read within bounds.

A new file is written beside its place, synced to disk, and renamed: a reader finds the old content or the new, never a
half, whatever stops the writer.
"""

import errno
import io
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from wavlm_jax.settings import SettingsError

_MAX_JSON_BYTES = 64 * 2**20


class DamagedFile(ValueError):  # noqa: N818 (named for the file that it is about)
    """A file that is cut off, altered, or not of the expected kind. The message names the file and the reason."""


class HostileFile(ValueError):  # noqa: N818 (as above)
    """A file that asks for code to be run, or for far more memory than its size. The message names file and reason."""


def open_regular(path: Path) -> io.FileIO:
    """`path` opened to read, without ever waiting for a writer.

    A pipe or device is refused after opening, so that the file cannot be swapped between check and use.

    Raises:
        OSError: it cannot be opened, or is a folder, a pipe or a device.

    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "a folder, pipe or device, expected a file", str(path))
    return io.FileIO(descriptor)


def named(text: str) -> Path:
    """The path that a person means: `~` and `~name` at its start are a home folder, unless a file is called so."""
    path = Path(text)
    if text.startswith("~") and not path.exists():
        with suppress(RuntimeError):  # of a user that there is not
            return path.expanduser()
    return path


def printable(name: object) -> str:
    """A file name as valid Unicode; invalid bytes become escapes."""
    return os.fsencode(str(name)).decode("utf-8", "backslashreplace")


def check_writable(path: Path) -> None:
    """Tries whether `replacing` can write `path`, whose folder has to exist.

    Raises:
        OSError: a folder, a pipe or device, a name that is too long, or a place where one may not write.

    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder, expected the name of a file", str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "a pipe or device, expected a file", str(path))
    _draft(path).touch()
    _draft(path).unlink()


def _draft(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write into; it replaces `path` at the end, or is deleted on an exception.

    The folder of `path` is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft(path)
    try:
        yield draft
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes the whole file; see `replacing`."""
    with replacing(path) as draft:
        draft.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Writes the whole file in UTF-8; see `replacing`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes the whole file: `value` as indented JSON in UTF-8, keys sorted; see `replacing`."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of at most 64 MiB.

    Raises:
        SettingsError: too large, not JSON, or not an object.
        FileNotFoundError: there is no such file.

    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MAX_JSON_BYTES:
            raise SettingsError(f"{path}: {size} bytes, expected at most {_MAX_JSON_BYTES}")
        content = file.read()
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SettingsError(
            f"{path}: not readable as JSON ({error}); it was cut off or written by something else"
        ) from error
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: found a {type(values).__name__}, expected an object")
    return values
