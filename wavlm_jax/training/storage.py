"""Where the checkpoints of a run are, and how one comes into being there all at once.

    folder/checkpoints/1000/{params,train,manifest.json,...}   committed by one rename
    folder/checkpoints/.unfinished/2000                        being written

A bucket has no rename. There the manifest, an object of its own, is written last, and its folder is a checkpoint from
then on:

    gs://bucket/run/checkpoints/1000/{params,train,manifest.json,...}
    gs://bucket/run/checkpoints/2000/{params,...}              being written
    gs://bucket/run/checkpoints/.manifest-last                 says so, and that what has no manifest may go
"""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from wavlm_jax.training.bucket import Bucket, address
from wavlm_jax.training.disk import Folder, push
from wavlm_jax.training.files import Files

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
