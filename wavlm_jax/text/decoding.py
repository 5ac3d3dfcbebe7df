"""CTC outputs to text with times: greedy decoding, and forced alignment of a given text (FACTS B7, E33).

Greedy decoding collapses runs of equal tokens first and drops the blank afterwards. Hugging Face's
`skip_special_tokens=True` drops the blank first and so loses doubled letters ("HELO").

Forced alignment finds the most likely of the paths that collapse to the text (Viterbi). A character spans the frames
in which its token, and not the blank, is on the path; a word goes from its first character to its last. CTC models are
peaky: starts are more exact than ends.

Frames count from 0, ends are exclusive, and a frame is `geometry.hop` samples (20 ms) long.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int8

from wavlm_jax.shapes import SAMPLE_RATE, Geometry
from wavlm_jax.text.vocabulary import Vocabulary, VocabularyError

Ids = Int[np.ndarray, "frames"]
Logits = Float[Array, "rows frames tokens"]


class Span(NamedTuple):
    """A character or a word, and its frames."""

    text: str
    start: int
    end: int
    """Exclusive."""


class Transcript(NamedTuple):
    """A text with the times of its parts."""

    text: str
    characters: tuple[Span, ...]
    """The space between words is one of them."""
    words: tuple[Span, ...]


class Run(NamedTuple):
    """Consecutive frames with the same token."""

    token_id: int
    start: int
    end: int


def collapse(ids: Sequence[int] | Ids) -> list[Run]:
    """The runs of equal ids, blanks included."""
    ids = np.asarray(ids, np.int64)
    if not len(ids):
        return []
    starts = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]]))
    ends = np.append(starts[1:], len(ids))
    return [Run(int(ids[start]), int(start), int(end)) for start, end in zip(starts, ends, strict=True)]


def decode(ids: Sequence[int] | Ids, vocabulary: Vocabulary, *, drop_special: bool = False) -> Transcript:
    """The text of a path through the frames, with the frames of its characters and words.

    Args:
        ids: the token of every real frame, without padding.
        vocabulary: of the model.
        drop_special: also leave out `<s>`, `</s>` and `<unk>`, after collapsing. Hugging Face's pipeline shows them.

    Raises:
        VocabularyError: an id that the vocabulary does not have.

    """
    hidden = vocabulary.hidden_ids | (vocabulary.special_ids if drop_special else frozenset())
    return transcript([run for run in collapse(vocabulary.known(ids)) if run.token_id not in hidden], vocabulary)


def transcript(runs: Sequence[Run], vocabulary: Vocabulary) -> Transcript:
    """The text that `runs` spell, one token per run, none of them hidden. Of phones, each is a word.

    One space between words and none at the ends, as in the error rates of training; transformers leaves runs of them.
    """
    shown = vocabulary.show_all([run.token_id for run in runs])
    characters = tuple(Span(text, run.start, run.end) for text, run in zip(shown, runs, strict=True))
    if vocabulary.phones:
        return Transcript(" ".join(shown), characters, characters)
    return Transcript(" ".join("".join(shown).split()), characters, _words(characters))


def seconds(frame: int, geometry: Geometry) -> float:
    """Start of frame number `frame`, which is the end of the one before."""
    return frame * geometry.hop / SAMPLE_RATE


def frames_needed(labels: Sequence[int] | Int[np.ndarray, "labels"]) -> int:
    """The fewest frames that CTC needs for `labels`: one per label, and a blank between two equal ones."""
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
    """The tokens of each row, packed to the left; -1 after `num_tokens`."""

    ids: Int[Array, "rows frames"]
    num_tokens: Int[Array, "rows"]


@jax.jit
def collapse_greedily(logits: Logits, num_frames: Int[Array, "rows"], blank_id: int | Int[Array, ""]) -> Collapsed:
    """Greedy decoding on the device: runs of the most likely token collapsed, then the blank dropped.

    Args:
        logits: (rows, frames, tokens), or any scores in the same order.
        num_frames: (rows,) real frames of each row; later ones are ignored.
        blank_id: of the vocabulary.

    """
    rows, frames = logits.shape[:2]
    place = jnp.arange(frames)
    real = place[None, :] < num_frames[:, None]
    best = jnp.where(real, logits.argmax(axis=2), blank_id)
    changes = best[:, 1:] != best[:, :-1]
    edge = jnp.ones((rows, 1), bool)
    first = real & (best != blank_id) & jnp.concatenate([edge, changes], axis=1)
    count = first.sum(axis=1)
    kept = jnp.take_along_axis(best, jnp.argsort(~first, axis=1, stable=True), axis=1)
    return Collapsed(jnp.where(place[None, :] < count[:, None], kept, -1), count)


LogProbs = Float[np.ndarray, "frames tokens"]

_MOST_PAIRS = 1 << 35
"""Pairs of frame and state, a byte each: half an hour of audio with 25,000 characters is 4.5 GB; quadratic."""


class AlignmentError(ValueError):
    """A text that cannot be aligned with this audio."""


class Alignment(NamedTuple):
    """A given text with its times."""

    transcript: Transcript
    log_prob: float
    """Of the whole best path (natural logarithm)."""
    confidence: tuple[float, ...]
    """Mean probability of each character over its frames, in the order of `transcript.characters`."""


def align(log_probs: LogProbs, text: str, vocabulary: Vocabulary) -> Alignment:
    """The times of `text` in an utterance.

    Args:
        log_probs: log-softmax of a CTC model's logits, real frames only.
        text: what was said.
        vocabulary: of the model.

    Raises:
        UnknownCharactersError: `text` has characters that the vocabulary does not have.
        AlignmentError: the text is empty, or needs more frames than there are.
        VocabularyError: the model has another number of outputs than the vocabulary has tokens.

    """
    if log_probs.shape[1] != len(vocabulary):
        raise VocabularyError(
            f"log_probs: found {log_probs.shape[1]} tokens a frame, the vocabulary has {len(vocabulary)}; it belongs "
            "to another model"
        )
    labels = vocabulary.encode(text)
    path = best_path(log_probs, labels, vocabulary.blank_id)
    runs: list[Run] = [run for run in collapse(path) if run.token_id not in vocabulary.hidden_ids]
    confidence = tuple(
        float(np.exp(log_probs[run.start : run.end, run.token_id].astype(np.float64)).mean()) for run in runs
    )
    total = float(log_probs[np.arange(len(path)), path].sum(dtype=np.float64))
    return Alignment(transcript(runs, vocabulary), total, confidence)


def check_fit(labels: Sequence[int] | Int[np.ndarray, "labels"], frames: int) -> None:
    """Checks before any computation that a text can be aligned with audio of `frames` frames.

    Raises:
        AlignmentError: no labels, more labels than the frames can hold, or a search that takes too much memory.

    """
    needed = frames_needed(labels)
    if not len(labels):
        raise AlignmentError("text: found nothing to align, expected at least one character")
    if needed > frames:
        raise AlignmentError(
            f"text: {len(labels)} characters need {needed} frames, the audio has {frames}; is it "
            "the text of this audio?"
        )
    if frames * (2 * len(labels) + 1) > _MOST_PAIRS:
        raise AlignmentError(
            f"text: {len(labels)} characters in {frames} frames would take "
            f"{frames * (2 * len(labels) + 1) >> 30} GiB; cut audio and text into parts"
        )


def best_path(log_probs: LogProbs, labels: Sequence[int] | Int[np.ndarray, "labels"], blank_id: int) -> Ids:
    """The token of each frame on the most likely path that collapses to `labels`.

    Viterbi: states are the labels with a blank before and after each; one step per frame, all states at once.
    O(frames x labels) time, one byte of memory per pair of frame and state.

    Raises:
        AlignmentError: see `check_fit`.

    """
    labels, frames = np.asarray(labels, np.int64), len(log_probs)
    check_fit(labels, frames)
    states = np.full(2 * len(labels) + 1, blank_id, np.int64)
    states[1::2] = labels
    may_skip = np.zeros(len(states), bool)
    may_skip[3::2] = labels[1:] != labels[:-1]
    came_from, score = _forward(log_probs, states, may_skip)
    state = len(states) - 1 if score[-1] >= score[-2] else len(states) - 2
    path = np.empty(frames, np.int64)
    for frame in range(frames - 1, -1, -1):
        path[frame] = states[state]
        state -= came_from[frame, state]
    return path


def _forward(
    log_probs: LogProbs, states: Int[np.ndarray, "states"], may_skip: np.ndarray
) -> tuple[Int8[np.ndarray, "frames states"], Float[np.ndarray, "states"]]:
    """How far back each state's best predecessor is (0, 1 or 2 states), and the score of each state at the end."""
    came_from = np.zeros((len(log_probs), len(states)), np.int8)
    score = np.full(len(states), -np.inf)
    score[:2] = log_probs[0, states[:2]]
    one, two = np.full_like(score, -np.inf), np.full_like(score, -np.inf)
    for frame in range(1, len(log_probs)):
        one[1:] = score[:-1]
        two[2:] = np.where(may_skip[2:], score[:-2], -np.inf)
        choice = came_from[frame]
        choice[one > score] = 1
        best = np.maximum(score, one)
        choice[two > best] = 2
        score = np.maximum(best, two) + log_probs[frame, states]
    return came_from, score
