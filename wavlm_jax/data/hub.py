"""The only module that imports `datasets`: the form of our Arrow files, and the data sets of others."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

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
    found = [name for name, feature in dataset.features.items() if _is_audio(feature)]
    if len(found) != 1:
        raise ValueError(f"found {len(found)} audio columns among {', '.join(dataset.column_names)}, expected one")
    return found[0]


def _is_audio(feature: Any) -> bool:
    return isinstance(feature, datasets.Audio) or (isinstance(feature, dict) and {"bytes", "path"} == set(feature))


def _undecoded(dataset: datasets.Dataset) -> datasets.Dataset:
    return dataset.cast_column(audio_column(dataset), datasets.Audio(decode=False))
