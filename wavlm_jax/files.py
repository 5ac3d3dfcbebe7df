"""Files that are whole or absent, whatever stops their writer.

What can be wrong with a file from outside. Both kinds name the file and the reason.

JSON files from outside: bounded, and typed before anything is made of them.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

from wavlm_jax.settings import SettingsError, convert


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write into, which takes its place at the end; with an exception it is gone.

    Whoever reads `path` finds the old file or the new one, never a half. The folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield draft
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`text` in UTF-8 as the whole of `path`, on disk before it has its name; see `replacing`."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


class DamagedFile(ValueError):  # noqa: N818 (named for the file that it is about)
    """A file that is cut off, altered, or not of the kind that it was taken for."""


class HostileFile(ValueError):  # noqa: N818 (as above)
    """A file that asks for code to be run, or for more memory than it can fill."""


_MOST_BYTES = 64 * 2**20
_MOST = 2**20
"""No size in a config is larger; what is, would only fill the memory."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        SettingsError: too large, not JSON, or no object.
        FileNotFoundError: there is no such file.

    """
    if path.is_file() and path.stat().st_size > _MOST_BYTES:
        raise SettingsError(f"{path}: {path.stat().st_size} bytes, expected at most {_MOST_BYTES}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise SettingsError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: found a {type(values).__name__}, expected an object")
    return values


def typed(values: Mapping[str, Any], kind: type, path: Path) -> dict[str, Any]:
    """Those of `values` that are fields of the dataclass `kind`, checked against the field's type and of sane size.

    Raises:
        ValueError: another type, or a number above a million; the key is named.

    """
    hints = get_type_hints(kind)
    where = path.name.removeprefix("config.")  # settings' messages begin with "config."
    known = {key: convert(value, hints[key], f"{where}.{key}") for key, value in values.items() if key in hints}
    for key, value in known.items():
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, int) and abs(number) > _MOST for number in numbers):
            raise SettingsError(f"{path}: {key} is {str(value)[:80]}, expected at most {_MOST}")
    return known


def to_json(values: Mapping[str, Any]) -> bytes:
    """The content of a file."""
    return (json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
