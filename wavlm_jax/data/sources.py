"""What speech there is: folders of audio, manifests, and whatever `datasets` loads, as one list of utterances.

Names come from outside and may not leave their root: `..`, absolute paths and links that point elsewhere are refused.
Faults of a manifest stop everything and name the line; faults of an audio file are found later and only counted.

Manifests: TSV or CSV with a header, JSON lines, fairseq's .tsv (FACTS C4), the metadata of an audiofolder.

Every error names the file and the line. Lines are never guessed at: a duplicate id, a missing file, an empty line or a
number that is none stops the reading before any work is done.

The only module that imports `datasets`: the form of our Arrow files, and the data sets of others.
"""

import contextlib
import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeAlias

import datasets
import pyarrow as pa

from wavlm_jax.audio.wave import AudioFault, AudioSource

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus", ".oga", ".aif", ".aiff", ".au", ".sph", ".w64"})


ID_COLUMNS = ("id", "utterance_id", "utt_id", "segment_id", "audio_id")
SPEAKER_COLUMNS = ("speaker", "speaker_id", "client_id")
TEXT_COLUMNS = ("text", "transcription", "transcript", "sentence", "normalized_text", "raw_transcription")
"""Names under which data sets keep what a manifest calls id, speaker and text; the first that is there counts."""


class SourceError(ValueError):
    """A source that cannot be read as a whole; names the file and line, what was found, what was expected."""


class Alignment(NamedTuple):
    """Phones of one utterance in samples of its file."""

    symbols: list[str]
    starts: list[int]
    ends: list[int]


class Entry(NamedTuple):
    """One utterance of a source, before anything was decoded."""

    id: str
    audio: str | int
    """Path inside the source's root, or row of a data set."""
    stamp: str = ""
    """Changes when the file changes: size and time."""
    samples: int | None = None
    """What a manifest claims."""
    speaker: str = ""
    text: str = ""
    phones: Alignment | None = None

    @property
    def listing(self) -> str:
        """Everything but the stamp, for digests."""
        return json.dumps(self._replace(stamp=""), ensure_ascii=True)


AudioReader: TypeAlias = Callable[[Entry], AudioSource]
"""How the audio of an entry is reached: bytes, or the path of a file inside the root; else an `AudioFault`. Travels to
worker processes."""


@dataclass(frozen=True)
class Source:
    """A list of utterances with a way to their audio."""

    description: str
    entries: Sequence[Entry]
    reader: AudioReader
    notes: tuple[str, ...] = ()
    """What a person should know about how the source was read."""


@dataclass(frozen=True)
class Files:
    """Audio files under one root, which is resolved."""

    root: Path

    def __call__(self, entry: Entry) -> Path:
        """The file, if no link leads out of the root."""
        path = self.root / str(entry.audio)
        return kept_inside(path, self.root, str(path))


def inside(path: Path, root: Path) -> bool:
    """Whether `path`, all links followed, lies under the folder `root`, which has none in it."""
    return path.resolve().is_relative_to(root)


def kept_inside(path: Path, root: Path, what: str) -> Path:
    """`path`, if it lies under `root`.

    Raises:
        AudioFault: outside_root, about `what`.

    """
    if not inside(path, root):
        raise AudioFault("outside_root", f"{what} leads out of {root}")
    return path


def digest(entries: Iterable[Entry], *extra: str, stamps: bool = False) -> str:
    """SHA-256 (hex) over a list of utterances; `stamps`: over the state of their files too."""
    sha256 = hashlib.sha256("\0".join(extra).encode())
    for entry in entries:
        sha256.update(entry.listing.encode() + (entry.stamp.encode() if stamps else b"") + b"\n")
    return sha256.hexdigest()


