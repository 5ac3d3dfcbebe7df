"""Batches of features, and whose frames they are."""

from typing import Any, NamedTuple


class Piece(NamedTuple):
    """Some frames of one utterance, and where a batch has them."""

    utterance: int
    start: int
    """First frame, counted in the utterance."""
    frames: int
    row: int
    """First row, counted in the features of the batch."""


class Batch(NamedTuple):
    """What the devices of this host get at a time."""

    size: int
    """Which of the source's few static shapes."""
    arrays: Any
    """Tree of numpy arrays, rows first."""
    pieces: tuple[Piece, ...]
    """Whose frames they are; the others are filler."""
