"""Self-attention with a gated relative position bias: one function `attend`, several ways to compute it.

"dense" holds all logits at once and is the measure of the others; "chunked" goes over blocks of queries and recomputes
each in the backward pass; "pallas_tpu" and "pallas_gpu" are fused kernels; "cudnn" is NVIDIA's. All give the same
numbers up to rounding, gradients and dropout included. `attention_choice` has what "auto" picks.
"""

from wavlm_jax.config import Attention as Implementation
from wavlm_jax.config import Compute, WavLMConfig
from wavlm_jax.model.attention_choice import choose, current_device
from wavlm_jax.model.attention_layer import Method
from wavlm_jax.model.attention_rules import AttentionDropout
from wavlm_jax.model.fused_attention import attend_by
from wavlm_jax.model.gpu_attention import on_gpu
from wavlm_jax.model.plain_attention import (
    attend_at_once,
    attend_by_cudnn,
    attend_in_blocks,
    attention_probabilities,
    mix,
)
from wavlm_jax.model.position import Bias
from wavlm_jax.model.tpu_attention import on_tpu
from wavlm_jax.shapes import FrameMask, Heads, Probabilities


def attend(
    query: Heads,
    key: Heads,
    value: Heads,
    bias: Bias | None,
    frame_mask: FrameMask | None,
    drop: AttentionDropout,
    implementation: Implementation,
) -> Heads:
    """Attention of every frame to all valid frames of its row.

    Args:
        query: (rows, frames, heads, head_dim), already divided by sqrt(head_dim).
        key: as `query`.
        value: as `query`.
        bias: gated position bias, float32, or None (HuBERT).
        frame_mask: (rows, frames), True where a frame may be attended to; None: everywhere. A row without a valid
            frame attends to all its frames alike, so it stays finite.
        drop: dropout of the probabilities.
        implementation: how, as `attention_choice.choose` says; all give the same result.

    Returns:
        (rows, frames, heads, head_dim) in the dtype of `value`. Logits and softmax are float32.

    Raises:
        ValueError: "auto", which is no implementation, or dropout in cuDNN.

    """
    if implementation == "dense":
        return attend_at_once(query, key, value, bias, frame_mask, drop)
    if implementation == "chunked":
        return attend_in_blocks(query, key, value, bias, frame_mask, drop)
    if implementation == "pallas_tpu":
        return attend_by(on_tpu, query, key, value, bias, frame_mask, drop)
    if implementation == "pallas_gpu":
        return attend_by(on_gpu, query, key, value, bias, frame_mask, drop)
    if implementation == "cudnn" and drop.seeds is None:
        return attend_by_cudnn(query, key, value, bias, frame_mask)
    raise ValueError(
        f"attend: {implementation!r} with dropout threshold {drop.threshold}; choose() has what to ask for"
    )


def attend_with_maps(
    query: Heads, key: Heads, value: Heads, bias: Bias | None, frame_mask: FrameMask | None, drop: AttentionDropout
) -> tuple[Heads, Probabilities]:
    """`attend` and the probabilities before dropout, by "dense"."""
    probabilities = attention_probabilities(query, key, bias, frame_mask)
    return mix(probabilities, value, drop), probabilities


def method_for(config: WavLMConfig, compute: Compute, num_frames: int, maps: bool, *, dropping: bool) -> Method:
    """How a forward pass computes attention: as chosen for the device it is traced for; with maps always dense."""
    if maps:
        return Method(attend_with_maps, takes_pairs=True)
    implementation = choose(config, compute, num_frames, current_device(), dropping=dropping).implementation

    def without_maps(
        query: Heads, key: Heads, value: Heads, bias: Bias | None, frame_mask: FrameMask | None, drop: AttentionDropout
    ) -> tuple[Heads, None]:
        return attend(query, key, value, bias, frame_mask, drop, implementation), None

    return Method(without_maps, takes_pairs=implementation == "dense")
