"""What the tasks share: the plain cross entropy is torch's and that of transformers' classifier."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.support.head_twins import head_twins, small_head
from tests.support.torch_twins import attention_mask, small_config, waveforms
from wavlm_jax.model.heads import WavLMForSequenceClassification
from wavlm_jax.settings import SettingsError
from wavlm_jax.tasks.common import cross_entropy, head_config


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # transformers' own call
def test_the_loss_of_a_classifier_is_that_of_transformers_class():
    """From our own model's scores."""
    twin = head_twins(WavLMForSequenceClassification, small_config(), small_head())
    labels, lengths = np.array([4, 1]), (9000, 7000)
    waveform, mask = waveforms(lengths), attention_mask(lengths, 9000).long()
    with torch.no_grad():
        given = twin.torch(torch.tensor(waveform), attention_mask=mask, labels=torch.tensor(labels))
    output = jax.jit(twin.model.apply)({"params": twin.params}, jnp.array(waveform), jnp.array(lengths))
    found = cross_entropy(output.logits, jnp.array(labels))
    np.testing.assert_allclose(found.mean(), given.loss.item(), atol=1e-4)


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_what_is_not_trained_is_refused(kind):
    with pytest.raises(SettingsError, match=f"config.head.problem_type: found '{kind}'"):
        head_config({"problem_type": kind}, num_labels=3)
    assert head_config({"problem_type": "single_label_classification"}, num_labels=3).function_to_apply == "softmax"


def test_cross_entropy_is_torch_s():
    logits = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32) * 5
    labels = np.array([0, 1, 2, 3, 0, 1])
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels), reduction="none")
    np.testing.assert_allclose(cross_entropy(jnp.array(logits), jnp.array(labels)), expected.numpy(), atol=1e-5)
