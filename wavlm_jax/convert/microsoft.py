"""The authors' checkpoints, `{"cfg": ..., "model": ...}`, and fairseq's, in and out (FACTS A11 and A13).

WavLM of microsoft/unilm and microsoft/UniSpeech, HuBERT of fairseq; pre-trained or fine-tuned (the encoder is taken, a
CTC projection is left out by name). Read and written without torch.

A config is a dict, an `argparse.Namespace`, or OmegaConf's objects; it is flat in the authors' files, and has sections
`model` and `task` in fairseq's, where a fine-tuned model keeps that of its encoder in `w2v_args`.
"""

import ast
import itertools
import math
import re
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from wavlm_jax.config import WavLMConfig
from wavlm_jax.convert.pickle_machine import Inert
from wavlm_jax.convert.state_dict import (
    HEAD_NAMES,
    ConversionError,
    Precision,
    check_layers,
    from_torch,
    head_tensors,
    old_name,
    read_head,
    rounded,
    tensors_of,
    to_torch,
)
from wavlm_jax.convert.torch_file import LazyTensor, read_torch_file, write_torch_file
from wavlm_jax.model.heads import tree_shapes
from wavlm_jax.weights import Origin, Weights

ConvLayer = tuple[int, int, int]
"""Channels, kernel, stride."""

_MAX_TEXT = 4096
_MAX_LAYERS = 32
_MAX_NUMBER = 65536
_MAX_STRIDE = 2**20
_CONV_TEXT = re.compile(r"[\[\](),+*0-9\s]*", re.ASCII)

_FIELDS: Mapping[str, tuple[str, Any]] = {
    "encoder_layers": ("num_hidden_layers", 12),
    "encoder_embed_dim": ("hidden_size", 768),
    "encoder_ffn_embed_dim": ("intermediate_size", 3072),
    "encoder_attention_heads": ("num_attention_heads", 12),
    "activation_fn": ("hidden_act", "gelu"),
    "layer_norm_first": ("do_stable_layer_norm", False),
    "conv_bias": ("conv_bias", False),
    "feature_grad_mult": ("feature_grad_mult", 1.0),
    "normalize": ("do_normalize", False),
    "dropout": ("hidden_dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.1),
    "activation_dropout": ("activation_dropout", 0.0),
    "encoder_layerdrop": ("layerdrop", 0.0),
    "dropout_input": ("feat_proj_dropout", 0.0),
    "mask_length": ("mask_time_length", 10),
    "mask_prob": ("mask_time_prob", 0.65),
    "mask_channel_length": ("mask_feature_length", 10),
    "mask_channel_prob": ("mask_feature_prob", 0.0),
    "conv_pos": ("num_conv_pos_embeddings", 128),
    "conv_pos_groups": ("num_conv_pos_embedding_groups", 16),
    "num_buckets": ("num_buckets", 320),
    "max_distance": ("max_bucket_distance", 1280),
}
"""The authors' field -> ours, and the default of the authors' class, which is not always that of their checkpoints."""

_OTHER_DEFAULTS: Mapping[str, Any] = {
    "extractor_mode": "default",
    "conv_feature_layers": "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2",
    "relative_position_embedding": False,
    "gru_rel_pos": False,
}
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "activation_fn": ("gelu", "relu", "tanh", "gelu_accurate", "gelu_fast"),
    "expand_attention_head_size": (-1, 0),
    "layer_type": ("transformer",),
    "pos_conv_depth": (1,),
    "conv_pos_batch_norm": (False,),
    "target_glu": (False,),
}
"""Fields of which this model supports one value only (or several that mean the same)."""

_ACTIVATIONS = {"gelu_new": "gelu_accurate", "gelu_pytorch_tanh": "gelu_accurate"}
"""transformers' names of the GELU by tanh -> the authors'."""

_FOR_EXPORT: Mapping[str, Any] = {
    "dropout_features": 0.0,
    "mask_selection": "static",
    "mask_other": 0.0,
    "no_mask_overlap": False,
    "mask_min_space": 1,
    "mask_channel_selection": "static",
    "mask_channel_other": 0.0,
    "no_mask_channel_overlap": False,
    "mask_channel_min_space": 1,
}
"""Fields of the authors' class that are constant here."""

_NORMS: Mapping[str, Literal["group", "layer"]] = {"default": "group", "layer_norm": "layer"}
_MAX_SIZE = 2**20


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
"""Entries that fairseq stores beside the weights; they are ignored."""


