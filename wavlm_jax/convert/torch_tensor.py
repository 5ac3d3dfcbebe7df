"""A tensor in a `.pt` file: where its numbers lie, checked against the file, and read when they are wanted."""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from wavlm_jax.convert.faults import DamagedFile, HostileFile
from wavlm_jax.convert.zip_members import Place

DTYPES: Mapping[str, np.dtype[Any]] = {
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.CharStorage": np.dtype("i1"),
    "torch.ShortStorage": np.dtype("<i2"),
    "torch.IntStorage": np.dtype("<i4"),
    "torch.LongStorage": np.dtype("<i8"),
    "torch.ByteStorage": np.dtype("u1"),
    "torch.BoolStorage": np.dtype("?"),
}
"""Torch's storage classes and what they hold."""

_MAX_DIMENSIONS = 16


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A run of numbers in a file; several tensors may look at one."""

    path: Path
    key: str
    dtype: np.dtype[Any]
    num_elements: int
    """As the pickle claims; compared with the file before any tensor is handed out."""
    places: Mapping[str, Place]
    """Key -> where it lies, shared by all storages of a file."""

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return self.num_elements * self.dtype.itemsize

    def read(self, start: int, stop: int) -> Shaped[np.ndarray, "elements"]:
        """The elements from `start` to before `stop`, in their own dtype.

        Raises:
            DamagedFile: the file has changed or become shorter since it was opened, or the checksum is wrong.

        """
        place = self.places[self.key]
        elements = np.empty(stop - start, self.dtype)
        content = elements.view(np.uint8).data
        with self.path.open("rb") as file:
            file.seek(place.offset + start * self.dtype.itemsize)
            if file.readinto(content) != len(content):
                raise DamagedFile(f"{self.path}: storage {self.key} is cut off; fetch the file again")
        if place.crc and len(content) == place.num_bytes and zlib.crc32(content) != place.crc:
            raise DamagedFile(
                f"{self.path}: storage {self.key} does not have the checksum that the archive gives for it; the file "
                "was damaged on its way, fetch it again"
            )
        return elements


@dataclass(frozen=True, slots=True, eq=False)
class LazyTensor:
    """Shape and dtype now, numbers on demand."""

    storage: Storage
    offset: int
    """Elements into the storage."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Elements from one index to the next, an entry a dimension."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the numbers in the file; bfloat16 is `ml_dtypes.bfloat16`."""
        return self.storage.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes that `read` takes."""
        return self.size * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> "LazyTensor":
        """The part of it from index `start` to before `stop` of the first axis; nothing is read.

        Raises:
            ValueError: there are fewer rows.

        """
        if not self.shape or not 0 <= start <= stop <= self.shape[0]:
            raise ValueError(f"rows {start} to {stop} of a tensor of shape {self.shape}")
        offset = self.offset + start * self.strides[0]
        return replace(self, offset=offset, shape=(stop - start, *self.shape[1:]))

    def read(self) -> Shaped[np.ndarray, "..."]:
        """The numbers, contiguous, owned by the caller; of the file only the part that this tensor covers is read.

        Raises:
            DamagedFile: see `Storage.read`.

        """
        if self.size == 0:
            return np.empty(self.shape, self.dtype)
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        elements = self.storage.read(self.offset, self.offset + span)
        strides = [stride * self.dtype.itemsize for stride in self.strides]
        return np.asarray(np.lib.stride_tricks.as_strided(elements, self.shape, strides), order="C")


def make_tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> LazyTensor:
    """The tensor that looks at `storage` as described, after checking that all of it lies inside.

    Raises:
        HostileFile: it claims more elements than its storage has, or reaches outside.
        TypeError: the description is not one.

    """
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise TypeError("a tensor is described by a storage and two tuples")
    if len(shape) != len(strides) or len(shape) > _MAX_DIMENSIONS:
        raise TypeError(f"a tensor of {len(shape)} dimensions with {len(strides)} strides")
    if any(type(value) is not int or value < 0 for value in (offset, *shape, *strides)):
        raise TypeError("a tensor's offset, sizes or strides are not whole numbers from 0")
    size = math.prod(shape)
    last = offset + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True))
    if size and (size > storage.num_elements or last >= storage.num_elements):
        raise HostileFile(
            f"{storage.path}: a tensor of shape {shape} and strides {strides} at element {offset} of storage "
            f"{storage.key}, which has {storage.num_elements} elements"
        )
    return LazyTensor(storage, offset, shape, strides)
