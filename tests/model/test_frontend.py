"""The strided convolutions, both ways to compute them, against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wavlm_jax.model.frontend import direct_convolution, patch_convolution, strided_convolution

IMPLEMENTATIONS = [strided_convolution, patch_convolution, direct_convolution]


def arrays(length, taps, channels=3, features=5):
    generator = np.random.default_rng(0)
    x = generator.standard_normal((2, length, channels)).astype(np.float32)
    kernel = generator.standard_normal((taps, channels, features)).astype(np.float32)
    return x, kernel


def torch_convolution(x, kernel, stride):
    """torch's conv1d in our layout."""
    return torch.nn.functional.conv1d(x.transpose(1, 2), kernel.permute(2, 1, 0), stride=stride).transpose(1, 2)


@pytest.mark.parametrize("convolution", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("taps", "stride", "length"), [(10, 5, 10), (10, 5, 64), (3, 2, 31), (3, 2, 32), (2, 2, 9), (4, 1, 9)]
)
def test_convolution_and_its_gradients_equal_torch(convolution, taps, stride, length):
    x, kernel = arrays(length, taps)
    theirs = [torch.tensor(array, requires_grad=True) for array in (x, kernel)]
    output = torch_convolution(*theirs, stride)
    direction = np.random.default_rng(1).standard_normal(output.shape).astype(np.float32)
    (output * torch.tensor(direction)).sum().backward()
    ours, pull = jax.vjp(lambda a, b: convolution(a, b, stride), jnp.asarray(x), jnp.asarray(kernel))
    np.testing.assert_allclose(ours, output.detach().numpy(), atol=1e-5, rtol=0)
    for gradient, wanted in zip(pull(jnp.asarray(direction)), theirs, strict=True):
        np.testing.assert_allclose(gradient, wanted.grad.numpy(), atol=2e-5, rtol=0)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 40))
def test_any_geometry_gives_as_many_frames_as_torch(taps, stride, extra):
    x, kernel = arrays(taps + extra, taps, channels=2, features=2)
    ours = patch_convolution(jnp.asarray(x), jnp.asarray(kernel), stride)
    assert ours.shape[1] == extra // stride + 1
    expected = torch_convolution(torch.tensor(x), torch.tensor(kernel), stride)
    np.testing.assert_allclose(ours, expected.numpy(), atol=1e-5, rtol=0)
