"""Where the members of a zip archive lie, for archives that store them uncompressed, as `torch.save` does.

Only stored members are accepted: what is read from the file is then never larger than the file, whatever its headers
claim, and a tensor is one stretch of the file. Layout: PKWARE's APPNOTE, sections 4.3 and 4.5.3 (zip64).

A tensor in a `.pt` file: where its numbers lie, checked against the file, and read when they are wanted.

Reads what `torch.save` wrote (`.pt`, `.pth`, `.bin`), without torch and without running anything.

Two layouts: a zip archive (torch >= 1.6) with the pickle in `data.pkl` and one member a storage; and the older one,
five pickles in a row followed by the storages. Tensors come back as `LazyTensor`, everything else as plain Python data.

Writes what `torch.load(path, weights_only=True)` reads: plain data and tensors, without torch.

The zip layout of torch >= 1.6: a pickle of protocol 2 that names three functions of torch, and one stored member a
tensor, aligned so that torch can map it into memory. The same content gives the same bytes.
"""

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from io import BufferedIOBase, BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from wavlm_jax.convert.pickle_machine import Global, Vocabulary, read_pickle
from wavlm_jax.files import DamagedFile, HostileFile, replacing

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")

_MAX_COMMENT = 65535
_MAX_MEMBERS = 100_000
_MAX_DIRECTORY_BYTES = 64 * 2**20
_ENCRYPTED = 1
_ZIP64_EXTRA = 1
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF


class Place(NamedTuple):
    """A stretch of a file."""

    offset: int
    """Bytes from the start of the file."""
    num_bytes: int
    crc: int = 0
    """CRC-32 of the content; 0 where the writer left it out."""


class _Directory(NamedTuple):
    offset: int
    size: int
    num_entries: int


def members(file: BufferedIOBase, path: Path) -> dict[str, Place]:
    """Name -> place of every file in a zip archive; folders are left out.

    Args:
        file: the archive, open for reading at any position.
        path: its name, for messages.

    Raises:
        DamagedFile: cut off, overlapping its end, or with a directory that makes no sense.
        HostileFile: compressed or encrypted members, absolute or climbing names, too many members.

    """
    size = file.seek(0, os.SEEK_END)
    directory = _find_directory(file, size, path)
    if directory.num_entries > _MAX_MEMBERS or directory.size > _MAX_DIRECTORY_BYTES:
        raise HostileFile(
            f"{path}: an archive of {directory.num_entries} files with a directory of {directory.size} bytes; "
            f"at most {_MAX_MEMBERS} files and {_MAX_DIRECTORY_BYTES} bytes are read"
        )
    if directory.offset + directory.size > size:
        raise DamagedFile(f"{path}: the archive's directory lies past the end of the file; it was cut off")
    file.seek(directory.offset)
    data = file.read(directory.size)
    found: dict[str, Place] = {}
    position = 0
    for _ in range(directory.num_entries):
        name, header_offset, member, position = _entry(data, position, path)
        if name in found:
            raise HostileFile(f"{path}: holds {name!r} twice")
        if not name.endswith("/"):
            found[name] = member._replace(offset=_content_offset(file, header_offset, path))
            if found[name].offset + member.num_bytes > size:
                raise DamagedFile(f"{path}: {name} lies past the end of the file; it was cut off")
    if sum(member.num_bytes for member in found.values()) > size:
        raise HostileFile(f"{path}: its members claim more bytes than the file has; they overlap")
    return found


def _find_directory(file: BufferedIOBase, size: int, path: Path) -> _Directory:
    tail_size = min(size, _END.size + _MAX_COMMENT)
    file.seek(size - tail_size)
    tail = file.read(tail_size)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or at + _END.size > len(tail):
        raise DamagedFile(f"{path}: a zip archive without its directory; the file was cut off, fetch it again")
    _, _, _, _, count, directory_size, offset, _ = _END.unpack_from(tail, at)
    if count != _FULL16 and _FULL32 not in (directory_size, offset):
        return _Directory(offset, directory_size, count)
    return _find_directory64(file, size - tail_size + at, path)


def _find_directory64(file: BufferedIOBase, end: int, path: Path) -> _Directory:
    """The directory of an archive of more than 4 GiB or 65,535 members; `end` is where its plain end record lies."""
    file.seek(max(0, end - _END64_LOCATOR.size))
    locator = file.read(_END64_LOCATOR.size)
    if len(locator) == _END64_LOCATOR.size and locator.startswith(b"PK\6\7"):
        file.seek(min(_END64_LOCATOR.unpack(locator)[2], end))
        record = file.read(_END64.size)
        if len(record) == _END64.size and record.startswith(b"PK\6\6"):
            count, directory_size, offset = _END64.unpack(record)[7:]
            return _Directory(offset, directory_size, count)
    raise DamagedFile(f"{path}: a zip64 archive without its end record; the file was cut off, fetch it again")


