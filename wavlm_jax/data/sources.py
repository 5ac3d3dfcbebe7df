"""Sources of speech as lists of utterances: folders of audio, manifests, and whatever `datasets` loads.

Faults of a list are errors before any work is done; faults of audio files are found later (`data.conform`) and only
counted.
"""

import dataclasses
import fnmatch
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.compute as pc

from wavlm_jax.audio.folders import AUDIO_SUFFIXES, AudioFolder, counted, cure_of, walk
from wavlm_jax.audio.wave import AudioFault
from wavlm_jax.data.entries import (
    COLUMNS,
    Chosen,
    Entry,
    FileReader,
    SourceError,
    UtteranceSource,
    choose_columns,
    kept_inside,
    listed,
    names_in,
    one_line,
    stamp_of,
    text_of,
    value_at,
)
from wavlm_jax.data.layouts import Beside, beside, common_voice, kaldi
from wavlm_jax.data.manifests import alignment, from_manifest, from_rows
from wavlm_jax.files import printable

MANIFEST_SUFFIXES = (".tsv", ".csv", ".jsonl", ".jsonl.gz", ".json", ".txt", ".manifest")
AUDIOFOLDER = ("metadata.jsonl", "metadata.csv")
"""Names that `datasets` expects for the manifest of a folder of audio."""


def open_source(
    name: str,
    root: Path | None = None,
    subset: str | None = None,
    split: str | None = None,
    chosen: Chosen | None = None,
    *,
    whole: bool = False,
    plain: bool = False,
) -> UtteranceSource:
    """The utterances of a manifest, a folder of audio with or without metadata, or a data set.

    Args:
        name: a path, or a name on the hub.
        root: folder that has all audio, where that is not the source's own (see `from_manifest`).
        subset: configuration of a data set.
        split: which of several splits; of files, a pattern such as `train*` takes all that match.
        chosen: columns that go before the usual names.
        whole: recordings as wholes, where a Kaldi folder has segments.
        plain: of a folder, audio files alone, whatever stands beside them.

    Raises:
        SourceError: it cannot be read, or has several splits and none is named.
        RecordError: a file beside the audio cannot be read.

    """
    path = Path(name)
    one_list = path.is_file() and name.endswith(MANIFEST_SUFFIXES)
    is_kaldi = not plain and (path / "wav.scp").is_file()
    if (one_list or is_kaldi) and (split is not None or subset is not None):
        raise SourceError(f"{name}: one list, of which --split and --subset choose nothing; name the one to read")
    if one_list:
        return from_manifest(path, root, chosen)
    if is_kaldi:
        listing, rows = kaldi(path, whole=whole)
        unused = [f"{path}: has turns; with --rttm {path / 'rttm'} recordings are taken as wholes, with their turns"]
        notes = unused if (path / "rttm").is_file() and not whole else []
        return from_rows(listing, rows, root, [*([] if root is None else [root]), path, path.parent], notes)
    if not plain and (tables := common_voice(path)):
        table, *more = choose_splits(name, list(tables), split)
        if more:
            raise SourceError(f"{name}: --split {split}: found {len(more) + 1} tables; they are read one at a time")
        return from_manifest(tables[table], root or path / "clips", chosen)
    if path.is_dir():
        folder = _of_split(walk(path.resolve()), split)
        if not plain and (metadata := _metadata(folder)) is not None:
            return _from_metadata(folder, metadata, root, chosen)
        if folder.audio or folder.unread:
            if chosen:
                raise SourceError(
                    f"{path}: a folder of audio, which has no columns; --{min(chosen)}-column is for tables"
                )
            return from_folder(folder, root, plain=plain)
    return from_datasets(name, subset, split, chosen, root)


_SPLIT_FOLDER = re.compile(r"(train|test|dev|val|eval)(ing|elopment|id|idation|uation)?(?![a-z])", re.IGNORECASE)
_MOST_NAMED = 10


def _split_folder(path: str) -> str:
    """The part of a path down to the first folder that is named like a split, such as train-clean-100; else ""."""
    folders = PurePosixPath(path).parts[:-1]
    number = next((number for number, folder in enumerate(folders) if _SPLIT_FOLDER.match(folder)), None)
    return "" if number is None else "/".join(folders[: number + 1])


def _of_split(folder: AudioFolder, split: str | None) -> AudioFolder:
    """What belongs to a split, where folders are named like splits; training and test audio is never joined unasked."""
    held = [*folder.audio, *folder.unread]
    names = sorted({_split_folder(name) for name in held} - {""})
    matches = [_SPLIT_FOLDER.match(PurePosixPath(name).name) for name in names]
    kinds = {match[1].lower() for match in matches if match is not None}
    if not held or (split is None and len(kinds) <= 1):
        return folder
    chosen = {*choose_splits(str(folder.root), names, split), *([""] if split == "*" else [])}
    audio = [name for name in folder.audio if _split_folder(name) in chosen]
    others = [name for name in folder.others if _split_folder(name) in {*chosen, ""}]
    unread = [name for name in folder.unread if _split_folder(name) in chosen]
    return folder._replace(audio=audio, others=others, unread=unread)


