"""torchaudio's state dicts of WavLM and HuBERT (FACTS A13), which come without a config.

Sizes are read from the shapes of the tensors. What no tensor shows is assumed to be as in the released models, and
listed in the notes: strides, norm order, the reach of the position bias, HuBERT's number of heads, wave normalisation.
`changes` overrides an assumption.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wavlm_jax.config import BASE_STRIDES, WavLMConfig
from wavlm_jax.convert.state_dict import (
    ConversionError,
    Tensors,
    check_layers,
    from_torch,
    old_name,
    read_float32,
    read_head,
    state_in,
    tensors_of,
)
from wavlm_jax.convert.torch_file import LazyTensor, read_torch_file
from wavlm_jax.model.heads import tree_shapes
from wavlm_jax.weights import Origin, Weights

_PRE_TRAINING = "wav2vec2."
"""Before the encoder's names in torchaudio's pre-training model."""

_HEAD = ("logit_generator.final_proj.weight", "logit_generator.final_proj.bias", "logit_generator.label_embeddings")
_MASK_VECTOR, _OUR_MASK_VECTOR = "mask_generator.mask_embedding", "masked_spec_embed"
_FINE_TUNING = re.compile(r"^aux\.(weight|bias)$")
_FUSED = re.compile(r"^(encoder\.transformer\.layers\.\d+\.attention\.)attention\.in_proj_(weight|bias)$")
_FUSED_OUT = re.compile(r"^(encoder\.transformer\.layers\.\d+\.attention\.)attention\.(out_proj\.)")
_HEADS = {768: 12, 1024: 16, 1280: 16}
"""Width -> attention heads of the HuBERT models that torchaudio publishes: Base, Large, X-Large."""
_HEAD_WIDTH = 64
"""Of one head in models of other widths."""


def is_torchaudio(state: Any) -> bool:
    """Whether a file's value is one of torchaudio's state dicts."""
    state = state_in(state)
    return isinstance(state, dict) and any(
        isinstance(name, str) and "encoder.transformer.layers.0." in name for name in state
    )


def import_torchaudio(path: Path, state: Any = None, **changes: Any) -> Weights:
    """The model in a torchaudio state dict: WavLM with fused projections, or HuBERT, with its pre-training head.

    Args:
        path: what `torch.save(model.state_dict(), path)` wrote.
        state: what `read_torch_file` gives for it; None: it is read here.
        changes: fields of `WavLMConfig` that the file does not show and that differ from the released models.

    Raises:
        HostileFile, DamagedFile: see `read_torch_file`.
        ConversionError: tensors missing, left over, of another shape or not finite; all of them named.
        ValueError: sizes or `changes` that make no model.

    """
    state = read_torch_file(path) if state is None else state
    if not is_torchaudio(state):
        raise ConversionError(f"{path}: no state dict of torchaudio's; its names begin with encoder.transformer.layers")
    notes: list[str] = []
    tensors = tensors_of(state, path, notes)
    head = {name: tensors.pop(name) for name in _HEAD if name in tensors}
    vector = tensors.pop(_MASK_VECTOR, None)
    notes += [f"left out: {name}" for name in tensors if _FINE_TUNING.match(name)]
    encoder = {
        name: tensor
        for key, lazy in tensors.items()
        if not _FINE_TUNING.match(key)
        for name, tensor in _split(key.removeprefix(_PRE_TRAINING), lazy, path)
    }
    config = _config(encoder, path, changes)
    notes.append(
        f"assumed, as no tensor tells it: conv_stride {config.conv_stride}, do_stable_layer_norm "
        f"{config.do_stable_layer_norm}, do_normalize {config.do_normalize}, {config.num_attention_heads} heads, "
        f"max_bucket_distance {config.max_bucket_distance}"
    )
    check_layers(config.num_hidden_layers, encoder, path)
    absent = {_OUR_MASK_VECTOR: _mask_vector(vector, config, notes, path)}
    params = from_torch(encoder, tree_shapes(config), path, name_of=torchaudio_name, absent=absent)
    origin = Origin("torchaudio", str(path), tuple(notes))
    return Weights(config, params, _head(head, config.hidden_size, path), origin=origin)


def torchaudio_name(name: str) -> str:
    """The name in torchaudio of a tensor of Hugging Face's state dict, with q, k and v apart."""
    name = old_name(name)
    if name.startswith("feature_projection."):
        return f"encoder.{name}"
    return re.sub(r"^encoder\.", "encoder.transformer.", name)


