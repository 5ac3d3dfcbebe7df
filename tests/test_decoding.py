"""Greedy decoding, beam search and forced alignment against brute force over all paths, and each other."""

import functools
import itertools
import math
import sys
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from language_models import CHARACTERS, WORDS, log10_prob, write_models

from wavlm_jax.text.alignment import AlignmentError, align, best_path
from wavlm_jax.text.beam import BeamSearch, BeamSettings, DecoderError
from wavlm_jax.text.ctc import decode, decode_greedily
from wavlm_jax.text.lexicon import lexicon_of_words, read_lexicon, words_of_arpa
from wavlm_jax.text.lines import RecordError
from wavlm_jax.text.vocabulary import UnknownCharactersError, Vocabulary, VocabularyError

TINY = Vocabulary(tokens=("<pad>", "|", "A", "B"), unknown=None, begin=None, end=None)
SPECIAL = Vocabulary(tokens=("A", "<unk>", "B", "<s>", "|", "<pad>"), end=None)
WIDE = BeamSettings(beam=10_000, threshold=1e9, lm_weight=0.0)
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


def _log_probs(seed, frames, tokens=4, sharpness=1.0):
    logits = np.random.default_rng(seed).normal(size=(frames, tokens)) * sharpness
    return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)


def _best_by_text(log_probs, vocabulary):
    """Of every text, its best path: all paths are tried."""
    best = {}
    for path in itertools.product(range(len(vocabulary)), repeat=len(log_probs)):
        score = float(sum(row[token] for row, token in zip(log_probs, path, strict=True)))
        tokens = tuple(token for token, _ in itertools.groupby(path) if token != vocabulary.blank_id)
        if score > best.get(tokens, (-math.inf,))[0]:
            best[tokens] = (score, path)
    return best


@settings(deadline=None, max_examples=25)
@given(seed=seeds, frames=st.lists(st.integers(0, 12), min_size=3, max_size=3), drop=st.booleans())
def test_greedy_on_the_device_is_the_best_token_of_each_real_frame(seed, frames, drop):
    logits = np.random.default_rng(seed).normal(size=(3, 12, 6)).astype(np.float32)
    heard = decode_greedily(jnp.asarray(logits), jnp.asarray(frames), SPECIAL, drop_special=drop)
    for row, count, transcript in zip(logits, frames, heard, strict=True):
        assert transcript == decode(row[:count].argmax(axis=1), SPECIAL, drop_special=drop)


@settings(deadline=None, max_examples=50)
@given(seed=seeds, frames=st.integers(0, 30))
def test_a_beam_of_one_without_language_model_is_greedy(seed, frames):
    log_probs = _log_probs(seed, frames, tokens=6)
    (found,) = BeamSearch(SPECIAL, BeamSettings(beam=1))(log_probs)
    assert found.transcript == decode(log_probs.argmax(axis=1), SPECIAL)
    assert found.score == pytest.approx(log_probs.max(axis=1).sum(), abs=1e-4)


@settings(deadline=None, max_examples=20)
@given(seed=seeds, frames=st.integers(1, 25), beam=st.sampled_from([1, 3, 50]))
def test_a_language_model_of_weight_zero_changes_nothing(models, seed, frames, beam):
    log_probs = _log_probs(seed, frames)
    nothing = BeamSettings(beam=beam, lm_weight=0.0, num_best=5, lm_unknown="allow")
    without = BeamSearch(TINY, nothing)(log_probs)
    for name in ("characters.arpa", "characters.bin"):
        with_model = BeamSearch(TINY, nothing, models[name])(log_probs)
        assert [h.transcript.text for h in with_model][:1] == [h.transcript.text for h in without][:1]
        assert with_model[0].score == pytest.approx(without[0].score, abs=1e-4)


@settings(deadline=None, max_examples=15)
@given(
    seed=seeds,
    frames=st.integers(1, 6),
    weight=st.sampled_from([0.5, 2.0, 5.0]),
    name=st.sampled_from([".arpa", ".bin"]),
)
def test_lexicon_free_search_finds_the_best_of_all_texts(models, seed, frames, weight, name):
    log_probs = _log_probs(seed, frames)
    search = BeamSearch(TINY, replace(WIDE, lm_weight=weight), models["characters" + name])
    (found,) = search(log_probs)
    best_text, best_score = "", -math.inf
    for path in itertools.product(range(len(TINY)), repeat=frames):
        # flashlight starts behind a silence: a delimiter in the first frame goes on with it
        tokens = [t for t, _ in itertools.groupby((TINY.delimiter_id, *path)) if t != TINY.blank_id][1:]
        lm = _cached_log10_prob("".join(TINY.tokens[token] for token in tokens))
        score = float(log_probs[np.arange(frames), path].sum()) + weight * lm
        if score > best_score:
            best_text, best_score = TINY.spell(tokens), score
    assert found.score == pytest.approx(best_score, abs=1e-3)
    assert found.transcript.text == best_text


@functools.cache
def _cached_log10_prob(characters):
    return log10_prob(CHARACTERS, list(characters))