def choose_splits(where: str, names: Sequence[str], split: str | None) -> list[str]:
    """Those of `names` (paths of folders or files) that `split` asks for.

    Args:
        where: the source, for messages.
        names: of all splits.
        split: a name or its last part; with `*`, `?` or `[` a pattern; None: the only one.

    Raises:
        SourceError: none, or several that no pattern joins.

    """
    joins = split is not None and any(sign in split for sign in "*?[")
    if split is None:
        found = list(names)
    elif joins:
        found = [name for name in names if fnmatch.fnmatchcase(name, split)]
    else:
        found = [name for name in names if name == split] or [n for n in names if PurePosixPath(n).name == split]
    if not found or (len(found) > 1 and not joins):
        some = ", ".join(names[:_MOST_NAMED]) + (f" and {len(names) - _MOST_NAMED} more" * (len(names) > _MOST_NAMED))
        asked = "" if split is None else f"--split {split}: found {len(found)}; "
        raise SourceError(
            f"{where}: {asked}it has the splits {some or '(none)'}, which are not joined unasked; pass --split "
            "with one of them, or with a pattern in quotes that takes several ('train*', '*')"
        )
    return found


def _metadata(folder: AudioFolder) -> str | None:
    """The metadata of an audiofolder: in the folder itself, or in the one folder below that has any.

    Raises:
        SourceError: it stands in several folders.

    """
    top = [name for name in AUDIOFOLDER if name in folder.others]
    named = [name for name in folder.others if PurePosixPath(name).name in AUDIOFOLDER and folder.audio]
    found = {str(PurePosixPath(name).parent): name for name in named}  # in one folder: .jsonl, which sorts behind .csv
    if not top and len(found) > 1:
        some = ", ".join(list(found)[:_MOST_NAMED])
        raise SourceError(
            f"{folder.root}: metadata stands in {len(found)} folders ({some}); give one of them as SOURCE"
        )
    return next(iter([*top, *found.values()]), None)


def _from_metadata(folder: AudioFolder, metadata: str, root: Path | None, chosen: Chosen | None) -> UtteranceSource:
    """The rows of an audiofolder's metadata whose folders are those of `folder`; audio without a row is noted."""
    file = folder.root / metadata
    source = from_manifest(file, root or file.parent, chosen)
    place = PurePosixPath(metadata).parent
    paths = [os.path.normpath(place / str(entry.audio)) for entry in source.entries]
    splits = {_split_folder(path) for path in folder.audio} | {""}
    kept = [entry for entry, path in zip(source.entries, paths, strict=True) if _split_folder(path) in splits]
    notes = (*source.notes, *folder.notes)
    if unlisted := [path for path in folder.audio if path not in {*paths}]:
        notes += (f"{file}: does not list {len(unlisted)} audio files, left out, such as {printable(unlisted[0])}",)
    return dataclasses.replace(source, entries=kept, notes=notes)


def from_folder(folder: AudioFolder | Path, root: Path | None = None, *, plain: bool = False) -> UtteranceSource:
    """Every audio file of a folder, sorted by path. The id is the path without suffix.

    Transcripts, speakers and phones beside the files are read in known layouts (`layouts.beside`), unless `plain`.

    Links to files are followed if they stay inside `root`, by default the folder.

    Raises:
        SourceError: no audio file there.

    """
    if isinstance(folder, Path):
        folder = walk(folder.resolve())
    place = folder.root
    if not folder.audio:
        unread = f"only {counted(folder.unread)}, which are not read ({cure_of(folder.unread)})"
        found = unread if folder.unread else "no audio file"
        raise SourceError(f"{place}: {found}, expected some of *{', *'.join(sorted(AUDIO_SUFFIXES))}")
    stems = [os.path.splitext(path)[0] for path in folder.audio]  # noqa: PTH122  (Path would normalise odd names)
    counts = Counter(stems)
    names = [path if counts[stem] > 1 else stem for path, stem in zip(folder.audio, stems, strict=True)]
    layouts, rows = ([], Beside()) if plain else beside(folder)
    known = {path: row for path, row in rows.items() if row is not None}
    entries = [
        Entry(
            id=printable(name),
            audio=path,
            stamp=stamp_of(place / path),
            **_annotations(known.get(path, {}), place / path),
        )
        for name, path in zip(names, folder.audio, strict=True)
        if path not in rows or path in known
    ]
    reader = FileReader((root or place).resolve(), place)
    return UtteranceSource(f"folder {place}", entries, reader, (*folder.notes, *_said(layouts, rows, entries)))


