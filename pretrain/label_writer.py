"""Writes the arrays of one split of a label store part by part, so that a killed run goes on where it was.

Several hosts write a file each, and the first joins them.
"""

import io
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Int64, UInt16, UInt64

from pretrain.files import read_json, write_json
from pretrain.label_arrays import array_digest, file_of, map_array, offsets_of
from pretrain.shares import Share

_COPIED = 2**22
"""Labels that are copied at a time."""


class SplitWriter:
    """One host's share of the labels of a split, in the order of the corpus and never held in memory as a whole.

    `{split}.labels.npy.partial` fills up, `{split}.progress.json` says how many utterances of it are sure, and `finish`
    gives it its name. Several hosts have such files each (`.1-of-4`), and `join` makes one of them.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        counts: Int64[np.ndarray, " utterances"],
        keys: UInt64[np.ndarray, " utterances"],
        made_from: str,
        share: Share = Share(0, 1),  # noqa: B008 frozen
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._split, self._share, self._made_from = folder, split, share, made_from
        self._target = self._file(share.index)
        self._partial = self._target.with_name(self._target.name + ".partial")
        self._progress = folder / f"{split}.progress{_part(share, share.index)}.json"
        self.offsets = offsets_of(counts)
        self.start, self.end = share.of(counts)
        """Of this host's utterances."""
        if share.first:
            for name, array in (("offsets", self.offsets), ("keys", keys)):
                _save(file_of(folder, split, name), array)
        self._base = int(self.offsets[self.start])
        self._num_labels = int(self.offsets[self.end]) - self._base
        self._header = _npy_header(self._num_labels)
        self.done = self._resume()

    def _file(self, index: int) -> Path:
        """Where host `index` puts its labels."""
        return file_of(self._folder, self._split, "labels" + _part(self._share, index))

    def write(self, first: int, end: int, labels: UInt16[np.ndarray, " labels"]) -> None:
        """Appends the labels of the utterances `first` to `end` (exclusive), which must be next in line."""
        start, stop = (int(offset) for offset in self.offsets[[first, end]])
        if first != self.done or stop - start != len(labels):
            raise ValueError(
                f"{self._target}: {len(labels)} labels of the utterances {first} to {end}; expected {stop - start} "
                f"of {self.done} and following"
            )
        with self._partial.open("r+b") as file:
            file.seek(len(self._header) + 2 * (start - self._base))
            file.write(labels.astype("<u2").tobytes())
            _sync(file)
        self._note(end)

    def finish(self) -> None:
        """Gives this host's labels their name."""
        if self._partial.exists():
            self._partial.replace(self._target)

    def join(self) -> str:
        """One file of those of all hosts, which have finished; the SHA-256 (hex) of the array. For one host to do."""
        whole = file_of(self._folder, self._split, "labels")
        files = [self._file(index) for index in range(self._share.count)]
        if files != [whole]:
            partial = whole.with_name(whole.name + ".partial")
            with partial.open("wb") as file:
                file.write(_npy_header(int(self.offsets[-1])))
                for part in files:
                    _copy(map_array(part, np.uint16), file)
                _sync(file)
            partial.replace(whole)
        return array_digest(map_array(whole, np.uint16))

    def _note(self, done: int) -> None:
        write_json(self._progress, {"made_from": self._made_from, "utterances": done})
        self.done = done

    def _resume(self) -> int:
        """Utterances that an earlier run has written; a fresh file if there is none to go on with."""
        size = len(self._header) + 2 * self._num_labels
        if self._progress.exists():
            progress = read_json(self._progress)
            file = self._partial if self._partial.exists() else self._target
            if progress.get("made_from") == self._made_from and file.exists() and file.stat().st_size == size:
                return int(progress["utterances"])
        with self._partial.open("wb") as handle:
            handle.write(self._header)
            handle.truncate(size)
            _sync(handle)
        self._note(self.start)
        return self.start


def _part(share: Share, index: int) -> str:
    return "" if share.count == 1 else f".{index}-of-{share.count}"


def _copy(array: np.ndarray, file: BinaryIO) -> None:
    file.writelines(array[start : start + _COPIED].tobytes() for start in range(0, len(array), _COPIED))


def _npy_header(count: int) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<u2", "fortran_order": False, "shape": (count,)})
    return buffer.getvalue()


def _save(file: Path, array: np.ndarray) -> None:
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("wb") as handle:
        np.save(handle, array, allow_pickle=False)
        _sync(handle)
    temporary.replace(file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
