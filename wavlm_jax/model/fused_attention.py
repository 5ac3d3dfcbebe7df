"""What the fused attention kernels of TPUs and GPUs share, and what all implementations agree on about dropout.

Whether dropout keeps a probability is a hash of (the row's random key, head, query frame, key frame). Numbers that a
generator returns in order would differ between implementations, and a kernel would have to store them for the backward
pass. With a hash, each implementation computes the decisions where it needs them and stores none.

"Mixed values" are the result of attention: the values, summed with the probabilities as weights.

`attend_by` turns the arguments of `attention.attend` into those of the kernels, and `on_each_device` runs the kernels
on each device's own rows and heads.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int, Key, UInt32

from wavlm_jax.model.layers import mesh_axes
from wavlm_jax.model.position import Bias
from wavlm_jax.shapes import FrameMask, Heads

EXCLUDED = -1e30
"""Logit of a key that is padding. Finite, so that a row without a valid frame gives a uniform softmax and not 0 / 0."""
Seeds = UInt32[Array, "rows heads words=2"]


class AttentionDropout(NamedTuple):
    """A share threshold / RESOLUTION of the probabilities becomes 0, the rest is scaled up; no seeds: no dropout."""

    threshold: int
    seeds: Seeds | None

    @property
    def scale(self) -> float:
        """What is kept is multiplied by this."""
        return scale_of_kept(self.threshold)


NO_DROPOUT = AttentionDropout(0, None)


def attention_dropout(rate: float, keys: Key[Array, "rows"], num_heads: int) -> AttentionDropout:
    """Dropout of a share `rate` of the probabilities, each row's by its own key."""
    seeds: Seeds = jax.vmap(lambda key: jax.random.bits(key, (num_heads, 2), jnp.uint32))(keys)
    return AttentionDropout(min(round(rate * RESOLUTION), RESOLUTION - 1), seeds)


def kept(
    threshold: int, seeds: Seeds, queries: Int[Array, "queries"], keys: Int[Array, "keys"]
) -> Bool[Array, "rows heads queries keys"]:
    """Which probabilities dropout keeps; `queries` and `keys` are the numbers of their frames."""
    pairs = queries // (2 * HALF) * HALF + queries % HALF
    signed = jax.lax.bitcast_convert_type(seeds, jnp.int32)[:, :, None, None, :]
    words = random_words(signed[..., 0], signed[..., 1], pairs[None, None, :, None], keys[None, None, None, :])
    upper = (queries // HALF % 2 == 1)[None, None, :, None]
    return jnp.where(upper, shifted_right(words, 16), words & (RESOLUTION - 1)) >= threshold


RESOLUTION = 1 << 16
"""Rates of dropout are rounded to 1 / 65,536: two decisions from one 32-bit word."""
HALF = 64
"""Queries q and q + HALF of each block of 2 * HALF share a word, so that a kernel's block splits between registers."""
BLOCK = 2 * HALF
"""Queries in one block of the fused kernels. They pad the frames of a row to a multiple of it."""
ATTENDED = "attended"
"""Name of attention's result for recomputation policies, which would not recognise a fused kernel as a product."""


class Facts(NamedTuple):
    """What a fused kernel knows when it is compiled."""

    num_heads: int
    head_dim: int
    frames: int
    """A multiple of BLOCK."""
    has_bias: bool
    has_fill: bool
    drop_threshold: int
    """As in `AttentionDropout`; 0: no dropout."""
    group: int = 1
    """Heads that are handled together in one block."""

    @property
    def width(self) -> int:
        """Numbers per frame in a group of heads."""
        return self.group * self.head_dim

    @property
    def num_groups(self) -> int:
        """Groups of heads."""
        return self.num_heads // self.group


class Operands(NamedTuple):
    """Inputs of all kernels, inside of them as references to blocks; the modules of the kernels give the shapes."""

    query: Any
    key: Any
    value: Any
    profile: Any
    """float32: the bias of distance d is at index frames + d."""
    gate: Any
    """float32, one per query."""
    fill: Any
    """float32, one per key: 0, or the value that replaces the logits of a key that is padding."""
    seeds: Any
    """int32, two per row and head."""


OPERANDS = Operands._fields
Differentiable = tuple[Array, Array, Array, Array, Array]
"""Inputs that have a gradient: query, key, value (rows, frames, width), profile (heads, 2 * frames) with distance d at
index frames + d, and gate (rows, heads, frames)."""
Fixed = tuple[Array, Array]
"""Inputs without a gradient: fill (rows, frames), 0 for a key that counts, else the value that replaces its logit; and
int32 seeds (rows, heads, 2)."""


def matmul(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """Product over the named axes, float32; float32 operands are not rounded."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    axes = (((x_axis,), (y_axis,)), ((), ()))
    return jax.lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)


def scale_of_kept(threshold: int) -> float:
    """What is kept is multiplied by this, when threshold / RESOLUTION is dropped."""
    return RESOLUTION / (RESOLUTION - threshold)


def random_words(first: Array, second: Array, pairs: Array, keys: Array) -> Array:
    """One random int32 for each pair of queries and each key frame, under two int32 seeds; shapes broadcast."""
    return _scrambled(_scrambled(pairs * _ODD + first) ^ _scrambled(keys * _ODD + second))


def _scrambled(x: Array) -> Array:
    """A bijection of 32-bit words in which each bit of the result depends on all (multipliers: C. Wellons, 2018)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32))):
        x = (x ^ shifted_right(x, shift)) * factor
    return x ^ shifted_right(x, 16)


