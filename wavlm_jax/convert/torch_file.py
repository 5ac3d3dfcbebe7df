"""Reads what `torch.save` wrote (`.pt`, `.pth`, `.bin`), without torch and without running anything.

Two layouts: a zip archive (torch >= 1.6) with the pickle in `data.pkl` and one member a storage; and the older one,
five pickles in a row followed by the storages. Tensors come back as `LazyTensor`, everything else as plain Python data.
"""

import struct
from collections.abc import Callable, Mapping
from io import BufferedIOBase, BytesIO
from pathlib import Path
from typing import Any

from wavlm_jax.convert.faults import DamagedFile, HostileFile
from wavlm_jax.convert.pickle_machine import read_pickle
from wavlm_jax.convert.pickle_vocabulary import Global, Vocabulary
from wavlm_jax.convert.torch_tensor import DTYPES, LazyTensor, Storage, make_tensor
from wavlm_jax.convert.zip_members import Place, members

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
