"""A prepared corpus: Arrow files of FLAC audio, a header, and (optional) speaker turns; and the corpora of a config.

`header.json` is written last, so a folder that has one is complete. The Arrow files are memory-mapped: a worker process
opens a corpus at once. The folder also opens with `datasets.load_from_disk` (see `data.prepare`).
`turns.rttm` says who speaks when; its recordings are named by utterance ids, and a recording that has turns counts as
annotated from its first to its last sample.
"""

import bisect
import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int16, Int32, Int64

from wavlm_jax.audio.wave import AudioFault, read_crop
from wavlm_jax.files import read_json, write_json, write_text
from wavlm_jax.settings import SettingsError, check_sizes, read
from wavlm_jax.shapes import SAMPLE_RATE
from wavlm_jax.text.records import Turn, read_rttm, write_rttm

FORMAT = 1
HEADER = "header.json"


class CorpusError(ValueError):
    """A folder that is not a complete corpus, or turns that do not fit one; names the file and what to do."""


@dataclass(frozen=True, kw_only=True)
class CorpusShard:
    """One Arrow file of a corpus."""

    file: str
    rows: int
    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True, kw_only=True)
class CorpusHeader:
    """Contents of `header.json`."""

    format: int
    name: str
    hours: float
    count: int
    """Utterances."""
    speakers: int
    """Distinct ones; 0 if the source names none."""
    sample_rate: int
    """Hz: 16,000."""
    fingerprint: str
    """SHA-256 over ids, lengths and decoded samples: the same on every machine and for every number of workers."""
    source: str
    """Where it came from, in words."""
    source_digest: str
    """SHA-256 over the source's list of utterances, the state of its files, and the options of preparation."""
    faults: dict[str, int]
    """Name of a fault -> files left out because of it; they are listed in bad_files.jsonl."""
    dropped: dict[str, int]
    """too_short, too_long -> utterances left out because of --min-seconds and --max-seconds."""
    warnings: dict[str, int]
    """Name of a warning (`data.conform.WarningName`; cut_without_text: pieces have not the text or phones of their
    file) -> files with it, which are kept."""
    versions: dict[str, str]
    shards: tuple[CorpusShard, ...]


def is_corpus(path: Path) -> bool:
    """Whether `path` holds a complete corpus, as far as its header tells."""
    return (path / HEADER).is_file()


def write_header(folder: Path, header: CorpusHeader) -> None:
    """Write `header.json`, the last file of a corpus, atomically."""
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
        header = read(values, CorpusHeader, str(file))
    except (TypeError, KeyError, SettingsError) as error:
        raise CorpusError(f"{file}: not a corpus header ({error}); prepare the corpus again") from error
    _check_shards(header, file)
    return header


def _check_shards(header: CorpusHeader, file: Path) -> None:
    """Shards are files of the folder itself, named once each; their rows are the corpus."""
    names = [shard.file for shard in header.shards]
    odd = [name for name in names if Path(name).name != name or "\0" in name or names.count(name) > 1]
    if odd:
        raise CorpusError(f"{file}: names the shard {odd[0]!r}, expected files beside it, each once; is it damaged?")
    rows = sum(shard.rows for shard in header.shards if 0 <= shard.rows <= shard.size)
    if rows != header.count:
        raise CorpusError(f"{file}: count is {header.count}, its shards have {rows} rows; is it damaged?")


COLUMNS = ("id", "audio", "samples", "speaker", "text", "mean", "variance", "phones")
"""Of every shard; their types are `data.prepare.FEATURES`."""


class Phones(NamedTuple):
    """Phone alignment of one utterance: `symbols[i]` lasts from sample `starts[i]` up to, not including, `ends[i]`."""

    symbols: list[str]
    starts: Int32[np.ndarray, "phones"]
    ends: Int32[np.ndarray, "phones"]