def _split(name: str, tensor: LazyTensor, path: Path) -> list[tuple[str, LazyTensor]]:
    """One tensor of the file, its fused projection of q, k and v taken apart."""
    fused = _FUSED.match(name)
    if fused is None:
        return [(_FUSED_OUT.sub(r"\1\2", name), tensor)]
    if not tensor.shape or tensor.shape[0] % 3:
        raise ConversionError(
            f"{path}: {name} has shape {tensor.shape}, expected three times as many rows as the width"
        )
    width = tensor.shape[0] // 3
    return [
        (f"{fused[1]}{part}_proj.{fused[2]}", tensor.rows(index * width, (index + 1) * width))
        for index, part in enumerate("qkv")
    ]


def _config(encoder: Mapping[str, LazyTensor], path: Path, changes: dict[str, Any]) -> WavLMConfig:
    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in encoder or len(encoder[name].shape) != dimensions:
            raise ConversionError(f"{path}: {name} is missing or has no {dimensions} dimensions; it tells the sizes")
        return encoder[name].shape

    layer = "encoder.transformer.layers.0"
    convs = [shape(f"feature_extractor.conv_layers.{i}.conv.weight", 3) for i in range(_count(encoder, "conv_layers"))]
    width, group_width, taps = shape("encoder.transformer.pos_conv_embed.conv.weight_v", 3)
    layer_normed = "feature_extractor.conv_layers.1.layer_norm.weight" in encoder
    bias = f"{layer}.attention.rel_attn_embed.weight" in encoder
    heads = _HEADS.get(width, max(1, width // _HEAD_WIDTH))
    table = shape(f"{layer}.attention.rel_attn_embed.weight", 2) if bias else (4, heads)
    values: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": _count(encoder, "layers"),
        "num_attention_heads": table[1],
        "intermediate_size": shape(f"{layer}.feed_forward.intermediate_dense.weight", 2)[0],
        "feat_extract_norm": "layer" if layer_normed else "group",
        "do_stable_layer_norm": layer_normed,
        "do_normalize": layer_normed,
        "conv_dim": tuple(conv[0] for conv in convs),
        "conv_kernel": tuple(conv[2] for conv in convs),
        "conv_stride": (BASE_STRIDES + (2,) * len(convs))[: len(convs)],
        "conv_bias": "feature_extractor.conv_layers.0.conv.bias" in encoder,
        "num_conv_pos_embeddings": taps,
        "num_conv_pos_embedding_groups": width // max(1, group_width),
        "position_bias": bias,
        **({"num_buckets": table[0]} if bias else {}),
        "padding": "huggingface",
    }
    try:
        return WavLMConfig(**(values | changes))
    except (ValueError, ZeroDivisionError) as error:
        raise ConversionError(f"{path}: the shapes of its tensors make no model: {error}") from error


def _count(encoder: Mapping[str, LazyTensor], kind: str) -> int:
    """Number of modules in a list, by the highest index in the names."""
    found = [re.search(rf"\.{kind}\.(\d{{1,4}})\.", name) for name in encoder]
    return 1 + max((int(index[1]) for index in found if index), default=-1)


def _mask_vector(vector: LazyTensor | None, config: WavLMConfig, notes: list[str], path: Path) -> np.ndarray:
    """Of shape (hidden_size,)."""
    if vector is None:
        notes.append(
            "filled with zeros: masked_spec_embed, which torchaudio's encoder does not have; only masking reads it"
        )
        return np.zeros(config.hidden_size, np.float32)
    if vector.shape != (config.hidden_size,):
        raise ConversionError(f"{path}: {_MASK_VECTOR} has shape {vector.shape}, expected ({config.hidden_size},)")
    return read_float32(_MASK_VECTOR, vector, path)


def _head(tensors: Tensors, width: int, path: Path) -> dict[str, Any] | None:
    missing = [name for name in _HEAD if name not in tensors]
    if len(missing) == len(_HEAD):
        return None
    if missing:
        raise ConversionError(f"{path}: the pre-training head is not whole; missing: {', '.join(missing)}")
    return read_head({name: tensors[name] for name in _HEAD}, width, path)
