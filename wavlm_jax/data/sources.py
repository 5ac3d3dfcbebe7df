"""Sources of speech as lists of utterances: folders of audio, manifests, and whatever `datasets` loads.

Manifests are TSV or CSV with a header line, JSON lines, fairseq's .tsv (FACTS C4), or the metadata of an audiofolder.
Nothing is guessed: a duplicate id, a missing file, an empty line or a malformed number is an error that names the
line, before any work is done. Faults of audio files are found later (`data.conform`) and only counted.

Names come from outside and may not leave their root: `..`, absolute paths and links that point elsewhere are refused.
"""

import csv
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeAlias

from wavlm_jax.audio.folders import AUDIO_SUFFIXES, AudioFolder, counted, walk
from wavlm_jax.audio.wave import AudioFault, AudioSource

COLUMNS = {
    "id": ("id", "utterance_id", "utt_id", "segment_id", "audio_id"),
    "path": ("path", "file_name"),
    "samples": ("samples",),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "text": ("text", "transcription", "transcript", "sentence", "normalized_text", "raw_transcription"),
    "phones": ("phones",),
}
"""Names of columns in manifests and data sets; the first that exists is taken."""
MANIFEST_SUFFIXES = frozenset({".tsv", ".csv", ".jsonl", ".txt", ".manifest"})
AUDIOFOLDER = ("metadata.jsonl", "metadata.csv")
"""Names that `datasets` expects for the manifest of a folder of audio."""


class SourceError(ValueError):
    """A source that cannot be read; names file and line, what was found, what was expected."""


class PhoneTimes(NamedTuple):
    """Phones of one utterance as a manifest gives them; samples at 16 kHz."""

    symbols: list[str]
    starts: list[int]
    ends: list[int]


class Entry(NamedTuple):
    """One utterance of a source; nothing was decoded yet."""

    id: str
    audio: str | int
    """Path inside the source's root, or row of a data set."""
    stamp: str = ""
    """Size and time of the file: changes when the file changes."""
    samples: int | None = None
    """Length that a manifest claims."""
    speaker: str = ""
    text: str = ""
    phones: PhoneTimes | None = None

    @property
    def listing(self) -> str:
        """Everything but the stamp, for digests."""
        return json.dumps(self._replace(stamp=""), ensure_ascii=True)


AudioReader: TypeAlias = Callable[[Entry], AudioSource]
"""Entry -> its audio: bytes, or the path of a file; raises `AudioFault`. Picklable, for worker processes."""


@dataclass(frozen=True)
class UtteranceSource:
    """A list of utterances, and how to read their audio."""

    description: str
    entries: Sequence[Entry]
    reader: AudioReader
    notes: tuple[str, ...] = ()
    """For people: how the source was understood."""


def open_source(
    name: str, root: Path | None = None, subset: str | None = None, split: str | None = None
) -> UtteranceSource:
    """The utterances of a manifest, a folder of audio with or without metadata, or a data set.

    Args:
        name: a path, or a name on the hub.
        root: folder that the paths of a manifest are relative to (None: see `from_manifest`).
        subset: configuration of a hub data set.
        split: split of a data set that has several.

    Raises:
        SourceError: it cannot be read.

    """
    path = Path(name)
    if path.is_file() and path.suffix in MANIFEST_SUFFIXES:
        return from_manifest(path, root)
    for metadata in AUDIOFOLDER:
        if (path / metadata).is_file():
            return from_manifest(path / metadata, root or path)
    if path.is_dir():
        folder = walk(path.resolve())
        if folder.audio or folder.unread:
            return from_folder(folder)
    return from_datasets(name, subset, split)


@dataclass(frozen=True)
class FileReader:
    """Audio files under `root`, a resolved path. An `AudioReader`."""

    root: Path

    def __call__(self, entry: Entry) -> Path:
        """The file, unless a link leads out of the root."""
        path = self.root / str(entry.audio)
        return _kept_inside(path, self.root, str(path))


def _inside(path: Path, root: Path) -> bool:
    """Whether `path`, with all links followed, lies under the resolved folder `root`."""
    return path.resolve().is_relative_to(root)


def _kept_inside(path: Path, root: Path, what: str) -> Path:
    """`path` if it lies under `root`, else an `AudioFault` outside_root about `what`."""
    if not _inside(path, root):
        raise AudioFault("outside_root", f"{what} leads out of {root}")
    return path