class StringColumn(Sequence[str]):
    """A string column read from the memory map: no copy of millions of ids in every process."""

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
    """A prepared corpus, memory-mapped.

    Cheap to open and to pickle: only path and header travel, and a worker opens the files when it first reads. Audio is
    decoded crop by crop.
    """

    def __init__(self, path: Path, header: CorpusHeader) -> None:
        self.path = path
        self.header = header

    @classmethod
    def open(cls, path: Path) -> "Corpus":
        """The corpus in folder `path`; reads only the header and compares file sizes.

        Raises:
            CorpusError: no corpus, one of another format, or a shard that is missing or truncated.

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
        """Speaker of each utterance, "" if unknown."""
        return StringColumn(self._table["speaker"])

    @functools.cached_property
    def texts(self) -> Sequence[str]:
        """Transcript of each utterance, "" if there is none."""
        return StringColumn(self._table["text"])

    @functools.cached_property
    def paths(self) -> Sequence[str]:
        """Path of each utterance in its source; pieces of one file share it."""
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
            AudioFault: the stored bytes are damaged, or the crop is longer than the utterance; names the utterance.
            IndexError: no such utterance.

        """
        try:
            return read_crop(memoryview(self._flac(index)), start, num_samples)
        except AudioFault as error:
            raise AudioFault(error.fault, f"{self.path}: utterance {self.ids[index]}: {error.detail}") from error

    def random_index(self, which: float) -> int:
        """The utterance that `which`, in [0, 1), chooses."""
        return int(which * len(self))

    def random_piece(self, which: float, where: float, size: int) -> Int16[np.ndarray, "samples"]:
        """A random crop of a random utterance, such as noise to mix into speech.

        Args:
            which: in [0, 1), chooses the utterance.
            where: in [0, 1), chooses the start.
            size: samples of the crop; fewer only if the utterance has fewer.

        Raises:
            AudioFault: as `wave`.

        """
        index = self.random_index(which)
        length = int(self.lengths[index])
        count = min(length, size)
        return self.wave(index, int(where * (length - count + 1)), count)

    def phones(self, index: int) -> Phones | None:
        """The phone alignment of utterance `index`, None if the corpus has none."""
        value = self._table["phones"][index].as_py()
        if value is None or value["symbols"] is None:
            return None
        return Phones(value["symbols"], np.asarray(value["starts"], np.int32), np.asarray(value["ends"], np.int32))

    def verify(self) -> None:
        """Compare the SHA-256 of every shard with the header.

        Raises:
            CorpusError: names the shard that differs.

        """
        for shard in self.header.shards:
            found = sha256_of(self.path / shard.file)
            if found != shard.sha256:
                raise CorpusError(
                    f"{self.path / shard.file}: SHA-256 {found}, {HEADER} says {shard.sha256}; copy it again"
                )

    def _flac(self, index: int) -> pa.Buffer:
        """The bytes of one utterance in the memory map, without a copy."""
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
    """An Arrow stream as a memory-mapped table."""
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


