"""Hugging Face folders, in and out, without torch: models alone and with any head, tensor by tensor.

What is written loads with transformers' class of the same name. What such a folder has no place for stands beside it:
conventions in wavlm_jax.json, the pre-training head in pretraining_head.safetensors.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from wavlm_jax.config import WavLMConfig
from wavlm_jax.convert.huggingface_config import (
    CONFIG,
    CONVENTIONS,
    PREPROCESSOR,
    Conventions,
    architecture,
    config_json,
    conventions_json,
    preprocessor_json,
    read_config,
    read_conventions,
    read_head,
    read_labels,
)
from wavlm_jax.convert.names import ConversionError, places
from wavlm_jax.convert.precision import Precision
from wavlm_jax.convert.pretraining_head import read_pretraining_head, write_pretraining_head
from wavlm_jax.convert.safetensors_file import write_safetensors
from wavlm_jax.convert.shards import WEIGHTS, open_weights
from wavlm_jax.convert.source import Source
from wavlm_jax.convert.state_dict import Sources, as_in_torch, fill, match
from wavlm_jax.model.head_config import HeadConfig, TaskHead
from wavlm_jax.shapes import Params
from wavlm_jax.text.vocabulary_files import tokenizer_files
from wavlm_jax.weights import Origin, Weights

_MASK_VECTOR = "masked_spec_embed"
_PREFIXES = ("wavlm.", "hubert.")


Shapes: TypeAlias = Callable[[WavLMConfig, str | None, HeadConfig | None], Params]
"""(encoder, name of a class with a head, its head) -> the parameter tree as shapes: `model.heads.tree_shapes`."""


def import_huggingface(folder: Path, tree_shapes: Shapes) -> Weights:
    """The model in a Hugging Face folder, or in one of ours.

    Args:
        folder: holds config.json and the weights (model.safetensors, pytorch_model.bin, or shards of either with their
            index), and may hold preprocessor_config.json, a vocabulary, and what we write beside these.
        tree_shapes: `wavlm_jax.model.heads.tree_shapes`.

    Raises:
        FileNotFoundError: no config.json or weights, naming what the folder has instead.
        HostileFile, DamagedFile: a file that is not what it should be.
        ConversionError: weights that do not fit the config; tensors are named.
        ValueError: a config that this model does not do, naming the key.

    """
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder / CONFIG}: no such file; expected the folder of a Hugging Face model")
    path, found = open_weights(folder)
    sources = _our_names(found, path)
    kind = _kind(sources, architecture(folder))
    conventions = read_conventions(folder)
    config = read_config(folder, conventions, has_head=kind is not None)
    num_labels = _num_labels(kind, sources, path)
    head = None if kind is None else read_head(folder, num_labels, conventions)
    _check_counts(config, head, len(sources), folder / CONFIG)
    tree = _fill(sources, config, kind, tree_shapes(config, kind, head), path)
    task = None
    if kind is not None and head is not None:
        params = tree.pop("wavlm")
        task, tree = TaskHead(kind, head, tree, read_labels(folder, num_labels)), params
    return Weights(
        config,
        tree,
        read_pretraining_head(folder, config.hidden_size),
        task,
        Origin("huggingface", str(folder), _notes(config, task, conventions), files=tokenizer_files(folder)),
    )


def export_huggingface(weights: Weights, folder: Path, tree_shapes: Shapes, dtype: Precision = "float32") -> None:
    """Writes the model as a new Hugging Face folder. Whether it is good is for `verify` to say.

    Args:
        weights: what is written; parameters on any device.
        folder: made; it must not exist, or be empty.
        tree_shapes: `wavlm_jax.model.heads.tree_shapes`.
        dtype: of the numbers in the file.

    Raises:
        ConversionError: parameters that do not fit the config or the dtype, or a head that transformers has no place
            for.
        FileExistsError: there is something in `folder`.

    """
    tensors, config, origin = huggingface_tensors(weights, tree_shapes), weights.config, weights.origin
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).open("xb").close()
    (folder / CONFIG).write_bytes(config_json(config, weights.task, dtype))
    (folder / PREPROCESSOR).write_bytes(preprocessor_json(config))
    (folder / CONVENTIONS).write_bytes(conventions_json(config, weights.task, origin.dialect, origin.notes))
    if weights.task is not None:
        for name, content in origin.files.items():
            (folder / name).write_bytes(content)
    if weights.head is not None:
        write_pretraining_head(weights.head, folder, config.hidden_size, dtype)
    write_safetensors(folder / WEIGHTS, tensors, dtype)


def huggingface_tensors(weights: Weights, tree_shapes: Shapes) -> dict[str, np.ndarray]:
    """Transformers' state dict of the model: float32 views.

    Raises:
        ConversionError: parameters that do not fit the config, or a head that transformers has no place for.

    """
    kind, head, config = _kind_of(weights), weights.task.config if weights.task else None, weights.config
    _check_place(kind, head, config)
    tensors = as_in_torch(weights.tree, tree_shapes(config, kind, head))
    if not _has_mask_vector(config):
        del tensors[_prefix(kind) + _MASK_VECTOR]
    if not config.position_bias:
        tensors = {re.sub(r"^wavlm\.", "hubert.", name): tensor for name, tensor in tensors.items()}
    return tensors


def _kind_of(weights: Weights) -> str | None:
    return None if weights.task is None else weights.task.kind


def _prefix(kind: str | None) -> str:
    return "" if kind is None else "wavlm."


def _check_place(kind: str | None, head: HeadConfig | None, config: WavLMConfig) -> None:
    """Whether transformers has a class that computes this."""
    if kind is None or head is None:
        return
    if kind == "WavLMForECAPA":
        raise ConversionError("transformers has no class with an ECAPA-TDNN; a run of ours is read as it is")
    if kind == "WavLMForCTC" and head.use_weighted_layer_sum and head.compat != "huggingface":
        raise ConversionError("head.use_weighted_layer_sum: transformers' WavLMForCTC has no layer weights")
    hubert = ("WavLMForCTC", "WavLMForSequenceClassification")
    if not config.position_bias and (kind not in hubert or head.add_adapter):
        raise ConversionError(f"transformers has no HuBERT that is like our {kind} (adapter: {head.add_adapter})")


def _our_names(found: Mapping[str, Source], path: Path) -> dict[str, Source]:
    """The tensors under the names of our walk: the encoder of a model with a head under `wavlm.`, alone under none."""
    prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in found)), "")
    if not prefix:
        return dict(found)
    has_head = any(not name.startswith(prefix) for name in found)
    named = {re.sub(f"^{prefix}", "wavlm." if has_head else "", name): source for name, source in found.items()}
    if len(named) != len(found):
        raise ConversionError(f"{path}: has tensors with and without {prefix} before the same name")
    return named


def _kind(names: Mapping[str, Source], said: str | None) -> str | None:
    """Which class has tensors of these names; the config's word counts where there are some of a head."""
    marks = {
        "lm_head": "WavLMForCTC",
        "objective": "WavLMForXVector",
        "projector": "WavLMForSequenceClassification",
        "classifier": "WavLMForAudioFrameClassification",
    }
    found = [kind for module, kind in marks.items() if any(name.startswith(f"{module}.") for name in names)]
    if not found:
        return None
    return said if said in marks.values() else found[0]


