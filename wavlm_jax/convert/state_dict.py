"""One tensor of a file that is read when it is wanted.

The precisions that weights are written in.

The walk between our parameter tree and the names and layouts of a torch state dict (FACTS A13).

Our attributes carry Hugging Face's names, so most of the walk is a rule a leaf: `kernel`, `scale` and `embedding` are
torch's `weight`, linear and convolution kernels have their axes reversed, layers are numbered instead of stacked. The
exceptions stand in `_place`. Nothing is skipped and nothing invented: every tensor is used, every parameter filled.

Released checkpoints by file name, and the SHA-256 that a sound copy has, so that a damaged one is refused.

Some copies of WavLM-Large.pt in circulation give NaN or 1e37 (FACTS E43). No SHA-256 stated by a publisher was found
(looked for in November 2026), and a hash that somebody took of an unknown copy proves nothing; the slots are therefore
empty until a trustworthy value is known. An empty slot is no check; the archive's own checksums and the test for finite
numbers are, and are always made.

A foreign state dict matched to our parameters, name by name, and read one tensor at a time.

Each dialect gives its own names for the tensors of Hugging Face's state dict, whose names and shapes `names.places`
knows. Everything is compared before the first number is read: nothing is left over, nothing is missing, shapes agree.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from wavlm_jax.convert.torch_file import LazyTensor
from wavlm_jax.files import DamagedFile, HostileFile
from wavlm_jax.shapes import Params


@dataclass(frozen=True)
class Source:
    """One tensor to be read: its name in the file, its shape, its numbers on demand."""

    key: str
    shape: tuple[int, ...]
    read: Callable[[], Shaped[np.ndarray, "..."]]


Precision: TypeAlias = Literal["float32", "float16", "bfloat16"]
DTYPES: Mapping[Precision, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def rounded(name: str, tensor: np.ndarray, dtype: Precision) -> np.ndarray:
    """The tensor in a precision, C-contiguous; one that is like that already is given back itself.

    Raises:
        ConversionError: numbers that are not finite in it; the tensor is named.

    """
    with np.errstate(over="ignore"):
        result = np.asarray(tensor, DTYPES[dtype], order="C")
    if not np.isfinite(result).all():
        raise ConversionError(f"{name} holds numbers that {dtype} has no room for")
    return result


Tensors = Mapping[str, np.ndarray]
"""A torch state dict: name -> array."""

ENCODER = "wavlm"
"""Where a model with a head keeps its encoder: our attribute, and the prefix in transformers' WavLM classes."""


class ConversionError(ValueError):
    """Weights that do not fit the model; the message names the tensors."""


@dataclass(frozen=True)
class Place:
    """Where one torch tensor lies in our tree."""

    path: tuple[str, ...]
    """Keys from the root of the tree to the array."""
    layer: int | None
    """Index on the array's first axis, for stacked layers."""
    name: str
    """Name in the state dict."""
    shape: tuple[int, ...]
    """Shape of the torch tensor."""
    reverse: bool
    """Whether torch has the axes in the opposite order."""


def to_torch(params: Params) -> dict[str, np.ndarray]:
    """The state dict of Hugging Face's WavLMModel, HubertModel or WavLMFor...: float32 arrays, C-contiguous.

    Args:
        params: our tree, of an encoder or of a model with a head; arrays on any device.

    """
    arrays = {path: np.asarray(leaf, np.float32) for path, leaf in _leaves(params)}
    tensors = {}
    for place in places(params):
        array = arrays[place.path] if place.layer is None else arrays[place.path][place.layer]
        array = array.transpose() if place.reverse else array
        tensors[place.name] = np.ascontiguousarray(array.reshape(place.shape))
    return tensors


def from_torch(tensors: Tensors, shapes: Params) -> dict[str, Any]:
    """Our tree of float32 arrays, filled from a state dict.

    Args:
        tensors: all of the model's tensors and no other; both spellings of weight norm are read.
        shapes: the tree to fill, as `parameter_shapes` gives it.

    Raises:
        ConversionError: missing or unused tensors, wrong shapes, numbers that are not finite; all of them named.

    """
    named = {current_name(name): tensor for name, tensor in tensors.items()}
    num_layers = max((leaf.shape[0] for path, leaf in _leaves(shapes) if _is_stacked(path)), default=0)
    if num_layers > len(named):
        raise ConversionError(f"weights: found {len(named)} tensors, expected those of {num_layers} layers")
    wanted = list(places(shapes))
    _check(named, wanted)
    tree: dict[str, Any] = {}
    parts: dict[tuple[str, ...], list[np.ndarray]] = {}
    for place in wanted:
        array = np.asarray(named[place.name], np.float32)
        parts.setdefault(place.path, []).append(array.transpose() if place.reverse else array)
    for path, leaf in _leaves(shapes):
        array = np.stack(parts[path]) if _is_stacked(path) else parts[path][0]
        _insert(tree, path, array.reshape(leaf.shape))
    return tree


