"""Data sets that `datasets` loads as a source: hub, parquet, Arrow. It hands out bytes, undecoded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wavlm_jax.data.hub import audio_column, load_dataset
from wavlm_jax.data.sources import ID_COLUMNS, SPEAKER_COLUMNS, TEXT_COLUMNS, Entry, Source, SourceError, kept_inside


@dataclass(frozen=True)
class Rows:
    """Rows of a data set; those that hold a path instead of bytes may only point below `root`."""

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


def from_datasets(source: str, subset: str | None = None, split: str | None = None) -> Source:
    """The utterances of a data set (see `corpus.load_dataset`); ids are row numbers where no id column is known.

    Raises:
        SourceError: it cannot be loaded, has no single audio column, or repeats an id.

    """
    try:
        dataset = load_dataset(source, subset, split)
        column = audio_column(dataset)
    except (OSError, ValueError, ConnectionError, RuntimeError) as error:
        raise SourceError(
            f"{source}: not a folder of audio or a manifest, and `datasets` cannot load it either: {error}"
        ) from error
    ids = _texts(dataset, ID_COLUMNS) or [f"{row:08d}" for row in range(len(dataset))]
    speakers = _texts(dataset, SPEAKER_COLUMNS) or [""] * len(dataset)
    texts = _texts(dataset, TEXT_COLUMNS) or [""] * len(dataset)
    seen: dict[str, int] = {}
    for row, name in enumerate(ids):
        if seen.setdefault(name, row) != row:
            raise SourceError(f"{source}: rows {seen[name]} and {row} have the same id {name!r}; ids have to be unique")
    entries = [
        Entry(id=name, audio=row, speaker=speaker, text=text)
        for row, (name, speaker, text) in enumerate(zip(ids, speakers, texts, strict=True))
    ]
    version = getattr(dataset, "_fingerprint", "")
    return Source(
        f"data set {source} {split or ''} {version}".strip(), entries, Rows(dataset, column, Path(source).resolve())
    )


def _texts(dataset: Any, names: tuple[str, ...]) -> list[str] | None:
    """The first known column as texts."""
    for name in names:
        if name in dataset.column_names:
            return ["" if value is None else str(value) for value in dataset[name]]
    return None
