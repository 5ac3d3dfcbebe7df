"""The walk between our parameter tree and the names and layouts of a torch state dict (FACTS A13).

Our attributes carry Hugging Face's names, so most of the walk is a rule a leaf: `kernel`, `scale` and `embedding` are
torch's `weight`, linear and convolution kernels have their axes reversed, layers are numbered instead of stacked. The
exceptions stand in `_place`. Nothing is skipped and nothing invented: every tensor is used, every parameter filled.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from wavlm_jax.shapes import Params

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
