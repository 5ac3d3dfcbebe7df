"""Configs of a model: the encoder (FACTS A11), its head (FACTS B), and how both are computed.

Field names are Hugging Face's, so that `config.json` is read and written by name. What Hugging Face keeps elsewhere
(gradient multiplier, normalisation of the waveform, padding convention) is here too.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from wavlm_jax.settings import SettingsError, check_sizes
from wavlm_jax.shapes import STANDARD, Geometry, Params

Padding = Literal["exact", "huggingface", "microsoft"]
Remat = Literal["none", "full", "dots"]
AttentionImplementation = Literal["auto", "dense", "chunked", "pallas_tpu", "pallas_gpu"]

Activation = Literal[
    "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_accurate", "quick_gelu", "relu", "silu", "swish", "tanh"
]
"""transformers' names, of functions that are 0 at 0, so that padding stays 0."""

BASE_STRIDES = (5, 2, 2, 2, 2, 2, 2)
BASE_KERNELS = (10, 3, 3, 3, 3, 2, 2)
MAX_SIZE = 2**20
"""No size of a model is larger; a larger one would only fill the memory."""


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How the model is computed. No property of the model, so it is not stored with its weights."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Activations and matrix products. Parameters, norms, softmax, gate and loss stay float32."""
    remat: Remat = "none"
    """What a Transformer layer recomputes in the backward pass: nothing, everything ("full"), or all but its matrix
    products and attention ("dots"); docs/performance.md says what each costs."""
    unroll: int = 1
    """Transformer layers per iteration of the layer scan. 1 compiles fastest, the number of layers unrolls the scan
    (docs/performance.md: no gain on a wide model, a little on the demo's)."""
    attention: AttentionImplementation = "auto"
    """All give the same result (`model/attention.py`); "auto" chooses by the device and the frames of a row."""

    def __post_init__(self) -> None:
        check_sizes(self, "unroll")