@settings(deadline=None, max_examples=15)
@given(seed=seeds, frames=st.integers(2, 6), weight=st.sampled_from([0.0, 1.0, 4.0]))
def test_search_with_a_lexicon_finds_the_best_sequence_of_its_words(models, seed, frames, weight):
    log_probs = _log_probs(seed, frames)
    lexicon = lexicon_of_words(words_of_arpa(models["words.arpa"]), TINY)
    chosen = replace(WIDE, lm_weight=weight, word_score=-0.5)
    (found,) = BeamSearch(TINY, chosen, models["words.arpa"], lexicon)(log_probs)
    scores = {}
    for tokens, (score, _) in _best_by_text(log_probs, TINY).items():
        words = TINY.spell(tokens).split()
        if all(word in lexicon for word in words):
            total = score + weight * log10_prob(WORDS, words) - 0.5 * len(words)
            scores[" ".join(words)] = max(total, scores.get(" ".join(words), -math.inf))
    assert found.transcript.text == max(scores, key=scores.__getitem__)
    assert found.score == pytest.approx(max(scores.values()), abs=1e-3)
    assert [word.text for word in found.transcript.words] == found.transcript.text.split()


def test_words_of_a_lexicon_keep_their_names_and_times(tmp_path):
    (tmp_path / "words.txt").write_text("BOTH A B |\n\nBA\n")
    lexicon = read_lexicon(tmp_path / "words.txt", TINY)
    assert lexicon == {"BOTH": [(2, 3)], "BA": [(3, 2)]}
    path = [0, 2, 2, 3, 1, 0, 3, 2, 0]
    log_probs = np.where(np.arange(4)[None, :] == np.array(path)[:, None], np.float32(-0.1), np.float32(-5.0))
    (found,) = BeamSearch(TINY, WIDE, lexicon=lexicon)(log_probs)
    assert found.transcript.text == "BOTH BA"
    assert [tuple(word) for word in found.transcript.words] == [("BOTH", 1, 4), ("BA", 6, 8)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda m: BeamSearch(SPECIAL, language_model=m["words.arpa"]),
            r"does not know 2 of 3 tokens.*'B', '\|'.*same case",
        ),
        (lambda m: BeamSearch(TINY, language_model=m["words.arpa"].with_name("none")), "none: no such file"),
        (lambda m: BeamSearch(TINY, language_model=m["words.arpa"].parent), "no such file; expected a language model"),
        (lambda _: BeamSearch(replace(TINY, delimiter=None), lexicon={"A": [(2,)]}), "no delimiter between words"),
        (
            lambda m: BeamSearch(replace(TINY, tokens=("<pad>", "|", "a", "b")), language_model=m["characters.bin"]),
            "does not know 2 of 3 tokens of the vocabulary",
        ),
        (
            lambda m: BeamSearch(TINY, language_model=m["words.arpa"], lexicon={"BB": [(3, 3)], "A": [(2,)]}),
            "does not know 1 of 2 words of the lexicon",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(models, make, message):
    with pytest.raises(DecoderError, match=message):
        make(models)


@pytest.mark.parametrize(
    "content", [b"", b"\\data\\\n", b"mmap lm http://kheafield.com/code format version 5\n\0", b"\x00" * 999]
)
def test_a_damaged_language_model_is_refused(tmp_path, content):
    (tmp_path / "lm").write_bytes(content)
    with pytest.raises(DecoderError, match="not a language model that KenLM reads"):
        BeamSearch(TINY, language_model=tmp_path / "lm")


def test_a_model_with_other_outputs_is_refused():
    wrong = _log_probs(0, 5, tokens=5)
    for use in (
        BeamSearch(TINY),
        lambda x: align(x, "A", TINY),
        lambda x: decode_greedily(jnp.asarray(x)[None], jnp.asarray([5]), TINY),
    ):
        with pytest.raises(VocabularyError, match="found 5 tokens a frame, the vocabulary has 4"):
            use(wrong)


def test_without_flashlight_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashlight.lib.text.dictionary", None)
    with pytest.raises(DecoderError, match=r"pip install 'wavlm-jax\[decode\]'.*3\.13"):
        BeamSearch(TINY)


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
    with pytest.raises(RecordError, match="the vocabulary can spell none of 1 words"):
        lexicon_of_words(["ab"], TINY)


@settings(deadline=None, max_examples=40)
@given(seed=seeds, frames=st.integers(1, 7), text=st.text("AB", min_size=1, max_size=4))
def test_forced_alignment_is_the_best_of_all_paths(seed, frames, text):
    log_probs = _log_probs(seed, frames)
    labels = TINY.encode(text)
    every = _best_by_text(log_probs, TINY)
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
    log_probs = _log_probs(0, 3)
    with pytest.raises(AlignmentError, match="nothing to align"):
        align(log_probs, "  ", TINY)
    with pytest.raises(AlignmentError, match=r"2 characters need 3 frames, the audio has 2 \(40 ms\)"):
        align(log_probs[:2], "AA", TINY)
    with pytest.raises(UnknownCharactersError, match="'C'"):
        align(log_probs, "C", TINY)