def digest(entries: Iterable[Entry], *extra: str, stamps: bool = False) -> str:
    """SHA-256 (hex) over a list of utterances and `extra`; with `stamps` also over the state of their files."""
    sha256 = hashlib.sha256("\0".join(extra).encode())
    for entry in entries:
        sha256.update(entry.listing.encode() + (entry.stamp.encode() if stamps else b"") + b"\n")
    return sha256.hexdigest()


def _stamp(path: Path) -> str:
    """Size and modification time in whole seconds; "" if the file does not exist."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_size}@{int(status.st_mtime)}"


def from_folder(folder: AudioFolder | Path) -> UtteranceSource:
    """Every audio file of a folder, sorted by path. The id is the path without suffix.

    Links to files are followed if they stay inside the root.

    Raises:
        SourceError: no audio file there.

    """
    if isinstance(folder, Path):
        folder = walk(folder.resolve())
    root = folder.root
    if not folder.audio:
        found = f"only {counted(folder.unread)}, which are not read" if folder.unread else "no audio file"
        raise SourceError(f"{root}: {found}, expected some of *{', *'.join(sorted(AUDIO_SUFFIXES))}")
    stems = [os.path.splitext(path)[0] for path in folder.audio]  # noqa: PTH122  (Path would normalise odd names)
    counts = Counter(stems)
    names = [path if counts[stem] > 1 else stem for path, stem in zip(folder.audio, stems, strict=True)]
    entries = [
        Entry(id=printable(name), audio=path, stamp=_stamp(root / path))
        for name, path in zip(names, folder.audio, strict=True)
    ]
    return UtteranceSource(f"folder {root}", entries, FileReader(root), folder.notes)


def printable(name: str) -> str:
    """A file name as valid Unicode; invalid bytes become escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


_MOST_DIGITS = 18

Numbered: TypeAlias = tuple[int, Mapping[str, Any]]
"""Number of a line, and its columns."""


def from_manifest(file: Path, root: Path | None = None) -> UtteranceSource:
    """The utterances that a manifest lists.

    Args:
        file: a .tsv or .csv with a header line (columns path and, optional, id, samples, speaker, text), .jsonl with
            the same keys and, optional, phones {symbols, starts, ends}; or fairseq's: root, then path TAB samples.
            Other usual names of these columns are accepted too (`COLUMNS`).
        root: the folder that paths are relative to. None: fairseq's first line, else the folder of the manifest or its
            parent, whichever has the first path.

    Raises:
        SourceError: names the line.

    """
    lines, notes = _lines(file), tuple[str, ...]()
    if lines[0].startswith("{"):
        rows = _json_rows(file, lines)
    elif "\t" in lines[0] or file.suffix == ".csv":
        rows = _table_rows(file, lines, "," if file.suffix == ".csv" else "\t")
    else:
        rows = _fairseq_rows(file, lines[1:])
        if root is None:
            root = _fairseq_root(file, lines[0])
            notes = (f"{file}: paths are relative to {root}, as its first line says",)
    numbered = list(rows)
    if not numbered:
        raise SourceError(f"{file}: no utterance, expected one a line")
    root = (root or _find_root(file, str(numbered[0][1]["path"]))).resolve()
    entries = [_entry(row, root, f"{file}:{number}") for number, row in numbered]
    _check_unique(file, [(number, entry.id) for (number, _), entry in zip(numbered, entries, strict=True)])
    return UtteranceSource(f"manifest {file}, root {root}", entries, FileReader(root), notes)


def _lines(file: Path) -> list[str]:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{file}: not UTF-8 text at byte {error.start}; expected a .tsv or .jsonl manifest"
        ) from error
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise SourceError(f"{file}:{number}: empty line, expected an utterance; remove it")
    return lines


def _json_rows(file: Path, lines: list[str]) -> Iterator[Numbered]:
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{file}:{number}: not JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row := _known(row), dict) or not isinstance(row["path"], str):
            raise SourceError(f"{file}:{number}: expected an object with a text under 'path', found {line[:80]!r}")
        yield number, row


def _table_rows(file: Path, lines: list[str], delimiter: str) -> Iterator[Numbered]:
    """Rows of a CSV, or of a TSV, in which a quote is an ordinary character."""
    if delimiter == ",":
        table = _cells(file, csv.reader(lines, strict=True))
    else:
        table = _cells(file, csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE, strict=True))
    _, columns = next(table)
    if len(set(columns)) < len(columns) or _known(dict.fromkeys(columns, "")) is None:
        raise SourceError(
            f"{file}:1: found columns {', '.join(columns)}; expected path and, optional, id, samples, speaker, text, "
            "each once (or fairseq's form: the root folder alone on the first line)"
        )
    for number, cells in table:
        if len(cells) != len(columns):
            raise SourceError(f"{file}:{number}: found {len(cells)} columns, the header has {len(columns)}")
        yield number, _known(dict(zip(columns, cells, strict=True))) or {}


