"""The CTC loss against torch's, value and gradient, on every small size; and where rounding is worst."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from wavlm_jax.tasks.ctc import ctc_loss, has_alignment

MOST = 20
VOCABULARY = 5


def torch_loss(logits, num_frames, labels, num_labels, blank, dtype=torch.float64):
    """torch's loss and its gradient, in double precision."""
    given = torch.tensor(logits, dtype=dtype, requires_grad=True)
    loss = torch.nn.functional.ctc_loss(
        torch.log_softmax(given, dim=-1).transpose(0, 1),
        torch.tensor(labels),
        torch.tensor(num_frames),
        torch.tensor(num_labels),
        blank=blank,
        reduction="none",
        zero_infinity=True,
    )
    loss.sum().backward()
    return loss.detach().numpy(), given.grad.numpy()


def our_loss(logits, num_frames, labels, num_labels, blank):
    def total(logits):
        loss = ctc_loss(logits, jnp.array(num_frames), jnp.array(labels), jnp.array(num_labels), blank)
        return loss.sum(), loss

    gradient, loss = jax.jit(jax.grad(total, has_aux=True))(jnp.array(logits, jnp.float32))
    return np.asarray(loss), np.asarray(gradient)


@pytest.mark.parametrize("blank", [0, 3])
def test_every_size_equals_torch(blank):
    """All T and L from 0 to 20, three texts each: random, of one character repeated, of two in turn."""
    generator = np.random.default_rng(blank)
    sizes = np.array([(t, n) for t in range(MOST + 1) for n in range(MOST + 1) for _ in range(3)])
    letters = np.array([letter for letter in range(VOCABULARY) if letter != blank])
    labels = letters[generator.integers(0, len(letters), (len(sizes), MOST))]
    labels[1::3] = labels[1::3, :1]
    labels[2::3, ::2], labels[2::3, 1::2] = letters[0], letters[1]
    logits = (2 * generator.standard_normal((len(sizes), MOST, VOCABULARY))).astype(np.float32)
    loss, gradient = our_loss(logits, sizes[:, 0], labels, sizes[:, 1], blank)
    expected, slope = torch_loss(logits, sizes[:, 0], labels, sizes[:, 1], blank)
    np.testing.assert_allclose(loss, expected, atol=1e-5, rtol=1e-6)
    np.testing.assert_allclose(gradient, slope, atol=1e-5, rtol=0)
    assert (loss >= 0).all()
    fits = np.asarray(has_alignment(jnp.array(sizes[:, 0]), jnp.array(labels), jnp.array(sizes[:, 1])))
    np.testing.assert_array_equal(fits, (expected > 0) | (sizes[:, 1] == 0) & (expected == 0))


def test_never_negative_nor_nan_when_the_text_is_certain_or_impossible():
    """optax#1771: a loss near 0 must not round below; a text against all odds must not overflow."""
    frames, texts = 200, np.tile(np.array([[1, 2, 3, 1, 2, 3, 4, 4]]), (3, 1))
    path = np.repeat(np.array([1, 2, 3, 1, 2, 3, 4, 0, 4, 0]), 20)
    logits = np.zeros((3, frames, VOCABULARY), np.float32)
    logits[0, np.arange(frames), path] = 30.0
    logits[1, np.arange(frames), path] = 300.0
    logits[2, :, 0] = 500.0
    counts = np.full(3, frames), np.full(3, 8)
    loss, gradient = our_loss(logits, counts[0], texts, counts[1], 0)
    assert np.isfinite(gradient).all()
    assert (loss >= 0).all()
    expected, slope = torch_loss(logits, counts[0], texts, counts[1], 0)
    np.testing.assert_allclose(loss, expected, atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, atol=1e-4)


def test_long_rows_stay_near_double_precision():
    """30 s of audio and a long text in float32."""
    generator = np.random.default_rng(1)
    logits = generator.standard_normal((2, 1500, 32)).astype(np.float32)
    labels = generator.integers(1, 32, (2, 400))
    counts = np.array([1500, 900]), np.array([400, 380])
    loss, gradient = our_loss(logits, counts[0], labels, counts[1], 0)
    expected, slope = torch_loss(logits, counts[0], labels, counts[1], 0)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, atol=3e-5)


def test_what_is_behind_the_end_of_a_row_does_not_matter():
    generator = np.random.default_rng(2)
    logits = generator.standard_normal((2, 12, VOCABULARY)).astype(np.float32)
    logits[1] = logits[0]
    logits[1, 7:] = 50 * generator.standard_normal((5, VOCABULARY))
    labels = np.array([[1, 2, 2, 0, 0], [1, 2, 2, 3, 4]])
    loss, gradient = our_loss(logits, np.array([7, 7]), labels, np.array([3, 3]), 0)
    assert loss[0] == loss[1]
    np.testing.assert_array_equal(gradient[0, :7], gradient[1, :7])
    np.testing.assert_array_equal(gradient[:, 7:], 0)