def shifted_right(x: Array, bits: int) -> Array:
    """The upper bits of int32 words, zeros moving in."""
    return jax.lax.shift_right_logical(x, jnp.full_like(x, bits))


_ODD = 0x9E3779B9 - (1 << 32)
"""The golden ratio's bits: successive multiples spread over all words."""


_AXES = {
    **dict.fromkeys(("query", "key", "value", "direction", "result"), ("rows", None, "heads")),
    "profile": ("heads", None),
    "gate": ("rows", "heads", None),
    "fill": ("rows", None),
    "seeds": ("rows", "heads", None),
    "statistics": ("rows", "heads", None),
}
"""Logical axes of a fused kernel's arguments and results; `training.sharding.RULES` maps them to mesh axes."""


def on_each_device(
    num_heads: int,
    call: Callable[..., Any],
    names: tuple[str, ...],
    results: tuple[str, ...],
    arguments: tuple[Any, ...],
) -> Any:
    """`call` on each device's own rows and heads; the profile's gradient is summed over the devices' rows.

    Args:
        num_heads: of all devices.
        call: from the number of its own heads and the arguments to a sequence of results.
        names: of the arguments, keys of `_AXES`.
        results: of the results, likewise.
        arguments: arrays.

    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tuple(call(num_heads, *arguments))
    axes = mesh_axes({"rows": arguments[0].shape[0], "heads": num_heads})
    own_heads = num_heads // math.prod(mesh.shape[axis] for axis in axes["heads"])

    def spec(name: str) -> PartitionSpec:
        return PartitionSpec(*(axes[axis] if axis else None for axis in _AXES[name]))

    def body(*arguments: Any) -> Any:
        found = zip(results, call(own_heads, *arguments), strict=True)
        return tuple(jax.lax.psum(x, axes["rows"]) if name == "profile" else x for name, x in found)

    given = tuple(map(spec, names))
    return jax.shard_map(body, in_specs=given, out_specs=tuple(map(spec, results)), check_vma=False)(*arguments)


Kernels = Callable[[Facts, Differentiable, Fixed], Array]
"""(facts, inputs with a gradient, other inputs) -> mixed values: (rows, frames, width), dtype of the query."""


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
