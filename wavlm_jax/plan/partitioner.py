"""What XLA's partitioner complains about: arrays that it brings whole to every device, because it knows no other way.

It says so on the process's standard error and nowhere else; libtpu does not even that, unless it is told to
(`SPEAKING`).
"""

import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

SPEAKING: Mapping[str, str] = {"TPU_MIN_LOG_LEVEL": "1", "TPU_STDERR_LOG_LEVEL": "1"}
"""Environment in which libtpu prints warnings; it is read when libtpu is loaded."""
_MARK = "nvoluntary full rematerialization"
_PLACE = re.compile(r"from sharding (\{.*?\}) to (\{.*?\}) (?:efficiently|without).*? HLO operation:? %?\S+ = (\S+)")
_NAME = re.compile(r'op_name="([^"]*)"')
_WARNING = re.compile(r"W\d{4} \d\d:\d\d:\d\d")
_STDERR = 2


@contextmanager
def replicated() -> Iterator[list[str]]:
    """Collects, while entered, each array that a compilation replicates against its will: once, with its place.

    The list is filled when the block is left. Whatever else is printed to standard error meanwhile is printed then;
    other warnings of the compiler are dropped.
    """
    found: list[str] = []
    sys.stderr.flush()
    before = os.dup(_STDERR)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), _STDERR)
        try:
            yield found
        finally:
            sys.stderr.flush()
            os.dup2(before, _STDERR)
            os.close(before)
            said.seek(0)
            lines = said.read().decode(errors="replace").splitlines(keepends=True)
            found += dict.fromkeys(_described(line) for line in lines if _MARK in line)
            rest = "".join(line for line in lines if _MARK not in line and not _WARNING.match(line))
            os.write(_STDERR, rest.encode())


def _described(line: str) -> str:
    """The array, its place in the program, and the shardings; the line itself where it is written in another way."""
    place, name = _PLACE.search(line), _NAME.search(line)
    if place is None:
        return line.strip()
    return f"{place.group(3)} of {name.group(1) if name else 'unknown'} from {place.group(1)} to {place.group(2)}"
