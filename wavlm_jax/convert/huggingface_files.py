"""The weight files of a Hugging Face folder, and how the folder is found: on this machine, or on the hub.

Weights are whole or in shards, as safetensors or as torch's pickles. Only one tensor is in memory at a time, in and
out. For safetensors that means two things. The library's reader maps the file, and what was looked at stays in memory
while it is open; so it is opened anew for each tensor. The library's writer wants all tensors as bytes at once; so the
format, a JSON header and the numbers, is written here (https://github.com/huggingface/safetensors#format).
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from wavlm_jax.convert.state_dict import (
    DTYPES,
    ConversionError,
    Precision,
    StoredTensor,
    current_name,
    respelled,
    rounded,
    tensors_of,
    unwrapped,
)
from wavlm_jax.convert.torch_file import read_torch_file
from wavlm_jax.files import DamagedFile, read_json

WEIGHTS, PICKLED = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
_MAX_SHARDS = 10_000
_NAMES: Mapping[Precision, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_READABLE = frozenset({"F64", "F32", "F16", "BF16"})
_BUFFERS = frozenset({"I64", "BOOL"})
_SHARD = re.compile(r"-\d+-of-\d+$")
_ALIGNMENT = 8
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_SMALL = ["*.json"]
_SAFE = ["model*.safetensors", "pretraining_head.safetensors"]
_LEGACY = ["pytorch_model*.bin"]


@dataclass(frozen=True)
class _SafeTensor:
    """One tensor of a safetensors file."""

    path: Path
    name: str
    shape: tuple[int, ...]

    def read(self) -> Shaped[np.ndarray, "..."]:
        """The numbers, in the dtype of the file."""
        try:
            with safe_open(self.path, "numpy") as file:
                return file.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise DamagedFile(f"{self.path}: changed while it was read ({error})") from error


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Name -> tensor, to be read when it is wanted.

    Raises:
        DamagedFile: cut off, altered, or no safetensors file.
        ConversionError: a tensor that does not hold floating-point numbers.
        FileNotFoundError: there is no such file.

    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    found: dict[str, StoredTensor] = {}
    try:
        with safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                part = file.get_slice(name)
                if part.get_dtype() in _BUFFERS:  # positions, counts, masks: no weights are missing without them
                    continue
                if part.get_dtype() not in _READABLE:
                    raise ConversionError(
                        f"{path}: {name} holds {part.get_dtype()}, expected floating-point numbers "
                        f"({', '.join(sorted(_READABLE))}); convert quantised weights back first"
                    )
                found[name] = _SafeTensor(path, name, tuple(part.get_shape()))
    except (SafetensorError, OSError) as error:
        raise DamagedFile(f"{path}: not a readable safetensors file ({error}); copy or download it again") from error
    return found


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], dtype: Precision) -> None:
    """Writes a new file, tensors in the order of their names, each converted when its turn comes.

    Args:
        path: the file.
        tensors: name -> float32 array, of any strides.
        dtype: of the numbers in the file.

    Raises:
        ConversionError: a number that is not finite, or too large for `dtype`.

    """
    size, header, end = DTYPES[dtype].itemsize, dict[str, Any](__metadata__={"format": "pt"}), 0
    for name in sorted(tensors):
        start, end = end, end + tensors[name].size * size
        shape = list(tensors[name].shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % _ALIGNMENT)
    with path.open("xb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for name in sorted(tensors):
            file.write(rounded(name, tensors[name], dtype).reshape(-1).view(np.uint8).data)


def open_weights(
    folder: Path, file: Path | None = None, notes: list[str] | None = None
) -> tuple[Path, dict[str, StoredTensor]]:
    """The file (or index) that was taken, and its tensors by name, weight norm in the current spelling.

    Args:
        folder: of the model.
        file: the weights in it that were asked for; None: model.safetensors, or else pytorch_model.bin, or shards.
        notes: what is left out is added to them.

    Raises:
        FileNotFoundError: no weights; the message says what the folder has.
        DamagedFile, HostileFile: a file that is not what it should be.
        ConversionError: an index that does not match its shards, or a tensor that is there twice.

    """
    notes = [] if notes is None else notes

    def named(path: Path, found: dict[str, StoredTensor]) -> tuple[Path, dict[str, StoredTensor]]:
        return path, respelled(unwrapped(found, notes), current_name, path)

    if file is not None and not _SHARD.search(file.stem):
        reader = open_safetensors if file.suffix == ".safetensors" else _open_pickled
        return named(file, reader(file))
    for name, reader in ((WEIGHTS, open_safetensors), (PICKLED, _open_pickled)):
        if (folder / name).is_file():
            return named(folder / name, reader(folder / name))
        index = folder / (name + INDEX)
        if index.is_file():
            return named(index, _open_shards(index, reader))
    others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".safetensors", ".h5", ".msgpack"))
    raise FileNotFoundError(f"{folder / WEIGHTS}: no such file; the folder has {', '.join(others) or 'no weights'}")


def _open_pickled(path: Path) -> dict[str, StoredTensor]:
    return dict(tensors_of(read_torch_file(path), path))


def _open_shards(index: Path, reader: Callable[[Path], dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise ConversionError(f"{index}: weight_map is no map from tensors to files")
    shards = sorted(set(where.values()))
    if len(shards) > _MAX_SHARDS:
        raise ConversionError(f"{index}: names {len(shards)} files, expected at most {_MAX_SHARDS}")
    found: dict[str, StoredTensor] = {}
    for shard in shards:
        if PurePath(shard).name != shard or "\\" in shard or "\0" in shard:
            raise ConversionError(f"{index}: names the file {shard[:80]!r}, which leads out of the folder")
        tensors = reader(index.parent / shard)
        if twice := sorted(found.keys() & tensors.keys()):
            raise ConversionError(f"{index}: {twice[0]} is in two files, one of them {shard}")
        found |= tensors
    missing = sorted({current_name(name) for name in where} - {current_name(name) for name in found})
    if missing:
        raise ConversionError(f"{index}: {missing[0]} is in none of its files ({len(missing)} missing)")
    return found


def is_hub_name(text: str) -> bool:
    """Whether it has the form "organisation/model" or "organisation/model@revision"."""
    return _HUB_NAME.fullmatch(text) is not None


def fetch(name: str) -> Path:
    """The folder of a model of the hub: config, vocabulary, and safetensors, or pytorch_model.bin where there are none.

    Args:
        name: "microsoft/wavlm-base-plus", or with a revision, "microsoft/wavlm-base-plus@main".

    Raises:
        ValueError: neither in the cache nor on the hub; the message says why and what to do.

    """
    repository, _, revision = name.partition("@")
    try:  # the hub first: what another program left in the cache may lack the vocabulary or the preprocessor
        return _snapshot(repository, revision or None, local_files_only=False)
    except _HUB_FAULTS as error:
        try:
            return _snapshot(repository, revision or None, local_files_only=True)
        except _HUB_FAULTS:
            pass
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ValueError(
            f"{name}: no such file or folder here, not in Hugging Face's cache, and not to be had from the hub "
            f"({reason}). Check the name; without a network, download it elsewhere ('hf download {repository}') and "
            "give the folder"
        ) from error


_HUB_FAULTS = (OfflineModeIsEnabled, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError)


def _snapshot(repository: str, revision: str | None, *, local_files_only: bool) -> Path:
    """The folder with its small files and weights.

    Raises:
        FileNotFoundError: it has no weights.

    """

    def download(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=patterns, local_files_only=local_files_only)
        )

    folder = download(_SMALL + _SAFE)
    if not _has(folder, WEIGHTS):
        folder = download(_SMALL + _LEGACY)
    if not _has(folder, WEIGHTS) and not _has(folder, PICKLED):
        raise FileNotFoundError(f"{repository}: has neither {WEIGHTS} nor {PICKLED}")
    return folder


def _has(folder: Path, name: str) -> bool:
    return (folder / name).is_file() or (folder / (name + INDEX)).is_file()
