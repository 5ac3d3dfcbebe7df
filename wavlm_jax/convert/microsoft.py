"""The authors' checkpoints, in and out: `{"cfg": ..., "model": ...}`, and fairseq's training checkpoints (FACTS A13).

WavLM of microsoft/unilm and microsoft/UniSpeech, HuBERT of fairseq; pre-trained or fine-tuned (the encoder is taken, a
CTC projection is left out by name). Read and written without torch.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wavlm_jax.config import WavLMConfig
from wavlm_jax.convert.fairseq_config import from_fairseq, to_microsoft, training_only
from wavlm_jax.convert.known import check_known
from wavlm_jax.convert.names import ConversionError, Place, places
from wavlm_jax.convert.precision import Precision, rounded
from wavlm_jax.convert.pretraining_head import NAMES as HEAD_NAMES
from wavlm_jax.convert.pretraining_head import head_tensors
from wavlm_jax.convert.source import Source
from wavlm_jax.convert.state_dict import (
    Sources,
    as_in_torch,
    check_layers,
    fill,
    match,
    old_spelling,
    read_head,
    source_of,
    tensors_of,
)
from wavlm_jax.convert.torch_file import read_torch_file
from wavlm_jax.convert.torch_tensor import LazyTensor
from wavlm_jax.convert.torch_writer import write_torch_file
from wavlm_jax.model.wavlm import parameter_shapes
from wavlm_jax.shapes import Params
from wavlm_jax.weights import Origin, Weights

_RENAMED: tuple[tuple[str, str], ...] = (
    (r"^masked_spec_embed$", "mask_emb"),
    (r"^feature_projection\.layer_norm\.", "layer_norm."),
    (r"^feature_projection\.projection\.", "post_extract_proj."),
    (r"^(feature_extractor\.conv_layers\.\d+)\.conv\.", r"\1.0."),
    (r"^encoder\.pos_conv_embed\.conv\.", "encoder.pos_conv.0."),
    (r"^(encoder\.layers\.\d+)\.attention\.gru_rel_pos_linear\.", r"\1.self_attn.grep_linear."),
    (r"^(encoder\.layers\.\d+)\.attention\.gru_rel_pos_const$", r"\1.self_attn.grep_a"),
    (r"^(encoder\.layers\.\d+)\.attention\.rel_attn_embed\.", r"\1.self_attn.relative_attention_bias."),
    (r"^(encoder\.layers\.\d+)\.attention\.", r"\1.self_attn."),
    (r"^(encoder\.layers\.\d+)\.layer_norm\.", r"\1.self_attn_layer_norm."),
    (r"^(encoder\.layers\.\d+)\.feed_forward\.intermediate_dense\.", r"\1.fc1."),
    (r"^(encoder\.layers\.\d+)\.feed_forward\.output_dense\.", r"\1.fc2."),
)
"""Hugging Face's names -> the authors'; the first rule that fits is taken, other names are the same in both."""

_CONV_NORM = re.compile(r"^(feature_extractor\.conv_layers\.\d+)\.layer_norm\.")
_CONV_NORM_NAME = {"group": r"\1.2.", "layer": r"\1.2.1."}

_FIRST_CONV = "feature_extractor.conv_layers.0.0.weight"
_FINE_TUNING = re.compile(r"^(w2v_encoder\.|encoder\.)?proj\.(weight|bias)$")
"""Tensors beside the encoder that are left out: fairseq's CTC projection."""

_BESIDE_THE_MODEL = frozenset(
    {"args", "cfg", "criterion", "ema", "extra_state", "last_optimizer_state", "optimizer_history", "task_state"}
)
"""What fairseq stores beside the weights."""


def microsoft_name(name: str, config: WavLMConfig) -> str:
    """The authors' name of a tensor of Hugging Face's state dict, with weight norm as `weight_g` and `weight_v`."""
    name = _CONV_NORM.sub(_CONV_NORM_NAME[config.feat_extract_norm], old_spelling(name))
    for pattern, replacement in _RENAMED:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name


def import_microsoft(path: Path) -> Weights:
    """The model in an authors' or fairseq checkpoint: config, parameters, and the pre-training head if it is there.

    Raises:
        HostileFile, DamagedFile: see `read_torch_file`; a known release with another hash.
        ConversionError: tensors missing, left over, of another shape or not finite; all of them named.
        ValueError: a config that this model does not do, naming the field.

    """
    notes = [check_known(path)]
    config, tensors = _open(path)
    prefix, encoder = _encoder(tensors, path)
    notes += [f"left out: {name}" for name in tensors if name.removeprefix(prefix) not in encoder]
    model = from_fairseq(config, str(path))
    head, head_notes = _take_head(encoder, model.hidden_size, path)
    check_layers(model.num_hidden_layers, encoder, path)
    shapes = parameter_shapes(model)
    wanted = {place.name: (microsoft_name(place.name, model), place.shape) for place in _stored(shapes, model)}
    match(encoder, dict(wanted.values()), path)
    sources = {name: source_of(prefix + key, encoder[key]) for name, (key, _) in wanted.items()}
    sources |= identity(model)
    params = fill(Sources(sources, path), shapes)
    notes += [*head_notes, *training_only(config, str(path))]
    return Weights(model, params, head, origin=Origin("microsoft", str(path), tuple(notes)))


