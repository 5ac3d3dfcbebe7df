"""CTC outputs to text: equal to transformers' tokenizer with its offsets and to brute force over all paths; word lists.

Beam search, which needs flashlight-text, is in test_beam.py.
"""

import itertools
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.every_path import SPECIAL, TINY, best_by_text, log_probs_of, seeds
from tests.support.language_models import WORDS
from wavlm_jax.extras import MissingExtraError
from wavlm_jax.shapes import STANDARD
from wavlm_jax.text import beam
from wavlm_jax.text.beam import BeamSearch, read_lexicon, words_of_arpa
from wavlm_jax.text.decoding import (
    AlignmentError,
    Span,
    align,
    best_path,
    check_fit,
    collapse,
    collapse_greedily,
    decode,
    frames_needed,
    seconds,
)
from wavlm_jax.text.records import RecordError
from wavlm_jax.text.vocabulary import UnknownCharactersError, Vocabulary, VocabularyError, write_vocabulary

SPOKEN = Vocabulary(tokens=("<pad>", "<s>", "</s>", "<unk>", "|", "H", "E", "L", "O"))
HELLO = [5, 5, 0, 6, 7, 7, 0, 7, 8, 8, 4, 4, 5]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    from transformers import Wav2Vec2CTCTokenizer

    folder = tmp_path_factory.mktemp("spoken")
    write_vocabulary(SPOKEN, folder)
    return Wav2Vec2CTCTokenizer.from_pretrained(folder)


def test_the_vector_of_the_fact_sheet():
    heard = decode(HELLO, SPOKEN)
    assert heard.text == "HELLO H"
    spans = [("H", 0, 2), ("E", 3, 4), ("L", 4, 6), ("L", 7, 8), ("O", 8, 10), (" ", 10, 12), ("H", 12, 13)]
    assert heard.characters == tuple(Span(*span) for span in spans)
    assert heard.words == (Span("HELLO", 0, 10), Span("H", 12, 13))
    assert (seconds(heard.words[1].start, STANDARD), seconds(heard.words[1].end, STANDARD)) == (0.24, 0.26)


def test_dropping_special_tokens_keeps_doubled_letters(theirs):
    assert theirs.decode(HELLO[:10], skip_special_tokens=True) == "HELO"
    assert decode(HELLO[:10], SPOKEN, drop_special=True).text == "HELLO"
    assert decode([1, 5, 3, 5, 2], SPOKEN).text == "<s>H<unk>H</s>"
    assert decode([1, 5, 3, 5, 2], SPOKEN, drop_special=True).text == "HH"


@given(ids=st.lists(st.sampled_from([0, 0, 4, 5, 6, 7, 8, 8, 1, 2, 3]), max_size=40))
def test_text_characters_and_words_are_those_of_transformers(theirs, ids):
    heard = decode(np.array(ids, np.int32), SPOKEN)
    wanted = theirs.decode(ids, output_char_offsets=True, output_word_offsets=True)
    assert heard.text == " ".join(wanted.text.split()) == " ".join(word.text for word in heard.words)

    def spans(offsets, name):
        return [(o[name], o["start_offset"], o["end_offset"]) for o in offsets]

    assert [tuple(c) for c in heard.characters] == spans(wanted.char_offsets, "char")
    assert [tuple(w) for w in heard.words] == spans(wanted.word_offsets, "word")


@given(labels=st.lists(st.integers(5, 8), max_size=12), silence=st.integers(0, 3))
def test_labels_fit_into_the_frames_they_need_and_no_fewer(labels, silence):
    path = [labels[0]] if labels else []
    for before, label in itertools.pairwise(labels):
        path += [0, label] if before == label else [label]
    assert frames_needed(labels) == len(path)
    assert decode(path + [0] * silence, SPOKEN).text == SPOKEN.spell(labels)


def test_nothing_was_said():
    assert decode([], SPOKEN) == decode([0, 0], SPOKEN) == ("", (), ())
    assert decode([4, 0, 4], SPOKEN).words == ()
    assert decode([4, 5, 4, 0, 4, 0, 4, 5, 4], SPOKEN).text == "H H"  # one space, as training's error rates count it
    with pytest.raises(VocabularyError, match="id 9"):
        decode([9], SPOKEN)


def test_lower_case_reaches_the_times():
    heard = decode(HELLO, replace(SPOKEN, do_lower_case=True))
    assert (heard.text, heard.words[0]) == ("hello h", Span("hello", 0, 10))


@settings(deadline=None, max_examples=25)
@given(seed=seeds, frames=st.lists(st.integers(0, 12), min_size=3, max_size=3))
def test_greedy_on_the_device_is_the_best_token_of_each_real_frame(seed, frames):
    logits = np.random.default_rng(seed).normal(size=(3, 12, 6)).astype(np.float32)
    heard = collapse_greedily(jnp.asarray(logits), jnp.asarray(frames), SPECIAL.blank_id)
    for row, count, ids, tokens in zip(logits, frames, heard.ids, heard.num_tokens, strict=True):
        runs = [run.token_id for run in collapse(row[:count].argmax(axis=1)) if run.token_id != SPECIAL.blank_id]
        assert ids[:tokens].tolist() == runs
        assert (ids[tokens:] == -1).all()