def _entry(data: bytes, position: int, path: Path) -> tuple[str, int, Place, int]:
    """One entry of the directory: name, offset of the local header, member without offset, position of the next."""
    if position + _ENTRY.size > len(data) or data[position : position + 4] != b"PK\1\2":
        raise DamagedFile(f"{path}: entry at byte {position} of the archive's directory is no entry")
    fields = _ENTRY.unpack_from(data, position)
    flags, method, crc, packed, size = fields[3], fields[4], *fields[7:10]
    name_size, extra_size, comment_size, header_offset = *fields[10:13], fields[16]
    start = position + _ENTRY.size
    stop = start + name_size + extra_size + comment_size
    if stop > len(data):
        raise DamagedFile(f"{path}: the archive's directory is cut off in the entry at byte {position}")
    name = _checked_name(data[start : start + name_size], path)
    extra = data[start + name_size : start + name_size + extra_size]
    size, packed, header_offset = _zip64(extra, [size, packed, header_offset], name, path)
    if flags & _ENCRYPTED:
        raise HostileFile(f"{path}: {name} is encrypted")
    if method != 0 or packed != size:
        raise HostileFile(
            f"{path}: {name} is compressed ({packed} bytes claim to hold {size}); torch.save stores without "
            "compression. Load the file with torch where you trust it and save it again"
        )
    return name, header_offset, Place(0, size, crc), stop


def _checked_name(raw: bytes, path: Path) -> str:
    try:
        name = raw.decode()
    except UnicodeDecodeError as error:
        raise DamagedFile(f"{path}: a member's name is not UTF-8: {raw[:80]!r}") from error
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise HostileFile(f"{path}: a member is called {name[:80]!r}, which leads out of the archive")
    return name


def _zip64(extra: bytes, values: list[int], name: str, path: Path) -> list[int]:
    """Size, packed size and offset, with those that do not fit in 32 bits taken from the extra field."""
    missing = [index for index, value in enumerate(values) if value == _FULL32]
    position = 0
    while missing and position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        if kind == _ZIP64_EXTRA and length >= 8 * len(missing) and position + 4 + length <= len(extra):
            wide = struct.unpack_from(f"<{len(missing)}Q", extra, position + 4)
            for index, value in zip(missing, wide, strict=True):
                values[index] = value
            missing = []
        position += 4 + length
    if missing:
        raise DamagedFile(f"{path}: {name} is larger than 4 GiB but its entry does not say how large")
    return values


def _content_offset(file: BufferedIOBase, header_offset: int, path: Path) -> int:
    try:
        file.seek(header_offset)
    except (OSError, OverflowError) as error:
        raise DamagedFile(f"{path}: a member at byte {header_offset}, which no file has") from error
    header = file.read(_LOCAL.size)
    if len(header) < _LOCAL.size or not header.startswith(b"PK\3\4"):
        raise DamagedFile(f"{path}: no member begins at byte {header_offset}; the archive is damaged or cut off")
    name_size, extra_size = _LOCAL.unpack(header)[9:11]
    return header_offset + _LOCAL.size + int(name_size) + int(extra_size)


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


_ZIP_MAGIC = b"PK\3\4"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_PICKLE_BYTES = 64 * 2**20
_MAX_KEY_LENGTH = 64
_COUNT = struct.Struct("<q")