@dataclass(frozen=True, kw_only=True)
class WavLMConfig:
    """A WavLM, or with `position_bias=False` a HuBERT. Immutable and hashable: can be a static argument of `jit`."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    feat_extract_norm: Literal["group", "layer"]
    """"group": GroupNorm after the first conv layer (Base). "layer": LayerNorm after every one (Large)."""
    do_stable_layer_norm: bool
    """False: norm after the residual sum (Base). True: norm before each block, one more at the end (Large)."""
    do_normalize: bool
    """Whether each waveform is normalised to mean 0 and variance 1 before the model (Large)."""
    normalize_eps: float = 1e-5
    """Added to the variance: 1e-5 in pre-training (authors), 1e-7 in Hugging Face's feature extractor (FACTS E12)."""

    conv_dim: tuple[int, ...] = (512,) * 7
    conv_kernel: tuple[int, ...] = BASE_KERNELS
    conv_stride: tuple[int, ...] = BASE_STRIDES
    conv_bias: bool = False
    hidden_act: Activation = "gelu"
    """Between the two linear maps of a layer. Every released WavLM has the exact GELU, here and in the next."""
    feat_extract_activation: Activation = "gelu"
    """Of the conv encoder and the positional convolution."""
    layer_norm_eps: float = 1e-5
    conv_pos_batch_norm: bool = False
    """HuBERT: a batch norm before the positional convolution in the place of weight norm; never updated here."""
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    position_bias: bool = True
    """Gated relative position bias (FACTS A5). False makes it a HuBERT: no gate, no table."""
    num_buckets: int = 320
    max_bucket_distance: int = 800
    initializer_range: float = 0.02

    feature_grad_mult: float = 1.0
    feat_proj_dropout: float = 0.0
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    layerdrop: float = 0.0
    layerdrop_first: bool = True
    """Whether layer 0 can be dropped. Hugging Face never drops it (FACTS E4). The position bias is kept either way."""

    mask_time_prob: float = 0.8
    mask_time_length: int = 10
    mask_time_min_masks: int = 2
    mask_feature_prob: float = 0.0
    mask_feature_length: int = 10
    mask_feature_min_masks: int = 0

    padding: Padding = "exact"
    """"exact": padding never changes a valid frame. "huggingface", "microsoft": as those sources do (FACTS A7, E5)."""

    def __post_init__(self) -> None:
        self._check_literals()
        lengths = {len(self.conv_dim), len(self.conv_kernel), len(self.conv_stride)}
        if len(lengths) != 1 or not self.conv_dim:
            raise ValueError(
                f"model.conv_dim, conv_kernel, conv_stride: found {len(self.conv_dim)}, {len(self.conv_kernel)} and "
                f"{len(self.conv_stride)} entries, expected one each per conv layer"
            )
        check_sizes(self, *_SIZES, prefix="model.")
        check_sizes(self, "mask_time_min_masks", "mask_feature_min_masks", least=0, prefix="model.")
        for name, divisor in (
            ("hidden_size", self.num_attention_heads),
            ("hidden_size", self.num_conv_pos_embedding_groups),
            ("num_buckets", 4),
        ):
            if getattr(self, name) % divisor:
                raise ValueError(f"model.{name}: found {getattr(self, name)}, expected a multiple of {divisor}")
        if self.position_bias and 4 * self.max_bucket_distance <= self.num_buckets:
            raise ValueError(
                f"model.max_bucket_distance: found {self.max_bucket_distance}, expected more than a quarter of the "
                f"{self.num_buckets} num_buckets, which hold one distance each"
            )
        for name in ("feat_proj_dropout", "hidden_dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"model.{name}: found {getattr(self, name)}, expected a probability in [0, 1]")

    def _check_literals(self) -> None:
        literals = {"feat_extract_norm": ("group", "layer"), "padding": get_args(Padding)}
        literals |= dict.fromkeys(("hidden_act", "feat_extract_activation"), get_args(Activation))
        for name, allowed in literals.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"model.{name}: found {getattr(self, name)!r}, expected one of {', '.join(allowed)}")

        for name in ("normalize_eps", "layer_norm_eps", "initializer_range", "feature_grad_mult"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"model.{name}: found {getattr(self, name)}, expected 0 or more")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def conv_layers(self) -> tuple[tuple[int, int, int], ...]:
        """(channels, kernel, stride) of each conv layer."""
        return tuple(zip(self.conv_dim, self.conv_kernel, self.conv_stride, strict=True))

    @property
    def geometry(self) -> Geometry:
        """Kernels and strides of the conv encoder: how many frames samples give, and how long a frame is."""
        return Geometry(self.conv_kernel, self.conv_stride)

    def require_standard_frames(self, why: str) -> None:
        """Refuses a model whose frames are not the standard ones.

        Raises:
            SettingsError: other kernels or strides; `why` ends the message.

        """
        if self.geometry != STANDARD:
            raise SettingsError(
                f"config.model.conv_kernel, conv_stride: found {self.conv_kernel}, {self.conv_stride}, expected "
                f"{STANDARD.kernels}, {STANDARD.strides}; {why}"
            )

    def another_function(self, found: "WavLMConfig") -> list[str]:
        """Why weights of a model with the config `found` compute another function here: one line per field.

        Compares the fields that decide the result of a forward pass, so not dropouts, masks and padding.
        """
        without_bias = set() if self.position_bias else {"num_buckets", "max_bucket_distance"}
        return [
            f"{name} is {getattr(found, name)}, config.model has {getattr(self, name)}"
            for name in (field.name for field in dataclasses.fields(self))
            if name not in _FREE | without_bias and getattr(found, name) != getattr(self, name)
        ]

    @classmethod
    def base(cls, **changes: Any) -> "WavLMConfig":
        """WavLM Base as pre-trained (FACTS A4, A11, C1): 94.4 M parameters, 12 post-norm layers."""
        return cls(**(_BASE | changes))

    @classmethod
    def base_plus(cls, **changes: Any) -> "WavLMConfig":
        """WavLM Base+: Base trained on 94k hours; no value of the model differs."""
        return cls.base(**changes)

    @classmethod
    def large(cls, **changes: Any) -> "WavLMConfig":
        """WavLM Large: 315.5 M parameters, 24 pre-norm layers; dropouts 0 as in HuBERT Large (FACTS E15)."""
        return cls(**(_LARGE | changes))

    @classmethod
    def tiny(cls, **changes: Any) -> "WavLMConfig":
        """A Base for tests and first experiments: two layers, 32 wide, the same frames."""
        return cls(**(_TINY | changes))

    @classmethod
    def from_huggingface(cls, values: Mapping[str, Any], *, do_normalize: bool | None = None) -> "WavLMConfig":
        """The config that Hugging Face's `config.json` describes (WavLM or HuBERT).

        Args:
            values: the parsed JSON object; missing keys take transformers' own defaults.
            do_normalize: of the feature extractor; None: True for layer-normed conv encoders, else False.

        Raises:
            ValueError: a value that this model does not support; the key is named.

        """
        kind = values.get("model_type", "wavlm")
        if kind not in ("wavlm", "hubert"):
            raise ValueError(f"config.json: model_type is {kind!r}, expected wavlm or hubert")
        for key, allowed in _ONLY.items():
            if values.get(key, allowed) != allowed:
                raise ValueError(f"config.json: {key} is {values[key]!r}; this model only does {allowed!r}")
        names = {field.name for field in dataclasses.fields(cls)}
        merged = _HUGGINGFACE_DEFAULTS | {key: value for key, value in values.items() if key in names}
        for key in ("conv_dim", "conv_kernel", "conv_stride"):
            merged[key] = tuple(int(value) for value in merged[key])
        merged["conv_pos_batch_norm"] = kind == "hubert" and merged.get("conv_pos_batch_norm", False)
        merged |= {"position_bias": kind == "wavlm", "padding": "huggingface", "layerdrop_first": False}
        merged["normalize_eps"] = 1e-7
        merged["do_normalize"] = merged["feat_extract_norm"] == "layer" if do_normalize is None else do_normalize
        config = cls(**merged)
        if (said := values.get("num_feat_extract_layers", len(config.conv_dim))) != len(config.conv_dim):
            raise ValueError(
                f"config.json: num_feat_extract_layers is {said!r}, conv_dim has {len(config.conv_dim)} layers"
            )
        return config

    def to_huggingface(self) -> dict[str, Any]:
        """The object for Hugging Face's `config.json` (a bare WavLMModel or HubertModel)."""
        kind = "WavLM" if self.position_bias else "Hubert"
        result: dict[str, Any] = {
            "architectures": [f"{kind}Model"],
            "model_type": kind.lower(),
            "num_feat_extract_layers": len(self.conv_dim),
            "apply_spec_augment": True,
        }
        for field in dataclasses.fields(self):
            if field.name not in _NOT_HUGGINGFACE:
                value = getattr(self, field.name)
                result[field.name] = list(value) if isinstance(value, tuple) else value
        if not self.position_bias:
            del result["num_buckets"], result["max_bucket_distance"]
        if not self.conv_pos_batch_norm:
            del result["conv_pos_batch_norm"]
        return result


