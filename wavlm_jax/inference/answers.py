"""Answers as they come: printed in the order of the files, or kept beside --out, where a second start goes on."""

import fcntl
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias, TypeVar

from wavlm_jax.audio.recordings import Recording
from wavlm_jax.inference.running import UsageError

T = TypeVar("T")
Key = tuple[str, ...]
"""Of an answer: name and path of its recording, size and time of the file, and what else it depends on."""


AsFault: TypeAlias = Callable[[str, Path, str], str]
"""Name, path and fault of a file without an answer -> its line in the output."""


def stamp_of(path: Path) -> str:
    """Size and time of a file, which are others when it was written anew."""
    status = path.stat()
    return f"{status.st_size}@{status.st_mtime_ns}"


def key_of(recording: Recording, *more: str) -> Key:
    """The key of a recording's answer."""
    return (recording.name, str(recording.path), stamp_of(recording.path), *more)


class Journal:
    """Answers so far, on disk: OUT.partial has their texts as OUT will, .OUT.done the key and byte range of each.

    Raises:
        UsageError: it has answers of another model or with other options, or another process is writing it.
        OSError: it cannot be written.

    """

    def __init__(self, out: Path, identity: Mapping[str, str]) -> None:
        """Goes on with what is there; `identity` is what all answers depend on."""
        self.partial, self._path = out.with_name(f"{out.name}.partial"), out.with_name(f".{out.name}.done")
        with ExitStack() as files:
            self._index = files.enter_context(self._path.open("a+", encoding="utf-8"))
            try:
                fcntl.flock(self._index, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(f"--out: another process is writing {out}") from error
            self._index.seek(0)
            records = list(_records(self._index))
            there = records[0] if records else {}
            other = sorted(name for name in {**there, **identity} if there.get(name) != identity.get(name))
            if there and other:
                found = f"has answers with other {', '.join(other)}"
                raise UsageError(f"{self.partial}: {found}; move it, or name another --out")
            self._answers = files.enter_context(self.partial.open("a+b"))
            self._answers.seek(0)
            content = self._answers.read()
            if content and not there:
                raise UsageError(f"{self.partial}: is not from an earlier start; move it, or name another --out")
            self._files = files.pop_all()
        whole = [entry for entry in records[1:] if entry["end"] <= len(content)]
        self.kept = {tuple(entry["key"]): content[entry["start"] : entry["end"]].decode() for entry in whole}
        self._end = max((entry["end"] for entry in whole), default=0)
        self._answers.truncate(self._end)  # behind it: half an answer of a start that was killed
        if not there:
            self._note(identity)

    def add(self, key: Key, text: str) -> None:
        """Keeps an answer."""
        content = text.encode()
        self._answers.write(content)
        self._answers.flush()
        self._note({"key": key, "start": self._end, "end": self._end + len(content)})
        self._end += len(content)

    def close(self, *, remove: bool) -> None:
        """Closes the files, and deletes them where the answers stand elsewhere or there are none."""
        if remove or not self._end:
            self.partial.unlink(missing_ok=True)
            self._path.unlink(missing_ok=True)
        self._files.close()

    def _note(self, record: Mapping[str, Any]) -> None:
        self._index.write(f"\n{json.dumps(record)}")  # a line of its own whatever a killed start has left
        self._index.flush()


def _records(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # empty, or half a line
            continue
        yield record


class Answers:
    """The text of every recording's answer, and a line for every file that has none."""

    def __init__(
        self,
        paths: Sequence[Path],
        faults: Mapping[Path, tuple[str, str]],
        as_fault: AsFault,
        journal: Journal | None,
        *,
        printed: bool,
    ) -> None:
        """`faults`: name and fault of files without an answer, may grow; `printed`: to stdout as they come."""
        self.texts: dict[Path, str] = {}
        self._paths, self._faults, self._as_fault = paths, faults, as_fault
        self._journal, self._printed = journal, printed
        self._waiting = iter(paths) if printed else iter(())
        self._next: Path | None = next(self._waiting, None)

    def collect(
        self,
        recordings: Sequence[Recording],
        compute: Callable[[list[Recording]], Iterator[tuple[Recording, T]]],
        as_text: Callable[[Recording, T], str],
        progress: Callable[[int], Any],
        more: Callable[[Recording], str] = lambda _: "",
    ) -> None:
        """Computes the answers that no earlier start has left; `more`: what an answer depends on besides its file."""
        keys = {recording: key_of(recording, more(recording)) for recording in recordings}
        kept = {} if self._journal is None else self._journal.kept
        self.texts = {recording.path: kept[key] for recording, key in keys.items() if key in kept}
        if self.texts:
            print(f"going on: {len(self.texts)} of {len(recordings)} answers are there", file=sys.stderr)
        self._print()
        for recording, answer in compute([one for one in recordings if one.path not in self.texts]):
            self.texts[recording.path] = as_text(recording, answer)
            if self._journal is not None:
                self._journal.add(keys[recording], self.texts[recording.path])
            self._print()
            progress(recording.num_samples)
        self._print()

    def _print(self) -> None:
        """Prints what comes next, in the order of the files, as far as it is known."""
        while self._next is not None and (self._next in self.texts or self._next in self._faults):
            sys.stdout.write(self._line(self._next))
            self._next = next(self._waiting, None)
        sys.stdout.flush()

    @property
    def whole(self) -> str:
        """The answers in the order of the files, with the lines of those that have none."""
        return "".join(map(self._line, self._paths))

    def _line(self, path: Path) -> str:
        if path in self.texts:
            return self.texts[path]
        name, fault = self._faults[path]
        return self._as_fault(name, path, fault)

    def __enter__(self) -> None:
        """Whatever stops the work, the answers that are there are kept or printed."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Says where the answers are if the work was stopped."""
        if kind is not None and self.texts:
            if self._journal is None:
                left = (self._next, *self._waiting) if self._printed else self._paths
                sys.stdout.write("".join(self.texts[path] for path in left if path in self.texts))
            place = "above" if self._journal is None else f"in {self._journal.partial}; the same command goes on"
            print(
                f"stopped; answers of {len(self.texts)} of {len(self._paths)} recordings are {place}", file=sys.stderr
            )
        if self._journal is not None:
            self._journal.close(remove=kind is None)
