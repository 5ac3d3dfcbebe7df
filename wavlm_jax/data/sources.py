"""Sources of speech as lists of utterances: folders of audio, manifests, and whatever `datasets` loads.

Faults of a list are errors before any work is done; faults of audio files are found later (`data.conform`) and only
counted.
"""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wavlm_jax.audio.folders import AUDIO_SUFFIXES, AudioFolder, counted, walk
from wavlm_jax.data.entries import (
    COLUMNS,
    Entry,
    FileReader,
    SourceError,
    UtteranceSource,
    kept_inside,
    printable,
    stamp_of,
)
from wavlm_jax.data.manifests import from_manifest

MANIFEST_SUFFIXES = frozenset({".tsv", ".csv", ".jsonl", ".txt", ".manifest"})
AUDIOFOLDER = ("metadata.jsonl", "metadata.csv")
"""Names that `datasets` expects for the manifest of a folder of audio."""


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
