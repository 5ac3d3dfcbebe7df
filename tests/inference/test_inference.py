"""Models with a head on recordings: batched, cut and written out, the answer is that of the model on the file alone."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from wavlm_jax.audio.recordings import Piece, Recording, open_recordings
from wavlm_jax.config import HeadConfig, WavLMConfig
from wavlm_jax.inference.diarization import TurnSettings, diarize, join, turns
from wavlm_jax.inference.recognition import Recognizer, align_texts, as_ctm, as_json, as_tsv, transcribe
from wavlm_jax.inference.running import Job, Result, RunSettings
from wavlm_jax.inference.utterances import classify, embed, scores
from wavlm_jax.model.heads import (
    WavLMForAudioFrameClassification,
    WavLMForCTC,
    WavLMForSequenceClassification,
    WavLMForXVector,
)
from wavlm_jax.text.decoding import AlignmentError, decode
from wavlm_jax.text.records import Trial, Turn
from wavlm_jax.text.vocabulary import Vocabulary, VocabularyError

CONFIG = WavLMConfig.tiny(num_hidden_layers=1)
TOKENS = Vocabulary(tokens=("<pad>", "|", "A", "B", "C"), unknown=None, begin=None, end=None)
HEAD = HeadConfig(vocab_size=5, num_labels=3, classifier_proj_size=8, xvector_output_dim=8, tdnn_dim=(8,) * 5)
RUNNING = RunSettings()


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    random = np.random.default_rng(0)
    for name, length in {"a": 15_000, "b": 9_000}.items():
        soundfile.write(folder / f"{name}.wav", random.normal(size=length) * 0.1, 16_000)
    return open_recordings([folder / "a.wav", folder / "b.wav"])


def _with_head(kind):
    module = kind(CONFIG, HEAD)
    params = module.init(jax.random.key(1), jnp.zeros((1, 6_000)))["params"]
    alone = jax.jit(lambda wave: module.apply({"params": params}, wave))
    return module, params, lambda recording: alone(jnp.asarray(recording.read())[None])


@pytest.fixture(scope="module")
def speech():
    module, params, alone = _with_head(WavLMForCTC)
    # random weights say one thing all the time; a larger head makes them talk
    params = jax.tree.map(lambda leaf: leaf, params) | {"lm_head": jax.tree.map(lambda w: w * 500, params["lm_head"])}
    alone = jax.jit(lambda wave: module.apply({"params": params}, wave))
    return Recognizer(module, params, TOKENS), lambda recording: alone(jnp.asarray(recording.read())[None])


def test_transcripts_are_those_of_each_file_alone(recordings, speech):
    recognizer, alone = speech
    heard = {one.recording: one for one in transcribe(recognizer, recordings, RUNNING)}
    for recording in recordings:
        assert heard[recording].transcript == decode(np.asarray(alone(recording).logits[0].argmax(axis=1)), TOKENS)
    assert any(one.transcript.words for one in heard.values())
    lines = [json.loads(line) for line in as_json(heard.values()).splitlines()]
    assert {line["name"]: line["text"] for line in lines} == {r.name: h.transcript.text for r, h in heard.items()}
    assert len(as_ctm(heard.values()).splitlines()) == sum(len(one.transcript.words) for one in heard.values())
    assert as_tsv(heard.values()).count("\t") == 2


def test_a_text_is_aligned_within_its_recording(recordings, speech):
    recognizer, _ = speech
    (one,) = align_texts(recognizer, {recordings[1]: "AB CAB"}, RUNNING)
    assert [word.text for word in one.transcript.words] == ["AB", "CAB"]
    times = [time for character in one.transcript.characters for time in (character.start, character.end)]
    assert times == sorted(times)
    assert times[-1] <= 27
    assert json.loads(as_json([one]))["characters"][0]["confidence"] == pytest.approx(one.confidence[0], abs=1e-4)
    with pytest.raises(AlignmentError, match=r"b\.wav: text 'AX': found 'X'"):
        align_texts(recognizer, {recordings[1]: "AX"}, RUNNING)
    with pytest.raises(AlignmentError, match=r"b\.wav: text: 40 characters need 79 frames, the audio has 27"):
        align_texts(recognizer, {recordings[1]: "A" * 40}, RUNNING)
    with pytest.raises(AlignmentError, match=r"a\.wav: text: found nothing to align.*\n.*b\.wav: text 'AX'"):
        align_texts(recognizer, {recordings[0]: " ", recordings[1]: "AX"}, RUNNING)


def test_a_vocabulary_of_another_model_is_refused(recordings, speech):
    other = Vocabulary(tokens=("<pad>", "|", "A"), unknown=None, begin=None, end=None)
    with pytest.raises(VocabularyError, match="has 3 tokens, the model 5 outputs"):
        transcribe(speech[0]._replace(vocabulary=other), recordings, RUNNING)


@pytest.mark.slow
def test_embeddings_are_those_of_each_file_alone(recordings):
    module, params, alone = _with_head(WavLMForXVector)
    found = embed(module, params, recordings, RUNNING)
    assert list(found) == recordings
    for recording, embedding in found.items():
        expected = np.asarray(alone(recording).embeddings[0])
        np.testing.assert_allclose(embedding, expected / np.linalg.norm(expected), atol=1e-5)
    named = {recording.name: embedding for recording, embedding in found.items()}
    same, other = scores([Trial(True, "a", "a"), Trial(False, "a", "b")], named)
    assert same == pytest.approx(1, abs=1e-6)
    assert other < same


@pytest.mark.slow
def test_classes_are_those_of_each_file_alone(recordings):
    module, params, alone = _with_head(WavLMForSequenceClassification)
    found = classify(module, params, recordings, ["x", "y", "z"], RUNNING)
    for recording, answers in found.items():
        expected = np.asarray(jax.nn.softmax(alone(recording).logits[0]))
        assert [answer.probability for answer in answers] == pytest.approx(sorted(expected, reverse=True), abs=1e-5)
        assert answers[0].label == "xyz"[expected.argmax()]
    with pytest.raises(ValueError, match="labels: found 1, the model has 3 classes"):
        classify(module, params, recordings, ["x"], RUNNING)


@pytest.mark.slow
def test_turns_are_those_of_each_file_alone(recordings):
    module, params, alone = _with_head(WavLMForAudioFrameClassification)
    how = TurnSettings(fill_seconds=0.0, least_seconds=0.0)
    for recording, found in diarize(module, params, recordings, RUNNING, how).items():
        expected = np.asarray(jax.nn.sigmoid(alone(recording).logits[0]))
        assert found == turns(recording.name, expected, how)


def test_turns_by_hand():
    activity = np.zeros((50, 2), np.float32)
    activity[5:15, 0] = activity[20:30, 0] = activity[29:40, 1] = 0.9
    activity[45, 1] = 0.9
    how = TurnSettings(fill_seconds=0.05, least_seconds=0.1)
    speakers = [Turn("r", 0.1, 0.2, "speaker1"), Turn("r", 0.4, 0.2, "speaker1"), Turn("r", 0.58, 0.22, "speaker2")]
    assert turns("r", activity, how) == speakers
    filled = turns("r", activity, TurnSettings(fill_seconds=0.11, least_seconds=0.1))
    assert filled[0] == Turn("r", 0.1, 0.5, "speaker1")


def test_pieces_of_a_long_file_agree_on_who_is_who(tmp_path):
    random = np.random.default_rng(0)
    truth = (random.random((120, 3)) > 0.5).astype(np.float32)
    recording = Recording("r", tmp_path, 16_000, 120 * 320 + 80)
    results = []
    for start, keep, order in ((0, (0, 45), [0, 1, 2]), (40, (45, 85), [2, 0, 1]), (70, (85, 120), [1, 0, 2])):
        piece = Piece(start * 320, 50 * 320 + 80, start, *keep)
        padding = np.ones((7, 3), np.float32)
        results.append(Result(Job(recording, piece), np.concatenate([truth[start : start + 50][:, order], padding])))
    np.testing.assert_array_equal(join(results), truth)