def attach_turns(corpus: Corpus, turns: Sequence[Turn], piece_samples: int | None = None) -> int:
    """Write the turns of the corpus' recordings to `turns.rttm`, atomically; turns of other recordings are left out.

    Args:
        corpus: whose utterances are recordings, or pieces of recordings.
        turns: of whole recordings.
        piece_samples: of every piece but the last, where recordings were cut (ids end in #0000, #0001, ...): a piece
            gets what is said in it, from its own start on. None: nothing was cut.

    Returns:
        How many recordings have turns.

    Raises:
        CorpusError: a turn that begins after the end of its recording, or no turn of any of its recordings.

    """
    lengths = {str(name): int(samples) for name, samples in zip(corpus.ids, corpus.lengths, strict=True)}
    pieces: dict[str, list[tuple[str, float]]] = {}
    for name in lengths:
        whole, _, number = name.rpartition("#")
        if piece_samples is not None and whole and number.isdecimal():
            pieces.setdefault(whole, []).append((name, int(number) * piece_samples / SAMPLE_RATE))
        else:
            pieces.setdefault(name, []).append((name, 0.0))
    names = _recordings(pieces, corpus.path, {turn.recording for turn in turns})
    held = []
    for turn in turns:
        recording = names.get(turn.recording, "")
        for name, start in pieces.get(recording, []):
            first, last = max(turn.start, start), min(turn.end, start + lengths[name] / SAMPLE_RATE)
            if name == recording:
                held.append(turn._replace(recording=name))
            elif first < last:
                held.append(turn._replace(recording=name, start=first - start, duration=last - first))
    if not held:
        found = ", ".join(sorted({turn.recording for turn in turns})[:3]) or "none"
        raise CorpusError(
            f"{corpus.path}: no turn is of one of its recordings; the turns are of {found}, the recordings are called "
            f"{', '.join(list(lengths)[:3])}; the second column of an RTTM file is an utterance id"
        )
    for turn in held:
        if turn.start * SAMPLE_RATE >= lengths[turn.recording]:
            raise CorpusError(
                f"{corpus.path}: a turn of {turn.recording} begins at {turn.start:.3f} s, the recording lasts "
                f"{lengths[turn.recording] / SAMPLE_RATE:.3f} s; are the turns of another recording?"
            )
    write_text(corpus.path / TURNS, write_rttm(held))
    return len({turn.recording for turn in held})


def _recordings(ids: Iterable[str], where: Path, wanted: Iterable[str]) -> dict[str, str]:
    """What RTTM files call a recording -> its utterance id: itself, the name of its file, or that up to the first dot.

    AMI says ES2002a and has the file ES2002a.Mix-Headset.wav. A name that fits several utterances is an error.
    """
    known = list(ids)
    files = [name.rpartition("/")[2] for name in known]
    names: dict[str, str] = {}
    several: set[str] = set()
    for shorts in ([name.partition(".")[0] for name in files], files, known):
        times = Counter(shorts)
        several |= {short for short in times if times[short] > 1}
        names |= {short: name for short, name in zip(shorts, known, strict=True) if times[short] == 1}
    if unclear := (several - names.keys()).intersection(wanted):
        raise CorpusError(
            f"{where}: turns are of {min(unclear)}, which is the name of several utterances; give the folder of "
            "one kind of recordings as SOURCE, such as mix_clean"
        )
    return names


def turns_of(corpus: Corpus) -> Mapping[str, Sequence[Turn]]:
    """The turns of each recording that has any, by utterance id.

    Raises:
        FileNotFoundError: the corpus has no `turns.rttm`.
        RecordError: a wrong line, by its number.

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
"""Split -> corpus, `train` first."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The config section `data`: folders made by `python -m wavlm_jax.data`."""

    train: str
    evaluation: tuple[str, ...]
    """A split has the name of its folder: corpora/demo/valid is `valid`."""
    evaluation_buckets: tuple[int, ...]
    """Frames that evaluation utterances are padded to; all have to fit, as none is cut."""

    def __post_init__(self) -> None:
        check_sizes(self, "evaluation_buckets")
        names = ["train", *(Path(path).name for path in self.evaluation)]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(
                f"evaluation: two folders are called {min(twice)!r}; expected distinct names, none `train`"
            )


def open_corpora(settings: DataSettings) -> Corpora:
    """The corpus of each split, `train` first.

    Raises:
        FileNotFoundError: a folder holds no corpus; says how to make one.

    """
    corpora = {}
    for split, path in {"train": settings.train, **{Path(path).name: path for path in settings.evaluation}}.items():
        if not is_corpus(Path(path)):
            raise FileNotFoundError(
                f"config.data: {split} is {path}, where there is no corpus (no {HEADER}); make one with: "
                f"python -m wavlm_jax.data SOURCE --out {path}"
            )
        corpora[split] = Corpus.open(Path(path))
    return corpora
