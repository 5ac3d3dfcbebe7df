"""Recognition of recordings: batched, cut and written out, the text is that of the model on the file alone."""

import json
from dataclasses import replace

import numpy as np
import pytest

from tests.support.inference_models import TOKENS, alone, model_of, two_recordings, weights_of
from wavlm_jax.inference.recognition import align_texts, as_ctm, as_json, as_tsv, transcribe
from wavlm_jax.inference.running import InferenceSettings
from wavlm_jax.text.decoding import AlignmentError, decode
from wavlm_jax.text.vocabulary import Vocabulary, VocabularyError
from wavlm_jax.weights import ready

SETTINGS = InferenceSettings()


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    return two_recordings(tmp_path_factory.mktemp("recordings"))


@pytest.fixture(scope="module")
def model():
    return model_of("WavLMForCTC", 500, vocabulary=TOKENS)


def test_transcripts_are_those_of_each_file_alone(recordings, model):
    heard = dict(transcribe(model, recordings, SETTINGS))
    for recording in recordings:
        best = np.asarray(alone(model, recording).logits[0].argmax(axis=1))
        assert heard[recording].transcript == decode(best, TOKENS)
    assert any(one.transcript.words for one in heard.values())
    lines = [json.loads(line) for line in as_json(heard.values()).splitlines()]
    assert {line["name"]: line["text"] for line in lines} == {r.name: h.transcript.text for r, h in heard.items()}
    assert len(as_ctm(heard.values()).splitlines()) == sum(len(one.transcript.words) for one in heard.values())
    assert as_tsv(heard.values()).count("\t") == 2


def test_times_are_those_of_the_model_s_own_frames(recordings):
    weights = weights_of("WavLMForCTC", 500, vocabulary=TOKENS)
    for last_stride in (1, 4):
        model = ready(replace(weights, config=replace(weights.config, conv_stride=(5, 2, 2, 2, 2, 2, last_stride))))
        aligned = dict(align_texts(model, {recordings[1]: "AB CAB"}, SETTINGS))[recordings[1]]
        words = json.loads(as_json([aligned]))["words"]
        assert words[-1]["end"] <= recordings[1].seconds
        columns = [line.split() for line in as_ctm([aligned]).splitlines()]
        starts = [float(start) for _, _, start, *_ in columns]
        np.testing.assert_allclose(starts, [word["start"] for word in words], atol=0.006)
        frames = [(word.start, word.end) for word in aligned.transcript.words]
        seconds = np.asarray(frames) * 0.01 * last_stride
        np.testing.assert_allclose([(word["start"], word["end"]) for word in words], seconds, atol=1e-9)


def test_a_text_is_aligned_within_its_recording(recordings, model):
    [(_, one)] = align_texts(model, {recordings[1]: "AB CAB"}, SETTINGS)
    assert [word.text for word in one.transcript.words] == ["AB", "CAB"]
    times = [time for character in one.transcript.characters for time in (character.start, character.end)]
    assert times == sorted(times)
    assert times[-1] <= 27
    assert json.loads(as_json([one]))["characters"][0]["confidence"] == pytest.approx(one.confidence[0], abs=1e-4)
    for texts, message in (
        ({recordings[1]: "AX"}, r"b\.wav: text 'AX': found 'X'"),
        ({recordings[1]: "A" * 40}, r"b\.wav: text: 40 characters need 79 frames, the audio has 27"),
        ({recordings[0]: " ", recordings[1]: "AX"}, r"a\.wav: text: found nothing to align.*\n.*b\.wav: text 'AX'"),
    ):
        with pytest.raises(AlignmentError, match=message):
            next(align_texts(model, texts, SETTINGS))


def test_a_vocabulary_of_another_model_is_refused(recordings):
    other = Vocabulary(tokens=("<pad>", "|", "A"), unknown=None, begin=None, end=None)
    with pytest.raises(VocabularyError, match="has 3 tokens, the model 5 outputs"):
        next(transcribe(model_of("WavLMForCTC", vocabulary=other), recordings, SETTINGS))
