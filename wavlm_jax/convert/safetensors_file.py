"""safetensors files, one tensor in memory at a time, in and out.

The library's own reader maps the file, and what was looked at stays in memory while it is open; so it is opened anew
for each tensor. Its own writer wants all tensors as bytes at once; so the format, a JSON header and the numbers, is
written here (https://github.com/huggingface/safetensors#format).
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from wavlm_jax.convert.faults import DamagedFile
from wavlm_jax.convert.names import ConversionError
from wavlm_jax.convert.precision import DTYPES, Precision, rounded
from wavlm_jax.convert.source import Source

_NAMES: Mapping[Precision, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_READABLE = frozenset({"F64", "F32", "F16", "BF16"})
_ALIGNMENT = 8


def open_safetensors(path: Path) -> dict[str, Source]:
    """Name -> tensor, to be read when it is wanted.

    Raises:
        DamagedFile: cut off, altered, or no safetensors file.
        ConversionError: a tensor that does not hold floating-point numbers.
        FileNotFoundError: there is no such file.

    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    sources = {}
    try:
        with safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                part = file.get_slice(name)
                if part.get_dtype() not in _READABLE:
                    raise ConversionError(
                        f"{path}: {name} holds {part.get_dtype()}, expected floating-point numbers "
                        f"({', '.join(sorted(_READABLE))}); convert quantised weights back first"
                    )
                sources[name] = Source(name, tuple(part.get_shape()), partial(_read, path, name))
    except (SafetensorError, OSError) as error:
        raise DamagedFile(f"{path}: not a readable safetensors file ({error}); copy or download it again") from error
    return sources


def _read(path: Path, name: str) -> Shaped[np.ndarray, "..."]:
    try:
        with safe_open(path, "numpy") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise DamagedFile(f"{path}: changed while it was read ({error})") from error


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
            _write(file, rounded(name, tensors[name], dtype))


def _write(file: BinaryIO, tensor: np.ndarray) -> None:
    file.write(tensor.reshape(-1).view(np.uint8).data)