def _num_labels(kind: str | None, sources: Mapping[str, Source], path: Path) -> int | None:
    """Classes, as the weights have them; None for CTC, whose characters are in the config."""
    if kind is None or kind == "WavLMForCTC":
        return None
    name, axis = ("objective.weight", 1) if kind == "WavLMForXVector" else ("classifier.weight", 0)
    if name not in sources or len(sources[name].shape) != 2:  # noqa: PLR2004
        raise ConversionError(f"{path}: {name} is missing or no matrix; it tells the number of classes")
    return sources[name].shape[axis]


def _check_counts(config: WavLMConfig, head: HeadConfig | None, num_tensors: int, path: Path) -> None:
    """Nothing is laid out for more layers than there are tensors."""
    counts = {"num_hidden_layers": config.num_hidden_layers, "conv_dim": len(config.conv_dim)}
    if head is not None:
        counts |= {"num_adapter_layers": head.num_adapter_layers * head.add_adapter, "tdnn_dim": len(head.tdnn_dim)}
    for key, count in counts.items():
        if count > num_tensors:
            raise ConversionError(f"{path}: {key} asks for {count} layers, the weights have {num_tensors} tensors")


def _fill(
    sources: Mapping[str, Source], config: WavLMConfig, kind: str | None, shapes: Params, path: Path
) -> dict[str, Any]:
    name, width = _prefix(kind) + _MASK_VECTOR, config.hidden_size
    if not _has_mask_vector(config) and name not in sources:
        # transformers does not make the vector where the config never masks; neither will anyone read it here.
        sources = {**sources, name: Source(name, (width,), lambda: np.zeros(width, np.float32))}
    match(sources, {place.name: place.shape for place in places(shapes)}, path)
    return fill(Sources(sources, path), shapes)


def _has_mask_vector(config: WavLMConfig) -> bool:
    return config.mask_time_prob > 0 or config.mask_feature_prob > 0


def _notes(config: WavLMConfig, task: TaskHead | None, conventions: Conventions | None) -> tuple[str, ...]:
    if conventions is not None:
        return conventions.notes
    notes = ["conventions are transformers', as the folder says nothing else"]
    if task is not None and task.config.use_weighted_layer_sum and config.do_stable_layer_norm:
        notes.append(
            "the average of layers takes the last state raw, as transformers 5 does; a head that was trained with "
            "transformers 4 or s3prl wants head.layer_sum_states = 'normed'"
        )
    return tuple(notes)
