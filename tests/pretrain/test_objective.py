"""The masked-prediction loss equals its formula written in torch, value and gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pretrain.predictor import NO_LABEL, ObjectiveSettings, PredictionHead, masked_prediction

SETTINGS = ObjectiveSettings(
    final_dim=8, logit_temp=0.1, masked_weight=1.0, unmasked_weight=0.0, penalty_weight=10.0, special_rows=0
)
ROWS, FRAMES, WIDTH, CLUSTERS, CHANNELS = 3, 11, 16, 7, 5


def example(seed: int = 0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(ROWS, FRAMES, WIDTH)).astype(np.float32)
    features = rng.normal(size=(ROWS, FRAMES, CHANNELS)).astype(np.float32)
    labels = rng.integers(0, CLUSTERS, (ROWS, FRAMES)).astype(np.int32)
    labels[0, -2:] = NO_LABEL
    valid = np.arange(FRAMES)[None, :] < np.asarray([FRAMES, 6, 0])[:, None]
    mask = rng.random((ROWS, FRAMES)) < 0.5
    return hidden, features, labels, valid, mask


def in_torch(hidden, features, labels, valid, mask, params, how):
    """FACTS C2 by torch's own cosine similarity and cross entropy."""
    weight, bias = (
        torch.tensor(np.array(params["final_proj"]["kernel"])).T,
        torch.tensor(np.array(params["final_proj"]["bias"])),
    )
    embeddings = torch.tensor(np.array(params["label_embeddings"]))
    projected = torch.nn.functional.linear(hidden, weight, bias)
    scores = torch.cosine_similarity(projected[:, :, None], embeddings[None, None], dim=-1) / how.logit_temp
    known = torch.tensor(valid & (labels != NO_LABEL))
    target = torch.tensor(np.where(np.asarray(known), labels, 0)).long() + how.special_rows
    nll = torch.nn.functional.cross_entropy(scores.flatten(0, 1), target.flatten(), reduction="none").view(ROWS, FRAMES)
    masked, unmasked = known & torch.tensor(mask), known & ~torch.tensor(mask)
    counting = (masked * (how.masked_weight > 0)) | (unmasked * (how.unmasked_weight > 0))
    loss = how.masked_weight * nll[masked].sum() + how.unmasked_weight * nll[unmasked].sum()
    for row in range(ROWS):
        if known[row].any():
            loss = loss + how.penalty_weight * (features[row][known[row]] ** 2).mean() * counting[row].sum()
    return loss, counting.sum(), nll, masked


@pytest.mark.parametrize("unmasked_weight", [0.0, 0.5])
@pytest.mark.parametrize("special_rows", [0, 4])
def test_loss_and_gradients_equal_torch(unmasked_weight, special_rows):
    how = dataclasses.replace(SETTINGS, unmasked_weight=unmasked_weight, special_rows=special_rows)
    hidden, features, labels, valid, mask = example()
    head = PredictionHead(how, CLUSTERS)
    params = jax.jit(head.init)(jax.random.key(0), jnp.asarray(hidden))["params"]
    assert params["label_embeddings"].shape == (CLUSTERS + special_rows, 8)

    def loss(hidden, features):
        scores = head.apply({"params": params}, hidden)
        sums = masked_prediction(scores, jnp.asarray(labels), jnp.asarray(mask), jnp.asarray(valid), features, how)
        return sums.loss, sums

    (value, sums), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, features)
    inputs = [torch.tensor(array, requires_grad=True) for array in (hidden, features)]
    expected, count, nll, masked = in_torch(*inputs, labels, valid, mask, params, how)
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    assert float(sums.count) == count.item()
    np.testing.assert_allclose(sums.metrics["masked_loss"][0], nll[masked].sum().item(), rtol=1e-5)
    for ours, theirs in zip(gradients, inputs, strict=True):
        np.testing.assert_allclose(ours, theirs.grad, rtol=1e-4, atol=1e-5)


def test_chance_level_is_the_logarithm_of_the_labels():
    """Orthogonal to every label: log2(504) = 8.98 bits for 500 clusters and fairseq's 4 special rows (FACTS C2)."""
    how = dataclasses.replace(SETTINGS, special_rows=4)
    scores = jnp.zeros((1, 5, 504))
    on = jnp.ones((1, 5), bool)
    sums = masked_prediction(scores, jnp.arange(5, dtype=jnp.int32)[None], on, on, jnp.zeros((1, 5, 2)), how)
    np.testing.assert_allclose(sums.loss / sums.count / np.log(2), 8.977, atol=1e-3)


def test_metrics_count_what_they_name():
    labels = jnp.asarray([[0, 1, 2, 3, NO_LABEL]], jnp.int32)
    scores = 5 * jax.nn.one_hot(jnp.asarray([[0, 1, 0, 3, 3]]), 4)
    mask = jnp.asarray([[True, True, True, False, True]])
    valid = jnp.ones((1, 5), bool)
    sums = masked_prediction(scores, labels, mask, valid, jnp.zeros((1, 5, 2)), SETTINGS)
    assert sums.metrics["masked_accuracy"] == (2, 3)
    assert sums.metrics["unmasked_accuracy"] == (1, 1)
    assert sums.metrics["masked_share"] == (3, 4)
    np.testing.assert_array_equal(sums.histograms["prediction_entropy"], [2, 1, 0, 0])
    np.testing.assert_array_equal(sums.histograms["label_entropy"], [1, 1, 1, 0])


def test_a_batch_without_a_frame_has_a_zero_loss_and_finite_gradients():
    hidden, features, labels, valid, mask = example()
    head = PredictionHead(SETTINGS, CLUSTERS)
    params = jax.jit(head.init)(jax.random.key(0), jnp.asarray(hidden))["params"]

    def loss(params, features):
        scores = head.apply({"params": params}, jnp.zeros_like(hidden))
        return masked_prediction(
            scores, jnp.asarray(labels), jnp.asarray(mask), jnp.zeros_like(valid), features, SETTINGS
        ).loss

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(params, jnp.asarray(features))
    assert value == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masked_weight": 0.0}, "expected none below 0 and one above"),
        ({"logit_temp": 0.0}, "expected more than 0"),
        ({"special_rows": 3}, "expected 0 or 4"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **changes)
