"""Which frames of a corpus the clusters are learned from: a fixed number, spread evenly over random utterances.

Everything is a function of the seed and the corpus, so that an interrupted fit finds the same sample again.
"""

import numpy as np
from jaxtyping import Array, Float, Float32, Int64

from pretrain.batches import Piece
from pretrain.row_shards import own_rows
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


class Drawing:
    """Draws at most `size` frames out of features that come by; memory depends on `size` and `dim` alone.

    Args:
        utterances: ascending.
        counts: frames of each of them.
        size: frames to keep.
        dim: width of a frame.
        seed: decides which.

    """

    def __init__(
        self,
        utterances: Int64[np.ndarray, " sampled"],
        counts: Int64[np.ndarray, " sampled"],
        *,
        size: int,
        dim: int,
        seed: int,
    ) -> None:
        self._utterances = utterances
        self._chosen = choose_frames(int(counts.sum()), size, seed)
        self._starts = np.cumsum(counts) - counts
        self.kept: Float32[np.ndarray, "frames dim"] = np.zeros((len(self._chosen), dim), np.float32)
        """0 in the places of frames that have not come by."""

    def take(self, result: Float[Array, "rows dim"], pieces: tuple[Piece, ...]) -> None:
        """The features of a batch; fetched from the devices if a frame of this host's rows is chosen."""
        features: np.ndarray | None = None
        for piece in pieces:
            first = int(self._starts[np.searchsorted(self._utterances, piece.utterance)]) + piece.start
            low, high = np.searchsorted(self._chosen, [first, first + piece.frames])
            if high > low:
                features = own_rows(result) if features is None else features
                self.kept[low:high] = features[self._chosen[low:high] - first + piece.row]
