"""Error counts inside jit against jiwer, on random strings; greedy reading against the text helper's own decoder."""

import jax
import jax.numpy as jnp
import jiwer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wavlm_jax.tasks.ctc import Sequences, edit_distance, greedy, tidy, words
from wavlm_jax.text.decoding import decode
from wavlm_jax.text.vocabulary import Vocabulary

VOCABULARY = Vocabulary(tokens=("<pad>", "|", "A", "B", "C"), unknown=None, begin=None, end=None)
MOST = 24


def levenshtein(found, wanted):
    """The textbook's table."""
    table = np.zeros((len(found) + 1, len(wanted) + 1), int)
    table[:, 0], table[0] = np.arange(len(found) + 1), np.arange(len(wanted) + 1)
    for i, a in enumerate(found, 1):
        for j, b in enumerate(wanted, 1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a != b))
    return table[-1, -1]


@jax.jit
def errors(ids, num_frames, wanted, num_wanted):
    """(characters wrong, words wrong, words found, text found, its length) of frames read greedily."""
    logits = jax.nn.one_hot(ids, len(VOCABULARY))
    found = tidy(greedy(logits, num_frames, VOCABULARY.blank_id), VOCABULARY.delimiter_id)
    right = Sequences(wanted, num_wanted)
    found_words, right_words = words(found, VOCABULARY.delimiter_id), words(right, VOCABULARY.delimiter_id)
    wrong = edit_distance(found, right), edit_distance(found_words, right_words)
    return (*wrong, right_words.length, found.values, found.length)


TEXT = st.lists(st.text("ABC", min_size=1, max_size=4), min_size=1, max_size=4).map(" ".join)


@given(st.lists(st.integers(0, 4), max_size=MOST), TEXT)
@settings(max_examples=150, deadline=None)
def test_errors_are_those_of_the_decoded_text(frames, text):
    """Frames of any kind: doubled letters, blanks between them, delimiters at the ends and side by side."""
    labels = VOCABULARY.encode(text)
    ids = np.pad(frames, (0, MOST - len(frames)), constant_values=3).astype(np.int32)[None]
    wanted = np.pad(labels, (0, MOST - len(labels)), constant_values=2)[None]
    given_to = jnp.array(ids), jnp.array([len(frames)]), jnp.array(wanted), jnp.array([len(labels)])
    characters, wrong_words, num_words, found, length = jax.device_get(errors(*given_to))
    read = " ".join(decode(np.array(frames, np.int32), VOCABULARY).text.split())
    assert VOCABULARY.spell(found[0, : length[0]]) == read
    assert characters[0] == levenshtein(read, text)
    assert wrong_words[0] == levenshtein(read.split(), text.split())
    assert num_words[0] == len(text.split())


def test_error_rates_are_jiwer_s():
    """A corpus of texts at once: sums of edits over sums of lengths."""
    generator = np.random.default_rng(0)
    texts = [" ".join("".join(generator.choice(list("ABC"), 3)) for _ in range(4)) for _ in range(30)]
    labels = np.stack([VOCABULARY.encode(text) for text in texts])
    frames = np.repeat(labels, 2, axis=1)
    frames[:, 1::2] = VOCABULARY.blank_id
    noise = generator.random(frames.shape) < 0.2
    frames[noise] = generator.integers(0, 5, int(noise.sum()))
    counts = jnp.full(30, frames.shape[1]), jnp.full(30, labels.shape[1])
    found = errors(jnp.array(frames), counts[0], jnp.array(labels), counts[1])
    read = [" ".join(decode(row, VOCABULARY).text.split()) for row in frames]
    assert float(found[0].sum() / labels.size) == pytest.approx(jiwer.cer(texts, read))
    assert float(found[1].sum() / found[2].sum()) == pytest.approx(jiwer.wer(texts, read))


def test_a_language_without_delimiter_is_left_alone():
    text = Sequences(jnp.array([[1, 1, 2]]), jnp.array([3]))
    assert tidy(text, None) is text
