"""From the best token of every frame to text with times: collapse first, then drop the blank (FACTS B7, E33).

Hugging Face's `skip_special_tokens=True` drops the blank first and so loses doubled letters ("HELO"); here the order
cannot be chosen. Frames count from 0, ends are exclusive, and a frame is `geometry.hop` samples (20 ms) long.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from wavlm_jax.shapes import SAMPLE_RATE, STANDARD, Geometry
from wavlm_jax.text.vocabulary import Vocabulary, VocabularyError

Ids = Int[np.ndarray, "frames"]
Logits = Float[Array, "rows frames tokens"]


class Span(NamedTuple):
    """A character or a word, and the frames that it was heard in."""

    text: str
    start: int
    end: int
    """Exclusive."""


class Transcript(NamedTuple):
    """What a model heard."""

    text: str
    characters: tuple[Span, ...]
    """The space between words is one of them."""
    words: tuple[Span, ...]


class Run(NamedTuple):
    """Frames in a row that have the same token."""

    token_id: int
    start: int
    end: int


def collapse(ids: Sequence[int] | Ids) -> list[Run]:
    """The runs of equal ids, blanks among them."""
    ids = np.asarray(ids, np.int64)
    if not len(ids):
        return []
    starts = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]]))
    ends = np.append(starts[1:], len(ids))
    return [Run(int(ids[start]), int(start), int(end)) for start, end in zip(starts, ends, strict=True)]


def decode(ids: Sequence[int] | Ids, vocabulary: Vocabulary, *, drop_special: bool = False) -> Transcript:
    """The text of a path through the frames, with the frames of its characters and words.

    Args:
        ids: the token of every real frame (padding cut off by the caller, who knows the length).
        vocabulary: of the model that gave them.
        drop_special: leave out `<s>`, `</s>` and `<unk>` too, after collapsing. Hugging Face's pipeline shows them.

    Raises:
        VocabularyError: an id that the vocabulary does not have.

    """
    hidden = vocabulary.special_ids if drop_special else {vocabulary.blank_id}
    return transcript([run for run in collapse(ids) if run.token_id not in hidden], vocabulary)


def transcript(runs: Sequence[Run], vocabulary: Vocabulary) -> Transcript:
    """The text that `runs` of real tokens spell, one run a token."""
    characters = tuple(Span(vocabulary.show(run.token_id), run.start, run.end) for run in runs)
    text = "".join(character.text for character in characters).strip()
    if vocabulary.do_lower_case:
        text = text.lower()
        characters = tuple(Span(text.lower(), start, end) for text, start, end in characters)
    return Transcript(text, characters, _words(characters))


def seconds(frame: int, geometry: Geometry = STANDARD) -> float:
    """When frame number `frame` starts, and the one before it ends."""
    return frame * geometry.hop / SAMPLE_RATE


def frames_needed(labels: Sequence[int] | Int[np.ndarray, "labels"]) -> int:
    """The fewest frames in which `labels` can be said: one a label, and a blank between two that are the same."""
    labels = np.asarray(labels)
    repeats: Bool[np.ndarray, "pairs"] = labels[1:] == labels[:-1]
    return len(labels) + int(np.count_nonzero(repeats))


def _words(characters: tuple[Span, ...]) -> tuple[Span, ...]:
    words: list[Span] = []
    open_word: Span | None = None
    for character in characters:
        if character.text == " ":
            words.extend([open_word] if open_word else [])
            open_word = None
        elif open_word is None:
            open_word = character
        else:
            open_word = Span(open_word.text + character.text, open_word.start, character.end)
    return (*words, *([open_word] if open_word else []))


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