def _annotations(row: Mapping[str, Any], path: Path) -> dict[str, Any]:
    return dict(row) | {"phones": alignment(row.get("phones"), None, str(path))}


def _said(layouts: Sequence[str], rows: Beside, entries: Sequence[Entry]) -> Iterator[str]:
    """Notes on how many files have what, and on what has no file."""
    if not layouts:
        return
    texts, speakers = (sum(bool(getattr(entry, key)) for entry in entries) for key in ("text", "speaker"))
    yield f"read as {' and '.join(layouts)}: {len(entries)} files, {texts} with a transcript, {speakers} with a speaker"
    copies = sum(row is None for row in rows.values())
    if copies:
        yield f"left out: {copies} further copies of these (second microphones, converted files)"
    lost = rows.keys() - {entry.audio for entry in entries} - {path for path, row in rows.items() if row is None}
    if lost:
        yield f"{len(lost)} transcripts have no audio file, such as that of {min(lost)}"


@dataclass(frozen=True)
class RowReader:
    """Rows of a data set; those that have a path instead of bytes may only point below `root`. An `AudioReader`."""

    dataset: Any
    column: str
    root: Path
    folder: Path
    """What relative paths start from, if not from the root."""

    def __call__(self, entry: Entry) -> bytes | Path:
        """The bytes of one row, or its file."""
        audio = self.dataset[int(entry.audio)][self.column]
        if audio is None or (audio["bytes"] is None and not audio["path"]):
            raise AudioFault("missing", f"row {entry.audio} has neither bytes nor a path")
        if audio["bytes"] is not None:
            return bytes(audio["bytes"])
        places = [folder / str(audio["path"]) for folder in (self.root, self.folder)]
        path = next((place for place in places if place.exists()), places[-1])
        return kept_inside(path, self.root, f"row {entry.audio} has no bytes and points to {path}, which")


def from_datasets(
    name: str,
    subset: str | None = None,
    split: str | None = None,
    chosen: Chosen | None = None,
    root: Path | None = None,
) -> UtteranceSource:
    """The utterances of a data set; classes have their names, and audio stays undecoded bytes.

    Ids are those of the first usual column whose values are all different; else the paths of the audio, where there
    is such a column and these are different; else row numbers.

    Args:
        name: a folder from save_to_disk, a .parquet file or a folder of them, or a name on the hub.
        subset: configuration of a hub data set, or a folder of parquet files.
        split: see `choose_splits`; None: the only one.
        chosen: columns that go before the usual names; `path` is the audio's.
        root: below which rows may name files instead of having bytes; None: the data set's folder, of a name on the
            hub the cache that it is downloaded to.

    Raises:
        SourceError: it cannot be loaded, has several splits and none is named, has not exactly one audio column, or
            no text in a column for texts, or the column that was named for ids repeats one.

    """
    import datasets  # noqa: PLC0415 a second or more, for those who need it

    chosen = chosen or {}
    try:
        dataset, column = _load_dataset(name, subset, split, chosen.get("path"))
    except SourceError:
        raise
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise SourceError(
            f"{name}: not a folder of audio or a manifest, and `datasets` cannot load it either: {error}"
        ) from error
    features = {key: feature for key, feature in dataset.features.items() if key != column}
    named = {key: value for key, value in chosen.items() if key != "path"}
    taken = choose_columns(names_in(features), named, name)
    ids, notes = _ids(dataset, column, named, name)
    speakers, texts = (
        _texts(dataset, taken[key], name) if key in taken else [""] * len(dataset) for key in ("speaker", "text")
    )
    version = getattr(dataset, "_fingerprint", "")
    entries = [
        Entry(id=identity, audio=row, stamp=version, speaker=speaker, text=one_line(text))
        for row, (identity, speaker, text) in enumerate(zip(ids, speakers, texts, strict=True))
    ]
    used = {taken[key] for key in ("id", "speaker", "text") if key in taken}
    said = [f"{key} is {taken[key]!r}" for key in ("speaker", "text") if key in taken]
    unused = [key for key in features if key not in {name.partition(".")[0] for name in used}]
    notes.append(
        f"{name}: columns: {', '.join(said) or 'neither speaker nor text'}"
        + (f"; not used: {listed(unused)} (--text-column and --speaker-column name others)" if unused else "")
    )
    folder = Path(name) if Path(name).exists() else Path(datasets.config.HF_CACHE_HOME).expanduser()
    folder = (folder.parent if folder.is_file() else folder).resolve()
    reader = RowReader(dataset, column, (root or folder).resolve(), folder)
    return UtteranceSource(f"data set {name} {split or ''} {version}".strip(), entries, reader, tuple(notes))


