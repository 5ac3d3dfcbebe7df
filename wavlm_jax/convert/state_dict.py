"""A foreign state dict matched to our parameters, name by name, and read one tensor at a time.

Each dialect gives its own names for the tensors of Hugging Face's state dict, whose names and shapes `names.places`
knows. Everything is compared before the first number is read: nothing is left over, nothing is missing, shapes agree.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from wavlm_jax.convert.faults import HostileFile
from wavlm_jax.convert.names import ConversionError, Place, places
from wavlm_jax.convert.source import Source
from wavlm_jax.convert.torch_tensor import LazyTensor
from wavlm_jax.shapes import Params

_ALIGNMENT = 64
_WEIGHT_NORM = {".parametrizations.weight.original0": ".weight_g", ".parametrizations.weight.original1": ".weight_v"}


def source_of(key: str, tensor: LazyTensor) -> Source:
    """A tensor of a file.

    Raises:
        ConversionError: it does not hold floating-point numbers.

    """
    if tensor.dtype.kind != "f" and tensor.dtype != ml_dtypes.bfloat16:
        raise ConversionError(
            f"{tensor.storage.path}: {key} holds {tensor.dtype}, expected floating-point numbers; convert quantised "
            "weights back first"
        )
    return Source(key, tensor.shape, tensor.read)


class Sources(Mapping[str, np.ndarray]):
    """Hugging Face's names -> float32 arrays, each read when it is asked for."""

    def __init__(self, sources: Mapping[str, Source], path: Path) -> None:
        self.sources, self.path = sources, path

    def __getitem__(self, name: str) -> np.ndarray:
        """The numbers of one tensor.

        Raises:
            ConversionError: some of them are not finite in float32.

        """
        source = self.sources[name]
        with np.errstate(over="ignore"):
            array = np.asarray(source.read(), np.float32)
        if not np.isfinite(array).all():
            raise ConversionError(
                f"{self.path}: {source.key} holds numbers that are not finite; the file is damaged, fetch it again"
            )
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)


def fill(sources: Mapping[str, np.ndarray], shapes: Params) -> dict[str, Any]:
    """Our tree of float32 arrays, filled tensor by tensor: memory holds the tree and one tensor.

    Args:
        sources: Hugging Face's names -> arrays; names and shapes were compared before (`match`).
        shapes: the tree to fill, as `parameter_shapes` gives it.

    """
    tree: dict[str, Any] = jax.tree.map(lambda leaf: _empty(leaf.shape), dict(shapes))
    arrays = flatten(tree)
    for place in places(shapes):
        _seen_by_torch(place, arrays)[...] = sources[place.name]
    return tree


def as_in_torch(params: Params, shapes: Params) -> dict[str, np.ndarray]:
    """Hugging Face's state dict of our tree, as float32 views that need no memory of their own.

    Args:
        params: arrays on any device.
        shapes: what they have to be.

    Raises:
        ConversionError: parameters missing, unknown, of another shape or not finite; they are named.

    """
    expected = {path: leaf.shape for path, leaf in flatten(shapes).items()}
    with np.errstate(over="ignore"):
        arrays = {path: np.asarray(leaf, np.float32) for path, leaf in flatten(params).items()}
    wrong = [path for path in expected.keys() | arrays.keys() if path not in arrays or path not in expected]
    wrong += [path for path in expected.keys() & arrays.keys() if arrays[path].shape != expected[path]]
    wrong += [path for path, array in arrays.items() if not np.isfinite(array).all()]
    if wrong:
        names = ", ".join("/".join(path) for path in sorted(wrong)[:8])
        raise ConversionError(f"{len(wrong)} parameters missing, unknown, of another shape or not finite: {names}")
    return {place.name: _seen_by_torch(place, arrays) for place in places(shapes)}


def _seen_by_torch(place: Place, arrays: Mapping[tuple[str, ...], np.ndarray]) -> np.ndarray:
    """The part of our array that is one torch tensor, as torch sees it: a view."""
    array = arrays[place.path] if place.layer is None else arrays[place.path][place.layer, ...]
    return array.transpose() if place.reverse else array.reshape(place.shape)


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    """Uninitialised float32 that begins at a multiple of 64 bytes: JAX on a CPU takes it over without a copy."""
    num_bytes = math.prod(shape) * np.dtype(np.float32).itemsize
    raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + num_bytes].view(np.float32).reshape(shape)


