"""Writes what `torch.load(path, weights_only=True)` reads: plain data and tensors, without torch.

The zip layout of torch >= 1.6: a pickle of protocol 2 that names three functions of torch, and one stored member a
tensor, aligned so that torch can map it into memory. The same content gives the same bytes.
"""

import struct
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from wavlm_jax.convert.torch_tensor import DTYPES
from wavlm_jax.whole_file import replacing

_ROOT = "archive"
_ALIGNMENT = 64
_LOCAL_HEADER_BYTES = 30
_EXTRA_HEADER = struct.Struct("<2sH")
_PADDING_KIND = b"FB"
_FIRST_DATE = (1980, 1, 1, 0, 0, 0)
_STORAGES = {dtype: name.removeprefix("torch.") for name, dtype in DTYPES.items()}


def write_torch_file(path: Path, value: Any) -> None:
    """Writes `value` as torch would; whoever reads `path` finds the old file or the whole new one.

    Args:
        path: the file; its folder is made.
        value: None, bools, ints of 64 bits, floats, strings, numpy arrays of torch's types, and lists, tuples and dicts
            of these.

    Raises:
        TypeError: something else in `value`.

    """
    pickle = _Pickle()
    pickle.add(value)
    with replacing(path) as draft, zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, "data.pkl", pickle.content())
        _add(archive, "byteorder", b"little")
        for key, array in enumerate(pickle.arrays):
            _add(archive, f"data/{key}", np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        _add(archive, "version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    """One stored member, its first byte at a multiple of 64."""
    info = zipfile.ZipInfo(f"{_ROOT}/{name}", _FIRST_DATE)
    info.file_size = len(content)
    start = archive.start_dir + _LOCAL_HEADER_BYTES + len(info.filename) + _EXTRA_HEADER.size
    padding = -start % _ALIGNMENT
    info.extra = _EXTRA_HEADER.pack(_PADDING_KIND, padding) + b"Z" * padding
    with archive.open(info, "w") as member:
        member.write(content)


class _Pickle:
    """A pickle being written, and the arrays that it refers to."""

    def __init__(self) -> None:
        self.out = BytesIO()
        self.arrays: list[np.ndarray] = []
        self.out.write(b"\x80\x02")

    def content(self) -> bytes:
        return self.out.getvalue() + b"."

    def add(self, value: Any) -> None:
        """Opcodes that leave `value` on the stack."""
        match value:
            case None | True | False:
                self.out.write({None: b"N", True: b"\x88", False: b"\x89"}[value])
            case int():
                self.out.write(b"\x8a\x08" + struct.pack("<q", value))
            case float():
                self.out.write(b"G" + struct.pack(">d", value))
            case str():
                raw = value.encode()
                self.out.write(b"X" + struct.pack("<L", len(raw)) + raw)
            case np.ndarray():
                self.add_tensor(value)
            case list() | tuple():
                self.add_sequence(value)
            case Mapping():
                self.add_mapping(value)
            case _:
                raise TypeError(f"a {type(value).__name__} has no place in a torch file")

    def add_sequence(self, values: list[Any] | tuple[Any, ...]) -> None:
        opening, closing = (b"](", b"e") if isinstance(values, list) else (b"(", b"t")
        self.out.write(opening)
        for value in values:
            self.add(value)
        self.out.write(closing)

    def add_mapping(self, values: Mapping[Any, Any]) -> None:
        self.out.write(b"}(")
        for key, value in values.items():
            self.add(key)
            self.add(value)
        self.out.write(b"u")

    def add_name(self, module: str, attribute: str) -> None:
        self.out.write(f"c{module}\n{attribute}\n".encode())

    def add_tensor(self, array: np.ndarray) -> None:
        if array.dtype not in _STORAGES:
            raise TypeError(f"torch has no tensors of {array.dtype}")
        strides = [int(np.prod(array.shape[axis + 1 :])) for axis in range(array.ndim)]
        self.add_name("torch._utils", "_rebuild_tensor_v2")
        self.out.write(b"((")
        self.add("storage")
        self.add_name("torch", _STORAGES[array.dtype])
        self.add(str(len(self.arrays)))
        self.add("cpu")
        self.add(array.size)
        self.out.write(b"tQ")
        for part in (0, array.shape, tuple(strides), False):
            self.add(part)
        self.add_name("collections", "OrderedDict")
        self.out.write(b")RtR")
        self.arrays.append(array)