def places(params: Params) -> Iterator[Place]:
    """Every torch tensor of the tree, stacked layers one by one in order."""
    for path, leaf in _leaves(params):
        if _is_stacked(path):
            for layer in range(leaf.shape[0]):
                yield _place(path, layer, leaf.shape[1:])
        else:
            yield _place(path, None, leaf.shape)


def _place(path: tuple[str, ...], layer: int | None, shape: tuple[int, ...]) -> Place:
    *modules, leaf = path
    reverse = leaf == "kernel"
    shape = shape[::-1] if reverse else shape
    name = ".".join([*modules, _LEAVES.get(leaf, leaf)])
    name = re.sub(r"\b(conv_layers|layers|tdnn)_(\d+)", r"\1.\2", name)
    if layer is not None:
        name = name.replace("encoder.layers.", f"encoder.layers.{layer}.", 1)
    if modules[-1:] == ["rel_attn_embed"]:
        name = name.replace("encoder.rel_attn_embed", "encoder.layers.0.attention.rel_attn_embed")
    if modules[:1] == ["adapter"]:
        name = f"{ENCODER}.{name}"  # transformers has it inside the encoder
    if leaf == "gru_rel_pos_const":
        shape = (1, *shape, 1, 1)
    return Place(path, layer, name, shape, reverse)


_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
}
"""Our name of an array -> torch's; the others are the same."""


def current_name(name: str) -> str:
    """`name` with the old spelling of weight norm replaced by the current one."""
    if name.endswith((".weight_g", ".weight_v")):
        module, _, leaf = name.rpartition(".")
        return f"{module}.{_LEAVES[leaf]}"
    return name


def _check(named: Tensors, wanted: list[Place]) -> None:
    expected = {place.name: place.shape for place in wanted}
    present = {name: tensor for name, tensor in named.items() if name in expected}
    problems = {
        "missing": [name for name in expected if name not in named],
        "not used by this model": [name for name in named if name not in expected],
        "of another shape": [
            f"{name} (found {tensor.shape}, expected {expected[name]})"
            for name, tensor in present.items()
            if tuple(tensor.shape) != expected[name]
        ],
        "not finite": [name for name, tensor in present.items() if not np.isfinite(tensor).all()],
    }
    found = [f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names]
    if found:
        raise ConversionError("weights do not fit the model: " + "; ".join(found))


def _some(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + more


def _is_stacked(path: tuple[str, ...]) -> bool:
    return path[path[0] == ENCODER :][:2] == ("encoder", "layers")


def _leaves(tree: Params, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _insert(tree: dict[str, Any], path: tuple[str, ...], array: np.ndarray) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = array


KNOWN: Mapping[str, str | None] = {
    "WavLM-Base.pt": None,
    "WavLM-Base+.pt": None,
    "WavLM-Large.pt": None,
    "hubert_base_ls960.pt": None,
    "hubert_large_ll60k.pt": None,
}
"""File name -> SHA-256 as hexadecimal text, None where no trustworthy value is known."""


def check_known(path: Path, known: Mapping[str, str | None] = KNOWN) -> str:
    """Compares a released checkpoint with its SHA-256; one sentence about what was found.

    Args:
        path: any file; its name decides.
        known: file name -> SHA-256.

    Raises:
        DamagedFile: the file is a known one and its hash is another.

    """
    expected = known.get(path.name)
    if expected is None:
        listed = "no trustworthy SHA-256 is known for it" if path.name in known else "it is not a known release"
        return f"{path.name}: {listed}; its content was not compared with a hash"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise DamagedFile(f"{path}: SHA-256 is {found}, expected {expected}; the file is damaged, fetch it again")
    return f"{path.name}: SHA-256 is that of the release"


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
    lines = [f"{len(names)} {kind}: {_some_names(names)}" for kind, names in problems.items() if names]
    if lines:
        raise ConversionError(f"{path}: weights do not fit the model: " + "; ".join(lines))


def _some_names(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name[:160] for name in sorted(names)[:most]) + more
