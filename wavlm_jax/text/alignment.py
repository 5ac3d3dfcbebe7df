"""Forced alignment: when each character and word of a given text was said (Viterbi over CTC paths).

The best path among those that collapse to the text. A character spans the frames in which its token, and not the blank,
is on the path; a word goes from its first character to its last. CTC models are peaky: starts are better than ends.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Int8

from wavlm_jax.text.ctc import Ids, Run, Transcript, collapse, frames_needed, transcript
from wavlm_jax.text.vocabulary import Vocabulary, VocabularyError

LogProbs = Float[np.ndarray, "frames tokens"]


class AlignmentError(ValueError):
    """A text that cannot be aligned with this audio."""


class Alignment(NamedTuple):
    """A text and when it was said."""

    transcript: Transcript
    log_prob: float
    """Of the whole best path (natural logarithm)."""
    confidence: tuple[float, ...]
    """Mean probability of each character over its frames, in the order of `transcript.characters`."""


def align(log_probs: LogProbs, text: str, vocabulary: Vocabulary) -> Alignment:
    """When `text` was said.

    Args:
        log_probs: log-softmax of a CTC model's logits, real frames only.
        text: what was said; its characters are all in the vocabulary.
        vocabulary: of the model.

    Raises:
        UnknownCharactersError: characters that the vocabulary does not have.
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
    runs: list[Run] = [run for run in collapse(path) if run.token_id != vocabulary.blank_id]
    confidence = tuple(
        float(np.exp(log_probs[run.start : run.end, run.token_id].astype(np.float64)).mean()) for run in runs
    )
    total = float(log_probs[np.arange(len(path)), path].sum(dtype=np.float64))
    return Alignment(transcript(runs, vocabulary), total, confidence)


def check_fit(labels: Sequence[int] | Int[np.ndarray, "labels"], frames: int) -> None:
    """Whether a text can be aligned with audio of so many frames, before anything is computed.

    Raises:
        AlignmentError: no labels, more than the frames can hold, or more of both than memory should.

    """
    needed = frames_needed(labels)
    if not len(labels):
        raise AlignmentError("text: found nothing to align, expected at least one character")
    if needed > frames:
        raise AlignmentError(
            f"text: {len(labels)} characters need {needed} frames, the audio has {frames} ({frames * 20} ms); is it "
            "the text of this audio?"
        )
    if frames * (2 * len(labels) + 1) > _MOST_PAIRS:
        raise AlignmentError(
            f"text: {len(labels)} characters in {frames} frames ({frames / 3000:.0f} min) would take "
            f"{frames * (2 * len(labels) + 1) >> 30} GiB; cut audio and text into parts"
        )


_MOST_PAIRS = 1 << 35
"""Bytes of the search: half an hour of audio with 25,000 characters is 4.5 GB, and it grows with the square."""


def best_path(log_probs: LogProbs, labels: Sequence[int] | Int[np.ndarray, "labels"], blank_id: int) -> Ids:
    """The token of each frame on the most likely path that collapses to `labels`.

    States are the labels with a blank around each; frames are taken one after the other, all states at once:
    O(frames x labels) time, one byte of memory for each pair of frame and state.

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