def stamp(path: Path) -> str:
    """Size and whole seconds of the last change; "" where there is nothing."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_size}@{int(status.st_mtime)}"


def from_folder(root: Path) -> Source:
    """Every audio file under `root`, in order of its path. The id is the path without suffix.

    Linked folders are not entered (they could lead anywhere, or round in circles), but noted; linked files are taken if
    they lie inside the root.

    Raises:
        SourceError: no audio file there.

    """
    root = root.resolve()
    paths = sorted(_audio_files(root), key=os.fsencode)
    if not paths:
        raise SourceError(f"{root}: no audio file, expected one of *{', *'.join(sorted(AUDIO_SUFFIXES))}")
    stems = [os.path.splitext(path)[0] for path in paths]  # noqa: PTH122  (Path would normalise odd names)
    shared = {stem for stem, count in _counts(stems).items() if count > 1}
    names = [path if stem in shared else stem for path, stem in zip(paths, stems, strict=True)]
    entries = [
        Entry(id=printable(name), audio=path, stamp=stamp(root / path)) for name, path in zip(names, paths, strict=True)
    ]
    return Source(f"folder {root}", entries, Files(root), tuple(_linked_folders(root)))


def has_audio(root: Path) -> bool:
    """Whether there is any file with the suffix of audio below `root`."""
    return next(_audio_files(root), None) is not None


def printable(name: str) -> str:
    """A file name as valid Unicode; bytes that are none become escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _audio_files(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        odd = [name for name in folders if _is_audio(name) and not os.path.islink(os.path.join(folder, name))]  # noqa: PTH114, PTH118
        for name in [*files, *odd]:
            if _is_audio(name):
                yield os.path.relpath(os.path.join(folder, name), root)  # noqa: PTH118


def _linked_folders(root: Path) -> Iterator[str]:
    for folder, folders, _ in os.walk(root):
        for name in folders:
            path = Path(folder, name)
            if path.is_symlink():
                yield f"{path}: a linked folder, not entered; to have its audio, give it as a SOURCE of its own"


def _is_audio(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES and not name.startswith(".")  # noqa: PTH122


def _counts(names: Iterable[str]) -> Mapping[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts


SUFFIXES = frozenset({".tsv", ".csv", ".jsonl", ".txt", ".manifest"})
AUDIOFOLDER = ("metadata.jsonl", "metadata.csv")
"""Names under which `datasets` expects the manifest of a folder of audio."""
COLUMNS = {
    "id": ID_COLUMNS,
    "path": ("path", "file_name"),
    "samples": ("samples",),
    "speaker": SPEAKER_COLUMNS,
    "text": TEXT_COLUMNS,
    "phones": ("phones",),
}

_MOST_DIGITS = 18

Numbered: TypeAlias = tuple[int, Mapping[str, Any]]
"""A line's number, and its columns."""


def from_manifest(file: Path, root: Path | None = None) -> Source:
    """The utterances that a manifest lists.

    Args:
        file: a .tsv or .csv with a header line (columns path and, optional, id, samples, speaker, text), .jsonl with
            the same keys and, optional, phones {symbols, starts, ends}; or fairseq's: root, then path TAB samples.
            The names that `datasets` and its users have for these columns (`COLUMNS`) will do as well.
        root: the folder that paths are relative to. None: fairseq's first line, else the folder of the manifest or its
            parent, whichever has the first path.

    Raises:
        SourceError: naming the line.

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
    return Source(f"manifest {file}, root {root}", entries, Files(root), notes)


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
    """Rows of a TSV, where a quote is a letter, or of a CSV, where it is a quote."""
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
    """Line numbers and cells of a csv.reader, whose errors name no line."""
    try:
        for cells in table:
            yield table.line_num, cells
    except csv.Error as error:
        raise SourceError(f"{file}:{table.line_num}: {error}") from error


def _known(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The columns that matter, under one name each; None where there is no path."""
    found = {key: next((row[name] for name in names if name in row), None) for key, names in COLUMNS.items()}
    return {key: value for key, value in found.items() if value is not None} if found["path"] is not None else None


def _fairseq_rows(file: Path, lines: list[str]) -> Iterator[Numbered]:
    for number, line in enumerate(lines, 2):
        cells = line.split("\t")
        if len(cells) != 2:  # noqa: PLR2004
            raise SourceError(f"{file}:{number}: found {len(cells)} columns, expected path TAB samples")
        yield number, {"id": str(PurePosixPath(cells[0]).with_suffix("")), "path": cells[0], "samples": cells[1]}


def _fairseq_root(file: Path, line: str) -> Path:
    """The first line of fairseq's .tsv; a relative one counts from the manifest's folder."""
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
    return Entry(**texts, audio=path, stamp=stamp(root / path), samples=samples, phones=phones)


def _check_path(path: str, root: Path, where: str) -> None:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\0" in path or not inside(root / path, root):
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


def _alignment(value: Any, samples: int | None, where: str) -> Alignment | None:
    if value is None:
        return None
    if not isinstance(value, dict) or set(value) != set(Alignment._fields):
        raise SourceError(f"{where}: phones has to be an object with symbols, starts, ends (in samples)")
    if not all(isinstance(column, list) for column in value.values()):
        raise SourceError(f"{where}: phones: symbols, starts and ends have to be lists")
    phones = Alignment(**value)
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
    """JSON can spell half a character, which no file can hold."""
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


FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "audio": datasets.Audio(decode=False),
        "samples": datasets.Value("int64"),
        "speaker": datasets.Value("string"),
        "text": datasets.Value("string"),
        "mean": datasets.Value("float32"),
        "variance": datasets.Value("float32"),
        "phones": {
            "symbols": [datasets.Value("string")],
            "starts": [datasets.Value("int32")],
            "ends": [datasets.Value("int32")],
        },
    }
)
"""Columns of a corpus. `audio` is {bytes: FLAC 16 kHz mono 16 bit, path}; `samples` are really decoded ones; `mean` and
`variance` (population) are those of the whole utterance in [-1, 1] scale; `phones` is null where there are none."""
SCHEMA: pa.Schema = FEATURES.arrow_schema


def write_dataset_info(folder: Path, files: Sequence[str]) -> None:
    """Make the Arrow `files` in `folder` a dataset that `datasets.load_from_disk` opens.

    `datasets` itself writes its two JSON files, for an empty dataset; then the list of files is put in, so that no
    audio is copied.
    """
    empty = datasets.Dataset(SCHEMA.empty_table())
    scratch = folder / "dataset_info"
    with _no_progress_bars():
        empty.save_to_disk(str(scratch))
    state = json.loads((scratch / "state.json").read_text())
    state["_data_files"] = [{"filename": name} for name in files]
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    (scratch / "dataset_info.json").replace(folder / "dataset_info.json")
    for leftover in scratch.iterdir():
        leftover.unlink()
    scratch.rmdir()


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def load_dataset(source: str, subset: str | None, split: str | None) -> datasets.Dataset:
    """Whatever `datasets` loads, its audio left as bytes.

    Args:
        source: a folder from save_to_disk, a .parquet file or a folder of them, or a name on the hub. (An audiofolder
            is read by manifests.py: `datasets` wants torchcodec to build one.)
        subset: configuration of a hub data set.
        split: name of a split; None: the only one.

    Raises:
        ValueError: several splits and none named.

    """
    path = Path(source)
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        loaded = datasets.load_from_disk(source)
    elif path.suffix == ".parquet" or (path.is_dir() and any(path.rglob("*.parquet"))):
        files = str(path) if path.is_file() else sorted(str(file) for file in path.rglob("*.parquet"))
        loaded = datasets.load_dataset("parquet", data_files=files)
    else:
        loaded = datasets.load_dataset(source, subset)
    if not isinstance(loaded, datasets.DatasetDict):
        return _undecoded(loaded)
    if split is None and len(loaded) == 1:
        split = next(iter(loaded))
    if split not in loaded:
        raise ValueError(f"{source} has the splits {', '.join(map(str, loaded))}; pass --split with one of them")
    return _undecoded(loaded[split])


def audio_column(dataset: datasets.Dataset) -> str:
    """The column that holds audio.

    Raises:
        ValueError: none, or several.

    """
    found = [name for name, feature in dataset.features.items() if _is_audio_column(feature)]
    if len(found) != 1:
        raise ValueError(f"found {len(found)} audio columns among {', '.join(dataset.column_names)}, expected one")
    return found[0]


def _is_audio_column(feature: Any) -> bool:
    return isinstance(feature, datasets.Audio) or (isinstance(feature, dict) and {"bytes", "path"} == set(feature))


def _undecoded(dataset: datasets.Dataset) -> datasets.Dataset:
    return dataset.cast_column(audio_column(dataset), datasets.Audio(decode=False))
