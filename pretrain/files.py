"""Small files that are whole or absent: JSON objects, and safetensors with a JSON header."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from wavlm_jax.whole_file import replacing

_MAX_JSON_BYTES = 64 * 2**20
_HEADER_KEY = "header"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object: whoever reads `path` finds the old one or the new one, never a half."""
    _replace(path, json.dumps(value, indent=2, sort_keys=True).encode() + b"\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of at most 64 MiB.

    Raises:
        ValueError: the file holds something else.
        FileNotFoundError: there is no such file.

    """
    size = path.stat().st_size
    if size > _MAX_JSON_BYTES:
        raise ValueError(f"{path}: {size} bytes, expected a JSON object of at most {_MAX_JSON_BYTES}")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); it was cut off or written by something else") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: found a JSON {type(value).__name__}, expected an object")
    return value


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> None:
    """Writes a safetensors file, whole or not at all, with `header` as JSON in its metadata."""
    metadata = {_HEADER_KEY: json.dumps(header, sort_keys=True)}
    _replace(path, safetensors.numpy.save(dict(tensors), metadata=metadata))


def read_tensors(path: Path, expected: Mapping[str, tuple[str, int]]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and header of a file that `write_tensors` wrote.

    Args:
        path: the file.
        expected: name -> (dtype, number of dimensions); exactly these must be there, with finite values.

    Raises:
        ValueError: not safetensors, or other tensors than expected.

    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            header = json.loads((file.metadata() or {})[_HEADER_KEY])
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not a safetensors file that this programme wrote ({error}); delete it") from error
    found = {name: (str(tensor.dtype), tensor.ndim) for name, tensor in tensors.items()}
    if found != dict(expected) or not isinstance(header, dict):
        raise ValueError(f"{path}: holds {found}, expected {dict(expected)}; delete it")
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds values that are not finite; delete it")
    return tensors, header


def _replace(path: Path, content: bytes) -> None:
    with replacing(path) as draft:
        draft.write_bytes(content)
