"""The parameter tables: which logical axes the parameters of the models of this library have.

Names are Hugging Face's with "/" for "."; Transformer layers are stacked on axis 0. What is small (conv encoder, norms,
biases, gate, masks) is kept whole on every device; what is large is split, see `sharding.RULES`.
"""

AxesTable = tuple[tuple[str, tuple[str | None, ...]], ...]
"""Rows of (regular expression over the whole parameter path, one logical axis per dimension; None = never split)."""

ENCODER_AXES: AxesTable = (
    (r"(.*/)?masked_spec_embed", (None,)),
    (r"(.*/)?feature_extractor/conv_layers[_/]\d+/conv/kernel", (None, None, None)),
    (r"(.*/)?feature_extractor/conv_layers[_/]\d+/(conv/bias|layer_norm/(scale|bias))", (None,)),
    (r"(.*/)?feature_projection/layer_norm/(scale|bias)", (None,)),
    (r"(.*/)?feature_projection/projection/kernel", (None, "embed")),
    (r"(.*/)?feature_projection/projection/bias", (None,)),
    (r"(.*/)?encoder/pos_conv_embed/conv/weight_[vg]", (None, None, None)),
    (r"(.*/)?encoder/pos_conv_embed/conv/bias", (None,)),
    (r"(.*/)?encoder/layer_norm/(scale|bias)", (None,)),
    (r"(.*/)?encoder/rel_attn_embed/embedding", (None, "heads")),
    (r"(.*/)?encoder/layers/attention/[qkv]_proj/kernel", ("layers", "embed", "heads")),
    (r"(.*/)?encoder/layers/attention/[qkv]_proj/bias", ("layers", "heads")),
    (r"(.*/)?encoder/layers/attention/out_proj/kernel", ("layers", "heads", "embed")),
    (r"(.*/)?encoder/layers/attention/out_proj/bias", ("layers", None)),
    (r"(.*/)?encoder/layers/attention/gru_rel_pos_linear/kernel", ("layers", None, None)),
    (r"(.*/)?encoder/layers/attention/gru_rel_pos_linear/bias", ("layers", None)),
    (r"(.*/)?encoder/layers/attention/gru_rel_pos_const", ("layers", "heads")),
    (r"(.*/)?encoder/layers/(final_)?layer_norm/(scale|bias)", ("layers", None)),
    (r"(.*/)?encoder/layers/feed_forward/intermediate_dense/kernel", ("layers", "embed", "mlp")),
    (r"(.*/)?encoder/layers/feed_forward/intermediate_dense/bias", ("layers", "mlp")),
    (r"(.*/)?encoder/layers/feed_forward/output_dense/kernel", ("layers", "mlp", "embed")),
    (r"(.*/)?encoder/layers/feed_forward/output_dense/bias", ("layers", None)),
)
"""A WavLM or HuBERT encoder, under any prefix."""

ADAPTER_AXES: AxesTable = (
    (r"lora/wavlm/feature_projection/projection/kernel/a", (None, None)),
    (r"lora/wavlm/feature_projection/projection/kernel/b", (None, "embed")),
    (r"lora/wavlm/encoder/layers/attention/gru_rel_pos_linear/kernel/[ab]", ("layers", None, None)),
    (r"lora/.*/(attention/[qkv]_proj|feed_forward/intermediate_dense)/kernel/a", ("layers", "embed", None)),
    (r"lora/.*/attention/[qkv]_proj/kernel/b", ("layers", None, "heads")),
    (r"lora/.*/feed_forward/intermediate_dense/kernel/b", ("layers", None, "mlp")),
    (r"lora/.*/attention/out_proj/kernel/a", ("layers", "heads", None)),
    (r"lora/.*/feed_forward/output_dense/kernel/a", ("layers", "mlp", None)),
    (r"lora/.*/(attention/out_proj|feed_forward/output_dense)/kernel/b", ("layers", None, "embed")),
)
"""Low-rank adapters (`wavlm_jax.lora`): inputs and outputs are split as those of their kernel, the rank never is."""

WAVLM_AXES: AxesTable = (
    *ENCODER_AXES,
    *ADAPTER_AXES,
    (r"(.*/)?final_proj/kernel", ("embed", None)),
    (r"(.*/)?final_proj/bias", (None,)),
    (r"(.*/)?label_embeddings", (None, "embed")),
    (r"layer_weights", (None,)),
    (r"adapter/proj/kernel", ("embed", None)),
    (r"adapter/proj_layer_norm/scale", (None,)),
    (r"adapter/layers_\d+/conv/kernel", (None, "embed", None)),
    (r"adapter/(proj|proj_layer_norm|layers_\d+/conv)/bias", (None,)),
    (r"(lm_head|projector|classifier|feature_extractor|tdnn_\d+/kernel)/kernel", ("embed", None)),
    (r"(lm_head|projector|classifier|feature_extractor|tdnn_\d+/kernel)/bias", (None,)),
    (r"objective/weight", ("embed", None)),
    (r"ecapa/(.*/)?(conv|attend[12])/kernel", (None, "embed", None)),
    (r"ecapa/(.*/)?(linear|up|down)/kernel", ("embed", None)),
    (r"ecapa/(.*/)?(conv|attend[12]|linear|up|down)/bias", (None,)),
    (r"ecapa/(.*/)?bn/(scale|bias|mean|variance)", (None,)),
)
"""An encoder alone, with the masked-prediction head, or with any head of `wavlm_jax.model.heads`."""
