"""Self-attention with a gated relative position bias: the implementations, which one is chosen, the layer.

"dense" holds all logits at once and is the reference for the others. "chunked" takes blocks of queries and recomputes
each in the backward pass. "pallas_tpu" and "pallas_gpu" are fused kernels in modules of their own. All give the same
numbers up to rounding, gradients and dropout included; `choose` says which one "auto" is for a device and a length.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from wavlm_jax.config import AttentionImplementation, Compute, WavLMConfig
from wavlm_jax.model.fused_attention import (
    ATTENDED,
    EXCLUDED,
    NO_DROPOUT,
    AttentionDropout,
    attend_by,
    attention_dropout,
    kept,
)
from wavlm_jax.model.gpu_attention import on_gpu
from wavlm_jax.model.layers import Site, linear, site_keys
from wavlm_jax.model.position import Bias, GateProjection, PairBias, Profile, gate, toeplitz
from wavlm_jax.model.tpu_attention import on_tpu
from wavlm_jax.shapes import FrameMask, Heads, Hidden, Probabilities, RowKeys


class Attention(nn.Module):
    """Multi-head self-attention of one layer, with the gate of its position bias."""

    config: WavLMConfig
    compute: Compute
    implementation: AttentionImplementation
    output_attentions: bool
    """Whether the probabilities are returned too; they are then computed by "dense"."""

    def setup(self) -> None:
        """The four projections and, with position bias, the gate; names as in Hugging Face's WavLMAttention."""
        config = self.config
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            linear(config.hidden_size, config, self.compute) for _ in range(4)
        )
        if config.position_bias:
            self.gru_rel_pos_linear = GateProjection(config)
            ones = nn.initializers.ones
            self.gru_rel_pos_const = self.param("gru_rel_pos_const", ones, (config.num_attention_heads,))

    def __call__(
        self,
        hidden: Hidden,
        position: Profile | PairBias | None,
        frame_mask: FrameMask | None,
        row_keys: RowKeys | None,
    ) -> tuple[Hidden, Probabilities | None]:
        """The attended states and, with `output_attentions`, the probabilities of each head before dropout."""
        config = self.config
        query, key, value = (self._heads(projection(hidden)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        query = query * config.head_dim**-0.5
        bias = None
        if position is not None:
            bias = Bias(position, gate(self.gru_rel_pos_linear(hidden), self.gru_rel_pos_const))
        drop = NO_DROPOUT
        if row_keys is not None and config.attention_dropout > 0:
            keys = site_keys(row_keys, Site.ATTENTION)
            drop = attention_dropout(config.attention_dropout, keys, config.num_attention_heads)
        probabilities = None
        if self.output_attentions:
            probabilities = attention_probabilities(query, key, bias, frame_mask)
            mixed = mix(probabilities, value, drop)
        else:
            mixed = attend(query, key, value, bias, frame_mask, drop, self.implementation)
        mixed = checkpoint_name(mixed, ATTENDED)
        return self.out_proj(mixed.reshape(hidden.shape)), probabilities

    def _heads(self, x: Hidden) -> Heads:
        return x.reshape(*x.shape[:2], self.config.num_attention_heads, self.config.head_dim)


def attend(
    query: Heads,
    key: Heads,
    value: Heads,
    bias: Bias | None,
    frame_mask: FrameMask | None,
    drop: AttentionDropout,
    implementation: AttentionImplementation,
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
        implementation: one of those that `choose` returns; all give the same result.

    Returns:
        (rows, frames, heads, head_dim) in the dtype of `value`. Logits and softmax are float32.

    Raises:
        ValueError: "auto", which is no implementation.

    """
    if implementation == "dense":
        return attend_at_once(query, key, value, bias, frame_mask, drop)
    if implementation == "chunked":
        return attend_in_blocks(query, key, value, bias, frame_mask, drop)
    if implementation == "pallas_tpu":
        return attend_by(on_tpu, query, key, value, bias, frame_mask, drop)
    if implementation == "pallas_gpu":
        return attend_by(on_gpu, query, key, value, bias, frame_mask, drop)
    raise ValueError(f"attend: found {implementation!r}, expected an implementation; choose() says which it is")


def attend_at_once(
    query: Heads, key: Heads, value: Heads, bias: Bias | None, frame_mask: FrameMask | None, drop: AttentionDropout
) -> Heads:
    """The implementation "dense": all queries at once.

    The backward pass recomputes the probabilities: storing them costs more.
    """

    @jax.checkpoint
    def mixed(query: Heads, key: Heads, value: Heads, bias: Bias | None) -> Heads:
        return mix(attention_probabilities(query, key, bias, frame_mask), value, drop)

    return mixed(query, key, value, bias)


BLOCK = 128
"""Queries that "chunked" handles at a time: one tile of a TPU."""


def attend_in_blocks(
    query: Heads, key: Heads, value: Heads, bias: Bias | None, frame_mask: FrameMask | None, drop: AttentionDropout
) -> Heads:
    """The implementation "chunked": one block of `BLOCK` queries after the other, recomputed in the backward pass."""
    rows, frames, heads, head_dim = query.shape
    blocks = -(-frames // BLOCK)
    padding = blocks * BLOCK - frames
    padded = None if bias is None else jnp.pad(bias.position, ((0, 0), (padding, 0)))

    @jax.checkpoint
    def one_block(number: Array, queries: Array, gates: Array | None) -> Array:
        tile = None
        if padded is not None:
            start = (blocks - 1 - number) * BLOCK
            window = jax.lax.dynamic_slice_in_dim(padded, start, BLOCK + frames - 1, axis=1)
            tile = toeplitz(window, BLOCK, frames)
        probabilities = _probabilities(queries, key, tile, gates, frame_mask)
        return mix(probabilities, value, drop, number * BLOCK)

    def in_blocks(x: Array) -> Array:
        widths = [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, widths).reshape(rows, blocks, BLOCK, *x.shape[2:]).swapaxes(0, 1)

    gates = None if bias is None else in_blocks(bias.gate)
    mixed = jax.lax.map(lambda block: one_block(*block), (jnp.arange(blocks), in_blocks(query), gates))
    return mixed.swapaxes(0, 1).reshape(rows, blocks * BLOCK, heads, head_dim)[:, :frames]


def attention_probabilities(query: Heads, key: Heads, bias: Bias | None, frame_mask: FrameMask | None) -> Probabilities:
    """Softmax over keys of query . key + gated bias: float32 (rows, heads, frames, frames)."""
    if bias is None:
        return _probabilities(query, key, None, None, frame_mask)
    frames = query.shape[1]
    pairs = bias.position if bias.position.ndim == _PAIR_AXES else toeplitz(bias.position, frames, frames)
    return _probabilities(query, key, pairs, bias.gate, frame_mask)


_PAIR_AXES = 3


def _probabilities(
    query: Array, key: Array, tile: Array | None, gates: Array | None, frame_mask: FrameMask | None
) -> Probabilities:
    logits = jnp.einsum("rqhd,rkhd->rhqk", query, key, preferred_element_type=jnp.float32)
    if tile is not None and gates is not None:
        logits = logits + _gated(gates.swapaxes(1, 2), tile)
    if frame_mask is not None:
        logits = jnp.where(frame_mask[:, None, None, :], logits, EXCLUDED)
    return jax.nn.softmax(logits, axis=-1)


@jax.custom_vjp
def _gated(gates: Float[Array, "rows heads queries"], tile: Float[Array, "heads queries keys"]) -> Probabilities:
    """The position bias of each row: gate of the query times bias of the pair."""
    return gates[:, :, :, None] * tile[None]


def _gated_forward(gates: Array, tile: Array) -> tuple[Array, tuple[Array, Array]]:
    return _gated(gates, tile), (gates, tile)


def _gated_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    """On a CPU the sum over rows is a matrix product: XLA's reduction of the first axis takes ten times as long."""
    gates, tile = saved
    to_tile = jax.lax.platform_dependent(
        gates,
        gradient,
        cpu=lambda gates, gradient: jnp.einsum("rhqk,rhq->hqk", gradient, gates),
        default=lambda gates, gradient: (gradient * gates[:, :, :, None]).sum(axis=0),
    )
    return (gradient * tile[None]).sum(axis=-1), to_tile


_gated.defvjp(_gated_forward, _gated_backward)


def mix(
    probabilities: Probabilities, value: Heads, drop: AttentionDropout, first_query: Int[Array, ""] | int = 0
) -> Float[Array, "rows queries heads head_dim"]:
    """Values weighted by the probabilities that dropout keeps; it depends on the first query's frame, `first_query`."""
    weights = probabilities.astype(value.dtype)
    if drop.seeds is not None:
        queries, keys = first_query + jnp.arange(weights.shape[2]), jnp.arange(weights.shape[3])
        keep = kept(drop.threshold, drop.seeds, queries, keys)
        weights = jnp.where(keep, weights * drop.scale, jnp.zeros((), weights.dtype))
    return jnp.einsum("rhqk,rkhd->rqhd", weights, value)


DENSE_FRAMES = 800
"""Up to this length (16 s) the logits of one row and head fit in 2.5 MB, and chunks cost more than they save."""
KERNEL_FRAMES = 5120
"""The longest row (102 s) that the slow tests compile the TPU kernel for: its blocks have to fit in fast memory."""
SMALL_MEMORY_FRAMES = 1024
"""The same for a core with 16 MB of fast memory."""
KERNEL_KINDS = {
    "TPU v4": SMALL_MEMORY_FRAMES,
    "TPU v5 lite": KERNEL_FRAMES,
    "TPU v5": KERNEL_FRAMES,
    "TPU v6 lite": KERNEL_FRAMES,
}
"""Kinds of TPU that the tests compile the kernel for, and the most frames of a row there."""
GPUS = ("gpu", "cuda")
GPU_HEAD_DIMS = (16, 32, 64, 128)
"""Head widths that the GPU kernels have tiles for."""
GPU_FRAMES = KERNEL_FRAMES
"""The longest row for the GPU kernels: at this length the gradient of the bias of all pairs takes 1.3 GB."""
OLD_GPUS = ("GTX", "RTX 20", "TITAN", "Quadro")
"""Parts of the names of NVIDIA GPUs before Ampere, which Triton does not support. V100 and older are "Tesla ..."."""


class Device(NamedTuple):
    """The properties of a device that the choice depends on."""

    platform: str
    """"cpu", "gpu", "tpu"."""
    kind: str
    """JAX's name for it: "TPU v5 lite"."""


class Choice(NamedTuple):
    """An implementation, never "auto", and the reason for it as a message."""

    implementation: AttentionImplementation
    reason: str


def current_device() -> Device:
    """The device of the current mesh, which may exist for compilation only; without a mesh JAX's default device."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return Device(abstract.platform, abstract.device_kind)
    device = jax.devices()[0]
    return Device(device.platform, device.device_kind)


def choose(config: WavLMConfig, compute: Compute, num_frames: int, device: Device) -> Choice:
    """Which implementation `compute.attention` means for rows of `num_frames` frames on a device."""
    obstacle = _gpu_obstacle(config, num_frames, device.kind)
    if compute.attention == "pallas_gpu" and obstacle is not None:
        return Choice("chunked", f"the GPU kernels {obstacle}")
    if compute.attention != "auto":
        return Choice(compute.attention, "as configured")
    longest = KERNEL_KINDS.get(device.kind, DENSE_FRAMES)
    if num_frames <= longest and device.kind in KERNEL_KINDS:
        return Choice("pallas_tpu", f"{device.kind}, a fused kernel")
    if device.platform in GPUS and compute.dtype == "bfloat16" and obstacle is None:  # float32 was never timed
        return Choice("pallas_gpu", f"{device.kind}, fused kernels")
    if num_frames <= longest:
        return Choice("dense", f"{device.kind}, up to {longest} frames")
    return Choice("chunked", f"{device.kind}, above {longest} frames")


def _gpu_obstacle(config: WavLMConfig, num_frames: int, kind: str) -> str | None:
    """Why the GPU kernels cannot run, to follow "the GPU kernels"; None: they can."""
    if config.head_dim not in GPU_HEAD_DIMS:
        return f"have tiles of {', '.join(map(str, GPU_HEAD_DIMS))}, heads are {config.head_dim} wide"
    if not kind.startswith("NVIDIA") or any(name in kind for name in OLD_GPUS):
        return f"need an NVIDIA GPU from Ampere on, this is {kind}"
    return f"take up to {GPU_FRAMES} frames, these are {num_frames}" if num_frames > GPU_FRAMES else None


def describe(config: WavLMConfig, compute: Compute, frames: tuple[int, ...], device: Device) -> list[str]:
    """One line for each implementation that the buckets of a training run get, to be printed at its start.

    Raises:
        ValueError: a TPU kernel is asked for without a TPU, or a GPU kernel without a GPU.

    """
    needed = {"pallas_tpu": ("tpu",), "pallas_gpu": GPUS}.get(compute.attention)
    if needed is not None and device.platform not in needed:
        raise ValueError(
            f"config.compute.attention: {compute.attention!r} needs a {needed[0].upper()}, found {device.kind}; "
            "'auto' takes what suits the device"
        )
    found: dict[Choice, list[int]] = {}
    for bucket in frames:
        found.setdefault(choose(config, compute, bucket, device), []).append(bucket)
    return [
        f"attention for {', '.join(map(str, buckets))} frames: {choice.implementation} ({choice.reason})"
        for choice, buckets in found.items()
    ]