def test_a_model_with_other_outputs_is_refused():
    with pytest.raises(VocabularyError, match="found 5 tokens a frame, the vocabulary has 4"):
        align(log_probs_of(0, 5, tokens=5), "A", TINY)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ((3, 12, 0), r"beam search needs a package .*: pip install 'wavlm-jax\[decode\]'$"),
        ((3, 13, 1), r"under Python 3\.11 or 3\.12.*no wheel for Python 3\.13: decode"),
    ],
)
def test_without_flashlight_the_message_says_what_to_do(monkeypatch, version, message):
    monkeypatch.setitem(sys.modules, "flashlight.lib.text.dictionary", None)
    monkeypatch.setattr(beam, "sys", SimpleNamespace(version_info=Version(*version)))
    with pytest.raises(MissingExtraError, match=message):
        BeamSearch(TINY)


class Version(NamedTuple):
    major: int
    minor: int
    micro: int


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"A\nCAT\n", "line 2: .*'C'"),
        (b"A\nAA A X\n", "line 2: 'AA' is spelt with"),
        (b"A |\n", "line 1: 'A' is spelt with nothing"),
        (b" \n", "found no word"),
        (b"A\n\xff\xfe\n", "not UTF-8"),
        (b"A" * 70_000, "line 1: longer than"),
    ],
)
def test_a_wrong_line_of_a_lexicon_is_named(tmp_path, content, message):
    (tmp_path / "words.txt").write_bytes(content)
    with pytest.raises(RecordError, match=message):
        read_lexicon(tmp_path / "words.txt", TINY)


def test_a_wrong_arpa_file_is_named(tmp_path):
    (tmp_path / "lm.arpa").write_text(WORDS.replace("-0.8\tBA\t-0.1", "-0.8 BA -0.1 7"))
    with pytest.raises(RecordError, match=r"line 10: found '-0\.8 BA -0\.1 7'"):
        words_of_arpa(tmp_path / "lm.arpa")
    (tmp_path / "lm.arpa").write_text("hello")
    with pytest.raises(RecordError, match="line 1: found 'hello'"):
        words_of_arpa(tmp_path / "lm.arpa")


@settings(deadline=None, max_examples=40)
@given(seed=seeds, frames=st.integers(1, 7), text=st.text("AB", min_size=1, max_size=4))
def test_forced_alignment_is_the_best_of_all_paths(seed, frames, text):
    log_probs = log_probs_of(seed, frames)
    labels = TINY.encode(text)
    every = best_by_text(log_probs, TINY)
    if tuple(labels.tolist()) not in every:
        with pytest.raises(AlignmentError, match=f"the audio has {frames}"):
            align(log_probs, text, TINY)
        return
    score, path = every[tuple(labels.tolist())]
    assert best_path(log_probs, labels, TINY.blank_id).tolist() == list(path)
    found = align(log_probs, text, TINY)
    assert found.log_prob == pytest.approx(score, abs=1e-5)
    assert found.transcript == decode(path, TINY)
    assert found.transcript.text == text
    assert all(0 < c <= 1 for c in found.confidence)


def test_a_clear_recording_is_aligned_to_the_frame():
    path = [0, 0, 2, 2, 0, 2, 1, 1, 3, 3, 3, 0]
    log_probs = np.where(np.arange(4)[None, :] == np.array(path)[:, None], np.log(0.97), np.log(0.01))
    found = align(log_probs, " AA  B", TINY)
    assert [tuple(word) for word in found.transcript.words] == [("AA", 2, 6), ("B", 8, 11)]
    assert [tuple(c) for c in found.transcript.characters] == [("A", 2, 4), ("A", 5, 6), (" ", 6, 8), ("B", 8, 11)]
    assert found.confidence == pytest.approx([0.97] * 4)


def test_texts_that_cannot_be_aligned_are_refused():
    log_probs = log_probs_of(0, 3)
    with pytest.raises(AlignmentError, match="nothing to align"):
        align(log_probs, "  ", TINY)
    with pytest.raises(AlignmentError, match=r"2 characters need 3 frames, the audio has 2; is it"):
        align(log_probs[:2], "AA", TINY)
    with pytest.raises(UnknownCharactersError, match="'C'"):
        align(log_probs, "C", TINY)
    check_fit(TINY.encode("AB" * 15_000), 180_000)  # an hour
    with pytest.raises(AlignmentError, match=r"60000 characters in 360000 frames would take 40 GiB; cut"):
        check_fit(TINY.encode("AB" * 30_000), 360_000)
