"""Safetensors files with a JSON header, written whole or not at all.

The flat arrays of a label store: where they lie, how they are read, what tells them apart.

Rows spread over the devices of all hosts, each host giving and getting its own.

A program for some of the chips only is refused by the compiler on slices of v5e and v6e with more than 16 of them, so
there is none here: a mesh has all devices, or is that of one host alone.

What several hosts divide among themselves when they make labels, and how their parts come together again.

Alone, one host has the only share and nothing is exchanged.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import flax.linen as nn
import jax
import numpy as np
import safetensors
import safetensors.numpy
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int64, Shaped, UInt64

from wavlm_jax.files import write_bytes
from wavlm_jax.training.hosts import agreed, told

_HEADER_KEY = "header"


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> None:
    """Writes a safetensors file, whole or not at all, with `header` as JSON in its metadata."""
    metadata = {_HEADER_KEY: json.dumps(header, sort_keys=True)}
    write_bytes(path, safetensors.numpy.save(dict(tensors), metadata=metadata))


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


_DIGEST_PIECE = 2**22


class LabelError(ValueError):
    """Labels that cannot be right for the corpus or the config; the message names file, utterance and cause."""


def offsets_of(counts: Int64[np.ndarray, " utterances"]) -> Int64[np.ndarray, " edges"]:
    """Where each utterance's labels begin, and behind the last one the end of all."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def file_of(folder: Path, split: str, array: str) -> Path:
    """Where the store in `folder` keeps "labels", "offsets" or "keys" of a split."""
    return folder / f"{split}.{array}.npy"


def utterance_keys(ids: Iterable[str]) -> UInt64[np.ndarray, " utterances"]:
    """A 64-bit hash of each utterance id."""
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in ids)
    return np.frombuffer(digests, np.dtype("<u8")).astype(np.uint64)


def array_digest(array: np.ndarray) -> str:
    """SHA-256 (hex) of an array's bytes, read in small pieces: a memory map stays out of memory."""
    digest = hashlib.sha256()
    for start in range(0, len(array), _DIGEST_PIECE):
        digest.update(array[start : start + _DIGEST_PIECE].tobytes())
    return digest.hexdigest()


def map_array(file: Path, dtype: type[np.generic]) -> np.ndarray:
    """A one-dimensional .npy file of `dtype`, by memory map.

    Raises:
        LabelError: missing, cut off, or something else.

    """
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise LabelError(f"{file}: not a whole .npy file ({error}); make the labels anew") from error
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != 1:
        found = f"{array.ndim}-D {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise LabelError(f"{file}: found {found}, expected 1-D {np.dtype(dtype).name}; make the labels anew")
    return array


ROWS = PartitionSpec("rows")


def row_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """One axis called "rows", host by host, so that a host's rows are neighbours."""
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(ordered), ("rows",), axis_types=(AxisType.Auto,))


def row_sharding() -> NamedSharding:
    """Rows over the devices of all hosts."""
    return NamedSharding(row_mesh(jax.devices()), ROWS)


def fit_sharding(rows: int) -> NamedSharding:
    """Rows over the devices of all hosts, which have to divide them; of one host: over as many as do."""
    devices = jax.devices()
    if jax.process_count() == 1:
        devices = devices[: max(count for count in range(1, len(devices) + 1) if rows % count == 0)]
    return NamedSharding(row_mesh(devices), ROWS)


def put(array: Any, sharding: NamedSharding) -> Array:
    """An array that all hosts have whole, onto the devices of all hosts."""
    whole = np.asarray(array)
    placed: Array = jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
    return placed


def put_everywhere(tree: Any) -> Any:
    """Arrays that all hosts have whole, each of them onto every device."""
    everywhere = NamedSharding(row_sharding().mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: put(leaf, everywhere), tree)


def put_rows(arrays: Any, sharding: NamedSharding) -> Any:
    """Arrays of this host's rows, as a part of those of all hosts; the same shapes on each of them."""

    def placed(rows: np.ndarray) -> Array:
        whole = (len(rows) * jax.process_count(), *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, whole)

    return jax.tree.map(placed, arrays)


def own_rows(array: Array) -> np.ndarray:
    """The rows of this host, in the order in which `put_rows` got them."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


@contextmanager
def rows_over(mesh: Mesh) -> Iterator[None]:
    """While entered, a model knows that its rows are spread over `mesh`: a kernel has to be told, XLA finds out."""
    with jax.set_mesh(mesh), nn.logical_axis_rules((("rows", "rows"),)):
        yield


Result = TypeVar("Result")
PATIENCE = 6 * 3600.0
"""Seconds that the first host waits for the slowest, after hours of equal shares."""
_PIECE_BYTES = 2**22


@dataclass(frozen=True)
class Share:
    """The part of one host."""

    index: int
    count: int

    @classmethod
    def here(cls) -> "Share":
        """Of this process."""
        return cls(jax.process_index(), jax.process_count())

    @property
    def first(self) -> bool:
        """Whether this host writes what all hosts read."""
        return self.index == 0

    def of(self, weights: Int64[np.ndarray, " items"]) -> tuple[int, int]:
        """The consecutive items [start, end) of this host: about the same weight for each, none twice, none left."""
        before = np.concatenate([[0], np.cumsum(weights)])
        edges = [int(np.searchsorted(before, before[-1] * part // self.count)) for part in range(self.count)]
        start, end = [*edges, len(weights)][self.index : self.index + 2]
        return start, end


def together(name: str, do: Callable[[], Result]) -> Result:
    """What `do` gives here, once all hosts have done theirs.

    Args:
        name: of the stage, for messages.
        do: may fail on some hosts only.

    Raises:
        LabelError: on all hosts, naming those where it failed. Alone: what `do` raises.
        HostsMissing: not all hosts came.

    """
    error: Exception | None = None
    result: list[Result] = []
    try:
        result.append(do())
    except (ValueError, OSError) as found:
        error = found
    complaint = agreed(name, None if error is None else str(error), PATIENCE)
    if error is not None and jax.process_count() == 1:
        raise error
    if complaint:
        raise LabelError(f"{name}: {complaint}")
    return result[0]


def most(name: str, counts: Mapping[int, int]) -> dict[int, int]:
    """For each key the largest of the counts of all hosts.

    Args:
        name: of what is counted, for messages.
        counts: of this host.

    Raises:
        HostsMissing: not all hosts came.

    """
    found: dict[int, int] = {}
    for _, _, theirs in told(name, sorted(counts.items()), PATIENCE):
        for key, count in theirs:
            found[key] = max(found.get(key, 0), count)
    return found


def total(parts: Shaped[np.ndarray, "frames dim"]) -> Shaped[np.ndarray, "frames dim"]:
    """The sum of the arrays of all hosts, of which each is 0 where it has nothing; a piece at a time."""
    if jax.process_count() == 1:
        return parts
    rows = max(1, _PIECE_BYTES // max(parts[:1].nbytes, 1))
    for start in range(0, len(parts), rows):
        piece = slice(start, start + rows)
        parts[piece] = np.asarray(multihost_utils.process_allgather(parts[piece])).sum(0)
    return parts


def of_first(array: Shaped[np.ndarray, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
    """Process 0's array, on all hosts."""
    return array if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(array))
