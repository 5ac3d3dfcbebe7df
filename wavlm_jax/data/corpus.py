"""`header.json`, the last file that is written of a corpus: what the corpus is, and which files make it up.

A prepared corpus: Arrow files of FLAC bytes, and a JSON header that says what it is.

The folder opens with `datasets.load_from_disk` too (hub.py); here it is read by memory map, so that a worker process is
up in no time. `header.json` is written last, so a folder that has one is whole.

Who speaks when in the recordings of a corpus: `turns.rttm` beside its header, recordings named by utterance ids.

A recording that has turns counts as annotated from its first to its last sample.

The corpora that a config names: one to learn from, any number to evaluate on.
"""

import bisect
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int16, Int32, Int64

from wavlm_jax.audio.wave import AudioFault, read_crop
from wavlm_jax.data.sources import SourceError
from wavlm_jax.files import read_json, write_json, write_text
from wavlm_jax.settings import SettingsError, read
from wavlm_jax.shapes import SAMPLE_RATE
from wavlm_jax.text.records import Turn, read_rttm, write_rttm

FORMAT = 1
HEADER = "header.json"


class CorpusError(ValueError):
    """A folder that is not a whole corpus; the message names the file and the cure."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One Arrow file of a corpus."""

    file: str
    rows: int
    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True, kw_only=True)
class CorpusHeader:
    """What `header.json` says."""

    format: int
    name: str
    hours: float
    count: int
    """Utterances."""
    speakers: int
    """Distinct ones; 0 where the source names none."""
    sample_rate: int
    """Hz: 16,000."""
    fingerprint: str
    """SHA-256 over ids, lengths and decoded samples: the same on every machine and for every number of workers."""
    source: str
    """Where it came from, for people."""
    source_digest: str
    """SHA-256 over the source's list of utterances and the options that shaped the corpus."""
    faults: dict[str, int]
    """Name of a fault -> files left out for it; the files stand in bad_files.jsonl."""
    dropped: dict[str, int]
    """too_short, too_long -> utterances left out by --min-seconds and --max-seconds."""
    warnings: dict[str, int]
    """Name of a warning (down_mix_cancels, silent, clipped) -> files kept in spite of it."""
    versions: dict[str, str]
    shards: tuple[Shard, ...]


def is_corpus(path: Path) -> bool:
    """Whether `path` holds a whole corpus, as far as its header tells."""
    return (path / HEADER).is_file()


def write_header(folder: Path, header: CorpusHeader) -> None:
    """Write `header.json`, the last file of a corpus, whole or not at all."""
    write_json(folder / HEADER, asdict(header))


