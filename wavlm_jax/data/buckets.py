"""Buckets that suit a corpus, and what they waste."""

import numpy as np

from wavlm_jax.data.plan import FILLER, Lengths, PlannedBatch
from wavlm_jax.shapes import num_frames, samples_for


def fit_buckets(lengths: Lengths, count: int, multiple: int) -> tuple[int, ...]:
    """At most `count` buckets that hold every utterance with the least padding.

    Exact: the cheapest way to cut the sorted list of multiples of `multiple` frames into `count` runs, by dynamic
    programming over the run that ends at each one.

    Args:
        lengths: samples, each at least one frame.
        count: buckets, that is, compilations.
        multiple: of frames; 128 suits accelerators best, small ones waste less.

    """
    needed = -(-np.maximum(_frames(lengths), 1) // multiple)
    held = np.bincount(needed)
    ends = np.flatnonzero(held)
    total = np.concatenate([[0], np.cumsum(held[ends])])
    cost = np.where(np.arange(len(ends) + 1) == 0, 0.0, np.inf)
    chosen: list[np.ndarray] = []
    for _ in range(min(count, len(ends))):
        # of a run that starts after candidate i and ends with candidate j: all its utterances at the length of j
        run = ends[None, :] * (total[None, 1:] - total[:-1, None])
        run = np.where(np.arange(len(ends))[:, None] <= np.arange(len(ends))[None, :], run, np.inf)
        paths = cost[:-1, None] + run
        chosen.append(paths.argmin(axis=0))
        cost = np.concatenate([[0.0], paths.min(axis=0)])
    buckets, end = [], len(ends)
    for choice in reversed(chosen):
        if end == 0:
            break
        buckets.append(int(ends[end - 1]) * multiple)
        end = int(choice[end - 1])
    return tuple(sorted(buckets))


def padding_share(lengths: Lengths, batches: list[PlannedBatch]) -> float:
    """Share of the samples in `batches` that is padding or filler."""
    held = sum(len(batch.indices) * samples_for(batch.bucket) for batch in batches)
    real = 0
    for batch in batches:
        chosen = lengths[batch.indices[batch.indices != FILLER]]
        real += int(np.minimum(chosen, samples_for(batch.bucket)).sum())
    return 1 - real / held


def _frames(lengths: Lengths) -> Lengths:
    """The fewest frames whose bucket holds each utterance whole, the samples behind its last frame included."""
    frames = num_frames(lengths)
    return frames + (lengths > samples_for(1) + 320 * (frames - 1))