def _cells(file: Path, table: Any) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and cells of a csv.reader, whose own errors do not name the line."""
    try:
        for cells in table:
            yield table.line_num, cells
    except csv.Error as error:
        raise SourceError(f"{file}:{table.line_num}: {error}") from error


def _known(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The known columns under our names; None if there is no path."""
    found = {key: next((row[name] for name in names if name in row), None) for key, names in COLUMNS.items()}
    return {key: value for key, value in found.items() if value is not None} if found["path"] is not None else None


def _fairseq_rows(file: Path, lines: list[str]) -> Iterator[Numbered]:
    for number, line in enumerate(lines, 2):
        cells = line.split("\t")
        if len(cells) != 2:  # noqa: PLR2004
            raise SourceError(f"{file}:{number}: found {len(cells)} columns, expected path TAB samples")
        yield number, {"id": str(PurePosixPath(cells[0]).with_suffix("")), "path": cells[0], "samples": cells[1]}


def _fairseq_root(file: Path, line: str) -> Path:
    """The folder in the first line of fairseq's .tsv; if relative, to the manifest's folder."""
    root = file.parent / line
    if not root.is_dir():
        raise SourceError(f"{file}:1: root {line!r} is not a folder; pass --root FOLDER")
    return root


def _find_root(file: Path, first: str) -> Path:
    for folder in (file.parent, file.resolve().parent.parent):
        if (folder / first).exists():
            return folder
    raise SourceError(
        f"{file}: first path {first!r} is neither under {file.parent} nor under {file.resolve().parent.parent}; "
        "pass --root FOLDER"
    )


def _entry(row: Mapping[str, Any], root: Path, where: str) -> Entry:
    path = row["path"]
    name = row["id"] if "id" in row else str(PurePosixPath(path).with_suffix(""))
    texts = {"id": name, "speaker": row.get("speaker", ""), "text": row.get("text", "")}
    for key, value in texts.items():
        if not isinstance(value, str) or not _is_unicode(value):
            raise SourceError(f"{where}: {key} is {value!r}, expected text")
    if not name or name != name.strip():
        raise SourceError(f"{where}: id is {name!r}, expected text without blanks at its ends")
    _check_path(path, root, where)
    samples = _samples(row.get("samples"), where)
    phones = _alignment(row.get("phones"), samples, where)
    return Entry(**texts, audio=path, stamp=_stamp(root / path), samples=samples, phones=phones)


def _check_path(path: str, root: Path, where: str) -> None:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\0" in path or not _inside(root / path, root):
        raise SourceError(
            f"{where}: path {path!r} leads out of {root}; paths are relative and stay inside; pass --root"
        )
    if not (root / path).exists():
        raise SourceError(f"{where}: path {path!r} does not exist under {root} (columns swapped? blank at the end?)")


def _samples(value: Any, where: str) -> int | None:
    if value is None or value == "":
        return None
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < _MOST_DIGITS:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise SourceError(f"{where}: samples is {value!r}, expected a whole number (columns swapped?)")
    return value


def _alignment(value: Any, samples: int | None, where: str) -> PhoneTimes | None:
    if value is None:
        return None
    if not isinstance(value, dict) or set(value) != set(PhoneTimes._fields):
        raise SourceError(f"{where}: phones has to be an object with symbols, starts, ends (in samples)")
    if not all(isinstance(column, list) for column in value.values()):
        raise SourceError(f"{where}: phones: symbols, starts and ends have to be lists")
    phones = PhoneTimes(**value)
    numbers = [*phones.starts, *phones.ends]
    texts = all(isinstance(symbol, str) and _is_unicode(symbol) for symbol in phones.symbols)
    if not texts or not all(isinstance(number, int) for number in numbers):
        raise SourceError(f"{where}: phones: expected texts under symbols, whole numbers under starts and ends")
    spans = sorted(numbers) == [n for pair in zip(phones.starts, phones.ends, strict=False) for n in pair]
    if not len(phones.symbols) == len(phones.starts) == len(phones.ends) or not spans or min(numbers, default=0) < 0:
        raise SourceError(f"{where}: phones: expected as many starts and ends as symbols, ascending, none overlapping")
    if samples is not None and max(numbers, default=0) > samples:
        raise SourceError(f"{where}: phones end at sample {max(numbers)}, the utterance has {samples}")
    return phones


