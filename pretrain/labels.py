"""The label store: one k-means label per frame of a corpus, in flat arrays read by memory map.

    header.json             what the labels are (LabelHeader); written last: a folder that has one is complete
    {split}.labels.npy      uint16, the labels of all utterances in the order of the corpus
    {split}.offsets.npy     int64 (utterances + 1,), utterance i has labels[offsets[i]:offsets[i + 1]]
    {split}.keys.npy        uint64, a hash of each utterance id, which shows shuffled or swapped rows
    kmeans.safetensors      the centroids

There is no dictionary file: a label is a number below `num_clusters`. `SplitWriter` writes a split part by part, so
that a killed run continues where it was; several hosts write a file each, and the first host joins them.
"""

import hashlib
import io
import os
import tokenize
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
from jaxtyping import Int64, UInt16, UInt64

from pretrain.distributed import Share
from pretrain.kmeans import KMeansSettings
from wavlm_jax.files import read_json, replacing, write_json
from wavlm_jax.settings import read

_DIGEST_PIECE = 2**22


class LabelError(ValueError):
    """Labels that cannot be right for the corpus or the config; the message names file, utterance and cause."""


def offsets_of(counts: Int64[np.ndarray, " utterances"]) -> Int64[np.ndarray, " edges"]:
    """Where each utterance's labels begin, and behind the last one the end of all."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def file_of(folder: Path, split: str, array: str) -> Path:
    """Where the store in `folder` keeps "labels", "offsets" or "keys" of a split."""
    return folder / f"{split}.{array}.npy"


def utterance_keys(ids: Iterable[str]) -> UInt64[np.ndarray, " utterances"]:
    """A 64-bit hash of each utterance id."""
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in ids)
    return np.frombuffer(digests, np.dtype("<u8")).astype(np.uint64)


def array_digest(array: np.ndarray) -> str:
    """SHA-256 (hex) of an array's bytes, read in small pieces: a memory map stays out of memory."""
    digest = hashlib.sha256()
    for start in range(0, len(array), _DIGEST_PIECE):
        digest.update(array[start : start + _DIGEST_PIECE].tobytes())
    return digest.hexdigest()


def map_array(file: Path, dtype: type[np.generic]) -> np.ndarray:
    """A one-dimensional .npy file of `dtype`, by memory map.

    Raises:
        LabelError: missing, cut off, or something else.

    """
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError) as error:
        raise LabelError(f"{file}: not a whole .npy file ({error}); make the labels anew") from error
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != 1:
        found = f"{array.ndim}-D {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise LabelError(f"{file}: found {found}, expected 1-D {np.dtype(dtype).name}; make the labels anew")
    return array


FORMAT = 1
HEADER = "header.json"
MIN_CLUSTERS, MAX_CLUSTERS = 2, 2**16
TeacherKind = Literal["mfcc", "layer"]


@dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """The config section `labels`."""

    path: str
    """Folder of the label store."""
    make: bool
    """Whether `train.py` makes labels that are missing; otherwise it stops with the command that makes them."""
    num_clusters: int
    rate_hz: int
    """Labels a second: 100 for MFCC, 50 for a layer."""
    teacher: TeacherKind
    """What is clustered: "mfcc" (first iteration) or "layer" (the output of a layer of an earlier model)."""
    run: str | None
    """"layer": workdir of an earlier run, or a Hugging Face folder (WavLM or HuBERT)."""
    step: int | None
    """"layer": checkpoint of the run; None: its newest. A Hugging Face folder has none."""
    layer: int | None
    """"layer": 1-based, Hugging Face's hidden_states[layer] (FACTS A10): 6 of a first iteration, 9 of a second."""
    seed: int
    """Of the sample and the clusters; apart from the seed of training, so that labels outlive a change of that."""
    sample_seconds: float | None
    """Audio of the training corpus, whole utterances at random, from which the clusters are learned; None: all."""
    kmeans: KMeansSettings
    piece_seconds: float
    """"layer": longer utterances go through the teacher in pieces of this length (FACTS C9)."""
    batch_seconds: float
    """"layer": audio in one batch of the teacher, over the devices of a host."""
    num_threads: int
    """Threads that decode audio and compute MFCC."""
    min_entropy: float
    """Preflight: least entropy of the label histogram that is accepted, as a share of log(num_clusters)."""
    max_constant_share: float
    """Preflight: largest share of utterances that is accepted whose labels are all the same, among those of a second or
    more; digital silence is such an utterance."""

    def __post_init__(self) -> None:
        if not MIN_CLUSTERS <= self.num_clusters <= MAX_CLUSTERS:
            raise ValueError(f"num_clusters: found {self.num_clusters}, expected {MIN_CLUSTERS} to {MAX_CLUSTERS}")
        if self.teacher not in get_args(TeacherKind):
            raise ValueError(f"teacher: found {self.teacher!r}, expected one of {', '.join(get_args(TeacherKind))}")
        if self.teacher == "layer" and (self.run is None or self.layer is None or self.layer < 1):
            raise ValueError(f"run, layer: found {self.run!r} and {self.layer}, expected a run and a layer from 1 on")
        for name in ("rate_hz", "num_threads", "piece_seconds", "batch_seconds", "sample_seconds"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected more than 0")
        for name in ("min_entropy", "max_constant_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected a share in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class SplitHeader:
    """What `header.json` says about one split."""

    corpus: str
    """Fingerprint of the corpus that was labelled."""
    kmeans: str
    """Fingerprint of the clusters that labelled it."""
    utterances: int
    labels: int
    sha256: str
    """Of the array in {split}.labels.npy."""
    quality: Mapping[str, float | None]
    """Measures of pretrain/quality.py."""


@dataclass(frozen=True, kw_only=True)
class LabelHeader:
    """What `header.json` says."""

    format: int
    num_clusters: int
    rate_hz: int
    kmeans: str
    """Fingerprint of the clusters."""
    inertia: float
    """Mean squared distance to the centroid over the sample."""
    teacher: Mapping[str, str | int]
    """What was clustered: kind; for a layer also its number and the fingerprint of the parameters."""
    seed: int
    sample_share: float
    """Of the training corpus's audio that the clusters were learned from."""
    sample_frames: int
    """Frames that were in the sample."""
    request: str
    """Digest of everything that shaped the clusters."""
    splits: Mapping[str, SplitHeader]

    def __post_init__(self) -> None:
        if not MIN_CLUSTERS <= self.num_clusters <= MAX_CLUSTERS or self.rate_hz < 1:
            raise ValueError(
                f"num_clusters, rate_hz: found {self.num_clusters} and {self.rate_hz}, "
                f"expected {MIN_CLUSTERS} to {MAX_CLUSTERS} and at least 1"
            )

    def named(self, split: str, corpus: str) -> str:
        """The split with labels of the corpus of this fingerprint (it may have been renamed); `split` if none has."""
        same = [name for name, described in self.splits.items() if described.corpus == corpus]
        return split if split in same or not same else same[0]

    def write(self, folder: Path) -> None:
        """Makes `folder` a whole label store."""
        write_json(folder / HEADER, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "LabelHeader":
        """The header of the store in `folder`.

        Raises:
            LabelError: there is none, or it is not one.

        """
        file = folder / HEADER
        if not file.is_file():
            raise LabelError(f"{folder}: no {HEADER}, so no whole label store; make it: python -m pretrain.make_labels")
        try:
            values = read_json(file)
            _check_format(file, values)
            return read(values, cls, str(file))
        except LabelError:
            raise
        except ValueError as error:
            raise LabelError(f"{file}: not a label header ({error}); make the labels anew") from error


class LabelStore:
    """The labels of one split. Cheap to pickle: only the path travels, a worker maps the files again."""

    def __init__(self, path: Path, split: str, header: LabelHeader) -> None:
        self.path, self.split, self.header = path, split, header
        described = header.splits[split]
        self.flat: UInt16[np.ndarray, " labels"] = map_array(file_of(path, split, "labels"), np.uint16)
        self.offsets: Int64[np.ndarray, " utterances_and_one"] = map_array(file_of(path, split, "offsets"), np.int64)
        self.keys: UInt64[np.ndarray, " utterances"] = map_array(file_of(path, split, "keys"), np.uint64)
        found = (len(self.offsets) - 1, len(self.keys), len(self.flat))
        if found != (described.utterances, described.utterances, described.labels):
            raise LabelError(
                f"{path}: {split} has {found[0]} offsets, {found[1]} keys and {found[2]} labels; {HEADER} says "
                f"{described.utterances} utterances and {described.labels} labels; make the labels anew"
            )
        if self.offsets[0] != 0 or self.offsets[-1] != len(self.flat) or (np.diff(self.offsets) < 0).any():
            raise LabelError(f"{file_of(path, split, 'offsets')}: not ascending from 0 to {len(self.flat)}; make anew")

    @classmethod
    def open(cls, path: Path, split: str) -> "LabelStore":
        """The labels of `split` in the folder `path`; maps the files, reads the offsets.

        Raises:
            LabelError: no whole store, no such split, or files that are not what the header says.

        """
        header = LabelHeader.load(path)
        if split not in header.splits:
            known = ", ".join(sorted(header.splits)) or "none"
            raise LabelError(f"{path}: no labels for the split {split!r}; it has {known}")
        return cls(path, split, header)

    def __len__(self) -> int:
        return len(self.keys)

    def __reduce__(self) -> tuple[type["LabelStore"], tuple[Path, str, LabelHeader]]:
        return LabelStore, (self.path, self.split, self.header)

    def labels(self, index: int) -> UInt16[np.ndarray, " labels"]:
        """Labels of utterance number `index` of the corpus, `header.rate_hz` a second."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: {self.split} has no utterance {index}; it has {len(self)}")
        return self.flat[self.offsets[index] : self.offsets[index + 1]]


def _check_format(file: Path, values: Mapping[str, Any]) -> None:
    found = values.get("format")
    if found != FORMAT:
        raise LabelError(f"{file}: label format {found}, this version reads {FORMAT}; make the labels anew")


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
        """First utterance of this host's share, and the one behind its last."""
        if share.first:
            for name, array in (("offsets", self.offsets), ("keys", keys)):
                with replacing(file_of(folder, split, name)) as draft, draft.open("wb") as file:
                    np.save(file, array, allow_pickle=False)
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
            with replacing(whole) as draft, draft.open("wb") as file:
                file.write(_npy_header(int(self.offsets[-1])))
                for part in files:
                    _copy(map_array(part, np.uint16), file)
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


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