def import_microsoft(path: Path, checkpoint: Any = None) -> Weights:
    """The model in an authors' or fairseq checkpoint: config, parameters, and the pre-training head if it is there.

    Args:
        path: the file.
        checkpoint: what `read_torch_file` gives for it; None: it is read here.

    Raises:
        HostileFile, DamagedFile: see `read_torch_file`.
        ConversionError: tensors missing, left over, of another shape or not finite; all of them named.
        ValueError: a config that this model does not do, naming the field.

    """
    left_out: list[str] = []
    config, tensors = open_microsoft(path, checkpoint, left_out)
    fields = _model_fields(config, str(path))
    prefix, encoder = _encoder(tensors, path)
    notes = left_out + [f"left out: {name}" for name in tensors if name.removeprefix(prefix) not in encoder]
    model = _config(fields, str(path))
    head = take_head(encoder, model.hidden_size, path, notes)
    check_layers(model.num_hidden_layers, encoder, path)

    def name_of(name: str) -> str:
        return microsoft_name(name, model)

    params = from_torch(encoder, tree_shapes(model), path, name_of=name_of, absent=identity(model))
    notes += _training_only(fields)
    return Weights(model, params, head, origin=Origin("microsoft", str(path), tuple(notes)))


def open_microsoft(
    path: Path, checkpoint: Any = None, notes: list[str] | None = None
) -> tuple[Any, dict[str, LazyTensor]]:
    """The config of a checkpoint, as the file has it, and its tensors in the authors' names; adds to `notes`.

    Raises:
        HostileFile, DamagedFile, ConversionError: see `import_microsoft`.

    """
    checkpoint = read_torch_file(path) if checkpoint is None else checkpoint
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
    return config, tensors_of(checkpoint["model"], path, notes)


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


def take_head(encoder: MutableMapping[str, Any], width: int, path: Path, notes: list[str]) -> dict[str, Any] | None:
    """The pre-training head, removed from the tensors; None where not all of it is there. Adds to `notes`."""
    found = {name: encoder.pop(name) for name in HEAD_NAMES if name in encoder}
    if len(found) < len(HEAD_NAMES):
        notes += [f"left out: {name}, which is no whole pre-training head" for name in found]
        return None
    head = read_head(found, width, path)
    rows, final_dim = head["label_embeddings"].shape
    notes.append(f"pre-training head with {rows} label embeddings of width {final_dim}")
    return head


def _config(fields: Mapping[str, Any], where: str) -> WavLMConfig:
    """The model that a checkpoint's config describes; missing fields take the defaults of the authors' class.

    The result follows the authors' conventions: `padding="microsoft"`, waves normalised with eps 1e-5.
    """
    for name, allowed in _ONLY.items():
        if name in fields and fields[name] not in allowed:
            raise ValueError(f"{where}: cfg.{name} is {_shown(fields[name])}; this model only does {allowed[0]!r}")
    values = {ours: _scalar(fields, name, default, where) for name, (ours, default) in _FIELDS.items()}
    other = {name: _scalar(fields, name, default, where) for name, default in _OTHER_DEFAULTS.items()}
    if other["extractor_mode"] not in _NORMS:
        raise ValueError(f"{where}: cfg.extractor_mode is {_shown(other['extractor_mode'])}, expected one of {_NORMS}")
    if other["relative_position_embedding"] != other["gru_rel_pos"]:
        raise ValueError(f"{where}: cfg.relative_position_embedding and cfg.gru_rel_pos differ; WavLM has both")
    try:
        channels, kernels, strides = zip(*parse_conv_layers(other["conv_feature_layers"]), strict=True)
        return WavLMConfig(
            **values,
            feat_extract_norm=_NORMS[other["extractor_mode"]],
            conv_dim=channels,
            conv_kernel=kernels,
            conv_stride=strides,
            position_bias=other["gru_rel_pos"],
            padding="microsoft",
        )
    except ValueError as error:
        raise ValueError(f"{where}: cfg describes no model: {error}") from error


def _training_only(fields: Mapping[str, Any]) -> list[str]:
    """Fields that ask for masks other than ours, as notes; they change nothing but training."""
    return [
        f"cfg.{name} is {_shown(fields[name])}; masks in training are drawn as with {expected!r} here"
        for name, expected in _FOR_EXPORT.items()
        if "mask" in name and "space" not in name and name in fields and fields[name] != expected
    ]