def _is_unicode(text: str) -> bool:
    """JSON can spell half a character (a lone surrogate), which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_unique(file: Path, names: list[tuple[int, str]]) -> None:
    seen: dict[str, int] = {}
    for number, name in names:
        if name in seen:
            raise SourceError(
                f"{file}:{number}: id {name!r} stands in line {seen[name]} already; ids have to be unique"
            )
        seen[name] = number


@dataclass(frozen=True)
class RowReader:
    """Rows of a data set; those that have a path instead of bytes may only point below `root`. An `AudioReader`."""

    dataset: Any
    column: str
    root: Path

    def __call__(self, entry: Entry) -> bytes | Path:
        """The bytes of one row, or its file."""
        audio = self.dataset[int(entry.audio)][self.column]
        if audio["bytes"] is not None:
            return bytes(audio["bytes"])
        path = self.root / str(audio["path"])
        return _kept_inside(path, self.root, f"row {entry.audio} has no bytes and points to {path}, which")


def from_datasets(name: str, subset: str | None = None, split: str | None = None) -> UtteranceSource:
    """The utterances of a data set; ids are row numbers if it has no id column. Audio stays undecoded bytes.

    Args:
        name: a folder from save_to_disk, a .parquet file or a folder of them, or a name on the hub.
        subset: configuration of a hub data set.
        split: name of a split; None: the only one.

    Raises:
        SourceError: it cannot be loaded, has several splits and none is named, has not exactly one audio column, or
            repeats an id.

    """
    try:
        dataset, column = _load_dataset(name, subset, split)
    except (OSError, ValueError, ConnectionError, RuntimeError) as error:
        raise SourceError(
            f"{name}: not a folder of audio or a manifest, and `datasets` cannot load it either: {error}"
        ) from error
    ids = _texts(dataset, "id") or [f"{row:08d}" for row in range(len(dataset))]
    speakers = _texts(dataset, "speaker") or [""] * len(dataset)
    texts = _texts(dataset, "text") or [""] * len(dataset)
    seen: dict[str, int] = {}
    for row, identity in enumerate(ids):
        if seen.setdefault(identity, row) != row:
            raise SourceError(
                f"{name}: rows {seen[identity]} and {row} have the same id {identity!r}; ids have to be unique"
            )
    entries = [
        Entry(id=identity, audio=row, speaker=speaker, text=text)
        for row, (identity, speaker, text) in enumerate(zip(ids, speakers, texts, strict=True))
    ]
    version = getattr(dataset, "_fingerprint", "")
    reader = RowReader(dataset, column, Path(name).resolve())
    return UtteranceSource(f"data set {name} {split or ''} {version}".strip(), entries, reader)


def _load_dataset(name: str, subset: str | None, split: str | None) -> tuple[Any, str]:
    """A `datasets.Dataset` and the name of its audio column, which is not decoded."""
    import datasets  # noqa: PLC0415 a second or more, for those who need it

    path = Path(name)
    if any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
        loaded = datasets.load_from_disk(name)
    elif path.suffix == ".parquet" or (path.is_dir() and any(path.rglob("*.parquet"))):
        files = str(path) if path.is_file() else sorted(str(file) for file in path.rglob("*.parquet"))
        loaded = datasets.load_dataset("parquet", data_files=files)
    else:
        loaded = datasets.load_dataset(name, subset)
    if isinstance(loaded, datasets.DatasetDict):
        if split is None and len(loaded) == 1:
            split = next(iter(loaded))
        if split not in loaded:
            raise ValueError(f"{name} has the splits {', '.join(map(str, loaded))}; pass --split with one of them")
        loaded = loaded[split]
    columns = [
        column
        for column, feature in loaded.features.items()
        if isinstance(feature, datasets.Audio) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})
    ]
    if len(columns) != 1:
        raise ValueError(f"found {len(columns)} audio columns among {', '.join(loaded.column_names)}, expected one")
    return loaded.cast_column(columns[0], datasets.Audio(decode=False)), columns[0]


def _texts(dataset: Any, key: str) -> list[str] | None:
    """The first known column for `key`, as texts."""
    for name in COLUMNS[key]:
        if name in dataset.column_names:
            return ["" if value is None else str(value) for value in dataset[name]]
    return None
