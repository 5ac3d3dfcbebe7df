"""Beam search, which needs flashlight-text: against every path there is. Not collected where it has no wheel (3.13)."""

import functools
import gzip
import itertools
import math
from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.every_path import SPECIAL, TINY, best_by_text, log_probs_of, seeds
from tests.support.language_models import CHARACTERS, WORDS, log10_prob, write_models
from wavlm_jax.audio.recordings import open_recordings
from wavlm_jax.config import HeadConfig, WavLMConfig
from wavlm_jax.inference.recognition import transcribe
from wavlm_jax.inference.running import InferenceSettings
from wavlm_jax.model.heads import CTCOutput, WavLMForCTC
from wavlm_jax.text.beam import BeamSearch, BeamSettings, DecoderError, read_lexicon, words_of_arpa
from wavlm_jax.text.decoding import decode
from wavlm_jax.text.records import RecordError
from wavlm_jax.text.vocabulary import VocabularyError, files_of_record
from wavlm_jax.weights import Model, Origin, Weights

WIDE = BeamSettings(beam=10_000, threshold=1e9, lm_weight=0.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


def lexicon_of(arpa):
    """The words of a language model, spelt by TINY."""
    return {word: [tuple(TINY.encode(word).tolist())] for word in words_of_arpa(arpa)}


@settings(deadline=None, max_examples=50)
@given(seed=seeds, frames=st.integers(0, 30))
def test_a_beam_of_one_without_language_model_is_greedy(seed, frames):
    log_probs = log_probs_of(seed, frames, tokens=6)
    (found,) = BeamSearch(SPECIAL, BeamSettings(beam=1))(log_probs)
    assert found.transcript == decode(log_probs.argmax(axis=1), SPECIAL)
    assert found.score == pytest.approx(log_probs.max(axis=1).sum(), abs=1e-4)


@settings(deadline=None, max_examples=20)
@given(seed=seeds, frames=st.integers(1, 25), beam=st.sampled_from([1, 3, 50]))
def test_a_language_model_of_weight_zero_changes_nothing(models, seed, frames, beam):
    log_probs = log_probs_of(seed, frames)
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
    log_probs = log_probs_of(seed, frames)
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
@given(
    seed=seeds,
    frames=st.integers(2, 6),
    weight=st.sampled_from([0.0, 1.0, 4.0]),
    name=st.sampled_from(["words.arpa", "words.bin"]),
)
def test_search_with_a_lexicon_finds_the_best_sequence_of_its_words(models, seed, frames, weight, name):
    log_probs = log_probs_of(seed, frames)
    lexicon = lexicon_of(models["words.arpa"])
    chosen = replace(WIDE, lm_weight=weight, word_score=-0.5)
    (found,) = BeamSearch(TINY, chosen, models[name], lexicon)(log_probs)
    scores = {}
    for tokens, (score, _) in best_by_text(log_probs, TINY).items():
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
            r"does not know 2 of 3 tokens.*'B', '\|'.*lower and upper case too",
        ),
        (lambda m: BeamSearch(TINY, language_model=m["words.arpa"].with_name("none")), "none: no such file"),
        (lambda m: BeamSearch(TINY, language_model=m["words.arpa"].parent), "no such file; expected a language model"),
        (lambda _: BeamSearch(replace(TINY, delimiter=None), lexicon={"A": [(2,)]}), "no delimiter between words"),
        (
            lambda m: BeamSearch(replace(TINY, tokens=("<pad>", "|", "x", "y")), language_model=m["characters.bin"]),
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


@pytest.mark.parametrize("beam", [0, 10**13])
def test_a_beam_has_a_width_that_can_be_counted(beam):
    with pytest.raises(ValueError, match=f"beam: found {beam}, expected 1 to 1,048,576"):
        BeamSettings(beam=beam)


@pytest.mark.parametrize("name", ["words.arpa", "words.bin", "words.arpa.gz", "commented.arpa"])
@pytest.mark.parametrize("lower", ["vocabulary", "model"])
def test_a_language_model_of_another_case_or_gzipped_is_the_same_model(tmp_path, models, name, lower):
    arpa = models["words.arpa"].read_text()
    if lower == "model":
        arpa = arpa.replace("A", "a").replace("B", "b")
    (tmp_path / "words.arpa").write_text(arpa)
    (tmp_path / "words.arpa.gz").write_bytes(gzip.compress(arpa.encode()))
    (tmp_path / "commented.arpa").write_text("# by hand\n" + arpa)
    path = models[name] if name == "words.bin" else tmp_path / name
    vocabulary = replace(TINY, tokens=tuple(map(str.lower, TINY.tokens))) if lower == "vocabulary" else TINY
    words = [word.lower() if lower == "vocabulary" else word for word in lexicon_of(models["words.arpa"])]
    assert sorted(map(str.upper, words_of_arpa(tmp_path / name if name != "words.bin" else models["words.arpa"]))) == [
        "A",
        "AB",
        "BA",
    ]
    lexicon = {word: [tuple(vocabulary.encode(word).tolist())] for word in words}
    log_probs = log_probs_of(3, 9)
    [expected] = BeamSearch(TINY, BeamSettings(), models["words.arpa"], lexicon_of(models["words.arpa"]))(log_probs)
    [found] = BeamSearch(vocabulary, BeamSettings(), path, lexicon)(log_probs)
    assert found.score == pytest.approx(expected.score, abs=1e-4)
    assert found.transcript.text.upper() == expected.transcript.text


def test_a_gzipped_model_that_is_cut_off_is_named(tmp_path, models):
    (tmp_path / "cut.gz").write_bytes(gzip.compress(models["words.arpa"].read_bytes())[:60])
    with pytest.raises(RecordError, match=r"cut\.gz, after line \d+: gzip data that are damaged or cut off"):
        words_of_arpa(tmp_path / "cut.gz")


@pytest.mark.parametrize(
    "content", [b"", b"\\data\\\n", b"mmap lm http://kheafield.com/code format version 5\n\0", b"\x00" * 999]
)
def test_a_damaged_language_model_is_refused(tmp_path, content):
    (tmp_path / "lm").write_bytes(content)
    with pytest.raises(DecoderError, match="not a language model that KenLM reads"):
        BeamSearch(TINY, language_model=tmp_path / "lm")


def test_a_model_with_other_outputs_is_refused():
    with pytest.raises(VocabularyError, match="found 5 tokens a frame, the vocabulary has 4"):
        BeamSearch(TINY)(log_probs_of(0, 5, tokens=5))


class Says(WavLMForCTC):
    """A CTC model that says A where a sample is loud, and nothing elsewhere."""

    def setup(self) -> None:
        pass

    def __call__(self, waveform, num_samples=None, masks=None, keys=None) -> CTCOutput:
        del masks, keys
        frames = (waveform.shape[1] - 80) // 320
        loud = waveform[:, 160 : 160 + 320 * frames : 320] > 0.1
        heard = jnp.where(loud, 2, TINY.blank_id)
        logits = 8.0 * jax.nn.one_hot(heard, 4)
        mask = jnp.arange(frames)[None] < ((num_samples - 80) // 320)[:, None]
        return CTCOutput(logits, mask, None)


def test_recordings_are_searched_as_they_are_read(tmp_path, models):
    samples = np.repeat([0, 0.5, 0.5, 0, 0.5, 0, 0, 0], 320)
    soundfile.write(tmp_path / "a.wav", np.concatenate([samples, np.zeros(80)]), 16_000)
    config, origin = WavLMConfig.tiny(), Origin(files=files_of_record(asdict(TINY)))
    says = Model(config, {}, Says(config, HeadConfig(vocab_size=4)), Weights(config, {}, None, origin=origin))

    def heard(search=None):
        [(_, found)] = transcribe(says, open_recordings([tmp_path / "a.wav"]), InferenceSettings(), search)
        return found

    assert heard().transcript.text == "AA"
    assert heard(BeamSearch(TINY, BeamSettings(beam=1))) == heard()
    lexicon = lexicon_of(models["words.arpa"])
    search = BeamSearch(TINY, WIDE, models["words.arpa"], lexicon)
    assert heard(search).transcript.text in lexicon