def _model_fields(config: Any, where: str) -> dict[str, Any]:
    """The fields of the encoder's own config, `normalize` among them."""
    top = _section(config, where)
    model = _section(top["model"], where) if "model" in top else top
    task = _section(top["task"], where) if "task" in top and "model" in top else {}
    outer = {key: section[key] for section in (task, model) for key in section if key == "normalize"}
    if not isinstance(outer.get("normalize", False), bool):  # "${task.normalize}", not resolved
        outer = {"normalize": task["normalize"]} if "normalize" in task else {}
    if model.get("w2v_args") is not None:
        inner = _section(model["w2v_args"], where)
        nested = _section(inner["model"], where) if "model" in inner else inner
        return nested | outer
    return model | outer


def _section(value: Any, where: str) -> dict[str, Any]:
    """One level of a config, whatever kind of object it came in."""
    if isinstance(value, Inert) and isinstance(value.state, dict):
        value = value.state.get("_content", value.state) if value.kind.startswith("omegaconf.") else value.state
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a part of cfg is a {type(value).__name__}, expected a dictionary or a Namespace")
    return {key: _leaf(item) for key, item in value.items() if isinstance(key, str)}


def _leaf(value: Any) -> Any:
    """A value freed from OmegaConf's node, or an enumeration's member as its text."""
    if isinstance(value, Inert) and isinstance(value.state, dict) and "_val" in value.state:
        value = value.state["_val"]
    if isinstance(value, Inert) and value.kind.startswith("fairseq.") and len(value.arguments) == 1:
        return value.arguments[0]
    return value


