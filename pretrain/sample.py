"""Which frames of a corpus the clusters are learned from: a fixed number, spread evenly over random utterances.

Everything is a function of the seed and the corpus, so that an interrupted fit finds the same sample again.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float32, Int64

from pretrain.features import Block
from wavlm_jax.shapes import SAMPLE_RATE


def choose_utterances(
    lengths: Int64[np.ndarray, " utterances"], sample_seconds: float | None, seed: int
) -> Int64[np.ndarray, " sampled"]:
    """Random whole utterances of together at least `sample_seconds` (None: all), ascending."""
    if sample_seconds is None:
        return np.arange(len(lengths), dtype=np.int64)
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(lengths))
    before = np.cumsum(lengths[order]) - lengths[order]
    return np.sort(order[before < sample_seconds * SAMPLE_RATE]).astype(np.int64)


def choose_frames(total: int, size: int, seed: int) -> Int64[np.ndarray, " frames"]:
    """`size` of the numbers below `total` (all of them if fewer), ascending: a random one in each of `size` strata."""
    if total <= size:
        return np.arange(total, dtype=np.int64)
    strata = (np.arange(size + 1) * total) // size
    offsets = np.random.Generator(np.random.Philox(key=seed)).random(size)
    return strata[:-1] + (offsets * np.diff(strata)).astype(np.int64)


def draw(
    blocks: Iterable[Block],
    utterances: Int64[np.ndarray, " sampled"],
    counts: Int64[np.ndarray, " sampled"],
    *,
    size: int,
    dim: int,
    seed: int,
) -> Float32[np.ndarray, "frames dim"]:
    """At most `size` frames out of a stream of features; memory depends on `size` and `dim` alone.

    Args:
        blocks: all frames of `utterances`, in any order.
        utterances: ascending.
        counts: frames of each of them.
        size: frames to keep.
        dim: width of a frame.
        seed: decides which.

    """
    chosen = choose_frames(int(counts.sum()), size, seed)
    starts = np.cumsum(counts) - counts
    kept = np.zeros((len(chosen), dim), np.float32)
    for block in blocks:
        features: np.ndarray | None = None
        for piece in block.pieces:
            first = int(starts[np.searchsorted(utterances, piece.utterance)]) + piece.start
            low, high = np.searchsorted(chosen, [first, first + piece.frames])
            if high > low:
                features = np.asarray(block.features) if features is None else features
                kept[low:high] = features[chosen[low:high] - first + piece.row]
    return kept
