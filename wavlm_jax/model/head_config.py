"""What stands on top of a WavLM: sizes of the heads, field names as in Hugging Face's config.json (FACTS A11, B)."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from wavlm_jax.shapes import Params

Compat: TypeAlias = Literal["exact", "huggingface"]
States: TypeAlias = Literal["raw", "normed"]


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The head of a model; each kind of head reads the fields that concern it. Immutable and hashable."""

    compat: Compat = "exact"
    """"exact": padding changes nothing. "huggingface": as transformers computes it, where it differs (docs/parity.md):
    frames that x-vectors are pooled over, adapters that read padding, layer weights that WavLMForCTC does not have."""

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
    ecapa_global_context: bool = False
    """ECAPA-TDNN: whether the weights of the pooling know mean and deviation of the whole utterance."""

    add_adapter: bool = False
    """Whether convolutions shorten the sequence between encoder and head (CTC and x-vector)."""
    adapter_kernel_size: int = 3
    adapter_stride: int = 2
    num_adapter_layers: int = 3
    output_hidden_size: int | None = None
    """Width behind the adapter; None: that of the encoder."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_labels", "classifier_proj_size", "xvector_output_dim", "num_adapter_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected 1 or more")
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
        if not 0 <= self.final_dropout < 1:
            raise ValueError(f"final_dropout: found {self.final_dropout}, expected a probability in [0, 1)")
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
    def tdnn_context(self) -> int:
        """Frames that the TDNN takes from a sequence: 14 with the standard kernels and dilations (FACTS B4)."""
        return sum((k - 1) * d for k, d in zip(self.tdnn_kernel, self.tdnn_dilation, strict=True))


@dataclass(frozen=True)
class TaskHead:
    """What stands on the encoder of a fine-tuned model."""

    kind: str
    """Name of the class here and in transformers: "WavLMForCTC"; a key of `model.kinds.KINDS`."""
    config: HeadConfig
    params: Params
    """Everything beside the encoder: {"lm_head": ...}."""
    labels: tuple[str, ...] | None = None
    """Names of the classes in order (`id2label` of a config.json); None: not told."""