def _scalar(fields: Mapping[str, Any], name: str, default: Any, where: str) -> Any:
    """The field's value, of its default's type; an int passes for a float."""
    value, kind = fields.get(name, default), type(default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{where}: cfg.{name} is {_shown(value)}, expected {kind.__name__}")
    if kind is int and not 0 < value <= _MAX_SIZE:
        raise ValueError(f"{where}: cfg.{name} is {value}, expected a size from 1 to {_MAX_SIZE}")
    return value


def _shown(value: Any) -> str:
    """A value for a message: what comes from a file may be of any size and refer to itself."""
    return repr(value)[:80] if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"


def parse_conv_layers(text: str) -> tuple[ConvLayer, ...]:
    """The conv layers that `conv_feature_layers` of a config describes, such as "[(512,10,5)] + [(512,3,2)] * 4".

    The authors' code hands this string, which comes out of the checkpoint, to Python's `eval`. Here it is parsed, and
    the tree of lists, tuples, numbers, sums and repetitions is walked; nothing is evaluated.

    Raises:
        ValueError: anything else, no layer, a number of 0, or out of all proportion (more than 32 layers, numbers above
            65,536, strides that multiply to more than 2**20).

    """
    shown = f"{text[:120]!r}"
    wrong = f"conv_feature_layers: found {shown}, expected a sum of lists such as '[(512,10,5)] + [(512,3,2)] * 4'"
    if len(text) > _MAX_TEXT or not _CONV_TEXT.fullmatch(text):
        raise ValueError(wrong)
    try:
        layers = _layers(ast.parse(" ".join(text.split()), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError, TypeError) as error:
        raise ValueError(wrong) from error
    if len(layers) > _MAX_LAYERS:
        raise ValueError(f"conv_feature_layers: more than {_MAX_LAYERS} layers in {shown}")
    numbers = list(itertools.chain.from_iterable(layers))
    stride = math.prod(stride for _, _, stride in layers)
    if not layers or min(numbers) < 1 or max(numbers) > _MAX_NUMBER or stride > _MAX_STRIDE:
        raise ValueError(f"conv_feature_layers: {shown} describes no conv encoder of speech")
    return tuple(layers)


def _layers(node: ast.expr) -> list[ConvLayer]:
    """The value of a list, a sum or a repetition; of a repetition beyond `_MAX_LAYERS` only one layer more."""
    match node:
        case ast.List(elements):
            return [_layer(element) for element in elements]
        case ast.BinOp(left, ast.Add(), right):
            return _layers(left) + _layers(right)
        case ast.BinOp(left, ast.Mult(), ast.Constant(int(count))):
            return (_layers(left) * min(count, _MAX_LAYERS + 1))[: _MAX_LAYERS + 1]
    raise TypeError(f"a {type(node).__name__}")


def _layer(node: ast.expr) -> ConvLayer:
    match node:
        case ast.Tuple([ast.Constant(int(channels)), ast.Constant(int(kernel)), ast.Constant(int(stride))]):
            return channels, kernel, stride
    raise TypeError(f"a {type(node).__name__}")


def format_conv_layers(layers: Iterable[ConvLayer]) -> str:
    """`layers` as fairseq writes them, runs of equal layers shortened."""
    terms = []
    for layer, run in itertools.groupby(layers):
        count = len(list(run))
        terms.append(f"[({','.join(map(str, layer))})]" + (f" * {count}" if count > 1 else ""))
    return " + ".join(terms)


def microsoft_name(name: str, config: WavLMConfig) -> str:
    """The authors' name of a tensor of Hugging Face's state dict, with weight norm as `weight_g` and `weight_v`."""
    name = _CONV_NORM.sub(_CONV_NORM_NAME[config.feat_extract_norm], old_name(name))
    for pattern, replacement in _RENAMED:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name


def identity(config: WavLMConfig) -> dict[str, np.ndarray]:
    """Hugging Face's name -> what stands for the projection that the authors leave out where both widths are equal."""
    width = config.hidden_size
    if config.conv_dim[-1] != width:
        return {}
    name = "feature_projection.projection"
    return {f"{name}.weight": np.eye(width, dtype=np.float32), f"{name}.bias": np.zeros(width, np.float32)}


def export_microsoft(weights: Weights, path: Path, dtype: Precision = "float32") -> None:
    """Writes the authors' `.pt`: exactly the names and shapes of their model, for torch's `weights_only=True`.

    Args:
        weights: an encoder, with the pre-training head if there is one; arrays on any device.
        path: the file; an older one is replaced once the new one is whole.
        dtype: of the numbers in the file.

    Raises:
        ConversionError: parameters that do not fit the config or the dtype, or a model that the layout has no place
            for.

    """
    model = microsoft_tensors(weights, path)
    if dtype != "float32":
        model = {name: rounded(name, tensor, dtype) for name, tensor in model.items()}
    write_torch_file(path, {"cfg": _authors_config(weights.config), "model": model})


def _activation(config: WavLMConfig) -> str:
    """The authors' name of the activation."""
    return _ACTIVATIONS.get(config.hidden_act, config.hidden_act)


def _authors_config(config: WavLMConfig) -> dict[str, Any]:
    """The `cfg` of the authors' checkpoints: every field of their config class, plain values only."""
    mode = {ours: theirs for theirs, ours in _NORMS.items()}[config.feat_extract_norm]
    return {
        "extractor_mode": mode,
        "conv_feature_layers": format_conv_layers(config.conv_layers),
        "relative_position_embedding": config.position_bias,
        "gru_rel_pos": config.position_bias,
        **{name: getattr(config, ours) for name, (ours, _) in _FIELDS.items()},
        "activation_fn": _activation(config),
        **_FOR_EXPORT,
    }


def microsoft_tensors(weights: Weights, path: Path) -> dict[str, np.ndarray]:
    """The authors' state dict of an encoder and its pre-training head: float32, views where possible.

    Raises:
        ConversionError: parameters that do not fit the config, or a model that the layout has no place for.

    """
    config = weights.config
    if config.layer_norm_eps != 1e-5:  # noqa: PLR2004 (the authors' code knows no other)
        raise ConversionError(f"layer_norm_eps is {config.layer_norm_eps}; the authors' layout has no place for it")
    if config.feat_extract_activation != "gelu" or _activation(config) not in _ONLY["activation_fn"]:
        raise ConversionError(
            f"feat_extract_activation is {config.feat_extract_activation!r}, hidden_act is {config.hidden_act!r}; the "
            f"authors' layout has a place for 'gelu', and for {', '.join(_ONLY['activation_fn'])}"
        )
    if config.conv_pos_batch_norm:
        raise ConversionError("conv_pos_batch_norm is true; the authors' layout has no place for this batch norm")
    tensors = to_torch(weights.params, tree_shapes(config))
    for name, array in identity(config).items():
        if not np.array_equal(tensors.pop(name), array):
            raise ConversionError(
                f"{name} is not the identity; the authors' model has no projection where the conv encoder is as wide "
                f"as the Transformer ({config.hidden_size})"
            )
    model = {microsoft_name(name, config): tensor for name, tensor in tensors.items()}
    if weights.head is not None:
        model |= head_tensors(weights.head, config.hidden_size, path)
    return model
