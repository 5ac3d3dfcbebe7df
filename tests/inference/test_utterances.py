"""One answer per recording: batched and cut, it is that of the model on the file alone."""

import jax
import numpy as np
import pytest

from tests.support.inference_models import alone, model_of, two_recordings
from wavlm_jax.inference.running import InferenceSettings
from wavlm_jax.inference.utterances import classify, embed

SETTINGS = InferenceSettings()


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    return two_recordings(tmp_path_factory.mktemp("recordings"))


@pytest.mark.slow
def test_embeddings_are_those_of_each_file_alone(recordings):
    model = model_of("WavLMForXVector")
    found = dict(embed(model, recordings, SETTINGS))
    assert {*found} == {*recordings}
    for recording, embedding in found.items():
        expected = np.asarray(alone(model, recording).embeddings[0])
        np.testing.assert_allclose(embedding, expected / np.linalg.norm(expected), atol=1e-5)
        assert embedding @ embedding == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
def test_classes_are_those_of_each_file_alone(recordings):
    model = model_of("WavLMForSequenceClassification", labels=("x", "y", "z"))
    for recording, answers in classify(model, recordings, SETTINGS):
        expected = np.asarray(jax.nn.softmax(alone(model, recording).logits[0]))
        assert [answer.probability for answer in answers] == pytest.approx(sorted(expected, reverse=True), abs=1e-5)
        assert answers[0].label == "xyz"[expected.argmax()]
    with pytest.raises(ValueError, match="labels: found 1, the model has 3 classes"):
        classify(model_of("WavLMForSequenceClassification", labels=("x",)), recordings, SETTINGS)
