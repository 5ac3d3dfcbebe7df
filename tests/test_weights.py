"""A loaded model as a Python object: what people have in their hands as waves, and jit, export, pickle, copy, hash."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import export

from tests.support.inference_models import model_of
from wavlm_jax.config import WavLMConfig
from wavlm_jax.model.wavlm import WavLM
from wavlm_jax.weights import Weights, ready

WAVE = (np.random.default_rng(0).standard_normal(4_000) * 0.1).astype(np.float32)


def tiny(*, do_normalize):
    norm = "layer" if do_normalize else "group"
    config = WavLMConfig.tiny(num_hidden_layers=1, feat_extract_norm=norm, do_normalize=do_normalize)
    params = jax.jit(WavLM(config).init)(jax.random.key(0), jnp.zeros((1, 400)))["params"]
    return ready(Weights(config, jax.device_get(params), None))


@pytest.fixture(scope="module")
def plain():
    return tiny(do_normalize=False)


@pytest.fixture(scope="module")
def normalising():
    return tiny(do_normalize=True)


@pytest.mark.parametrize("kind", ["plain", "normalising"])
def test_a_wave_is_the_same_in_every_form(kind, request):
    model = request.getfixturevalue(kind)
    integers = np.rint(WAVE * 32_768).astype(np.int16)
    rounded = model.inputs([integers.astype(np.float32) / 32_768]).waveform
    for given in (integers, integers.astype(">i2"), torch.from_numpy(integers), jnp.asarray(integers)):
        np.testing.assert_allclose(model.inputs([given]).waveform, rounded, atol=1e-6)
    expected = model.inputs([WAVE]).waveform
    forms = WAVE.astype(np.float64), WAVE.astype(">f4"), WAVE.tolist(), torch.from_numpy(WAVE), jnp.asarray(WAVE)
    for given in (*forms, np.repeat(WAVE, 2)[::2]):
        np.testing.assert_array_equal(model.inputs([given]).waveform, expected)
    for given in (WAVE.astype(np.float16), jnp.asarray(WAVE, jnp.bfloat16)):
        np.testing.assert_allclose(model.inputs([given]).waveform, expected, atol=0.03)


def test_int16_is_scaled_in_a_call_too_and_refused_where_the_model_wants_normalised_waves(plain, normalising):
    integers = np.rint(WAVE * 32_768).astype(np.int16)[None]
    expected = plain(integers.astype(np.float32) / 32_768).hidden_states
    for given in (integers, jnp.asarray(integers)):
        np.testing.assert_array_equal(plain(given).hidden_states, expected)
    for given in (integers, jnp.asarray(integers), torch.from_numpy(integers)):
        with pytest.raises(ValueError, match=r"found int16 samples, expected .* model.inputs\(waves\) makes them"):
            normalising(given)


HOLED, LOUD = np.where(np.arange(4_000) == 7, np.nan, WAVE), np.where(np.arange(4_000) == 7, np.inf, WAVE)
NOT_SAMPLES = [
    (HOLED, "NaN or infinite"),
    (LOUD, "NaN or infinite"),
    (np.full(4_000, 1e300), "NaN or infinite"),
    (jnp.asarray(HOLED), "NaN or infinite"),
    *((np.zeros(4_000, dtype), dtype) for dtype in ("int8", "uint8", "uint16", "int32", "int64", "bool", "complex64")),
    ([0, 1, 2] * 900, "int64"),
    ("a.wav", "expected floating point"),
    (None, "object"),
    ([[0.1, 0.2], [0.1]], "not to be read as an array"),
    (torch.zeros(4_000, requires_grad=True), "not to be read as an array"),
]
SHAPES = [
    (WAVE[None], r"wave 1: found shape \(1, 4000\), expected \(samples,\), mono"),
    (np.stack([WAVE, WAVE], axis=1), r"wave 1: found shape \(4000, 2\), expected \(samples,\), mono"),
    (WAVE[:0], "wave 1: found 0 samples, expected at least 400"),
    (WAVE[:399], "wave 1: found 399 samples, expected at least 400"),
    (0.5, r"found a number at place 1, expected waves; one alone is \[wave\]"),
]


@pytest.mark.parametrize(("given", "message"), [*NOT_SAMPLES, *SHAPES])
def test_what_is_no_wave_is_refused_by_its_number(plain, normalising, given, message):
    for model in (plain, normalising):
        with pytest.raises(ValueError, match=message) as error:
            model.inputs([WAVE, given])
        assert "1" in str(error.value)
        assert "\n" not in str(error.value)


def test_no_list_of_waves_is_refused(plain):
    for given, message in ((WAVE, r"one alone is \[wave\]"), ([], "found none"), ("a.wav", "wave 0: found <U1")):
        with pytest.raises(ValueError, match=message):
            plain.inputs(given)


@pytest.mark.parametrize(("given", "message"), NOT_SAMPLES)
def test_what_is_no_batch_is_refused(plain, given, message):
    rows = [given] if isinstance(given, list | str | None) else given[None]
    with pytest.raises(ValueError, match=f"waveform: .*{message}|waveform: not to be read"):
        plain(rows)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([4_000], r"found int64 of shape \(1,\), expected \(2,\) whole numbers"),
        ([4_000.0, 4_000.0], "found float64"),
        (np.ones((2, 4_000), bool), "found bool of shape"),
        ([4_000, 4_001], "found 4000 to 4001, expected 0 to the 4000 of a row"),
        ([-1, 4_000], "found -1 to 4000"),
    ],
)
def test_lengths_that_are_not_those_of_the_rows_are_refused(plain, counts, message):
    for given in (counts, np.asarray(counts)):
        with pytest.raises(ValueError, match=message):
            plain(np.stack([WAVE, WAVE]), given)


def test_a_model_is_a_python_object_like_others(plain):
    batch, headed = np.stack([WAVE, WAVE]), model_of("WavLMForCTC")
    expected = plain(batch).last_hidden_state
    for other in (_pickled(plain), copy.deepcopy(plain), copy.copy(plain)):
        np.testing.assert_array_equal(other(batch).last_hidden_state, expected)
    restored = _pickled(headed)
    np.testing.assert_array_equal(restored(batch).logits, headed(batch).logits)
    assert restored.weights.origin == headed.weights.origin
    assert {plain: 1, headed: 2}[plain] == 1
    assert len({plain, headed, plain.weights, headed.weights, headed.weights.task, plain}) == 5
    assert plain != headed
    assert plain == plain  # noqa: PLR0124


def _pickled(model):
    return pickle.loads(pickle.dumps(model))  # noqa: S301 our own bytes


def test_a_model_is_a_function_for_jax(plain, normalising):
    batch = np.stack([WAVE, WAVE * 0.5])
    for model in (plain, normalising):
        expected = model(batch, [4_000, 3_000])
        np.testing.assert_allclose(
            jax.jit(model)(batch, jnp.array([4_000, 3_000])).hidden_states, expected.hidden_states, atol=1e-5
        )
    slope = jax.grad(lambda wave: plain(wave).last_hidden_state.sum())(jnp.asarray(batch))
    assert np.isfinite(slope).all()
    assert slope.shape == batch.shape
    each = jax.vmap(lambda wave: plain(wave[None]).last_hidden_state[0])(batch)
    np.testing.assert_allclose(each, plain(batch).last_hidden_state, atol=1e-4)


def test_a_model_is_exported_for_any_number_of_rows(plain):
    (rows,) = export.symbolic_shape("rows")
    states = jax.jit(lambda waveform: plain(waveform).last_hidden_state)
    stored = export.export(states)(jax.ShapeDtypeStruct((rows, 4_000), jnp.float32)).serialize()
    batch = np.stack([WAVE, WAVE * 0.5, WAVE])
    found = export.deserialize(stored).call(batch)
    np.testing.assert_allclose(found, plain(batch).last_hidden_state, atol=1e-5)
