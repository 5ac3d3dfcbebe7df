"""Sources of speech as lists of utterances: folders of audio, manifests, and whatever `datasets` loads.

Faults of a list are errors before any work is done; faults of audio files are found later (`data.conform`) and only
counted.
"""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from wavlm_jax.audio.folders import AUDIO_SUFFIXES, AudioFolder, counted, walk
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
    printable,
    stamp_of,
    text_of,
    value_at,
)
from wavlm_jax.data.manifests import from_manifest

MANIFEST_SUFFIXES = frozenset({".tsv", ".csv", ".jsonl", ".txt", ".manifest"})
AUDIOFOLDER = ("metadata.jsonl", "metadata.csv")
"""Names that `datasets` expects for the manifest of a folder of audio."""


def open_source(
    name: str,
    root: Path | None = None,
    subset: str | None = None,
    split: str | None = None,
    chosen: Chosen | None = None,
) -> UtteranceSource:
    """The utterances of a manifest, a folder of audio with or without metadata, or a data set.

    Args:
        name: a path, or a name on the hub.
        root: folder that the paths of a manifest are relative to (None: see `from_manifest`).
        subset: configuration of a hub data set.
        split: split of a data set that has several.
        chosen: columns that go before the usual names.

    Raises:
        SourceError: it cannot be read.

    """
    path = Path(name)
    if path.is_file() and path.suffix in MANIFEST_SUFFIXES:
        return from_manifest(path, root, chosen)
    for metadata in AUDIOFOLDER:
        if (path / metadata).is_file():
            return from_manifest(path / metadata, root or path, chosen)
    if path.is_dir():
        folder = walk(path.resolve())
        if folder.audio or folder.unread:
            if chosen:
                raise SourceError(
                    f"{path}: a folder of audio, which has no columns; --{min(chosen)}-column is for tables"
                )
            return from_folder(folder)
    return from_datasets(name, subset, split, chosen)


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
        Entry(id=printable(name), audio=path, stamp=stamp_of(root / path))
        for name, path in zip(names, folder.audio, strict=True)
    ]
    return UtteranceSource(f"folder {root}", entries, FileReader(root), folder.notes)


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
        return kept_inside(path, self.root, f"row {entry.audio} has no bytes and points to {path}, which")


def from_datasets(
    name: str, subset: str | None = None, split: str | None = None, chosen: Chosen | None = None
) -> UtteranceSource:
    """The utterances of a data set; classes have their names, and audio stays undecoded bytes.

    Ids are those of the first usual column whose values are all different; else the paths of the audio, where there
    is such a column and these are different; else row numbers.

    Args:
        name: a folder from save_to_disk, a .parquet file or a folder of them, or a name on the hub.
        subset: configuration of a hub data set.
        split: name of a split; None: the only one.
        chosen: columns that go before the usual names; `path` is the audio's.

    Raises:
        SourceError: it cannot be loaded, has several splits and none is named, has not exactly one audio column, or
            no text in a column for texts, or the column that was named for ids repeats one.

    """
    chosen = chosen or {}
    try:
        dataset, column = _load_dataset(name, subset, split, chosen.get("path"))
    except (OSError, ValueError, ConnectionError, RuntimeError) as error:
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
    entries = [
        Entry(id=identity, audio=row, speaker=speaker, text=one_line(text))
        for row, (identity, speaker, text) in enumerate(zip(ids, speakers, texts, strict=True))
    ]
    used = {taken[key] for key in ("id", "speaker", "text") if key in taken}
    said = [f"{key} is {taken[key]!r}" for key in ("speaker", "text") if key in taken]
    unused = [key for key in features if key not in {name.partition(".")[0] for name in used}]
    notes.append(
        f"{name}: columns: {', '.join(said) or 'neither speaker nor text'}"
        + (f"; not used: {listed(unused)} (--text-column and --speaker-column name others)" if unused else "")
    )
    version = getattr(dataset, "_fingerprint", "")
    reader = RowReader(dataset, column, Path(name).resolve())
    return UtteranceSource(f"data set {name} {split or ''} {version}".strip(), entries, reader, tuple(notes))


def _ids(dataset: Any, audio: str, chosen: Chosen, name: str) -> tuple[list[str], list[str]]:
    """Ids of all rows, and notes about columns that cannot give them."""
    notes = []
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
        if (isinstance(feature, datasets.Audio) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"}))
        and audio in (None, column)
    ]
    if len(columns) != 1:
        wanted = "expected one; --audio-column names it" if audio is None else f"and {audio!r} is none"
        raise ValueError(f"found {len(columns)} audio columns among {listed(loaded.column_names)}, {wanted}")
    return loaded.cast_column(columns[0], datasets.Audio(decode=False)), columns[0]


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
