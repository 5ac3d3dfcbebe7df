"""Torch's files (`.pt`, `.pth`, `.bin`), read and written without torch, and without running anything.

Two layouts are read: a zip archive (torch >= 1.6) with the pickle in `data.pkl` and one member per storage; and the
older one, five pickles in a row followed by the storages. A storage is a run of numbers that several tensors may look
at. Tensors come back as `LazyTensor`, whose numbers are read on demand; everything else as plain Python data.

Only archives whose members are stored without compression are accepted, as torch writes them: then nothing that is read
is larger than the file, whatever its headers claim, and a tensor is one stretch of the file.
"""

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from io import BytesIO, FileIO
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from wavlm_jax.convert.pickle_machine import BoundedReader, Global, KnownNames, read_pickle
from wavlm_jax.files import DamagedFile, HostileFile, replacing

_ZIP_MAGIC = b"PK\3\4"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_PICKLE_BYTES = 64 * 2**20
_MAX_KEY_LENGTH = 64
_MAX_DIMENSIONS = 16
_MAX_MEMBERS = 100_000
_LEGACY_COUNT = struct.Struct("<q")
_LOCAL_HEADER = struct.Struct("<4s22x2H")
"""Of a member of a zip archive (PKWARE's APPNOTE, section 4.3.7): magic, sizes of the name and of the extra field."""
_ZIP64_END = struct.Struct("<4s28xQ16x")
"""The end record of a large archive (section 4.3.14): magic, number of members."""
_ZIP64_TAIL_BYTES = _ZIP64_END.size + 20 + 22
"""This record, its locator, and the plain end record."""

