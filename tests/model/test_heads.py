"""Models with a head: transformers' own torch classes are the measure, and padding changes nothing where we differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.support.head_twins import head_twins, parameter_shapes, small_head, torch_head
from tests.support.torch_twins import attention_mask, small_config, waveforms
from wavlm_jax.config import HeadConfig, WavLMConfig
from wavlm_jax.convert.state_dict import to_torch
from wavlm_jax.model.heads import (
    WavLMForAudioFrameClassification,
    WavLMForCTC,
    WavLMForSequenceClassification,
    WavLMForXVector,
    statistics_pooling,
)
from wavlm_jax.training.sharding import WAVLM_AXES, parameter_axes

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # transformers' own call
LENGTHS = (16000, 12345, 9000)
LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
CASES = {
    "ctc": (WavLMForCTC, {}, {}),
    "ctc large adapter": (WavLMForCTC, LARGE, {"add_adapter": True, "output_hidden_size": 20}),
    "ctc adapter": (WavLMForCTC, {}, {"add_adapter": True, "num_adapter_layers": 2}),
    "ctc ignores layer weights": (WavLMForCTC, {}, {"use_weighted_layer_sum": True}),
    "classes large sum": (WavLMForSequenceClassification, LARGE, {"use_weighted_layer_sum": True}),
    "frames sum": (WavLMForAudioFrameClassification, {}, {"use_weighted_layer_sum": True}),
    "xvector": (WavLMForXVector, {}, {}),
    "xvector large sum": (WavLMForXVector, LARGE, {"use_weighted_layer_sum": True}),
    "xvector adapter": (WavLMForXVector, {}, {"add_adapter": True, "num_adapter_layers": 1}),
}


def apply(twin, waveform, num_samples):
    """Our forward pass, compiled."""
    given = None if num_samples is None else jnp.array(num_samples)
    return jax.jit(twin.model.apply)({"params": twin.params}, jnp.array(waveform), given)


def theirs(twin, waveform, num_samples, **labels):
    """transformers' forward pass."""
    mask = None if num_samples is None else attention_mask(num_samples, waveform.shape[1]).long()
    with torch.no_grad():
        return twin.torch(torch.tensor(waveform), attention_mask=mask, **labels)


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers_on_ragged_batch(name):
    kind, changes, head = CASES[name]
    twin = head_twins(kind, small_config(**changes), small_head(**head))
    waveform = waveforms(LENGTHS)
    ours, reference = apply(twin, waveform, LENGTHS), theirs(twin, waveform, LENGTHS)
    np.testing.assert_allclose(ours.logits, reference.logits.numpy(), atol=1e-4, rtol=0)
    if kind is WavLMForXVector:
        np.testing.assert_allclose(ours.embeddings, reference.embeddings.numpy(), atol=1e-4, rtol=0)
    if kind is WavLMForCTC:
        counted = twin.torch._get_feat_extract_output_lengths(torch.tensor(LENGTHS))
        np.testing.assert_array_equal(ours.num_frames, counted.numpy())


@pytest.mark.parametrize("kind", [WavLMForSequenceClassification, WavLMForXVector])
def test_equals_transformers_without_padding(kind):
    twin = head_twins(kind, seed=1)
    waveform = waveforms((9000, 9000), seed=1)
    ours, reference = apply(twin, waveform, None), theirs(twin, waveform, None)
    np.testing.assert_allclose(ours.logits, reference.logits.numpy(), atol=1e-4, rtol=0)


