"""One answer per recording: batched and cut, it is that of the model on the file alone."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from tests.support.inference_models import alone, model_of, two_recordings, weights_of
from wavlm_jax.convert.huggingface import export_huggingface
from wavlm_jax.inference.running import InferenceSettings
from wavlm_jax.inference.utterances import classify, embed
from wavlm_jax.loading import load

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


@pytest.mark.parametrize("kind", ["multi_label_classification", None])
def test_labels_that_are_no_classes_have_the_answers_of_transformers_pipeline(recordings, tmp_path, kind):
    """`problem_type` travels in config.json; one label without it is a number."""
    weights = weights_of("WavLMForSequenceClassification", 30)
    head = replace(weights.task.config, problem_type=kind)
    if kind is None:
        head = replace(head, num_labels=1)
        classifier = {name: array[..., :1] for name, array in weights.task.params["classifier"].items()}
        weights.task.params["classifier"] = classifier
    export_huggingface(replace(weights, task=replace(weights.task, config=head)), tmp_path / "model")
    model = load(tmp_path / "model")
    apply = jax.nn.sigmoid if kind == "multi_label_classification" else lambda logits: logits
    for recording, answers in classify(model, recordings[1:], SETTINGS):
        expected = np.asarray(apply(alone(model, recording).logits[0]))
        assert [answer.probability for answer in sorted(answers)] == pytest.approx(expected.tolist(), abs=1e-5)
        assert kind == "multi_label_classification" or [answer.label for answer in answers] == [
            f"LABEL_{number}" for number in range(head.num_labels)
        ]


@pytest.mark.slow
def test_classes_are_those_of_each_file_alone(recordings):
    model = model_of("WavLMForSequenceClassification", labels=("x", "y", "z"))
    for recording, answers in classify(model, recordings, SETTINGS):
        expected = np.asarray(jax.nn.softmax(alone(model, recording).logits[0]))
        assert [answer.probability for answer in answers] == pytest.approx(sorted(expected, reverse=True), abs=1e-5)
        assert answers[0].label == "xyz"[expected.argmax()]
    with pytest.raises(ValueError, match="labels: found 1, the model has 3 classes"):
        classify(model_of("WavLMForSequenceClassification", labels=("x",)), recordings, SETTINGS)
