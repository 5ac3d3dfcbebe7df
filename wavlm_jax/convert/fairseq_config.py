"""The config in the authors' and in fairseq's checkpoints, as a `WavLMConfig`, and back (FACTS A11).

A config is a dict, an `argparse.Namespace`, or OmegaConf's objects; it is flat in the authors' files, and has sections
`model` and `task` in fairseq's, where a fine-tuned model keeps that of its encoder in `w2v_args`.
"""

from collections.abc import Mapping
from typing import Any, Literal

from wavlm_jax.config import WavLMConfig
from wavlm_jax.convert.conv_grammar import format_conv_layers, parse_conv_layers
from wavlm_jax.convert.pickle_vocabulary import Inert

_FIELDS: Mapping[str, tuple[str, Any]] = {
    "encoder_layers": ("num_hidden_layers", 12),
    "encoder_embed_dim": ("hidden_size", 768),
    "encoder_ffn_embed_dim": ("intermediate_size", 3072),
    "encoder_attention_heads": ("num_attention_heads", 12),
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
    "activation_fn": ("gelu",),
    "expand_attention_head_size": (-1, 0),
    "layer_type": ("transformer",),
    "pos_conv_depth": (1,),
    "conv_pos_batch_norm": (False,),
    "target_glu": (False,),
}
"""Fields that this model does in one way only."""

_FOR_EXPORT: Mapping[str, Any] = {
    "activation_fn": "gelu",
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
"""Fields of the authors' class that nothing here varies."""

_NORMS: Mapping[str, Literal["group", "layer"]] = {"default": "group", "layer_norm": "layer"}
_MAX_SIZE = 2**20


def from_fairseq(config: Any, where: str) -> WavLMConfig:
    """The model that a checkpoint's config describes; missing fields take the defaults of the authors' class.

    The result follows the authors' conventions: `padding="microsoft"`, waves normalised with eps 1e-5.

    Args:
        config: `cfg` or `args` of the checkpoint, as `read_torch_file` gives it.
        where: the file's name, for messages.

    Raises:
        ValueError: a value of the wrong type or size, or a model that this is not; the field is named.

    """
    fields = _model_fields(config, where)
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


def to_microsoft(config: WavLMConfig) -> dict[str, Any]:
    """The `cfg` of the authors' checkpoints: every field of their config class, plain values only."""
    mode = {ours: theirs for theirs, ours in _NORMS.items()}[config.feat_extract_norm]
    return {
        "extractor_mode": mode,
        "conv_feature_layers": format_conv_layers(config.conv_layers),
        "relative_position_embedding": config.position_bias,
        "gru_rel_pos": config.position_bias,
        **{name: getattr(config, ours) for name, (ours, _) in _FIELDS.items()},
        **_FOR_EXPORT,
    }


def training_only(config: Any, where: str) -> tuple[str, ...]:
    """Fields that ask for masks other than ours, as notes; they change nothing but training."""
    fields = _model_fields(config, where)
    return tuple(
        f"cfg.{name} is {_shown(fields[name])}; masks in training are drawn as with {expected!r} here"
        for name, expected in _FOR_EXPORT.items()
        if "mask" in name and "space" not in name and name in fields and fields[name] != expected
    )


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