_INERT = (
    *("argparse.Namespace", "fairseq.", "omegaconf.", "enum.Enum", "pathlib.PosixPath", "pathlib.WindowsPath"),
    *("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "_codecs.encode"),
    *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
    *("builtins.set", "builtins.frozenset", "builtins.bytes", "builtins.bytearray", "builtins.complex"),
    *("torch.device", "torch.Generator"),
)
"""Classes whose objects become records: what fairseq puts into its checkpoints beside the weights."""

_NAMES = frozenset(
    {
        *DTYPES,
        *("typing.Any", "typing.Union", "typing.Optional", "typing.List", "typing.Dict", "numpy.ndarray"),
        *(f"builtins.{name}" for name in ("dict", "list", "tuple", "int", "float", "str", "bool", "object", "type")),
        *(f"torch.{name}" for name in ("float16", "bfloat16", "float32", "float64", "int32", "int64", "uint8", "bool")),
    }
)
"""Names that stand as data, and are never called."""


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
    with path.open("rb") as file:
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


class _Storages:
    """The storages that a pickle mentions, by key, and where they turn out to lie."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.by_key: dict[str, Storage] = {}
        self.places: dict[str, Place] = {}

    def mention(self, identity: Any) -> Storage:
        """The storage behind a persistent id: ("storage", class, key, device, elements[, None])."""
        match identity:
            case ("storage", Global(kind), str(key), str(), int(count), *view) if view in ([], [None]):
                pass
            case _:
                raise HostileFile(f"{self.path}: a persistent id that is no storage")
        if kind not in DTYPES or count < 0 or len(key) > _MAX_KEY_LENGTH:
            raise HostileFile(f"{self.path}: a storage of kind {kind[:80]} with {count} elements, called {key[:80]!r}")
        storage = Storage(self.path, key, DTYPES[kind], count, self.places)
        known = self.by_key.setdefault(key, storage)
        if (known.dtype, known.num_elements) != (storage.dtype, storage.num_elements):
            raise HostileFile(f"{self.path}: storage {key} is described in two ways")
        return known

    def place(self, key: str, place: Place) -> None:
        """Says where a mentioned storage lies."""
        storage = self.by_key[key]
        if place.num_bytes != storage.num_bytes:
            raise HostileFile(
                f"{self.path}: storage {key} claims {storage.num_elements} elements of {storage.dtype} "
                f"({storage.num_bytes} bytes), the file has {place.num_bytes} bytes for it"
            )
        self.places[key] = place


def _empty_dict(factory: Any = None) -> dict[Any, Any]:
    """Entries follow as opcodes of their own; copying whatever is handed over would let few bytes fill the memory."""
    if not (factory is None or isinstance(factory, Global)):
        raise TypeError("a dictionary made from another object")
    return {}


def _size(values: tuple[int, ...]) -> tuple[int, ...]:
    if not isinstance(values, tuple):
        raise TypeError("torch.Size of something else than a tuple")
    return values


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> LazyTensor:
    del requires_grad, hooks
    if metadata:
        raise TypeError("a tensor that is lazily conjugated or negated")
    return make_tensor(storage, offset, shape, strides)


def _rebuild_parameter(tensor: Any, requires_grad: Any, hooks: Any) -> LazyTensor:
    del requires_grad, hooks
    if not isinstance(tensor, LazyTensor):
        raise TypeError("a parameter that is no tensor")
    return tensor


_CALLS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _empty_dict,
    "collections.defaultdict": _empty_dict,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": make_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
}
"""What a pickle may call, and our function that stands for it."""


def _vocabulary(storages: _Storages) -> Vocabulary:
    return Vocabulary(calls=_CALLS, names=_NAMES, inert=_INERT, persistent=storages.mention)


def _read_zip(file: BufferedIOBase, path: Path) -> Any:
    found = members(file, path)
    pickles = [name for name in found if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise DamagedFile(f"{path}: a zip archive with {len(pickles)} members called data.pkl, expected one")
    root = pickles[0].removesuffix("data.pkl")
    order = found.get(f"{root}byteorder")
    if order is not None and _content(file, order, path) != b"little":
        raise DamagedFile(f"{path}: was written on a big-endian machine; load it with torch and save it again")
    content = _content(file, found[pickles[0]], path)
    storages = _Storages(path)
    value = read_pickle(BytesIO(content), _vocabulary(storages), path)
    for key in storages.by_key:
        place = found.get(f"{root}data/{key}")
        if place is None:
            raise DamagedFile(f"{path}: storage {key} is missing from the archive")
        storages.place(key, place)
    return value


def _content(file: BufferedIOBase, place: Place, path: Path) -> bytes:
    if place.num_bytes > _MAX_PICKLE_BYTES:
        raise HostileFile(f"{path}: a pickle of {place.num_bytes} bytes, at most {_MAX_PICKLE_BYTES} are read")
    file.seek(place.offset)
    return file.read(place.num_bytes)


def _read_legacy(file: BufferedIOBase, path: Path) -> Any:
    storages = _Storages(path)
    vocabulary = _vocabulary(storages)
    if read_pickle(file, vocabulary, path) != _LEGACY_MAGIC:
        raise DamagedFile(f"{path}: a pickle, but not one of torch.save's; only files of torch.save are read")
    protocol = read_pickle(file, vocabulary, path)
    machine = read_pickle(file, vocabulary, path)
    if protocol != _LEGACY_PROTOCOL or not isinstance(machine, dict) or "little_endian" not in machine:
        raise DamagedFile(f"{path}: torch.save's header is not the known one (protocol {_LEGACY_PROTOCOL})")
    if machine["little_endian"] is not True:
        raise DamagedFile(f"{path}: was written on a big-endian machine; load it with torch and save it again")
    value = read_pickle(file, vocabulary, path)
    keys = read_pickle(file, vocabulary, path)
    _place_legacy(file, storages, keys, path)
    return value


def _place_legacy(file: BufferedIOBase, storages: _Storages, keys: Any, path: Path) -> None:
    """Behind the last pickle each storage follows in the order of `keys`: number of elements (int64), then these."""
    known = storages.by_key
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or set(keys) != set(known):
        raise DamagedFile(f"{path}: the list of storages does not match those that its tensors name")
    end = path.stat().st_size
    for key in keys:
        header = file.read(_COUNT.size)
        if len(header) < _COUNT.size:
            raise DamagedFile(f"{path}: cut off before storage {key}; fetch it again")
        offset = file.tell()
        num_bytes = _COUNT.unpack(header)[0] * known[key].dtype.itemsize
        storages.place(key, Place(offset, num_bytes))
        if offset + num_bytes > end:
            raise DamagedFile(f"{path}: cut off in storage {key}; fetch it again")
        file.seek(offset + num_bytes)


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
