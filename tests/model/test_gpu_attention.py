"""The GPU kernels: interpreted, they equal "dense" with all gradients; JAX lowers them to Triton."""

import warnings
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from tests.support.attention_cases import (
    DROP,
    compare_under_a_mesh,
    compare_with_dense,
    inputs_and_direction,
    ragged,
    run,
    values_and_gradients,
)
from tests.support.torch_twins import small_config
from wavlm_jax.config import Compute
from wavlm_jax.model import gpu_attention
from wavlm_jax.model.fused_attention import NO_DROPOUT
from wavlm_jax.model.wavlm import WavLM


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    """The kernels run on this CPU, one grid step after the other."""
    names = {name: getattr(pl, name) for name in dir(pl)}
    with pytest.MonkeyPatch.context() as patch:
        stand_in = SimpleNamespace(**names | {"pallas_call": partial(pl.pallas_call, interpret=True)})
        patch.setattr(gpu_attention, "pl", stand_in)
        yield


compare = partial(compare_with_dense, "pallas_gpu", head_dim=16)


def test_kernels_equal_dense():
    """Several query blocks, ragged rows, one without a valid frame, dropout."""
    compare(200, mask=ragged(200), drop=DROP)


@settings(max_examples=4, deadline=None)
@given(num_frames=st.integers(2, 300), masked=st.booleans(), dropping=st.booleans(), with_bias=st.booleans())
def test_kernels_equal_dense_for_any_length(num_frames, masked, dropping, with_bias):
    mask, drop = ragged(num_frames) if masked else None, DROP if dropping else NO_DROPOUT
    compare(num_frames, mask=mask, drop=drop, with_bias=with_bias)


def test_kernels_of_one_frame():
    """Its only probability is 1 whatever query and key are; dense finds their gradients to be exactly 0."""
    inputs, direction = inputs_and_direction(1, 16)
    dense, kernel = (
        values_and_gradients(run(name, True, None, NO_DROPOUT), inputs, direction) for name in ("dense", "pallas_gpu")
    )
    for ours, theirs in zip(kernel, dense, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


def test_kernels_in_bfloat16():
    compare(140, head_dim=64, mask=ragged(140), drop=DROP, dtype=jnp.bfloat16, tolerance=2e-2)


def test_kernels_under_a_mesh_equal_one_device():
    """Rows over data and fsdp, heads over tensor: the profile's gradient is summed, every other one stays in place."""
    compare_under_a_mesh("pallas_gpu")


def lowered(function, *arguments):
    """The program that JAX hands to XLA's compiler for an H100, which need not be there."""
    h100 = AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    mesh = AbstractMesh((1, 1, 1), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3, abstract_device=h100)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), jax.sharding.use_abstract_mesh(mesh):
        patch.setattr(gpu_attention, "pl", pl)
        warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_jax_lowers_the_kernels_to_triton(dtype):
    """XLA's own compiler for GPUs comes with JAX's CUDA plugin, which the tests do without."""
    inputs, direction = inputs_and_direction(300, 64, jnp.dtype(dtype))
    text = lowered(partial(values_and_gradients, run("pallas_gpu", True, ragged(300), DROP)), inputs, direction)
    for name in ("forward", "keys", "queries", "pairs"):
        assert f"toeplitz_attention_{name}" in text


@pytest.mark.parametrize(("remat", "times"), [("none", 1), ("dots", 1), ("full", 2)])
def test_only_full_recomputation_runs_the_forward_kernel_again(remat, times):
    model = WavLM(small_config(padding="exact"), Compute(attention="pallas_gpu", remat=remat))
    waveform = jnp.zeros((2, 5000))
    params = jax.eval_shape(model.init, jax.random.key(0), waveform)["params"]
    loss = lambda params: model.apply({"params": params}, waveform).last_hidden_state.sum()  # noqa: E731
    program = lowered(jax.grad(loss), params)
    calls = [program.count(f'name = "toeplitz_attention_{name}"') for name in ("forward", "keys", "queries", "pairs")]
    assert calls == [times, 1, 1, 1]