def test_base_sized_heads_have_transformers_parameters():
    """Names, shapes and number of all parameters of the full-size classes; nothing is computed."""
    config, head = WavLMConfig.base(), HeadConfig(num_labels=28, use_weighted_layer_sum=True, vocab_size=29)
    for kind in (WavLMForSequenceClassification, WavLMForAudioFrameClassification, WavLMForXVector):
        with torch.device("meta"):
            reference = torch_head(kind, config, head)
        expected = {name: tuple(p.shape) for name, p in reference.named_parameters()}
        shapes = jax.tree.map(
            lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), parameter_shapes(kind(config, head))
        )
        assert {name: array.shape for name, array in to_torch(shapes).items()} == expected


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_has_its_axes(name):
    kind, changes, head = CASES[name]
    shapes = parameter_shapes(kind(small_config(**changes), small_head(compat="exact", **head)))
    assert len(parameter_axes(shapes, WAVLM_AXES)) == len(jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", ["ctc adapter", "classes large sum", "xvector"])
def test_padding_changes_nothing(name):
    """A row alone, in its own length, and the same row in a longer batch, with noise in the padding."""
    kind, changes, head = CASES[name]
    model = kind(small_config(padding="exact", **changes), small_head(compat="exact", **head))
    params = head_twins(kind, small_config(**changes), small_head(**head)).params
    waveform = np.array(waveforms((9000, 14000)))
    waveform[0, 9000:] = np.random.default_rng(0).standard_normal(5000)
    run = jax.jit(model.apply)
    together = run({"params": params}, jnp.array(waveform), jnp.array([9000, 14000]))
    alone = run({"params": params}, jnp.array(waveform[:1, :9000]), jnp.array([9000]))
    if kind is WavLMForCTC:
        assert int(together.num_frames[0]) == int(alone.num_frames[0]) == alone.logits.shape[1]
    frames = slice(None) if alone.logits.ndim == 2 else slice(alone.logits.shape[1])
    np.testing.assert_allclose(together.logits[0][frames], alone.logits[0], atol=1e-5, rtol=0)


def test_transformers_pools_x_vectors_over_padding_and_we_do_not():
    """E30: the very row that agrees alone differs in a batch by transformers' count, and not by ours."""
    twin = head_twins(WavLMForXVector, small_config(**LARGE))
    exact = WavLMForXVector(small_config(**LARGE), small_head(compat="exact"))
    waveform = waveforms((9000, 16000))
    alone = theirs(twin, waveform[:1, :9000], (9000,)).logits[0]
    batched = theirs(twin, waveform, (9000, 16000)).logits[0]
    assert float((alone - batched).abs().max()) > 1e-3
    ours = jax.jit(exact.apply)({"params": twin.params}, jnp.array(waveform), jnp.array([9000, 16000])).logits[0]
    np.testing.assert_allclose(ours, alone.numpy(), atol=1e-4, rtol=0)
    assert exact.head.tdnn_context == 14


def test_normed_layer_sum_is_that_of_transformers_4():
    """E7: with all weight on the last state, the normed sum is the head without a sum, the raw one is not."""
    config = small_config(**LARGE)
    heads = {states: small_head(use_weighted_layer_sum=True, layer_sum_states=states) for states in ("raw", "normed")}
    twin = head_twins(WavLMForSequenceClassification, config)
    waveform = waveforms((8000,))
    weighted = {"params": twin.params | {"layer_weights": jnp.array([0.0, 0.0, 100.0])}}
    found = {
        states: jax.jit(WavLMForSequenceClassification(config, head).apply)(weighted, jnp.array(waveform)).logits
        for states, head in heads.items()
    }
    expected = theirs(twin, waveform, None).logits.numpy()
    np.testing.assert_allclose(found["normed"], expected, atol=1e-5, rtol=0)
    assert np.abs(found["raw"] - expected).max() > 1e-3


def test_statistics_are_torch_s_and_finite_for_one_frame():
    frames = np.random.default_rng(0).standard_normal((3, 9, 4)).astype(np.float32)
    mask = np.arange(9)[None] < np.array([[9], [5], [1]])
    pooled = statistics_pooling(jnp.array(frames), jnp.array(mask))
    for row, count in enumerate((9, 5)):
        chosen = torch.tensor(frames[row, :count])
        expected = torch.cat([chosen.mean(dim=0), chosen.std(dim=0)])
        np.testing.assert_allclose(pooled[row], expected.numpy(), atol=1e-6)
    np.testing.assert_allclose(pooled[2, 4:], 0)
    slope = jax.grad(lambda x: statistics_pooling(x, jnp.array(mask)).sum())(jnp.ones((3, 9, 4)))
    assert np.isfinite(slope).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pad_token_id": 11}, "0 to 10"),
        ({"tdnn_kernel": (5, 3)}, "one each per layer"),
        ({"add_adapter": True, "use_weighted_layer_sum": True}, "expected one of them"),
        ({"final_dropout": 1.5}, "probability"),
        ({"num_labels": 0}, "1 or more"),
    ],
)
def test_wrong_heads_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        small_head(**values)


def test_heads_without_adapter_refuse_one():
    model = WavLMForSequenceClassification(small_config(), small_head(add_adapter=True))
    with pytest.raises(ValueError, match="takes no adapter"):
        parameter_shapes(model)


def test_too_short_rows_are_named():
    model = WavLMForXVector(small_config(), small_head())
    with pytest.raises(ValueError, match="14 frames, expected at least 15"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 4560))))
