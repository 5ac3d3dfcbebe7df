"""Position of a frame: the gated relative position bias (FACTS A5) and the convolutional position embedding (A3).

The bias of an attention logit is gate[row, head, query] * profile[head, key - query]. The profile has one number per
head and distance. It comes from one table for all layers and is computed once; the gate belongs to each layer.

The position embedding is a grouped convolution over 128 frames whose weight is normalised tap by tap. XLA's CPU backend
computes the gradient of a grouped convolution channel by channel, and cuDNN computes one without matrix units: a third
of a training step on either. So on a CPU the convolution is computed in the frequency domain, with the Fourier
transforms as matrix products, on a GPU as one product of windows with shifted taps, elsewhere as XLA's convolution. All
give the same numbers up to rounding (docs/performance.md has the times).
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from wavlm_jax.config import Compute, WavLMConfig
from wavlm_jax.model.layers import ACTIVATIONS, ChannelNorm, keep_where, mesh_axes
from wavlm_jax.shapes import FrameMask, Hidden

Profile = Float[Array, "heads distances"]
"""Bias of each distance key - query, from -(frames - 1) to frames - 1."""
PairBias = Float[Array, "heads frames frames"]
"""Bias of every pair of frames, (query, key)."""
Gate = Float[Array, "rows frames heads"]


class Bias(NamedTuple):
    """What is added to the logits: gate[row, query, head] * position[head, key - query].

    `position` is the profile, or for the "dense" attention the bias of all pairs, made once for all layers.
    """

    position: Profile | PairBias
    gate: Gate


def relative_buckets(
    distances: Int[np.ndarray, "*shape"], num_buckets: int, max_distance: int
) -> Int[np.ndarray, "*shape"]:
    """The bucket of each distance key - query, int32.

    Half of the buckets are for keys after the query. In each half, the first half of the buckets holds one distance
    each, and the others are logarithmic up to `max_distance`, beyond which all distances share the last bucket.
    In float32 and in torch's order, so that edges are where transformers and the authors' code have them (64 of 32
    buckets up to 128: 12, where float64 gives 11). Computed on the host, because an accelerator's logarithm may round
    differently at the edge of a bucket.
    """
    half = num_buckets // 2
    exact = half // 2
    size = np.abs(distances)
    ratio = np.maximum(size, exact).astype(np.float32) / np.float32(exact)
    log = np.log(ratio.astype(np.float64)).astype(np.float32)
    scaled = log / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    logarithmic = (np.float32(exact) + scaled).astype(np.int32)
    if (exception := _TORCH_ROUNDS.get((num_buckets, max_distance))) is not None:
        logarithmic = np.where(size == exception[0], exception[1], logarithmic)
    bucket = np.where(size < exact, size, np.minimum(logarithmic, half - 1))
    return (bucket + np.where(distances > 0, half, 0)).astype(np.int32)


# fmt: off
_TORCH_ROUNDS: Mapping[tuple[int, int], tuple[int, int]] = {
    (68, 1577): (709, 31), (88, 1598): (127, 31), (96, 1254): (550, 43), (128, 1997): (1755, 62),
    (148, 1169): (59, 42), (152, 1550): (644, 66), (156, 1779): (1613, 77), (172, 859): (199, 65),
    (204, 1358): (1194, 100), (216, 1037): (568, 97), (244, 699): (147, 82), (248, 948): (411, 104),
    (260, 1003): (747, 123), (276, 476): (189, 105), (284, 1726): (920, 127), (292, 1618): (856, 131),
    (296, 1275): (716, 133), (308, 1594): (435, 121), (324, 725): (422, 141), (324, 1300): (955, 153),
    (348, 548): (453, 165), (352, 1075): (458, 145), (356, 883): (488, 154), (364, 1093): (1007, 179),
    (376, 295): (215, 161), (392, 394): (367, 190), (392, 1287): (1043, 188), (396, 403): (256, 166),
    (400, 169): (130, 149), (404, 719): (451, 177), (404, 1298): (1234, 200), (428, 965): (554, 186),
    (488, 983): (641, 219), (544, 963): (846, 262), (548, 1196): (408, 205), (552, 952): (378, 210),
    (572, 961): (830, 275), (628, 901): (540, 268),
}
# fmt: on
"""(num_buckets, max_distance) -> the distance at which torch's float32 logarithm on a CPU is not the nearest number and
so gives another bucket, and that bucket. Complete up to 320 buckets and a distance of 2000, up to 640 and 1300."""


class RelativePositionTable(nn.Module):
    """The learned table (num_buckets, heads), read once per forward pass."""

    config: WavLMConfig

    @nn.compact
    def __call__(self, num_frames: int) -> Profile:
        """The profile of all distances between `num_frames` frames, float32."""
        shape = (self.config.num_buckets, self.config.num_attention_heads)
        table = self.param("embedding", nn.initializers.normal(self.config.initializer_range), shape)
        distances = np.arange(1 - num_frames, num_frames)
        buckets = relative_buckets(distances, self.config.num_buckets, self.config.max_bucket_distance)
        return table[buckets].T


def toeplitz(window: Float[Array, "heads distances"], queries: int, keys: int) -> Float[Array, "heads queries keys"]:
    """The matrix whose entry (query, key) is `window[queries - 1 - query + key]`.

    `window` holds the queries + keys - 1 distances from the last query and first key to the first query and last key.
    Reading a sequence of period p in rows of p - 1 shifts each row by one, so there is no gather, and no scatter in the
    gradient.
    """
    heads, period = window.shape[0], queries + keys
    repeated = jnp.tile(jnp.pad(window, ((0, 0), (0, 1))), (1, queries))
    skewed = repeated[:, queries - 1 : queries - 1 + queries * (period - 1)].reshape(heads, queries, period - 1)
    return skewed[:, :, :keys]


class GateProjection(nn.Module):
    """The linear map from each head's slice of the layer input to its two gate logits, the same for all heads.

    Stored with the authors' 8 outputs, which they add up in two groups of 4. Here the weights are added up instead: the
    same function with the same gradients. All heads are one product with a block diagonal matrix, because slices of 64
    numbers would have to be copied to another layout, at many times the memory traffic of the hidden states.
    """

    config: WavLMConfig

    @nn.compact
    def __call__(self, hidden: Hidden) -> Float[Array, "rows frames gates=2 heads"]:
        """The two logits of every row, frame and head, float32."""
        heads, head_dim = self.config.num_attention_heads, self.config.head_dim
        initialiser = nn.initializers.normal(self.config.initializer_range)
        kernel = self.param("kernel", initialiser, (head_dim, _GATE_OUTPUTS))
        bias = self.param("bias", nn.initializers.zeros, (_GATE_OUTPUTS,))
        folded = kernel.reshape(-1, 2, _GATE_OUTPUTS // 2).sum(axis=-1)
        offset = bias.reshape(2, _GATE_OUTPUTS // 2).sum(axis=-1)
        diagonal = jnp.einsum("dg,hk->hdgk", folded, jnp.eye(heads)).reshape(heads * head_dim, 2 * heads)
        logits = hidden.astype(jnp.float32) @ diagonal
        return logits.reshape(*hidden.shape[:2], 2, heads) + offset[None, None, :, None]


_GATE_OUTPUTS = 8


def gate(logits: Float[Array, "rows frames gates=2 heads"], constant: Float[Array, "heads"]) -> Gate:
    """sigmoid(z1) * (sigmoid(z2) * constant - 1) + 2: about 1.75 at initialisation, in (1, 2) for constant 1."""
    update, reset = jax.nn.sigmoid(logits[:, :, 0]), jax.nn.sigmoid(logits[:, :, 1])
    return update * (reset * constant[None, None, :] - 1.0) + 2.0


TapWeights = Float[Array, "width group_width taps"]


def grouped_convolution(x: Hidden, weight: TapWeights, groups: int) -> Hidden:
    """Output frame t sums weight[:, :, k] times the group's input frame t + k - taps // 2; frames outside are 0.

    As many frames come out as go in (FACTS A3: 64 before and 63 after for 128 taps).
    """
    return jax.lax.platform_dependent(
        x,
        weight,
        cpu=partial(spectral_convolution, groups=groups),
        cuda=partial(on_own_rows, partial(block_convolution, groups=groups)),
        default=partial(direct_convolution, groups=groups),
    )


def on_own_rows(convolve: Callable[[Hidden, TapWeights], Hidden], x: Hidden, weight: TapWeights) -> Hidden:
    """`convolve` on each device's own rows, so that the weight's gradient is summed over devices in its own size.

    XLA on its own (and `shard_map` with `check_vma`) would sum the shifted taps of `block_convolution`, which are
    eighteen times as large.
    """
    rows = mesh_axes({"rows": x.shape[0]})["rows"]
    if not rows:
        return convolve(x, weight)
    spread = PartitionSpec(rows)
    own = jax.shard_map(convolve, in_specs=(spread, PartitionSpec()), out_specs=spread, check_vma=False)
    return own(x, weight)


def direct_convolution(x: Hidden, weight: TapWeights, groups: int) -> Hidden:
    """`grouped_convolution` as one XLA convolution."""
    taps = weight.shape[-1]
    return jax.lax.conv_general_dilated(
        x,
        weight.transpose(2, 1, 0),
        window_strides=(1,),
        padding=((taps // 2, taps - 1 - taps // 2),),
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=groups,
    )


def block_convolution(x: Hidden, weight: TapWeights, groups: int) -> Hidden:
    """`grouped_convolution` as one matrix product per group, of windows of frames with shifted taps.

    The outputs of BLOCK frames are a linear map of the taps + BLOCK - 1 frames around them: the taps, shifted to each
    place in the block. That is an eighth more arithmetic than the convolution needs, in products that are large enough
    for matrix units.
    """
    rows, frames, width = x.shape
    taps, group_width = weight.shape[-1], width // groups
    blocks, parts = -(-frames // BLOCK), -(-(taps + BLOCK - 1) // BLOCK)
    after = (blocks + parts - 1) * BLOCK - frames - taps // 2
    padded = jnp.pad(x, ((0, 0), (taps // 2, after), (0, 0)))
    cut = padded.reshape(rows, blocks + parts - 1, BLOCK, groups, group_width)
    windows = jnp.stack([cut[:, part : part + blocks] for part in range(parts)], axis=2)

    kernel = weight.reshape(groups, group_width, group_width, taps)
    places = ((first, parts * BLOCK - taps - first) for first in range(BLOCK))
    moved = jnp.stack([jnp.pad(kernel, ((0, 0), (0, 0), (0, 0), place)) for place in places])
    filters = moved.reshape(BLOCK, groups, group_width, group_width, parts, BLOCK)

    # r row, n block, p part of its window, u frame in the part, f frame in the block, g group, i and o channels
    outputs = jnp.einsum("rnpugi,fgoipu->rnfgo", windows, filters)
    return outputs.reshape(rows, blocks * BLOCK, width)[:, :frames]


BLOCK = 16
"""Frames of one product of `block_convolution`: with 16, windows and shifted taps have about the same size."""


def spectral_convolution(x: Hidden, weight: TapWeights, groups: int) -> Hidden:
    """`grouped_convolution` by overlap-save: in the frequency domain, one small matrix product per group and frequency.

    Frames are cut into windows of taps + hop, each of which gives `hop` outputs free of wrap-around; float32 inside.
    """
    rows, frames, width = x.shape
    taps, group_width = weight.shape[-1], width // groups
    hop = -(-taps // 2)
    window, count = taps + hop, -(-frames // hop)
    analysis, synthesis = _fourier_matrices(window)

    padded = jnp.pad(
        x.astype(jnp.float32), ((0, 0), (taps // 2, (count - 1) * hop + window - frames - taps // 2), (0, 0))
    )
    windows = jnp.stack([padded[:, hop * i : hop * i + window] for i in range(count)], axis=1)
    windows = windows.reshape(rows * count, window, groups, group_width)
    kernels = weight.astype(jnp.float32).reshape(groups, group_width, group_width, taps)

    # f frequency, c real or imaginary part, n time, g group, b window, i and o channels in and out
    signal = jnp.einsum("cnf,bngi->fgbci", analysis, windows)
    real, imaginary = signal[:, :, :, 0], signal[:, :, :, 1]
    # Correlation multiplies by the conjugate: (a + ib)(u - iv) = (au + bv) + i(bu - av), both parts in one product.
    crossed = jnp.stack([signal, jnp.stack([imaginary, -real], axis=3)], axis=2)
    filters = jnp.einsum("cnf,goin->fgcio", analysis[:, :taps], kernels)
    product = jnp.einsum("fgrbci,fgcio->fgrbo", crossed, filters)
    outputs = jnp.einsum("rfn,fgrbo->bngo", synthesis[:, :, :hop], product)
    outputs = outputs.reshape(rows, count * hop, width)[:, :frames]
    # What sees zeros alone is 0, as in torch. Rounding of the transform would be blown up by a norm of empty frames.
    sums = jnp.cumsum(jnp.pad((padded != 0).any(axis=2), ((0, 0), (1, 0))).astype(jnp.int32), axis=1)
    empty = sums[:, taps : taps + frames] == sums[:, :frames]
    return jnp.where(empty[:, :, None], outputs - jax.lax.stop_gradient(outputs), outputs).astype(x.dtype)


def _fourier_matrices(length: int) -> tuple[np.ndarray, np.ndarray]:
    """The real Fourier transform (2, time, frequency) and its inverse (2, frequency, time), real and imaginary part."""
    frequency = np.arange(length // 2 + 1)
    angle = 2 * np.pi * np.outer(np.arange(length), frequency) / length
    wave = np.stack([np.cos(angle), -np.sin(angle)])
    conjugates = np.where((frequency == 0) | (2 * frequency == length), 1, 2)
    inverse = wave.swapaxes(1, 2) * conjugates[None, :, None] / length
    return wave.astype(np.float32), inverse.astype(np.float32)


class WeightNormConvolution(nn.Module):
    """The convolution with its parameters in torch's layout: direction v, one gain g per tap, bias."""

    config: WavLMConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        """The convolved frames, with weight g[k] * v[:, :, k] / |v[:, :, k]| computed in float32."""
        config = self.config
        width, taps = config.hidden_size, config.num_conv_pos_embeddings
        groups = config.num_conv_pos_embedding_groups
        spread = nn.initializers.normal(math.sqrt(4 / (taps * width)))
        direction = self.param("weight_v", spread, (width, width // groups, taps))
        norm = jnp.sqrt(jnp.square(direction).sum(axis=(0, 1), keepdims=True))
        gain = self.param("weight_g", lambda _: norm)
        bias = self.param("bias", nn.initializers.zeros, (width,))
        dtype = jnp.dtype(self.compute.dtype)
        weight = (direction * (gain / norm)).astype(dtype)
        return grouped_convolution(x.astype(dtype), weight, groups) + bias.astype(dtype)[None, None, :]


class PositionalConvolution(nn.Module):
    """GELU (or another activation) of the convolution, to be added to its input (FACTS A3)."""

    config: WavLMConfig
    compute: Compute

    def setup(self) -> None:
        """The convolution, and the batch norm where the model has one, named as Hugging Face's."""
        self.conv = WeightNormConvolution(self.config, self.compute)
        if self.config.conv_pos_batch_norm:
            self.batch_norm = ChannelNorm(self.config.hidden_size)

    def __call__(self, x: Hidden, mask: FrameMask | None = None) -> Hidden:
        """(rows, frames, width), as many frames as in `x`, whose frames outside of the mask are 0."""
        if self.config.conv_pos_batch_norm:
            scale, bias = self.batch_norm()
            x = (x * scale[None, None] + bias[None, None]).astype(x.dtype)
            if mask is not None and self.config.padding == "exact":
                x = keep_where(mask, x)
        return ACTIVATIONS[self.config.feat_extract_activation](self.conv(x))
