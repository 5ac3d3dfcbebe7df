"""Diarisation errors frame by frame, inside jit: sums, so they are exact over any number of devices and hosts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8

from wavlm_jax.tasks.losses import in_best_order

Speaking = Bool[Array, "rows frames speakers"]
Total = Float[Array, "rows"]


class ActivityErrors(NamedTuple):
    """Frames times speakers of each row: what pyannote.metrics counts in seconds."""

    missed: Total
    false_alarm: Total
    confusion: Total
    """Speech that is given to another speaker."""
    speech: Total
    """Of the reference; the diarisation error rate is the sum of the three others over it."""


def activity_errors(
    found: Speaking, wanted: Speaking, others: UInt8[Array, "rows frames"], mask: Bool[Array, "rows frames"]
) -> ActivityErrors:
    """Errors under the order of speakers with the most frames in common.

    Args:
        found: who is heard.
        wanted: who speaks.
        others: speakers of a frame for whom `wanted` has no place; they are missed or confused. Where there are any,
            the best order of a scorer that knows them could be better, so the error here is an upper bound.
        mask: frames that count.

    """
    found, wanted = found & mask[:, :, None], wanted & mask[:, :, None]
    heard = found.sum(axis=2)
    spoken = wanted.sum(axis=2) + jnp.where(mask, others, 0)
    common = jnp.einsum(
        "rfi,rfj->rij",
        found.astype(jnp.float32),
        wanted.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    right = -in_best_order(-common).loss

    def total(frames: Array) -> Total:
        return frames.sum(axis=1).astype(jnp.float32)

    return ActivityErrors(
        missed=total(jnp.maximum(spoken - heard, 0)),
        false_alarm=total(jnp.maximum(heard - spoken, 0)),
        confusion=total(jnp.minimum(spoken, heard)) - right,
        speech=total(spoken),
    )
