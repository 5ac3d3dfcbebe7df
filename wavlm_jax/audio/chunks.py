"""Long audio in overlapping pieces: which samples to look at, and which frames of the whole file come out.

Pieces start on the frame grid, so frame i of a piece that starts at frame s is frame s + i of the file: same samples,
same time. Of an overlap each piece keeps its half, so every frame of the file is kept exactly once.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from wavlm_jax.shapes import SAMPLE_RATE, STANDARD, Geometry, num_frames, samples_for


@dataclass(frozen=True, kw_only=True)
class ChunkSettings:
    """How long audio is cut; what is not longer than a piece is looked at whole."""

    seconds: float = 30.0
    """Of one piece."""
    overlap_seconds: float = 6.0
    """That two pieces share: each frame that is kept has at least half of it as context on both sides."""

    def __post_init__(self) -> None:
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"seconds: found a piece of {self.seconds} s, expected more than 0")
        if not 0 <= self.overlap_seconds < self.seconds:
            raise ValueError(
                f"overlap_seconds: found {self.overlap_seconds}, expected 0 or more and less than the {self.seconds} s "
                "of a piece"
            )


class Piece(NamedTuple):
    """A stretch of a file. Frames are those of the file."""

    start_sample: int
    num_samples: int
    first_frame: int
    """Of the samples."""
    keep_from: int
    keep_to: int
    """The frames that are taken from this piece: keep_from ... keep_to - 1."""


def cut(num_samples: int, settings: ChunkSettings, geometry: Geometry = STANDARD) -> list[Piece]:
    """The pieces of a file, in order; together they keep frames 0 ... num_frames(num_samples) - 1.

    All pieces of a long file have the same length (one compilation); the last one ends with the file's last frame, so
    it shares more with the one before. A file that fits into one piece is one piece, its last samples included.

    Raises:
        ValueError: the file has no frame.

    """
    total = num_frames(num_samples, geometry)
    if total < 1:
        raise ValueError(
            f"audio: found {num_samples} samples, expected at least {geometry.receptive_field} for one frame"
        )
    size = max(1, num_frames(round(settings.seconds * SAMPLE_RATE), geometry))
    if total <= size:
        return [Piece(0, num_samples, 0, 0, total)]
    overlap = min(round(settings.overlap_seconds * SAMPLE_RATE / geometry.hop), size - 1)
    starts = [*range(0, total - size, size - overlap), total - size]
    edges = [0, *((before + size + start) // 2 for before, start in pairwise(starts)), total]
    width = samples_for(size, geometry)
    return [
        Piece(start * geometry.hop, width, start, edges[number], edges[number + 1])
        for number, start in enumerate(starts)
    ]
