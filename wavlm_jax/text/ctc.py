"""From the best token of every frame to text with times: collapse first, then drop the blank (FACTS B7, E33).

Hugging Face's `skip_special_tokens=True` drops the blank first and so loses doubled letters ("HELO"); here the order
cannot be chosen. Frames count from 0, ends are exclusive, and a frame is `geometry.hop` samples (20 ms) long.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from wavlm_jax.shapes import SAMPLE_RATE, STANDARD, Geometry
from wavlm_jax.text.vocabulary import Vocabulary

Ids = Int[np.ndarray, "frames"]


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