def sha256_of(file: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_header(path: Path) -> CorpusHeader:
    """The header of the corpus in folder `path`.

    Raises:
        CorpusError: no header there, or one that this version cannot read.

    """
    file = path / HEADER
    if not file.is_file():
        parts = sorted(inner.parent.name for inner in path.glob(f"*/{HEADER}"))
        if parts:
            raise CorpusError(f"{path}: no corpus itself; it holds the corpora {', '.join(parts)}: open one of them")
        raise CorpusError(
            f"{path}: no {HEADER}, so not a whole corpus; make it: python -m wavlm_jax.data SOURCE --out {path}"
        )
    try:
        values = read_json(file)
        found = values["format"]
        if found != FORMAT:
            raise CorpusError(f"{file}: corpus format {found}, this version reads {FORMAT}; prepare the corpus again")
        return read(values, CorpusHeader, str(file))
    except (TypeError, KeyError, SettingsError) as error:
        raise CorpusError(f"{file}: not a corpus header ({error}); prepare the corpus again") from error


COLUMNS = ("id", "audio", "samples", "speaker", "text", "mean", "variance", "phones")
"""Of every shard; their types are `hub.FEATURES`."""


class Phones(NamedTuple):
    """Phone alignment of one utterance: `symbols[i]` lasts from sample `starts[i]` up to, not including, `ends[i]`."""

    symbols: list[str]
    starts: Int32[np.ndarray, "phones"]
    ends: Int32[np.ndarray, "phones"]


class StringColumn(Sequence[str]):
    """A string column read in place: no copy of millions of ids in every process."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._column.take(pa.array(range(*index.indices(len(self))), pa.int64())).to_pylist()
        return self._column[int(index)].as_py()

    def __iter__(self) -> Iterator[str]:
        for chunk in self._column.chunks:
            yield from chunk.to_pylist()


class Corpus:
    """A prepared corpus, opened in place by memory map.

    Cheap to open and to pickle: only the path travels, and a worker opens the files again when it first reads. Audio is
    decoded crop by crop and never as a whole.
    """

    def __init__(self, path: Path, header: CorpusHeader) -> None:
        self.path = path
        self.header = header

    @classmethod
    def open(cls, path: Path) -> "Corpus":
        """The corpus in folder `path`; reads the header and compares file sizes, nothing more.

        Raises:
            CorpusError: no corpus there, one of another format, or a shard that is missing or cut off.

        """
        header = read_header(path)
        for shard in header.shards:
            file = path / shard.file
            found = file.stat().st_size if file.is_file() else None
            if found != shard.size:
                state = "missing" if found is None else f"{found} bytes long"
                raise CorpusError(
                    f"{file}: {state}, {HEADER} says {shard.size} bytes; copy or prepare the corpus again"
                )
        return cls(path, header)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over ids, lengths and decoded samples."""
        return self.header.fingerprint

    def __len__(self) -> int:
        return self.header.count

    def __repr__(self) -> str:
        return f"Corpus({self.header.name!r}, {self.header.count} utterances, {self.header.hours:.2f} h)"

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "header": self.header}

    @functools.cached_property
    def ids(self) -> Sequence[str]:
        """Utterance ids, unique, in the order of the source."""
        return StringColumn(self._table["id"])

    @functools.cached_property
    def speakers(self) -> Sequence[str]:
        """Speaker of each utterance, "" where unknown."""
        return StringColumn(self._table["speaker"])

    @functools.cached_property
    def texts(self) -> Sequence[str]:
        """Transcript of each utterance, "" where there is none."""
        return StringColumn(self._table["text"])

    @functools.cached_property
    def paths(self) -> Sequence[str]:
        """Where each utterance came from, as its source called it; pieces of a cut file share one."""
        audio = self._table["audio"]
        return StringColumn(pa.chunked_array([chunk.field("path") for chunk in audio.chunks], pa.string()))

    @functools.cached_property
    def lengths(self) -> Int64[np.ndarray, "utterances"]:
        """Samples of each utterance."""
        return np.asarray(self._table["samples"])

    @functools.cached_property
    def means(self) -> Float32[np.ndarray, "utterances"]:
        """Mean of each whole utterance, in [-1, 1] scale."""
        return np.asarray(self._table["mean"])

    @functools.cached_property
    def variances(self) -> Float32[np.ndarray, "utterances"]:
        """Population variance of each whole utterance, in [-1, 1] scale."""
        return np.asarray(self._table["variance"])

    def wave(self, index: int, start: int = 0, num_samples: int | None = None) -> Int16[np.ndarray, "samples"]:
        """Samples `start` to `start + num_samples` (None: to the end) of utterance `index`; decodes only those.

        Raises:
            AudioFault: the stored bytes do not give them (a damaged disk), naming the utterance.

        """
        try:
            return read_crop(memoryview(self._flac(index)), start, num_samples)
        except AudioFault as error:
            raise AudioFault(error.fault, f"{self.path}: utterance {self.ids[index]}: {error.detail}") from error

    def random_piece(self, which: float, where: float, size: int) -> Int16[np.ndarray, "samples"]:
        """At most `size` samples of an utterance of a corpus of noise: what is laid over speech.

        Args:
            which: in [0, 1), chooses the utterance.
            where: in [0, 1), chooses the start among all that leave as much as possible.
            size: samples that are wanted; fewer where the utterance has fewer.

        Raises:
            AudioFault: as `wave`.

        """
        index = int(which * len(self))
        length = int(self.lengths[index])
        count = min(length, size)
        return self.wave(index, int(where * (length - count + 1)), count)

    def phones(self, index: int) -> Phones | None:
        """The phone alignment of utterance `index`, None where the corpus has none."""
        value = self._table["phones"][index].as_py()
        if value is None or value["symbols"] is None:
            return None
        return Phones(value["symbols"], np.asarray(value["starts"], np.int32), np.asarray(value["ends"], np.int32))

    def verify(self) -> None:
        """Read every byte of every shard and compare its checksum.

        Raises:
            CorpusError: naming the shard that differs.

        """
        for shard in self.header.shards:
            found = sha256_of(self.path / shard.file)
            if found != shard.sha256:
                raise CorpusError(
                    f"{self.path / shard.file}: SHA-256 {found}, {HEADER} says {shard.sha256}; copy it again"
                )

    def _flac(self, index: int) -> pa.Buffer:
        """The bytes of one utterance where they lie in the memory map."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: utterance number {index}, expected 0 to {len(self) - 1}")
        starts, chunks = self._audio
        chunk = bisect.bisect_right(starts, index) - 1
        return chunks[chunk][int(index) - starts[chunk]].as_buffer()

    @functools.cached_property
    def _audio(self) -> tuple[list[int], list[pa.BinaryArray]]:
        """First row and bytes of each record batch."""
        chunks = [chunk.field("bytes") for chunk in self._table["audio"].chunks]
        starts = np.cumsum([0] + [len(chunk) for chunk in chunks]).tolist()
        return starts[:-1], chunks

    @functools.cached_property
    def _table(self) -> pa.Table:
        shards = [_read_shard(self.path / shard.file) for shard in self.header.shards]
        table = pa.concat_tables(shards)
        if len(table) != self.header.count:
            raise CorpusError(
                f"{self.path}: found {len(table)} utterances, {HEADER} says {self.header.count}; prepare it again"
            )
        return table


def _read_shard(file: Path) -> pa.Table:
    """An Arrow stream as a table that lies in the memory map of its file."""
    try:
        table = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
    except pa.ArrowInvalid as error:
        raise CorpusError(f"{file}: not an Arrow file ({error}); copy or prepare the corpus again") from error
    if table.schema.names != list(COLUMNS):
        raise CorpusError(
            f"{file}: found columns {', '.join(table.schema.names)}, expected {', '.join(COLUMNS)}; prepare it again"
        )
    return table


TURNS = "turns.rttm"


def attach_turns(corpus: Corpus, turns: Sequence[Turn]) -> int:
    """Put the turns of the corpus' recordings into its folder, whole or not at all; turns of others are left out.

    Returns:
        How many recordings have turns.

    Raises:
        SourceError: a turn that begins behind the end of its recording, or no recording that has any.

    """
    lengths = {str(name): int(samples) for name, samples in zip(corpus.ids, corpus.lengths, strict=True)}
    held = [turn for turn in turns if turn.recording in lengths]
    if not held:
        found = ", ".join(sorted({turn.recording for turn in turns})[:3]) or "none"
        raise SourceError(
            f"{corpus.path}: no turn is of one of its recordings; the turns are of {found}, the recordings are called "
            f"{', '.join(list(lengths)[:3])}; the second column of an RTTM file is an utterance id"
        )
    for turn in held:
        if turn.start * SAMPLE_RATE >= lengths[turn.recording]:
            raise SourceError(
                f"{corpus.path}: a turn of {turn.recording} begins at {turn.start:.3f} s, the recording lasts "
                f"{lengths[turn.recording] / SAMPLE_RATE:.3f} s; are the turns of another recording?"
            )
    write_text(corpus.path / TURNS, write_rttm(held))
    return len({turn.recording for turn in held})


def turns_of(corpus: Corpus) -> Mapping[str, Sequence[Turn]]:
    """The turns of each recording that has any, by utterance id.

    Raises:
        FileNotFoundError: the corpus has no `turns.rttm`.
        RecordError: a line of it that cannot be right, by its number.

    """
    file = corpus.path / TURNS
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no such file; a corpus gets its turns when it is prepared: python -m wavlm_jax.data SOURCE --out "
            f"{corpus.path} --rttm FILE ... (again, where it is there already)"
        )
    found: dict[str, list[Turn]] = {}
    for turn in read_rttm(file):
        found.setdefault(turn.recording, []).append(turn)
    return found


Corpora: TypeAlias = dict[str, Corpus]
"""By split, `train` first."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The config section `data`: folders that `python -m wavlm_jax.data` prepared."""

    train: str
    evaluation: tuple[str, ...]
    """A split is called what its folder is called: corpora/demo/valid is `valid`."""
    evaluation_buckets: tuple[int, ...]
    """Frames that held-out utterances are padded to; longer ones are cut to the last."""

    def __post_init__(self) -> None:
        names = ["train", *(Path(path).name for path in self.evaluation)]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(
                f"evaluation: two folders are called {min(twice)!r}; expected distinct names, none `train`"
            )

    @property
    def folders(self) -> dict[str, Path]:
        """Folder of each split, `train` first."""
        return {"train": Path(self.train), **{Path(path).name: Path(path) for path in self.evaluation}}


def open_corpora(settings: DataSettings) -> Corpora:
    """The corpus of each split, `train` first.

    Raises:
        FileNotFoundError: where a folder holds no corpus, with the command that makes one.

    """
    for split, folder in settings.folders.items():
        if not (folder / "header.json").is_file():
            raise FileNotFoundError(
                f"config.data: {split} is {folder}, where there is no corpus (no header.json); make one with: "
                f"python -m wavlm_jax.data SOURCE --out {folder}"
            )
    return {split: Corpus.open(folder) for split, folder in settings.folders.items()}
