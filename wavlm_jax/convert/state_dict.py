"""A foreign state dict matched to our parameters, name by name, and read one tensor at a time.

Each dialect gives its own names for the tensors of Hugging Face's state dict, whose names and shapes `names.places`
knows. Everything is compared before the first number is read: nothing is left over, nothing is missing, shapes agree.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from wavlm_jax.config import WavLMConfig
from wavlm_jax.convert.faults import HostileFile
from wavlm_jax.convert.names import ConversionError, places
from wavlm_jax.convert.torch_tensor import LazyTensor
from wavlm_jax.shapes import Params

_WEIGHT_NORM = {".parametrizations.weight.original0": ".weight_g", ".parametrizations.weight.original1": ".weight_v"}


@dataclass(frozen=True)
class Imported:
    """A checkpoint from outside, as our model."""

    config: WavLMConfig
    """With the conventions of the source (`padding`, `do_normalize`)."""
    params: Mapping[str, Any]
    """Float32 numpy arrays in our tree."""
    head: Mapping[str, Any] | None
    """Pre-training head: {"final_proj": {"kernel", "bias"}, "label_embeddings": (rows, final_dim)}; None: not there."""
    dialect: str
    """Whose layout it was."""
    notes: tuple[str, ...] = field(default=())
    """What was left out, filled in or assumed, in sentences."""


@dataclass(frozen=True)
class Source:
    """One tensor to be read: its name in the file, its shape, its numbers on demand."""

    key: str
    shape: tuple[int, ...]
    read: Callable[[], Shaped[np.ndarray, "..."]]


def source_of(key: str, tensor: LazyTensor) -> Source:
    """A tensor of a file."""
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
    tree: dict[str, Any] = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), dict(shapes))
    arrays = flatten(tree)
    for place in places(shapes):
        array = arrays[place.path] if place.layer is None else arrays[place.path][place.layer, ...]
        as_in_torch = array.transpose() if place.reverse else array.reshape(place.shape)
        as_in_torch[...] = sources[place.name]
    return tree


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


def match(found: Mapping[str, LazyTensor], wanted: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Compares names and shapes.

    Args:
        found: the tensors of the file.
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
