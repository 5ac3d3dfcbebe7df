"""The walk between our parameter tree and the names and layouts of a torch state dict (FACTS A13).

Our attributes carry Hugging Face's names, so most of the walk is one rule per array: `kernel`, `scale` and `embedding`
are torch's `weight`, linear and convolution kernels have their axes reversed, layers are numbered instead of stacked.
The exceptions stand in `_place`. Other dialects rename Hugging Face's names (`from_torch`, `name_of`). Names and shapes
are compared before the first number is read: nothing is left over, nothing is missing, nothing is invented.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Shaped

from wavlm_jax.convert.torch_file import LazyTensor
from wavlm_jax.files import HostileFile
from wavlm_jax.shapes import Params

ENCODER = "wavlm"
"""Where a model with a head keeps its encoder: our attribute, and the prefix in transformers' WavLM classes."""
HEAD_NAMES = ("final_proj.weight", "final_proj.bias", "label_embs_concat")
"""The authors' names of the tensors of the pre-training head: (final_dim, width), (final_dim,), (rows, final_dim)."""

Precision: TypeAlias = Literal["float32", "float16", "bfloat16"]
DTYPES: Mapping[Precision, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""The precisions that weights are written in."""

_ALIGNMENT = 64
_WEIGHT_NORM = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
"""Old spelling of weight norm -> torch's current one."""
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", **_WEIGHT_NORM}
"""Our name of an array -> torch's; the others are the same."""


class ConversionError(ValueError):
    """Weights that do not fit the model; the message names the tensors."""


@runtime_checkable
class StoredTensor(Protocol):
    """A tensor of a file: its shape now, its numbers on demand."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Known without reading."""
        ...

    def read(self) -> Shaped[np.ndarray, "..."]:
        """The numbers, in the dtype of the file."""
        ...


_Value = TypeVar("_Value")
Tensors: TypeAlias = Mapping[str, StoredTensor | np.ndarray]
"""A torch state dict: name -> tensor, in a file or in memory."""


@dataclass(frozen=True)
class Place:
    """Where one torch tensor lies in our tree."""

    path: tuple[str, ...]
    """Keys from the root of the tree to the array."""
    layer: int | None
    """Index on the array's first axis, for stacked layers."""
    name: str
    """Name in Hugging Face's state dict."""
    shape: tuple[int, ...]
    """Shape of the torch tensor."""
    reverse: bool
    """Whether torch has the axes in the opposite order."""

    def view(self, arrays: Mapping[tuple[str, ...], np.ndarray]) -> np.ndarray:
        """The part of our array that is this tensor, as torch sees it."""
        array = arrays[self.path] if self.layer is None else arrays[self.path][self.layer, ...]
        return array.transpose() if self.reverse else array.reshape(self.shape)


def places(params: Params) -> Iterator[Place]:
    """Every torch tensor of the tree, stacked layers one by one in order."""
    for path, leaf in flatten_dict(dict(params)).items():
        if path[path[0] == ENCODER :][:2] == ("encoder", "layers"):
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


def to_torch(params: Params, expected: Params | None = None) -> dict[str, np.ndarray]:
    """Hugging Face's state dict of our tree, as float32 views that need no memory of their own.

    Args:
        params: of an encoder or of a model with a head; arrays on any device.
        expected: the tree as shapes, to compare `params` with first; None: no comparison.

    Raises:
        ConversionError: parameters missing, unknown, of another shape or not finite; they are named.

    """
    with np.errstate(over="ignore"):
        arrays = {path: np.asarray(leaf, np.float32) for path, leaf in flatten_dict(dict(params)).items()}
    if expected is not None:
        shapes = {path: leaf.shape for path, leaf in flatten_dict(dict(expected)).items()}
        wrong = {path for path in shapes if path not in arrays or arrays[path].shape != shapes[path]}
        wrong |= {path for path, array in arrays.items() if path not in shapes or not np.isfinite(array).all()}
        if wrong:
            names = ", ".join("/".join(path) for path in sorted(wrong)[:8])
            raise ConversionError(f"{len(wrong)} parameters missing, unknown, of another shape or not finite: {names}")
    return {place.name: place.view(arrays) for place in places(params if expected is None else expected)}


def from_torch(
    found: Tensors,
    shapes: Params,
    path: Path = Path("weights"),
    *,
    name_of: Callable[[str], str] = str,
    absent: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Our tree of float32 arrays, filled tensor by tensor: memory holds the tree and one tensor.

    Args:
        found: all of the model's tensors and no other, in the names of their dialect.
        shapes: the tree to fill, as `model.heads.tree_shapes` gives it.
        path: the file's name, for messages.
        name_of: Hugging Face's name of a tensor -> the dialect's.
        absent: Hugging Face's name -> what stands for a tensor that the dialect does not have.

    Raises:
        ConversionError: missing or unused tensors, wrong shapes, numbers that are not finite; all of them named.

    """
    absent = absent or {}
    wanted = [place for place in places(shapes) if place.name not in absent]
    _compare(found, {name_of(place.name): place.shape for place in wanted}, path)
    tree: dict[str, Any] = jax.tree.map(lambda leaf: _empty(leaf.shape), dict(shapes))
    arrays = flatten_dict(tree)
    for place in places(shapes):
        if place.name in absent:
            place.view(arrays)[...] = absent[place.name]
        else:
            name = name_of(place.name)
            place.view(arrays)[...] = read_float32(name, found[name], path)
    return tree


def _compare(found: Tensors, wanted: Mapping[str, tuple[int, ...]], path: Path) -> None:
    problems = {
        "missing": [name for name in wanted if name not in found],
        "not used by this model": [name for name in found if name not in wanted],
        "of another shape": [
            f"{name} (found {found[name].shape}, expected {shape})"
            for name, shape in wanted.items()
            if name in found and found[name].shape != shape
        ],
    }
    lines = []
    for kind, names in problems.items():
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""  # noqa: PLR2004
            lines.append(f"{len(names)} {kind}: {', '.join(name[:160] for name in sorted(names)[:8])}{more}")
    if lines:
        raise ConversionError(f"{path}: weights do not fit the model: " + "; ".join(lines))


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    """Uninitialised float32 that begins at a multiple of 64 bytes: JAX on a CPU takes it over without a copy."""
    num_bytes = math.prod(shape) * np.dtype(np.float32).itemsize
    raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + num_bytes].view(np.float32).reshape(shape)


def read_float32(name: str, tensor: StoredTensor | np.ndarray, path: Path) -> np.ndarray:
    """The numbers of one tensor.

    Raises:
        ConversionError: they are no floating-point numbers, or some are not finite in float32.

    """
    array = tensor if isinstance(tensor, np.ndarray) else tensor.read()
    if array.dtype.kind != "f" and array.dtype != ml_dtypes.bfloat16:
        raise ConversionError(
            f"{path}: {name} holds {array.dtype}, expected floating-point numbers; convert quantised weights back first"
        )
    with np.errstate(over="ignore"):
        array = np.asarray(array, np.float32)
    if not np.isfinite(array).all():
        raise ConversionError(f"{path}: {name} holds numbers that are not finite; the file is damaged, fetch it again")
    return array


def rounded(name: str, tensor: np.ndarray, dtype: Precision) -> np.ndarray:
    """The tensor in a precision, C-contiguous; without a copy where it has both already.

    Raises:
        ConversionError: numbers that are not finite in it; the tensor is named.

    """
    with np.errstate(over="ignore"):
        result = np.asarray(tensor, DTYPES[dtype], order="C")
    if not np.isfinite(result).all():
        raise ConversionError(f"{name} holds numbers that {dtype} has no room for")
    return result


def read_head(tensors: Tensors, width: int, path: Path) -> dict[str, Any]:
    """A pre-training head as our `PredictionHead` has it.

    Args:
        tensors: weight, bias and label embeddings under any names, in the order and with the shapes of `HEAD_NAMES`;
            as many rows as the source has, with or without fairseq's first 4 (FACTS E20).
        width: of the encoder.
        path: the file's name, for messages.

    Raises:
        ConversionError: shapes that do not belong together or to the encoder, or numbers that are not finite.

    """
    shapes = [tensor.shape for tensor in tensors.values()]
    final_dim = shapes[0][:1]
    if (shapes[0], shapes[1], shapes[2][1:]) != ((*final_dim, width), final_dim, final_dim):
        parts = ", ".join(f"{name} {tensor.shape}" for name, tensor in tensors.items())
        raise ConversionError(
            f"{path}: the parts of the pre-training head do not fit an encoder of width {width}: {parts}"
        )
    weight, bias, labels = (read_float32(name, tensor, path) for name, tensor in tensors.items())
    projection = {"kernel": np.ascontiguousarray(weight.T), "bias": bias}
    return {"final_proj": projection, "label_embeddings": labels}


def head_tensors(head: Params, width: int, path: Path) -> dict[str, np.ndarray]:
    """The pre-training head in the authors' names and layouts, float32.

    Raises:
        ConversionError: parts that do not fit each other or an encoder of this width, or that are not finite.

    """
    projection = head["final_proj"]
    arrays = (np.asarray(projection["kernel"]).T, projection["bias"], head["label_embeddings"])
    tensors = {name: np.asarray(array, np.float32) for name, array in zip(HEAD_NAMES, arrays, strict=True)}
    read_head(tensors, width, path)
    return tensors


_SECTIONS = ("state_dict", "model_state_dict", "model", "module", "net")
"""Where trainers keep the state dict (Lightning, hand-written loops, DeepSpeed, ...)."""
_WRAPPERS = ("module.", "model.", "net.", "_orig_mod.", "_forward_module.")
"""Before all names of a model in DataParallel, in a LightningModule, compiled."""
_BUFFERS = re.compile(r"(^|\.)(num_batches_tracked|position_ids|dummy_weight|_float_tensor|version)$")


def state_in(value: Any) -> Any:
    """The state dict in what a trainer saved, found by the names of the sections; else `value` itself."""
    for _ in range(len(_SECTIONS)):
        if not isinstance(value, dict) or any(isinstance(part, LazyTensor) for part in value.values()):
            break
        value = next((value[name] for name in _SECTIONS if isinstance(value.get(name), dict)), value)
    return value


def unwrapped(state: Mapping[str, _Value], notes: list[str]) -> dict[str, _Value]:
    """The tensors of a model: without buffers that are no weights, and without what wrappers put before all names.

    Adds what was left out to `notes`.
    """
    found = {
        name: tensor
        for name, tensor in state.items()
        if not _BUFFERS.search(name) and getattr(tensor, "dtype", None) not in (np.int64, np.bool_)
    }
    notes += [f"left out: {name[:160]}, which is no weight" for name in state if name not in found]
    while found and (wrapper := next((w for w in _WRAPPERS if all(name.startswith(w) for name in found)), "")):
        found = {name.removeprefix(wrapper): tensor for name, tensor in found.items()}
    return found


def tensors_of(state: Any, path: Path, notes: list[str] | None = None) -> dict[str, LazyTensor]:
    """The tensors of a state dict out of a torch file (see `unwrapped`), weight norm in the old spelling.

    Raises:
        ConversionError: it holds something else than named tensors, or weight norm in both spellings.
        HostileFile: its tensors overlap so much that they are larger than the file.

    """
    state = state_in(state)
    if not isinstance(state, dict) or not state:
        raise ConversionError(f"{path}: found a {type(state).__name__} where a state dict was expected")
    for key, tensor in state.items():
        if not isinstance(key, str) or not isinstance(tensor, LazyTensor):
            raise ConversionError(f"{path}: {str(key)[:120]} is a {type(tensor).__name__}, expected a named tensor")
    total = sum(tensor.num_bytes for tensor in state.values())
    if total > 2 * path.stat().st_size:
        raise HostileFile(f"{path}: its tensors look at the same numbers so often that they would take {total} bytes")
    return respelled(unwrapped(state, [] if notes is None else notes), old_name, path)


def respelled(found: Mapping[str, _Value], name_of: Callable[[str], str], path: Path) -> dict[str, _Value]:
    """The tensors with weight norm in one spelling (`current_name` or `old_name`).

    Raises:
        ConversionError: some are there in both.

    """
    named = {name_of(name): tensor for name, tensor in found.items()}
    if len(named) != len(found):
        raise ConversionError(f"{path}: holds weight norm in both spellings")
    return named


def current_name(name: str) -> str:
    """`name` with the old spelling of weight norm replaced by the current one."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.{_WEIGHT_NORM[leaf]}" if leaf in _WEIGHT_NORM else name


def old_name(name: str) -> str:
    """`name` with the current spelling of weight norm replaced by the old one."""
    for old, current in _WEIGHT_NORM.items():
        if name.endswith(f".{current}"):
            return name.removesuffix(current) + old
    return name


def check_layers(num_layers: int, found: Tensors, path: Path) -> None:
    """Compares the number of Transformer layers with the config's, before any memory is reserved for so many.

    Raises:
        ConversionError: the file has other layers than 0, 1, ... `num_layers - 1`.

    """
    matches = (re.search(r"(?<!_)layers\.(\d{1,6})\.", name) for name in found)
    layers = {int(index[1]) for index in matches if index}
    if len(layers) != num_layers or max(layers, default=-1) != num_layers - 1:
        raise ConversionError(f"{path}: cfg asks for {num_layers} layers, the file has {len(layers)}")
