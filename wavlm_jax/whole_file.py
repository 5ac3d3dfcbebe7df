"""Files that are whole or absent, whatever stops their writer."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
