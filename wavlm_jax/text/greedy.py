"""Greedy CTC decoding on the device: the best token of each frame, collapsed, in static shapes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from wavlm_jax.text.ctc import Run, Transcript, transcript
from wavlm_jax.text.vocabulary import Vocabulary, VocabularyError

Logits = Float[Array, "rows frames tokens"]


class Collapsed(NamedTuple):
    """The tokens heard in each row, packed to the left; places behind `num_tokens` hold -1."""

    ids: Int[Array, "rows frames"]
    start: Int[Array, "rows frames"]
    """The first frame of each token."""
    end: Int[Array, "rows frames"]
    """One past its last frame."""
    num_tokens: Int[Array, "rows"]


@jax.jit
def collapse_greedily(logits: Logits, num_frames: Int[Array, "rows"], blank_id: int | Int[Array, ""]) -> Collapsed:
    """Collapse runs of the most likely token, then drop the blank; nothing but the tokens has to leave the device.

    Args:
        logits: (rows, frames, tokens), any monotone scores.
        num_frames: (rows,) real frames a row; what lies behind is not looked at.
        blank_id: of the vocabulary.

    """
    rows, frames = logits.shape[:2]
    place = jnp.arange(frames)
    real = place[None, :] < num_frames[:, None]
    best = jnp.where(real, logits.argmax(axis=2), blank_id)
    changes = best[:, 1:] != best[:, :-1]
    edge = jnp.ones((rows, 1), bool)
    spoken = real & (best != blank_id)
    first = spoken & jnp.concatenate([edge, changes], axis=1)
    last = spoken & jnp.concatenate([changes, edge], axis=1)
    count = first.sum(axis=1)

    def packed(values: Int[Array, "rows frames"], chosen: Array) -> Int[Array, "rows frames"]:
        order = jnp.argsort(~chosen, axis=1, stable=True)
        kept = jnp.take_along_axis(values, order, axis=1)
        return jnp.where(place[None, :] < count[:, None], kept, -1)

    places = jnp.broadcast_to(place, (rows, frames))
    return Collapsed(packed(best, first), packed(places, first), packed(places + 1, last), count)


def read_collapsed(collapsed: Collapsed, vocabulary: Vocabulary, *, drop_special: bool = False) -> list[Transcript]:
    """The transcript of each row (see `ctc.decode`)."""
    ids, starts, ends, counts = (part.tolist() for part in jax.device_get(collapsed))
    hidden = vocabulary.special_ids if drop_special else {vocabulary.blank_id}
    heard = []
    for row, count in enumerate(counts):
        runs = [
            Run(*run) for run in zip(ids[row][:count], starts[row], ends[row], strict=False) if run[0] not in hidden
        ]
        heard.append(transcript(runs, vocabulary))
    return heard


def decode_greedily(
    logits: Logits, num_frames: Int[Array, "rows"], vocabulary: Vocabulary, *, drop_special: bool = False
) -> list[Transcript]:
    """What a CTC model hears in each row: equal to `ctc.decode` of the best token of each real frame.

    Raises:
        VocabularyError: the model has another number of outputs than the vocabulary has tokens.

    """
    if logits.shape[2] != len(vocabulary):
        raise VocabularyError(
            f"logits: found {logits.shape[2]} tokens a frame, the vocabulary has {len(vocabulary)}; it belongs to "
            "another model"
        )
    return read_collapsed(
        collapse_greedily(logits, num_frames, vocabulary.blank_id), vocabulary, drop_special=drop_special
    )