def export_microsoft(
    config: WavLMConfig,
    params: Params,
    path: Path,
    head: Mapping[str, Any] | None = None,
    *,
    dtype: Precision = "float32",
) -> None:
    """Writes the authors' `.pt`: exactly the names and shapes of their model, for torch's `weights_only=True`.

    Args:
        config: what the model is.
        params: its parameters.
        path: the file; an older one is replaced once the new one is whole.
        head: the pre-training head as `Weights.head` has it.
        dtype: of the numbers in the file.

    Raises:
        ConversionError: parameters that do not fit the config or the dtype, or a model that the layout has no place
            for.

    """
    model = microsoft_tensors(config, params, head, path)
    if dtype != "float32":
        model = {name: rounded(name, tensor, dtype) for name, tensor in model.items()}
    write_torch_file(path, {"cfg": to_microsoft(config), "model": model})


def microsoft_tensors(
    config: WavLMConfig, params: Params, head: Mapping[str, Any] | None, path: Path
) -> dict[str, np.ndarray]:
    """The authors' state dict of the model: float32, views where possible.

    Raises:
        ConversionError: parameters that do not fit the config, or a model that the layout has no place for.

    """
    if config.layer_norm_eps != 1e-5:  # noqa: PLR2004 (the authors' code knows no other)
        raise ConversionError(f"layer_norm_eps is {config.layer_norm_eps}; the authors' layout has no place for it")
    tensors = as_in_torch(params, parameter_shapes(config))
    for name, source in identity(config).items():
        if not np.array_equal(tensors.pop(name), source.read()):
            raise ConversionError(
                f"{name} is not the identity; the authors' model has no projection where the conv encoder is as wide "
                f"as the Transformer ({config.hidden_size})"
            )
    model = {microsoft_name(name, config): tensor for name, tensor in tensors.items()}
    if head is not None:
        model |= head_tensors(head, config.hidden_size, path)
    return model


def open_microsoft(path: Path) -> dict[str, Source]:
    """The tensors of a checkpoint in the authors' names, to be read when they are wanted.

    Raises:
        HostileFile, DamagedFile, ConversionError: see `import_microsoft`.

    """
    return {name: source_of(name, tensor) for name, tensor in _open(path)[1].items()}


def _open(path: Path) -> tuple[Any, dict[str, LazyTensor]]:
    checkpoint = read_torch_file(path)
    if not isinstance(checkpoint, dict) or "model" not in checkpoint:
        raise ConversionError(
            f"{path}: no checkpoint of the authors' or fairseq's, which have the entries cfg and model"
        )
    config = checkpoint.get("cfg")
    config = checkpoint.get("args") if config is None else config
    if config is None:
        raise ConversionError(f"{path}: has neither cfg nor args; without them the model is not known")
    unknown = sorted(str(key)[:80] for key in set(checkpoint) - _BESIDE_THE_MODEL - {"model"})
    if unknown:
        raise ConversionError(f"{path}: unknown entries beside the model: {', '.join(unknown[:8])}")
    return config, tensors_of(checkpoint["model"], path)


def _encoder(tensors: Mapping[str, LazyTensor], path: Path) -> tuple[str, dict[str, LazyTensor]]:
    """The encoder's tensors and the prefix that was before their names."""
    prefixes = [name.removesuffix(_FIRST_CONV) for name in tensors if name.endswith(_FIRST_CONV)]
    if len(prefixes) != 1:
        raise ConversionError(f"{path}: found {len(prefixes)} tensors called {_FIRST_CONV}, expected one")
    encoder = {}
    for name, tensor in tensors.items():
        if name.startswith(prefixes[0]) and not _FINE_TUNING.match(name):
            encoder[name.removeprefix(prefixes[0])] = tensor
        elif not _FINE_TUNING.match(name):
            raise ConversionError(f"{path}: {name[:160]} is beside the encoder ({prefixes[0]}...) and not known")
    return prefixes[0], encoder


def _take_head(encoder: dict[str, LazyTensor], hidden: int, path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The pre-training head, removed from the tensors; None and notes where only a part of it is there."""
    found = {name: source_of(name, encoder.pop(name)) for name in HEAD_NAMES if name in encoder}
    if len(found) < len(HEAD_NAMES):
        return None, [f"left out: {name}, which is no whole pre-training head" for name in found]
    head = read_head(*found.values(), width=hidden, path=path)
    rows, width = head["label_embeddings"].shape
    return head, [f"pre-training head with {rows} label embeddings of width {width}"]


def _stored(shapes: Params, config: WavLMConfig) -> list[Place]:
    """The tensors that the layout holds: all but a projection between equal widths."""
    absent = identity(config)
    return [place for place in places(shapes) if place.name not in absent]


def identity(config: WavLMConfig) -> dict[str, Source]:
    """What stands for the projection that the authors leave out where both widths are equal."""
    width = config.hidden_size
    if config.conv_dim[-1] != width:
        return {}
    return {
        "feature_projection.projection.weight": Source(
            "identity", (width, width), lambda: np.eye(width, dtype=np.float32)
        ),
        "feature_projection.projection.bias": Source("zeros", (width,), lambda: np.zeros(width, np.float32)),
    }
