"""The TPU kernel: interpreted, it equals "dense" with all gradients; TPU compilers take it as it is."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from tests.support.attention_cases import (
    DROP,
    assert_agree,
    compare_under_a_mesh,
    compare_with_dense,
    inputs_and_direction,
    ragged,
    run,
    values_and_gradients,
)
from tests.support.torch_twins import small_config
from wavlm_jax.config import Compute
from wavlm_jax.model import tpu_attention
from wavlm_jax.model.fused_attention import NO_DROPOUT
from wavlm_jax.model.wavlm import WavLM
from wavlm_jax.training.sharding import RULES

RACES = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, random_seed=3)


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels run on this CPU, as a TPU core would run them; with memory that starts as NaN."""

    def interpret(params):
        monkeypatch.setattr(tpu_attention.pl, "pallas_call", partial(pl.pallas_call, interpret=params))

    return interpret


compare = partial(compare_with_dense, "pallas_tpu", head_dim=64)


def test_kernel_equals_dense_and_no_two_threads_touch_the_same_memory(interpreted):
    """Several query blocks, ragged rows, one without a valid frame, dropout; race detection on."""
    interpreted(RACES)
    compare(200, mask=ragged(200), drop=DROP)
    assert interpreter.races is not None
    assert not interpreter.races.races_found


@pytest.mark.parametrize(("shared", "racing"), [(True, True), (False, False)])
def test_race_detection_tells_a_race_from_none(shared, racing):
    """Two threads write one block, then each its own: what the test above relies on can fail."""

    def copy(source, result):
        result[...] = source[...]

    own = pl.BlockSpec((8, 128), lambda i: (i, 0))
    call = pl.pallas_call(
        copy,
        grid=(2,),
        in_specs=[own],
        out_specs=pl.BlockSpec((8, 128), lambda _: (0, 0)) if shared else own,
        out_shape=jax.ShapeDtypeStruct((16, 128), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=RACES,
    )
    try:
        call(jnp.ones((16, 128))).block_until_ready()
        found = interpreter.races.races_found
    except jax.errors.JaxRuntimeError as error:  # what JAX from 0.12 on does with one
        found = "RACE DETECTED" in str(error)
    assert found == racing


@settings(max_examples=4, deadline=None)
@given(num_frames=st.integers(1, 300), masked=st.booleans(), dropping=st.booleans(), with_bias=st.booleans())
def test_kernel_equals_dense_for_any_length(num_frames, masked, dropping, with_bias):
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        mask, drop = ragged(num_frames) if masked else None, DROP if dropping else NO_DROPOUT
        compare(num_frames, mask=mask, drop=drop, with_bias=with_bias)


@pytest.mark.parametrize("head_dim", [64, 16, 128])
def test_kernel_in_bfloat16(interpreted, head_dim):
    """Heads that fill a register by two, all heads in one narrow block, one head a block."""
    interpreted(pltpu.InterpretParams())
    compare(140, head_dim=head_dim, mask=ragged(140), drop=DROP, dtype=jnp.bfloat16, tolerance=2e-2)


def test_kernel_under_a_mesh_equals_one_device(interpreted):
    """Rows over data and fsdp, heads over tensor: the profile's gradient is summed, every other one stays in place."""
    interpreted(pltpu.InterpretParams())
    compare_under_a_mesh("pallas_tpu")


def test_rows_that_the_mesh_does_not_divide_are_computed_everywhere(interpreted):
    interpreted(pltpu.InterpretParams())
    inputs, direction = inputs_and_direction(20)
    dense = values_and_gradients(run("dense", True, None, NO_DROPOUT), inputs, direction)
    mesh = jax.make_mesh((2, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        assert_agree(values_and_gradients(run("pallas_tpu", True, None, NO_DROPOUT), inputs, direction), dense, 1e-5)


def test_model_with_the_kernel_equals_the_model_without(interpreted):
    interpreted(True)  # as plain JAX: with newer JAX, Flax does not scan over the TPU interpreter's callbacks
    config = small_config(padding="exact", attention_dropout=0.2)
    model = WavLM(config)
    waveform, lengths = jax.random.normal(jax.random.key(1), (2, 5000)), jnp.array([5000, 3000])
    params = jax.jit(model.init)(jax.random.key(0), waveform)["params"]
    keys = jax.random.key(2), jax.random.split(jax.random.key(3), 2)

    def output(attention):
        chosen = WavLM(config, Compute(attention=attention))
        given = {"params": params}
        apply = jax.jit(lambda: chosen.apply(given, waveform, lengths, step_key=keys[0], row_keys=keys[1]))
        return apply().last_hidden_state

    np.testing.assert_allclose(output("pallas_tpu"), output("dense"), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("remat", "times"), [("none", 1), ("dots", 1), ("full", 2)])
def test_only_full_recomputation_runs_the_forward_kernel_again(remat, times):
    model = WavLM(small_config(padding="exact"), Compute(attention="pallas_tpu", remat=remat))
    waveform = jnp.zeros((2, 5000))
    params = jax.eval_shape(model.init, jax.random.key(0), waveform)["params"]
    loss = lambda params: model.apply({"params": params}, waveform).last_hidden_state.sum()  # noqa: E731
    program = str(jax.make_jaxpr(jax.grad(loss))(params))
    calls = [program.count(f"name=toeplitz_attention_{name}") for name in ("forward", "backward")]
    assert calls == [times, 1]


def compiled(targets):
    """What tests/support/tpu_kernel_compile.py says of each target."""
    command = [sys.executable, str(Path(__file__).parents[1] / "support" / "tpu_kernel_compile.py")]
    environment = os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "XLA_FLAGS": ""}
    done = subprocess.run(
        [*command, *targets], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(each["device"], each["chosen"], each["calls"]) for each in found] == [
        (target.split(":")[0], "pallas_tpu", 2) for target in targets
    ]
    return found


def test_tpu_compilers_take_the_kernels():
    """What interprets well may still be refused by Mosaic: compiled for four kinds of TPU, in a process of its own."""
    targets = [f"{kind}:2:256:bfloat16" for kind in ("v5e", "v5p", "v6e", "v4")] + ["v5e:2:200:float32"]
    assert max(each["temp"] for each in compiled(targets)) < 2 * 12 * 256 * 256 * 4, "as much as all logits"


@pytest.mark.slow
@pytest.mark.parametrize(
    "target",
    ["v5e:1:5120:bfloat16", "v5e:1:5120:float32", "v5p:1:5120:float32", "v6e:1:5120:float32", "v4:1:1024:float32"],
)
def test_tpu_compilers_take_the_longest_rows(target):
    """As long as `auto` chooses the kernel for them, its blocks fit in fast memory."""
    compiled([target])
