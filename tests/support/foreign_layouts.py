"""State dicts of other projects, made with torch from transformers' models through the table of FACTS A13."""

import re

import torch

MICROSOFT = {
    r"masked_spec_embed": "mask_emb",
    r"feature_projection\.layer_norm\.(weight|bias)": r"layer_norm.\1",
    r"feature_projection\.projection\.(weight|bias)": r"post_extract_proj.\1",
    r"feature_extractor\.conv_layers\.(\d+)\.conv\.(weight|bias)": r"feature_extractor.conv_layers.\1.0.\2",
    r"encoder\.pos_conv_embed\.conv\.bias": "encoder.pos_conv.0.bias",
    r"encoder\.pos_conv_embed\.conv\.parametrizations\.weight\.original0": "encoder.pos_conv.0.weight_g",
    r"encoder\.pos_conv_embed\.conv\.parametrizations\.weight\.original1": "encoder.pos_conv.0.weight_v",
    r"encoder\.layer_norm\.(weight|bias)": r"encoder.layer_norm.\1",
    r"encoder\.layers\.(\d+)\.attention\.([qkv]|out)_proj\.(weight|bias)": r"encoder.layers.\1.self_attn.\2_proj.\3",
    r"encoder\.layers\.(\d+)\.attention\.gru_rel_pos_linear\.(\w+)": r"encoder.layers.\1.self_attn.grep_linear.\2",
    r"encoder\.layers\.(\d+)\.attention\.gru_rel_pos_const": r"encoder.layers.\1.self_attn.grep_a",
    r"(encoder\.layers\.0)\.attention\.rel_attn_embed\.weight": r"\1.self_attn.relative_attention_bias.weight",
    r"encoder\.layers\.(\d+)\.layer_norm\.(weight|bias)": r"encoder.layers.\1.self_attn_layer_norm.\2",
    r"encoder\.layers\.(\d+)\.feed_forward\.intermediate_dense\.(weight|bias)": r"encoder.layers.\1.fc1.\2",
    r"encoder\.layers\.(\d+)\.feed_forward\.output_dense\.(weight|bias)": r"encoder.layers.\1.fc2.\2",
    r"encoder\.layers\.(\d+)\.final_layer_norm\.(weight|bias)": r"encoder.layers.\1.final_layer_norm.\2",
}
GROUP = {r"feature_extractor\.conv_layers\.0\.layer_norm\.(weight|bias)": r"feature_extractor.conv_layers.0.2.\1"}
LAYER = {
    r"feature_extractor\.conv_layers\.(\d+)\.layer_norm\.(weight|bias)": r"feature_extractor.conv_layers.\1.2.1.\2"
}

HEAD_ROWS, HEAD_WIDTH = 104, 24


def _rename(name: str, rules: dict[str, str]) -> str:
    fitting = [match.expand(new) for old, new in rules.items() if (match := re.fullmatch(old, name))]
    assert len(fitting) == 1, name
    return fitting[0]


def microsoft_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The encoder in the authors' names."""
    rules = MICROSOFT | (GROUP if model.config.feat_extract_norm == "group" else LAYER)
    return {_rename(name, rules): tensor for name, tensor in model.state_dict().items()}


def microsoft_head(width: int) -> dict[str, torch.Tensor]:
    """A random pre-training head."""
    shapes = {
        "final_proj.weight": (HEAD_WIDTH, width),
        "final_proj.bias": (HEAD_WIDTH,),
        "label_embs_concat": (HEAD_ROWS, HEAD_WIDTH),
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def microsoft_config(model: torch.nn.Module) -> dict:
    """The config in the authors' names; only what differs from the defaults of their class."""
    config = model.config
    layers = zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)
    wavlm = config.model_type == "wavlm"
    return {
        "extractor_mode": {"group": "default", "layer": "layer_norm"}[config.feat_extract_norm],
        "encoder_layers": config.num_hidden_layers,
        "encoder_embed_dim": config.hidden_size,
        "encoder_ffn_embed_dim": config.intermediate_size,
        "encoder_attention_heads": config.num_attention_heads,
        "activation_fn": "gelu",
        "layer_norm_first": config.do_stable_layer_norm,
        "conv_feature_layers": str([tuple(layer) for layer in layers]),
        "conv_bias": config.conv_bias,
        "conv_pos": config.num_conv_pos_embeddings,
        "conv_pos_groups": config.num_conv_pos_embedding_groups,
        "normalize": config.feat_extract_norm == "layer",
        **({"num_buckets": config.num_buckets, "max_distance": config.max_bucket_distance} if wavlm else {}),
        **({"relative_position_embedding": True, "gru_rel_pos": True} if wavlm else {}),
    }


def torchaudio_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The encoder in torchaudio's names: q, k and v of WavLM in one tensor, and no mask vector."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("feature_projection."):
            state[f"encoder.{name}"] = tensor
        elif name != "masked_spec_embed":
            state[re.sub(r"^encoder\.", "encoder.transformer.", name)] = tensor
    return _fused(state, model) if model.config.model_type == "wavlm" else state


def _fused(state: dict[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    for layer in range(model.config.num_hidden_layers):
        attention = f"encoder.transformer.layers.{layer}.attention."
        for kind in ("weight", "bias"):
            parts = [state.pop(f"{attention}{part}_proj.{kind}") for part in "qkv"]
            state[f"{attention}attention.in_proj_{kind}"] = torch.cat(parts)
            state[f"{attention}attention.out_proj.{kind}"] = state.pop(f"{attention}out_proj.{kind}")
    return state