def _ids(dataset: Any, audio: str, chosen: Chosen, name: str) -> tuple[list[str], list[str]]:
    """Ids of all rows, and notes about columns that cannot give them."""
    notes = list[str]()
    known = [chosen["id"]] if "id" in chosen else [column for column in COLUMNS["id"] if column in dataset.features]
    for column in filter(None, known):
        ids = _texts(dataset, column, name)
        first = {identity: row for row, identity in reversed(list(enumerate(ids)))}
        row = next((row for row, identity in enumerate(ids) if first[identity] != row or not identity.strip()), None)
        if row is None:
            return ids, notes
        found = f"rows {first[ids[row]]} and {row} have the same id {ids[row]!r}" if ids[row] else f"row {row} has none"
        if column == chosen.get("id"):
            raise SourceError(f"{name}: {found} in column {column!r}; ids have to be unique")
        notes.append(f"{name}: {found} in column {column!r}, which is no id")
    if notes:
        table = dataset.data if getattr(dataset, "_indices", None) is None else None  # in the order of the rows
        paths = [] if table is None else pc.struct_field(table.column(audio), "path").to_pylist()
        stems = [os.path.splitext(path or "")[0] for path in paths]  # noqa: PTH122  (a name, not a path of this machine)
        if len(set(stems)) == len(dataset) and all(stem and stem == stem.strip() for stem in stems):
            return stems, [*notes, f"{name}: ids are the paths of the audio"]
        notes.append(f"{name}: ids are the numbers of the rows")
    return [f"{row:08d}" for row in range(len(dataset))], notes


def _load_dataset(name: str, subset: str | None, split: str | None, audio: str | None) -> tuple[Any, str]:
    """A `datasets.Dataset` and the name of its audio column, which is not decoded."""
    import datasets  # noqa: PLC0415 a second or more, for those who need it

    path = Path(name)
    if any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
        loaded = datasets.load_from_disk(name)
    elif path.suffix == ".parquet" and path.is_file():
        loaded = datasets.load_dataset("parquet", data_files=name)
    elif path.is_dir() and any(path.rglob("*.parquet")):
        loaded = datasets.load_dataset("parquet", data_files=_parquet_files(path, subset, split), split="train")
    else:
        loaded = datasets.load_dataset(name, subset)
    if isinstance(loaded, datasets.DatasetDict):
        parts = [loaded[part] for part in choose_splits(name, list(map(str, loaded)), split)]
        loaded = datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    sound = [
        column
        for column, feature in loaded.features.items()
        if isinstance(feature, datasets.Audio) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})
    ]
    if not sound:  # paths as texts
        usual = next((column for column in ("audio", *COLUMNS["path"]) if column in loaded.features), None)
        sound = [column for column in (audio or usual,) if column in loaded.features]
    columns = [column for column in sound if audio in (None, column)]
    if len(columns) != 1:
        wanted = "expected one; --audio-column names it" if audio is None else f"and {audio!r} is none"
        raise ValueError(f"found {len(columns)} audio columns among {listed(loaded.column_names)}, {wanted}")
    return loaded.cast_column(columns[0], datasets.Audio(decode=False)), columns[0]


_SHARD = re.compile(r"(^|[-_.])\d+[-_.]of[-_.]\d+(-[0-9a-f]{16})?$|^\d+$|[-_]\d{4,}$")
"""The end of a file's name that numbers the parts of one split: train-00000-of-00002, 0, part-0001."""


def _parquet_files(folder: Path, subset: str | None, split: str | None) -> list[str]:
    """The parquet files of a split: those that lie in one folder and whose names differ in a number alone."""
    splits: dict[str, list[str]] = {}
    for file in sorted(folder.rglob("*.parquet")):
        inner = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in inner.parts)
        if not hidden and (subset is None or subset in inner.parts[:-1]):
            splits.setdefault(str(inner.parent / _SHARD.sub("", inner.stem)), []).append(str(file))
    where = str(folder) if subset is None else f"{folder}, --subset {subset}"
    return [file for name in choose_splits(where, list(splits), split) for file in splits[name]]


def _texts(dataset: Any, name: str, where: str) -> list[str]:
    """A column as texts: names of classes, not their numbers."""
    feature = value_at(dataset.features, name)
    classes = getattr(feature, "names", None)  # of a ClassLabel
    key, inner = (name, "") if name in dataset.features else name.split(".", 1)
    texts = []
    for row, cell in enumerate(dataset[key]):
        value = cell if not inner or cell is None else cell[inner]
        if classes is not None and value is not None:
            value = classes[value] if value >= 0 else None
        try:
            texts.append(text_of(value))
        except ValueError as error:
            names = ", ".join(f"{name}.{part}" for part in feature) if isinstance(feature, dict) else "another column"
            raise SourceError(
                f"{where}: row {row}: column {name!r} {error}; name {names} with --text-column or --speaker-column"
            ) from error
    return texts
