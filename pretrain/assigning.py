"""From features to the labels of consecutive utterances."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Int, Int64, UInt16

from pretrain.batches import Piece
from pretrain.kmeans import Centroids, nearest
from pretrain.label_arrays import LabelError
from pretrain.row_shards import own_rows

PART_LABELS = 2**20
"""Labels that are made between two notes on progress."""
Edges = Int64[np.ndarray, " edges"]


def parts_of(offsets: Edges, first: int, end: int) -> list[tuple[int, int]]:
    """The utterances from `first` to `end` (exclusive) in consecutive parts of about `PART_LABELS` labels.

    Args:
        offsets: of the labels of all utterances.
        first: of the utterances.
        end: behind the last of them.

    """
    parts = []
    while first < end:
        reach = int(np.searchsorted(offsets, offsets[first] + PART_LABELS))
        parts.append((first, max(first + 1, min(reach, end))))
        first = parts[-1][1]
    return parts


def label_program(compute: Callable[[Any, Any], Array], rows: NamedSharding) -> Any:
    """Jitted: (params, arrays of a batch, centroids) -> int32, the label of each of its frames.

    Args:
        compute: of the features (`FeatureSource.compute`).
        rows: of the batch and of the labels.

    """

    def label(params: Any, arrays: Any, centroids: Centroids) -> Int[Array, " frames"]:
        return nearest(compute(params, arrays), centroids)[0]

    return jax.jit(label, out_shardings=rows)


class PartLabels:
    """Labels of consecutive utterances from `first` on, one behind the other; `offsets` are theirs in the split."""

    def __init__(self, offsets: Edges, first: int) -> None:
        self._offsets, self._first = offsets, first
        self._missing = int(offsets[-1] - offsets[0])
        self._labels = np.zeros(self._missing, np.uint16)

    def take(self, result: Int[Array, " frames"], pieces: tuple[Piece, ...]) -> None:
        """The labels of a batch, this host's rows of it."""
        found = own_rows(result)
        for piece in pieces:
            at = self._offsets[piece.utterance - self._first] - self._offsets[0] + piece.start
            self._labels[at : at + piece.frames] = found[piece.row : piece.row + piece.frames]
            self._missing -= piece.frames

    def whole(self) -> UInt16[np.ndarray, " labels"]:
        """All of them.

        Raises:
            LabelError: some were not taken.

        """
        if self._missing:
            raise LabelError(
                f"features: {self._missing} frames are missing from the utterances number {self._first} to "
                f"{self._first + len(self._offsets) - 2}; the audio is shorter than the corpus says; prepare the "
                "corpus again"
            )
        return self._labels