_STORAGE_DTYPES: Mapping[str, np.dtype[Any]] = {
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
"""Torch's storage classes and the type of their elements."""

_INERT = (
    *("argparse.Namespace", "fairseq.", "omegaconf.", "enum.Enum", "pathlib.PosixPath", "pathlib.WindowsPath"),
    *("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "_codecs.encode"),
    *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
    *("builtins.set", "builtins.frozenset", "builtins.bytes", "builtins.bytearray", "builtins.complex"),
    *("torch.device", "torch.Generator", "_operator.getitem"),
    *("pytorch_lightning.", "lightning.", "lightning_fabric.", "collections.Counter"),
)
"""Classes whose objects become records: what trainers put into their checkpoints beside the weights.

`_operator.getitem` stands for types such as `typing.List[int]`, which are pickled as this call.
"""

_NAMES = frozenset(
    {
        *_STORAGE_DTYPES,
        *(f"typing.{name}" for name in ("Any", "Union", "Optional", "List", "Dict", "Tuple", "Set", "Sequence")),
        *("numpy.ndarray", "builtins.Ellipsis"),
        *(f"builtins.{name}" for name in ("dict", "list", "tuple", "int", "float", "str", "bool", "object", "type")),
        *(f"torch.{name}" for name in ("float16", "bfloat16", "float32", "float64", "int32", "int64", "uint8", "bool")),
    }
)
"""Names that stand as data, and are never called."""


class Extent(NamedTuple):
    """A stretch of a file."""

    offset: int
    """Bytes from the start of the file."""
    num_bytes: int
    crc: int = 0
    """CRC-32 of the content; 0 where the writer left it out."""


@dataclass(slots=True, eq=False)
class TorchStorage:
    """A run of numbers in a file; several tensors may look at one."""

    path: Path
    key: str
    dtype: np.dtype[Any]
    num_elements: int
    """As the pickle claims; compared with the file before any tensor is handed out."""
    extent: Extent = field(init=False)
    """Where it lies: known when the whole pickle has been read."""

    def locate(self, extent: Extent) -> None:
        """Sets `extent`, after comparing it with the claimed size.

        Raises:
            HostileFile: there are other than the claimed bytes.

        """
        claimed = self.num_elements * self.dtype.itemsize
        if extent.num_bytes != claimed:
            raise HostileFile(
                f"{self.path}: storage {self.key} claims {self.num_elements} elements of {self.dtype} "
                f"({claimed} bytes), the file has {extent.num_bytes} bytes for it"
            )
        self.extent = extent

    def read(self, start: int, stop: int) -> Shaped[np.ndarray, "elements"]:
        """The elements from `start` to before `stop`, in their own dtype.

        Raises:
            DamagedFile: the file has changed or become shorter since it was opened, or the checksum is wrong.

        """
        elements = np.empty(stop - start, self.dtype)
        content = elements.view(np.uint8).data
        with self.path.open("rb") as file:
            file.seek(self.extent.offset + start * self.dtype.itemsize)
            if file.readinto(content) != len(content):
                raise DamagedFile(f"{self.path}: storage {self.key} is cut off; fetch the file again")
        _, num_bytes, crc = self.extent
        if crc and len(content) == num_bytes and zlib.crc32(content) != crc:
            raise DamagedFile(
                f"{self.path}: storage {self.key} does not have the checksum that the archive gives for it; the file "
                "was damaged on its way, fetch it again"
            )
        return elements


@dataclass(frozen=True, slots=True, eq=False)
class LazyTensor:
    """A tensor of a torch file: shape and dtype now, its numbers when they are read."""

    storage: TorchStorage
    offset: int
    """Elements into the storage."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Elements from one index to the next, one per dimension."""

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
            DamagedFile: see `TorchStorage.read`.

        """
        if self.size == 0:
            return np.empty(self.shape, self.dtype)
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        elements = self.storage.read(self.offset, self.offset + span)
        strides = [stride * self.dtype.itemsize for stride in self.strides]
        return np.asarray(np.lib.stride_tricks.as_strided(elements, self.shape, strides), order="C")


def _make_tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> LazyTensor:
    """The tensor that looks at `storage` as described, after checking that all of it lies inside.

    Raises:
        HostileFile: it claims more elements than its storage has, or reaches outside.
        TypeError: the description is not one.

    """
    if not isinstance(storage, TorchStorage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
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


def read_torch_file(path: Path) -> Any:
    """What `torch.load` would give for this file, as plain data.

    Dictionaries are dicts, tensors and parameters are `LazyTensor`, objects of known foreign classes are `Inert`.
    Memory: the size of the pickle times a small constant; no tensor is read.

    Raises:
        HostileFile: it names anything that a checkpoint does not need, or claims more than it holds.
        DamagedFile: it is cut off, altered or of another kind.
        FileNotFoundError: there is no such file.

    """
    if path.exists() and not path.is_file():
        raise DamagedFile(f"{path}: is not a plain file")
    with BoundedReader(FileIO(path)) as file:
        magic = file.read(len(_ZIP_MAGIC))
        file.seek(0)
        if magic == _ZIP_MAGIC:
            return _read_zip(file, path)
        if magic[:1] == b"\x80":
            return _read_legacy(file, path)
    raise DamagedFile(
        f"{path}: neither a zip archive nor a pickle (begins with {magic!r}). Layouts of before torch 0.4 (tar) are "
        "not read: load it with torch and save it again"
    )


def _read_zip(file: BoundedReader, path: Path) -> Any:
    found = _members(file, path)
    pickles = [name for name in found if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise DamagedFile(f"{path}: a zip archive with {len(pickles)} members called data.pkl, expected one")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in found and _content(found[f"{root}byteorder"], path) != b"little":
        raise DamagedFile(f"{path}: was written on a big-endian machine; load it with torch and save it again")
    reader = _PickleReader(path)
    content = _content(found[pickles[0]], path)
    if (crc := found[pickles[0]].crc) and zlib.crc32(content) != crc:
        raise DamagedFile(
            f"{path}: its pickle does not have the checksum that the archive gives for it; fetch it again"
        )
    value = reader.read(BytesIO(content))
    for key, storage in reader.storages.items():
        if f"{root}data/{key}" not in found:
            raise DamagedFile(f"{path}: storage {key} is missing from the archive")
        storage.locate(found[f"{root}data/{key}"])
    return value


def _content(extent: Extent, path: Path) -> bytes:
    if extent.num_bytes > _MAX_PICKLE_BYTES:
        raise HostileFile(f"{path}: a pickle of {extent.num_bytes} bytes, at most {_MAX_PICKLE_BYTES} are read")
    with path.open("rb") as file:
        file.seek(extent.offset)
        return file.read(extent.num_bytes)


def _members(file: BoundedReader, path: Path) -> dict[str, Extent]:
    """Name -> place of every file in a zip archive; folders are left out.

    Raises:
        DamagedFile: cut off, or with a directory that makes no sense.
        HostileFile: compressed, encrypted or overlapping members, absolute or climbing names, too many members.

    """
    size = file.seek(0, os.SEEK_END)
    _check_count(file, size, path)
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except HostileFile:
        raise
    except (zipfile.BadZipFile, NotImplementedError, OverflowError, ValueError, OSError) as error:
        raise DamagedFile(
            f"{path}: a zip archive without a sound directory ({error}); the file was cut off, fetch it again"
        ) from error
    found: dict[str, Extent] = {}
    for info in infos:
        _check_member(info, path)
        if info.filename in found:
            raise HostileFile(f"{path}: holds {info.filename!r} twice")
        if not info.filename.endswith("/"):
            extent = Extent(_content_offset(file, info.header_offset, size, path), info.file_size, info.CRC)
            if extent.offset + extent.num_bytes > size:
                raise DamagedFile(f"{path}: {info.filename} lies past the end of the file; it was cut off")
            found[info.filename] = extent
    if sum(extent.num_bytes for extent in found.values()) > size:
        raise HostileFile(f"{path}: its members claim more bytes than the file has; they overlap")
    return found


def _check_count(file: BoundedReader, size: int, path: Path) -> None:
    """Refuses an archive by the number of members that it claims, which `zipfile` does not look at."""
    file.seek(max(0, size - _ZIP64_TAIL_BYTES))
    tail = file.read(_ZIP64_END.size)
    if len(tail) == _ZIP64_END.size and tail.startswith(b"PK\6\6"):
        count = _ZIP64_END.unpack(tail)[1]
        if count > _MAX_MEMBERS:
            raise HostileFile(f"{path}: an archive of {count} files; at most {_MAX_MEMBERS} are read")


def _check_member(info: zipfile.ZipInfo, path: Path) -> None:
    name = info.orig_filename
    if name.startswith("/") or ".." in PurePosixPath(name).parts or "\\" in name or "\0" in name:
        raise HostileFile(f"{path}: a member is called {name[:80]!r}, which leads out of the archive")
    if info.flag_bits & 1:
        raise HostileFile(f"{path}: {name} is encrypted")
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise HostileFile(
            f"{path}: {name} is compressed ({info.compress_size} bytes claim to hold {info.file_size}); torch.save "
            "stores without compression. Load the file with torch where you trust it and save it again"
        )


def _content_offset(file: BoundedReader, header_offset: int, size: int, path: Path) -> int:
    """Where a member's content begins: `zipfile` tells only where its header does."""
    header = b""
    if 0 <= header_offset < size:
        file.seek(header_offset)
        header = file.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or not header.startswith(_ZIP_MAGIC):
        raise DamagedFile(f"{path}: no member begins at byte {header_offset}; the archive is damaged or cut off")
    _, name_size, extra_size = _LOCAL_HEADER.unpack(header)
    return header_offset + _LOCAL_HEADER.size + int(name_size) + int(extra_size)


def _read_legacy(file: BoundedReader, path: Path) -> Any:
    reader = _PickleReader(path)
    if reader.read(file) != _LEGACY_MAGIC:
        raise DamagedFile(f"{path}: a pickle, but not one of torch.save's; only files of torch.save are read")
    protocol, machine = reader.read(file), reader.read(file)
    if protocol != _LEGACY_PROTOCOL or not isinstance(machine, dict) or "little_endian" not in machine:
        raise DamagedFile(f"{path}: torch.save's header is not the known one (protocol {_LEGACY_PROTOCOL})")
    if machine["little_endian"] is not True:
        raise DamagedFile(f"{path}: was written on a big-endian machine; load it with torch and save it again")
    value, keys = reader.read(file), reader.read(file)
    _locate_legacy(file, reader.storages, keys, path)
    return value


def _locate_legacy(file: BoundedReader, storages: Mapping[str, TorchStorage], keys: Any, path: Path) -> None:
    """Behind the last pickle each storage follows in the order of `keys`: number of elements (int64), then these."""
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or set(keys) != set(storages):
        raise DamagedFile(f"{path}: the list of storages does not match those that its tensors name")
    end = path.stat().st_size
    for key in keys:
        header = file.read(_LEGACY_COUNT.size)
        if len(header) < _LEGACY_COUNT.size:
            raise DamagedFile(f"{path}: cut off before storage {key}; fetch it again")
        extent = Extent(file.tell(), _LEGACY_COUNT.unpack(header)[0] * storages[key].dtype.itemsize)
        storages[key].locate(extent)
        if extent.offset + extent.num_bytes > end:
            raise DamagedFile(f"{path}: cut off in storage {key}; fetch it again")
        file.seek(extent.offset + extent.num_bytes)


class _PickleReader:
    """Reads the pickles of one file, and collects the storages that they mention."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.storages: dict[str, TorchStorage] = {}

    def read(self, file: BoundedReader | BytesIO) -> Any:
        known = KnownNames(calls=_CALLS, names=_NAMES, inert=_INERT, persistent=self.storage)
        return read_pickle(file, known, self.path)

    def storage(self, identity: Any) -> TorchStorage:
        """The storage behind a persistent id: ("storage", class, key, device, elements[, None])."""
        match identity:
            case ("storage", Global(kind), str(key), str(), int(count), *view) if view in ([], [None]):
                pass
            case _:
                raise HostileFile(f"{self.path}: a persistent id that is no storage")
        if kind not in _STORAGE_DTYPES or count < 0 or len(key) > _MAX_KEY_LENGTH:
            raise HostileFile(f"{self.path}: a storage of kind {kind[:80]} with {count} elements, called {key[:80]!r}")
        known = self.storages.setdefault(key, TorchStorage(self.path, key, _STORAGE_DTYPES[kind], count))
        if (known.dtype, known.num_elements) != (_STORAGE_DTYPES[kind], count):
            raise HostileFile(f"{self.path}: storage {key} is described in two ways")
        return known


def _empty_dict(factory: Any = None) -> dict[Any, Any]:
    """Entries follow as opcodes of their own; copying whatever is handed over would let few bytes fill the memory."""
    if not (factory is None or isinstance(factory, Global)):
        raise TypeError("a dictionary made from another object")
    return {}


def _size(values: tuple[int, ...]) -> tuple[int, ...]:
    if not isinstance(values, tuple):
        raise TypeError("torch.Size of something else than a tuple")
    return values


def _type_of(value: Any) -> Global:
    """The only types that are pickled as this call."""
    if value is not None and value != Global("builtins.Ellipsis"):
        raise TypeError("the type of an object")
    return Global("builtins.type")


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> LazyTensor:
    del requires_grad, hooks
    if metadata:
        raise TypeError("a tensor that is lazily conjugated or negated")
    return _make_tensor(storage, offset, shape, strides)


def _rebuild_parameter(tensor: Any, requires_grad: Any, hooks: Any) -> LazyTensor:
    del requires_grad, hooks
    if not isinstance(tensor, LazyTensor):
        raise TypeError("a parameter that is no tensor")
    return tensor


_CALLS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _empty_dict,
    "collections.defaultdict": _empty_dict,
    "builtins.type": _type_of,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _make_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
}
"""What a pickle may call, and our function that stands for it."""


_ROOT = "archive"
_ALIGNMENT = 64
_EXTRA_HEADER = struct.Struct("<2sH")
_PADDING_KIND = b"FB"
_FIRST_DATE = (1980, 1, 1, 0, 0, 0)
_STORAGE_CLASSES = {dtype: name.removeprefix("torch.") for name, dtype in _STORAGE_DTYPES.items()}


def write_torch_file(path: Path, value: Any) -> None:
    """Writes what `torch.load(path, weights_only=True)` reads, whole or not at all (`files.replacing`).

    It is a pickle of protocol 2 that names three functions of torch, and one stored member per tensor, aligned so that
    torch can map it into memory. The same content gives the same bytes.

    Args:
        path: the file; its folder is made.
        value: None, bools, ints of 64 bits, floats, strings, numpy arrays of torch's types, and lists, tuples and dicts
            of these.

    Raises:
        TypeError: something else in `value`.

    """
    arrays: list[np.ndarray] = []
    pickle = b"\x80\x02" + _pickled(value, arrays) + b"."
    with replacing(path) as draft, zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, "data.pkl", pickle)
        _add(archive, "byteorder", b"little")
        for key, array in enumerate(arrays):
            _add(archive, f"data/{key}", np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        _add(archive, "version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    """One stored member, its first byte at a multiple of 64."""
    info = zipfile.ZipInfo(f"{_ROOT}/{name}", _FIRST_DATE)
    info.file_size = len(content)
    start = archive.start_dir + _LOCAL_HEADER.size + len(info.filename) + _EXTRA_HEADER.size
    padding = -start % _ALIGNMENT
    info.extra = _EXTRA_HEADER.pack(_PADDING_KIND, padding) + b"Z" * padding
    with archive.open(info, "w") as member:
        member.write(content)


def _pickled(value: Any, arrays: list[np.ndarray]) -> bytes:
    """Opcodes that push `value`; its arrays are appended to `arrays`, and referred to by their index."""
    match value:
        case None | True | False:
            opcodes = {None: b"N", True: b"\x88", False: b"\x89"}[value]
        case int():
            opcodes = b"\x8a\x08" + struct.pack("<q", value)
        case float():
            opcodes = b"G" + struct.pack(">d", value)
        case str():
            opcodes = b"X" + struct.pack("<L", len(value.encode())) + value.encode()
        case np.ndarray():
            opcodes = _pickled_tensor(value, arrays)
        case list():
            opcodes = b"](" + _pickled_items(value, arrays) + b"e"
        case tuple():
            opcodes = b"(" + _pickled_items(value, arrays) + b"t"
        case Mapping():
            opcodes = b"}(" + b"".join(_pickled_items(pair, arrays) for pair in value.items()) + b"u"
        case _:
            raise TypeError(f"a {type(value).__name__} has no place in a torch file")
    return opcodes


def _pickled_items(values: Iterable[Any], arrays: list[np.ndarray]) -> bytes:
    return b"".join(_pickled(value, arrays) for value in values)


def _pickled_tensor(array: np.ndarray, arrays: list[np.ndarray]) -> bytes:
    """A call of torch's `_rebuild_tensor_v2` with the persistent id of a storage; see `_PickleReader.storage`."""
    if array.dtype not in _STORAGE_CLASSES:
        raise TypeError(f"torch has no tensors of {array.dtype}")
    key, strides = str(len(arrays)), tuple(math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
    arrays.append(array)
    kind = f"ctorch\n{_STORAGE_CLASSES[array.dtype]}\n".encode()
    identity = b"(" + _pickled("storage", arrays) + kind + _pickled_items((key, "cpu", array.size), arrays) + b"tQ"
    layout = _pickled_items((0, array.shape, strides, False), arrays)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + identity + layout + b"ccollections\nOrderedDict\n)RtR"