def flatten(tree: Params, above: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Path -> array, for every array of a tree."""
    arrays: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        arrays |= flatten(value, (*above, key)) if isinstance(value, Mapping) else {(*above, key): value}
    return arrays


def read_head(weight: Source, bias: Source, labels: Source, *, width: int, path: Path) -> dict[str, Any]:
    """A pre-training head as our `PredictionHead` has it.

    Args:
        weight: (final_dim, width), torch's layout of the projection.
        bias: (final_dim,).
        labels: (rows, final_dim); as many rows as the source has, with or without fairseq's first 4 (FACTS E20).
        width: of the encoder.
        path: the file's name, for messages.

    Raises:
        ConversionError: shapes that do not belong together or to the encoder, or numbers that are not finite.

    """
    final_dim = weight.shape[0] if weight.shape else 0
    if (weight.shape, bias.shape, labels.shape[1:]) != ((final_dim, width), (final_dim,), (final_dim,)):
        parts = ", ".join(f"{source.key} {source.shape}" for source in (weight, bias, labels))
        raise ConversionError(
            f"{path}: the parts of the pre-training head do not fit an encoder of width {width}: {parts}"
        )
    found = Sources({source.key: source for source in (weight, bias, labels)}, path)
    arrays = [found[source.key] for source in (weight, bias, labels)]
    projection = {"kernel": np.ascontiguousarray(arrays[0].T), "bias": arrays[1]}
    return {"final_proj": projection, "label_embeddings": arrays[2]}


def tensors_of(state: Any, path: Path) -> dict[str, LazyTensor]:
    """A state dict with weight norm in its old spelling (`weight_g`, `weight_v`).

    Raises:
        ConversionError: it holds something else than named tensors, or weight norm in both spellings.
        HostileFile: its tensors overlap so much that they are larger than the file.

    """
    if not isinstance(state, dict) or not state:
        raise ConversionError(f"{path}: found a {type(state).__name__} where a state dict was expected")
    tensors: dict[str, LazyTensor] = {}
    for key, tensor in state.items():
        if not isinstance(key, str) or not isinstance(tensor, LazyTensor):
            raise ConversionError(f"{path}: {str(key)[:120]} is a {type(tensor).__name__}, expected a named tensor")
        name = old_spelling(key)
        if name in tensors:
            raise ConversionError(f"{path}: holds {key} in both spellings of weight norm")
        tensors[name] = tensor
    total = sum(tensor.num_bytes for tensor in tensors.values())
    if total > 2 * path.stat().st_size:
        raise HostileFile(f"{path}: its tensors look at the same numbers so often that they would take {total} bytes")
    return tensors


def old_spelling(name: str) -> str:
    """`name` with the current spelling of weight norm replaced by the old one."""
    for current, old in _WEIGHT_NORM.items():
        if name.endswith(current):
            return name.removesuffix(current) + old
    return name


def check_layers(num_layers: int, found: Mapping[str, LazyTensor], path: Path) -> None:
    """Compares the number of Transformer layers, before anything is laid out for as many as a config asks for.

    Raises:
        ConversionError: the file has other layers than 0, 1, ... `num_layers - 1`.

    """
    matches = (re.search(r"(?<!_)layers\.(\d{1,6})\.", name) for name in found)
    layers = {int(index[1]) for index in matches if index}
    if len(layers) != num_layers or max(layers, default=-1) != num_layers - 1:
        raise ConversionError(f"{path}: cfg asks for {num_layers} layers, the file has {len(layers)}")


def match(found: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Compares names and shapes.

    Args:
        found: the tensors of the file (`LazyTensor`, `Source`).
        wanted: name -> shape of those that the model needs, in the names of the file's dialect.
        path: the file's name, for messages.

    Raises:
        ConversionError: missing or unused tensors, other shapes; all of them named.

    """
    problems = {
        "missing": [name for name in wanted if name not in found],
        "not used by this model": [name for name in found if name not in wanted],
        "of another shape": [
            f"{name} (found {found[name].shape}, expected {shape})"
            for name, shape in wanted.items()
            if name in found and found[name].shape != shape
        ],
    }
    lines = [f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names]
    if lines:
        raise ConversionError(f"{path}: weights do not fit the model: " + "; ".join(lines))


def _some(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name[:160] for name in sorted(names)[:most]) + more
