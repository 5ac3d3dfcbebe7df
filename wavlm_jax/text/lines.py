"""Text files from outside, line by line: UTF-8, bounded, and every wrong line named by its number."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

MOST_LINE = 1 << 16


class RecordError(ValueError):
    """A text file with a line that cannot be right; the message names file, line, what was found and expected."""


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, from 1 on; nothing that is no text is read far.

    Raises:
        RecordError: no such file, a line without end, or bytes that are not UTF-8.

    """
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            while line := file.readline(MOST_LINE):
                number += 1
                if len(line) == MOST_LINE:
                    raise RecordError(f"{path}, line {number}: longer than {MOST_LINE} characters; is it a text file?")
                yield number, line
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}, after line {number}: not UTF-8 ({error.reason}); is it a binary file?") from error


def read_fields(path: Path) -> Iterator[tuple[str, list[str]]]:
    """("file, line n", fields between white space) of each line that is neither empty nor a comment (`;;`)."""
    for number, line in read_lines(path):
        fields = line.split()
        if fields and not fields[0].startswith(";;"):
            yield f"{path}, line {number}", fields


def wrong(where: str, found: object, expected: str) -> NoReturn:
    """Refuse a line.

    Raises:
        RecordError: always.

    """
    raise RecordError(f"{where}: found {str(found)[:100]!r}, expected {expected}")


def number(text: str, where: str, name: str, *, least: float = 0.0) -> float:
    """A finite number, `least` or more.

    Raises:
        RecordError: anything else.

    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < least:
        wrong(where, text, f"{name}: a number, {least:g} or more")
    return value
