"""From blocks of features to the labels of consecutive utterances."""

from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Array, Float, Int64, UInt16

from pretrain.features import Block, Piece
from pretrain.kmeans import nearest
from pretrain.label_arrays import LabelError

PART_LABELS = 2**20
"""Labels that are made between two notes on progress."""
Centroids = Float[Array, "clusters dim"]
Edges = Int64[np.ndarray, " edges"]


def part_end(offsets: Edges, first: int) -> int:
    """The utterance up to which (exclusive) a part that begins with `first` goes: about `PART_LABELS` labels."""
    end = int(np.searchsorted(offsets, offsets[first] + PART_LABELS))
    return max(first + 1, min(end, len(offsets) - 1))


def label_part(
    blocks: Iterable[Block], centroids: Centroids, offsets: Edges, first: int
) -> UInt16[np.ndarray, " labels"]:
    """Labels of consecutive utterances from `first` on, one behind the other; `offsets` are theirs in the split."""
    labels, missing = np.zeros(offsets[-1] - offsets[0], np.uint16), int(offsets[-1] - offsets[0])
    for found, pieces in _assigned(blocks, centroids):
        for piece in pieces:
            at = offsets[piece.utterance - first] - offsets[0] + piece.start
            labels[at : at + piece.frames] = found[piece.row : piece.row + piece.frames]
            missing -= piece.frames
    if missing:
        raise LabelError(
            f"features: {missing} frames are missing from the utterances number {first} to {first + len(offsets) - 2}; "
            "the audio is shorter than the corpus says; prepare the corpus again"
        )
    return labels


def _assigned(blocks: Iterable[Block], centroids: Centroids) -> Iterator[tuple[np.ndarray, tuple[Piece, ...]]]:
    """Labels of each block, fetched one block late so that the device never waits for the host."""
    previous: tuple[Array, tuple[Piece, ...]] | None = None
    for block in blocks:
        current = nearest(block.features, centroids)[0], block.pieces
        if previous is not None:
            yield np.asarray(previous[0]), previous[1]
        previous = current
    if previous is not None:
        yield np.asarray(previous[0]), previous[1]
