"""Margins against transformers' and scikit's plain formulas, speakers in any order against every order by hand."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.wavlm.modeling_wavlm import AMSoftmaxLoss

from tests.support.head_twins import head_twins, small_head, torch_head
from tests.support.torch_twins import attention_mask, small_config, waveforms
from wavlm_jax.model.heads import (
    WavLMForAudioFrameClassification,
    WavLMForCTC,
    WavLMForSequenceClassification,
    WavLMForXVector,
    unit_length,
)
from wavlm_jax.tasks.common import cross_entropy, margin_loss, one_speaker_a_frame, speakers_in_any_order
from wavlm_jax.tasks.ctc import ctc_loss

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # transformers' own call
LENGTHS = (9000, 7000)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_ctc_loss_is_that_of_transformers_class(reduction):
    model = torch_head(WavLMForCTC, small_config(), small_head(ctc_loss_reduction=reduction))
    labels = np.array([[3, 3, 1, 7, 2], [5, 1, -100, -100, -100]])
    mask = attention_mask(LENGTHS, 9000).long()
    with torch.no_grad():
        given = model(torch.tensor(waveforms(LENGTHS)), attention_mask=mask, labels=torch.tensor(labels))
    frames, counts = model._get_feat_extract_output_lengths(torch.tensor(LENGTHS)).numpy(), np.array([5, 2])
    loss = ctc_loss(jnp.array(given.logits), jnp.array(frames), jnp.array(labels), jnp.array(counts), 0)
    expected = loss.sum() if reduction == "sum" else (loss / counts).mean()
    np.testing.assert_allclose(expected, given.loss.item(), rtol=1e-5)


@pytest.mark.parametrize("kind", [WavLMForXVector, WavLMForSequenceClassification])
def test_losses_of_whole_rows_are_those_of_transformers_classes(kind):
    """From our own model's outputs: x-vectors by the cosines with its speaker vectors, classes by their scores."""
    twin = head_twins(kind, small_config(), small_head())
    labels, waveform = np.array([4, 1]), waveforms(LENGTHS)
    mask = attention_mask(LENGTHS, 9000).long()
    with torch.no_grad():
        given = twin.torch(torch.tensor(waveform), attention_mask=mask, labels=torch.tensor(labels))
    output = jax.jit(twin.model.apply)({"params": twin.params}, jnp.array(waveform), jnp.array(LENGTHS))
    if kind is WavLMForXVector:
        found = margin_loss(output.cosines, jnp.array(labels), "additive", scale=30.0, margin=0.4)
    else:
        found = cross_entropy(output.logits, jnp.array(labels))
    np.testing.assert_allclose(found.mean(), given.loss.item(), atol=1e-4)


def test_frame_loss_is_that_of_transformers_class_where_asked_for():
    model = torch_head(WavLMForAudioFrameClassification, small_config(), small_head())
    targets = (np.random.default_rng(0).random((2, 27, 5)) < 0.3).astype(np.float32)
    mask = attention_mask(LENGTHS, 9000).long()
    with torch.no_grad():
        given = model(torch.tensor(waveforms(LENGTHS)), attention_mask=mask, labels=torch.tensor(targets))
    found = one_speaker_a_frame(jnp.array(given.logits), jnp.array(targets))
    np.testing.assert_allclose(found.sum() / (2 * 27), given.loss.item(), rtol=1e-5)


def test_cross_entropy_is_torch_s():
    logits = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32) * 5
    labels = np.array([0, 1, 2, 3, 0, 1])
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels), reduction="none")
    np.testing.assert_allclose(cross_entropy(jnp.array(logits), jnp.array(labels)), expected.numpy(), atol=1e-5)


def test_additive_margin_is_transformers_s():
    torch.manual_seed(0)
    reference = AMSoftmaxLoss(8, 5)
    embeddings, labels = torch.randn(7, 8, requires_grad=True), torch.arange(7) % 5
    expected = reference(embeddings, labels)
    expected.backward()

    def loss(embeddings):
        weight = jnp.array(reference.weight.detach().numpy())
        cosines = unit_length(embeddings, axis=1) @ unit_length(weight, axis=0)
        return margin_loss(cosines, jnp.array(labels.numpy()), "additive", scale=30.0, margin=0.4).mean()

    value, gradient = jax.value_and_grad(loss)(jnp.array(embeddings.detach().numpy()))
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, embeddings.grad.numpy(), atol=1e-5)


@pytest.mark.parametrize("margin", [0.2, 0.5])
def test_angular_margin_turns_the_angle(margin):
    """Against arccos and cos in double precision, with the usual continuation behind pi."""
    cosines = np.random.default_rng(1).uniform(-0.999, 0.999, (40, 6)).astype(np.float32)
    cosines[:6, 0] = [-0.999, -0.99, -0.95, 0.0, 0.5, 0.999]
    labels = np.arange(40) % 6
    labels[:6] = 0
    angles = np.arccos(cosines.astype(np.float64))[np.arange(40), labels] + margin
    reduced = np.where(angles < math.pi, np.cos(angles), np.cos(angles - margin) - margin * math.sin(margin))
    logits = 30.0 * cosines.astype(np.float64)
    logits[np.arange(40), labels] = 30.0 * reduced
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels), reduction="none")
    found = margin_loss(jnp.array(cosines), jnp.array(labels), "angular", scale=30.0, margin=margin)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-3)
    ends = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    slope = jax.grad(lambda c: margin_loss(c, jnp.array([0, 0]), "angular", scale=30.0, margin=margin).sum())(ends)
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("speakers", [1, 2, 4])
def test_speakers_in_any_order_take_the_best_of_all_orders(speakers):
    generator = np.random.default_rng(speakers)
    logits = (4 * generator.standard_normal((5, 30, speakers))).astype(np.float32)
    targets = (generator.random((5, 30, speakers)) < 0.4).astype(np.float32)
    mask = np.arange(30)[None] < np.array([30, 20, 11, 1, 0])[:, None]
    found = speakers_in_any_order(jnp.array(logits), jnp.array(targets), jnp.array(mask))
    for row in range(5):
        each = {}
        for order in itertools.permutations(range(speakers)):
            given, wanted = torch.tensor(logits[row][mask[row]]), torch.tensor(targets[row][mask[row]][:, list(order)])
            each[order] = torch.nn.functional.binary_cross_entropy_with_logits(given, wanted, reduction="sum").item()
        np.testing.assert_allclose(found.loss[row], min(each.values()), atol=1e-3, rtol=1e-5)
        np.testing.assert_allclose(each[tuple(np.asarray(found.order[row]).tolist())], min(each.values()), rtol=1e-5)


def test_swapping_the_speakers_changes_nothing_and_too_many_are_refused():
    generator = np.random.default_rng(0)
    logits = jnp.array(generator.standard_normal((2, 9, 3)), jnp.float32)
    targets = jnp.array(generator.random((2, 9, 3)) < 0.5, jnp.float32)
    mask = jnp.ones((2, 9), bool)
    straight = speakers_in_any_order(logits, targets, mask).loss
    swapped = speakers_in_any_order(logits, targets[:, :, jnp.array([2, 0, 1])], mask).loss
    np.testing.assert_allclose(straight, swapped, rtol=1e-6)
    with pytest.raises(ValueError, match="found 7, expected 6 or fewer"):
        speakers_in_any_order(jnp.zeros((1, 2, 7)), jnp.zeros((1, 2, 7)), mask[:1, :2])