_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "conv_dim",
    "conv_kernel",
    "conv_stride",
    "num_conv_pos_embeddings",
    "num_conv_pos_embedding_groups",
    "num_buckets",
    "max_bucket_distance",
    "mask_time_length",
    "mask_feature_length",
)
_BASE: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "feat_extract_norm": "group",
    "do_stable_layer_norm": False,
    "do_normalize": False,
    "feature_grad_mult": 0.1,
    "feat_proj_dropout": 0.1,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "layerdrop": 0.05,
}
_LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "do_normalize": True,
}
_TINY: dict[str, Any] = _BASE | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": (32,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_buckets": 32,
    "max_bucket_distance": 80,
}

_ONLY = {"add_adapter": False, "feat_proj_layer_norm": True}
"""Keys of `config.json` that have one supported value."""

_HUGGINGFACE_DEFAULTS: dict[str, Any] = {
    **_BASE,
    "feature_grad_mult": 1.0,
    "feat_proj_dropout": 0.0,
    "activation_dropout": 0.1,
    "layerdrop": 0.1,
    "conv_dim": (512,) * 7,
    "conv_kernel": BASE_KERNELS,
    "conv_stride": BASE_STRIDES,
    "mask_time_prob": 0.05,
}
"""What transformers assumes for a key that is missing from `config.json` (FACTS A11)."""

_FREE = {
    *("normalize_eps", "initializer_range", "feature_grad_mult", "feat_proj_dropout", "hidden_dropout"),
    *("attention_dropout", "activation_dropout", "layerdrop", "layerdrop_first", "padding"),
    *("mask_time_prob", "mask_time_length", "mask_time_min_masks"),
    *("mask_feature_prob", "mask_feature_length", "mask_feature_min_masks"),
}
"""Fields that may be chosen freely for given weights."""

_NOT_HUGGINGFACE = {"do_normalize", "normalize_eps", "position_bias", "feature_grad_mult", "layerdrop_first", "padding"}
"""Fields that have no place in `config.json`."""


