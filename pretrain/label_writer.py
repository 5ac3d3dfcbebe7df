"""Writes the arrays of one split of a label store part by part, so that a killed run goes on where it was."""

import io
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Int64, UInt16, UInt64

from pretrain.files import read_json, write_json
from pretrain.label_arrays import array_digest, file_of, map_array


class SplitWriter:
    """The labels of one split, written in the order of the corpus and never held in memory as a whole.

    `{split}.labels.npy.partial` fills up, `{split}.progress.json` says how many utterances of it are sure, and `finish`
    gives it its name.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        counts: Int64[np.ndarray, " utterances"],
        keys: UInt64[np.ndarray, " utterances"],
        made_from: str,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._target = file_of(folder, split, "labels")
        self._partial = self._target.with_name(self._target.name + ".partial")
        self._progress = folder / f"{split}.progress.json"
        self._made_from = made_from
        self.offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        for name, array in (("offsets", self.offsets), ("keys", keys)):
            _save(file_of(folder, split, name), array)
        self._header = _npy_header(int(self.offsets[-1]))
        self.done = self._resume()

    def write(self, first: int, end: int, labels: UInt16[np.ndarray, " labels"]) -> None:
        """Appends the labels of the utterances `first` to `end` (exclusive), which must be next in line."""
        start, stop = (int(offset) for offset in self.offsets[[first, end]])
        if first != self.done or stop - start != len(labels):
            raise ValueError(
                f"{self._target}: {len(labels)} labels of the utterances {first} to {end}; expected {stop - start} "
                f"of {self.done} and following"
            )
        with self._partial.open("r+b") as file:
            file.seek(len(self._header) + 2 * start)
            file.write(labels.astype("<u2").tobytes())
            _sync(file)
        self._note(end)

    def finish(self) -> str:
        """Gives the labels their name; returns the SHA-256 (hex) of the array."""
        if self._partial.exists():
            self._partial.replace(self._target)
        return array_digest(map_array(self._target, np.uint16))

    def _note(self, done: int) -> None:
        write_json(self._progress, {"made_from": self._made_from, "utterances": done})
        self.done = done

    def _resume(self) -> int:
        """Utterances that an earlier run has written; a fresh file if there is none to go on with."""
        size = len(self._header) + 2 * int(self.offsets[-1])
        if self._progress.exists():
            progress = read_json(self._progress)
            file = self._partial if self._partial.exists() else self._target
            if progress.get("made_from") == self._made_from and file.exists() and file.stat().st_size == size:
                return int(progress["utterances"])
        with self._partial.open("wb") as handle:
            handle.write(self._header)
            handle.truncate(size)
            _sync(handle)
        self._note(0)
        return 0


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
