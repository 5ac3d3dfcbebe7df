"""From the arguments of attention to those of the fused kernels of TPUs and GPUs, and back."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from wavlm_jax.model.attention_rules import EXCLUDED, AttentionDropout
from wavlm_jax.model.kernel_rules import BLOCK, Differentiable, Facts, Fixed
from wavlm_jax.model.position import Bias
from wavlm_jax.shapes import FrameMask, Heads

Kernels = Callable[[Facts, Differentiable, Fixed], Array]
"""To mixed values, in the form of the query."""


def attend_by(
    kernels: Kernels,
    query: Heads,
    key: Heads,
    value: Heads,
    bias: Bias | None,
    frame_mask: FrameMask | None,
    drop: AttentionDropout,
) -> Heads:
    """`attention.attend` by `tpu_attention.on_tpu` or `gpu_attention.on_gpu`; frames are padded inside."""
    facts, inputs, fixed = _prepared(query, key, value, bias, frame_mask, drop)
    return kernels(facts, inputs, fixed)[:, : query.shape[1]].reshape(query.shape)


def _prepared(
    query: Heads, key: Heads, value: Heads, bias: Bias | None, frame_mask: FrameMask | None, drop: AttentionDropout
) -> tuple[Facts, Differentiable, Fixed]:
    rows, frames, heads, head_dim = query.shape
    padding = -frames % BLOCK
    flat = [jnp.pad(x.reshape(rows, frames, -1), ((0, 0), (0, padding), (0, 0))) for x in (query, key, value)]
    given = Bias(jnp.zeros((heads, 2 * frames - 1)), jnp.zeros((rows, frames, heads))) if bias is None else bias
    profile = jnp.pad(given.position.astype(jnp.float32), ((0, 0), (padding + 1, padding)))
    gate = jnp.pad(given.gate.astype(jnp.float32).swapaxes(1, 2), ((0, 0), (0, 0), (0, padding)))
    seeds = jnp.zeros((rows, heads, 2), jnp.uint32) if drop.seeds is None else drop.seeds
    has_fill = frame_mask is not None or padding > 0
    facts = Facts(heads, head_dim, frames + padding, bias is not None, has_fill, drop.threshold)
    fixed = _fill(frame_mask, rows, frames, padding), jax.lax.bitcast_convert_type(seeds, jnp.int32)
    return facts, (flat[0], flat[1], flat[2], profile, gate), fixed


def _fill(frame_mask: FrameMask | None, rows: int, frames: int, padding: int) -> Array:
    """float32 (rows, frames + padding): 0 for a key that counts, else what its logit becomes."""
    inside = jnp.zeros((rows, frames)) if frame_mask is None else jnp.where(frame_mask, 0.0, EXCLUDED)
    return jnp.pad(inside.astype(jnp.float32), ((0, 0), (0, padding)), constant_values=-np.inf)