Compat: TypeAlias = Literal["exact", "huggingface"]
States: TypeAlias = Literal["raw", "normed"]


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The head of a model; each kind of head reads the fields that concern it. Immutable and hashable."""

    compat: Compat = "exact"
    """"exact": padding changes nothing. "huggingface": as transformers computes it (docs/parity.md) the frames that
    x-vectors are pooled over, adapters, which read padding there, and no layer weights in WavLMForCTC."""

    vocab_size: int = 32
    """CTC: characters, the blank among them."""
    pad_token_id: int = 0
    """CTC: the blank (Hugging Face's name for it; FACTS E34)."""
    final_dropout: float = 0.1
    """CTC: before the linear map to characters."""
    ctc_loss_reduction: Literal["sum", "mean"] = "sum"
    """CTC: "sum" adds up utterances, "mean" adds up loss / characters; both are divided by the number of utterances
    in the end (FACTS E32)."""

    num_labels: int = 2
    """Classes; of the frame head: speakers (or other events) that are on or off."""
    classifier_proj_size: int = 256
    """Sequence classification: width that frames are averaged in."""
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None
    """Sequence classification: what the scores mean, as in transformers (`function_to_apply`)."""
    use_weighted_layer_sum: bool = False
    """Whether the head reads a learned average of all hidden states instead of the last one."""
    layer_sum_states: States = "raw"
    """What that average takes for the last hidden state of a model that ends in a norm (Large): its raw output, as in
    transformers 5, or the normed one, as in transformers 4 and s3prl, so in SUPERB (FACTS E7)."""

    tdnn_dim: tuple[int, ...] = (512, 512, 512, 512, 1500)
    tdnn_kernel: tuple[int, ...] = (5, 3, 3, 1, 1)
    tdnn_dilation: tuple[int, ...] = (1, 2, 3, 1, 1)
    xvector_output_dim: int = 512
    """X-vector: width of the embedding, and of what the margin loss takes."""

    ecapa_dim: int = 512
    """ECAPA-TDNN: width of its layers, a multiple of 8."""
    ecapa_output_dim: int = 256
    """ECAPA-TDNN: width of the embedding."""

    add_adapter: bool = False
    """Whether convolutions shorten the sequence between encoder and head (CTC and x-vector)."""
    adapter_kernel_size: int = 3
    adapter_stride: int = 2
    num_adapter_layers: int = 3
    output_hidden_size: int | None = None
    """Width behind the adapter; None: that of the encoder."""

    def __post_init__(self) -> None:
        check_sizes(
            self, "vocab_size", "num_labels", "classifier_proj_size", "xvector_output_dim", "num_adapter_layers"
        )
        check_sizes(self, "tdnn_dim", "tdnn_kernel", "tdnn_dilation", "adapter_kernel_size", "adapter_stride")
        if self.output_hidden_size is not None:
            check_sizes(self, "output_hidden_size")
        if self.ecapa_dim < 1 or self.ecapa_dim % 8 or self.ecapa_output_dim < 1:
            raise ValueError(
                f"ecapa_dim {self.ecapa_dim}, ecapa_output_dim {self.ecapa_output_dim}: expected a multiple of 8, and "
                "1 or more"
            )
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id (the CTC blank): found {self.pad_token_id}, expected one of the vocab_size "
                f"{self.vocab_size} characters, so 0 to {self.vocab_size - 1}"
            )
        if not 0 <= self.final_dropout <= 1:
            raise ValueError(f"final_dropout: found {self.final_dropout}, expected a probability in [0, 1]")
        sizes = len(self.tdnn_dim), len(self.tdnn_kernel), len(self.tdnn_dilation)
        if len(set(sizes)) != 1 or not self.tdnn_dim:
            raise ValueError(
                f"tdnn_dim, tdnn_kernel, tdnn_dilation: found {sizes[0]}, {sizes[1]} and {sizes[2]} entries, expected "
                "one each per layer"
            )
        if self.add_adapter and self.use_weighted_layer_sum:
            raise ValueError(
                "add_adapter, use_weighted_layer_sum: found both; the adapter reads the last hidden state alone, so "
                "expected one of them"
            )

    @property
    def function_to_apply(self) -> str:
        """What makes answers of a sequence classifier's scores (transformers' word): "softmax", "sigmoid" or "none".

        One label without a `problem_type` is a number too: its softmax would be 1 for every recording.
        """
        if self.problem_type is None:
            return "none" if self.num_labels == 1 else "softmax"
        return {"multi_label_classification": "sigmoid", "regression": "none"}.get(self.problem_type, "softmax")

    @property
    def tdnn_context(self) -> int:
        """Frames that the TDNN takes from a sequence: 14 with the standard kernels and dilations (FACTS B4)."""
        return sum((k - 1) * d for k, d in zip(self.tdnn_kernel, self.tdnn_dilation, strict=True))


@dataclass(frozen=True, eq=False)
class TaskHead:
    """The head of a fine-tuned model, with its parameters."""

    kind: str
    """A key of `model.heads.HEADS`: "WavLMForCTC"."""
    config: HeadConfig
    params: Params
    """Everything beside the encoder: {"lm_head": ...}."""
    labels: tuple[str, ...] | None = None
    """Names of the classes in order (`id2label` of a config.json); None: unknown."""
