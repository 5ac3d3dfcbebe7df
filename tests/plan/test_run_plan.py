"""The planner counts what it says: FLOPs by formula, traffic and messages of programs that are known, fit or not."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs.pretrain import base, base_plus, large
from pretrain.task import outline
from tests.support import tpu_programs
from wavlm_jax.extras import MissingExtraError
from wavlm_jax.plan import targets
from wavlm_jax.plan.cost import Module, executed, memory_traffic
from wavlm_jax.plan.program import Memory, loop_outputs, matrix_flops, program_text
from wavlm_jax.plan.report import changed, find_cures
from wavlm_jax.plan.targets import PlanTargetError, open_target, replicated_arrays
from wavlm_jax.settings import read_sections
from wavlm_jax.training.sharding import make_mesh
from wavlm_jax.training.start import RunSettings, make_builder
from wavlm_jax.training.task import Topology

ROOT = Path(__file__).parents[2]
SIDE, LAYERS = tpu_programs.SIDE, tpu_programs.LAYERS
MATRIX = SIDE * SIDE


def trace(config, split):
    """The longest batch's program of a config for the 8 devices of the tests: traced, never compiled."""
    values = json.loads(config.to_json())
    settings = read_sections(values, RunSettings)
    mesh = make_mesh(settings.mesh)
    task = outline(values, Topology.of(mesh))
    spec = task.stream(split).specs[-1]
    with jax.set_mesh(mesh):
        traced = make_builder(task, settings, mesh).trace(split, spec)
    return traced, spec.arrays["labels"].shape


def analytic_flops(model, rows, frames, clusters, final_dim, *, training, remat):
    """Matrix FLOPs of WavLM from its sizes (FACTS A2-A5, C2): a product and a sum are two, backward is twice forward.

    Recomputing a layer that ends in a sum leaves out its last product, which nothing in the backward pass reads.
    """
    pass_, width, inner = (3 if training else 1), model.hidden_size, model.intermediate_size
    length, channels, conv = 320 * frames + 80, 1, 0
    for number, (out, kernel, stride) in enumerate(
        zip(model.conv_dim, model.conv_kernel, model.conv_stride, strict=True)
    ):
        length = (length - kernel) // stride + 1
        passes = pass_ - (training and number == 0)  # nobody asks for the gradient of the waveform
        conv += passes * 2 * length * kernel * channels * out
        channels = out
    position = 2 * frames * model.num_conv_pos_embeddings * width * width // model.num_conv_pos_embedding_groups
    linear = 2 * frames * (4 * width * width + 2 * width * inner)
    attention = 2 * 2 * frames * frames * width
    again = {"none": (0, 0), "dots": (0, 1), "full": (1, 1)}[remat] if training else (0, 0)
    layer = (pass_ + again[0]) * linear + (pass_ + again[1]) * attention
    layer -= again[0] * model.do_stable_layer_norm * 2 * frames * width * inner
    head = pass_ * 2 * frames * (width * final_dim + final_dim * clusters)
    around = pass_ * (2 * frames * channels * width + position)
    return rows * (conv + around + model.num_hidden_layers * layer + head)


@pytest.mark.parametrize(
    ("module", "split", "remat"),
    [(base, "train", "dots"), (base_plus, "valid", "dots"), (large, "train", "full"), (base, "train", "none")],
    ids=["Base", "Base+ evaluated", "Large recomputed", "Base kept"],
)
def test_flops_of_a_step_are_those_of_the_formula(module, split, remat):
    config = module.get_config()
    config.compute.remat = remat
    config.compute.attention = "dense"
    traced, (rows, frames) = trace(config, split)
    expected = analytic_flops(
        config.model,
        rows,
        frames,
        config.labels.num_clusters,
        config.objective.final_dim,
        training=split == "train",
        remat=remat,
    )
    assert matrix_flops(traced.jaxpr, "tpu") == pytest.approx(expected, rel=0.03)


def test_loops_branches_and_gradients_of_convolutions_are_counted_as_often_as_they_run():
    x, w = jnp.ones((8, 64)), jnp.ones((5, 64, 64))

    def layers(w, x):
        return jax.lax.scan(lambda h, k: (jnp.tanh(h @ k), None), x, w)[0].sum()

    forward = 5 * 2 * 8 * 64 * 64
    assert matrix_flops(jax.make_jaxpr(layers)(w, x)) == forward
    assert matrix_flops(jax.make_jaxpr(jax.grad(layers, (0, 1)))(w, x)) == 3 * forward
    assert loop_outputs(jax.make_jaxpr(jax.grad(layers))(w, x)) >= 5 * 8 * 64 * 4
    branch = jax.make_jaxpr(lambda p: jax.lax.cond(p, lambda: x @ w[0], lambda: x @ w[0] @ w[1]))(True)
    assert matrix_flops(branch) == 2 * 2 * 8 * 64 * 64

    signal, kernel = jnp.ones((4, 401, 16)), jnp.ones((3, 16 // 2, 32))

    def convolve(signal, kernel):
        return jax.lax.conv_general_dilated(
            signal, kernel, (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=2
        ).sum()

    once = 2 * 4 * 200 * 32 * 3 * 8
    assert matrix_flops(jax.make_jaxpr(convolve)(signal, kernel)) == once
    assert matrix_flops(jax.make_jaxpr(jax.grad(convolve, (0, 1)))(signal, kernel)) == pytest.approx(3 * once, rel=0.02)


def test_what_another_platform_computes_does_not_count():
    """In loops and gradients as well; where no platform is said, the costliest of them."""
    x = jnp.ones((8, 8))

    def step(c, _):
        once, twice = (lambda c, x: c @ x), (lambda c, x: c @ x @ x)
        return jax.lax.platform_dependent(c, x, cpu=once, cuda=twice, default=lambda c, x: c + x), None

    forward = jax.make_jaxpr(lambda x: jax.lax.scan(step, x, None, length=3)[0].sum())(x)
    backward = jax.make_jaxpr(jax.grad(lambda x: jax.lax.scan(jax.checkpoint(step), x, None, length=3)[0].sum()))(x)
    once = 3 * 2 * 8**3
    assert [matrix_flops(forward, platform) for platform in ("tpu", "cpu", "cuda", None)] == [
        0,
        once,
        2 * once,
        2 * once,
    ]
    assert matrix_flops(backward, "tpu") == 0
    assert 0 < matrix_flops(backward, "cpu") < matrix_flops(backward, "cuda") == matrix_flops(backward)


def test_a_shard_mapped_product_counts_on_every_device():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    product = jax.shard_map(
        jnp.matmul, mesh=mesh, in_specs=(PartitionSpec("data"), PartitionSpec()), out_specs=PartitionSpec("data")
    )
    jaxpr = jax.make_jaxpr(product)(jnp.ones((64, 16)), jnp.ones((16, 32)))
    assert matrix_flops(jaxpr) == 2 * 64 * 16 * 32


def test_cpu_programs_are_read_too_and_loops_run_as_often_as_they_do():
    stack = jnp.ones((7, 256, 256))
    program = jax.jit(lambda x, ws: jax.lax.scan(lambda c, w: (c @ w, None), x, ws)[0])
    module = Module.parse(program.lower(stack[0], stack).compile().as_text())
    products = [placed.times for placed in executed(module) if placed.line.opcode in ("dot", "custom-call")]
    assert sum(products) == 7
    each = 256 * 256 * 4
    assert 7 * 3 * each <= memory_traffic(module) <= 7 * 8 * each  # product; slice and carry may be copied besides


@pytest.fixture(scope="module")
def counted():
    """Programs of `tpu_programs` as the TPU's compiler makes them."""
    command = [sys.executable, tpu_programs.__file__]
    environment = os.environ | {"XLA_FLAGS": ""}  # those of the tests are for CPUs, libtpu does not know them
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_traffic_of_known_programs(counted):
    assert counted["add"]["traffic"] == 3 * 4 * MATRIX
    assert counted["product"]["traffic"] == 3 * 2 * MATRIX
    assert counted["scan"]["traffic"] == pytest.approx(LAYERS * 2 * MATRIX, rel=0.05)  # the weights, each once
    assert counted["stacked"]["traffic"] == pytest.approx((1 + LAYERS) * 4 * MATRIX, rel=0.05)
    assert counted["scan"]["flops"] == LAYERS * 2 * 256 * MATRIX / 4


def test_a_gradient_is_reduced_once_over_all_devices(counted):
    (row,) = [row for row in counted["gradient"]["collectives"] if row["payload"] > 1000]
    assert (row["kind"], row["dtype"], row["axes"], row["group"]) == ("all-reduce", "bf16", ["data"], 4)
    assert (row["count"], row["payload"], row["sent"]) == (1, 2 * MATRIX, 2 * MATRIX * 1.5)
    assert row["links"] == "ICI x (no ring), y (no ring)"


def test_a_gathering_that_is_spread_over_products_counts_once(counted):
    """libtpu names it in each of the fusions that carry a part of it, whole."""
    (row,) = [row for row in counted["gathered"]["collectives"] if row["kind"] == "all-gather"]
    assert (row["count"], row["payload"]) == (2 * LAYERS, 2 * LAYERS * 2 * MATRIX)


def test_what_the_partitioner_replicates_is_found(counted):
    """libtpu is silent about it unless told otherwise, so a program that provokes it has to be found."""
    assert counted["gradient"]["replicated"] == []
    (array,) = counted["conflict"]["replicated"]
    mesh = r"\{mesh\['x'=2,'y'=2\], "  # as libtpu says it since jax 0.12
    given = rf"(\{{devices=\[2,1,2\]\S+|{mesh}\[\{{'y'\}}, \{{\}}, \{{'x'\}}\]\}})"
    wanted = rf"(\{{devices=\[1,4,1\]\S+|{mesh}\[\{{\}}, \{{'x', 'y'\}}, \{{\}}\]\}})"
    assert re.fullmatch(rf"f32\[8,16,8\]\S* of \S+ from {given} to {wanted}", array)


def test_what_else_is_printed_meanwhile_is_passed_on(capfd):
    """With the text of XLA's partitioner for CPUs."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    given, wanted = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("y", None, "x"), (None, ("x", "y"), None)))
    cube = jax.ShapeDtypeStruct((16, 16, 16), "float32", sharding=given)
    lowered = jax.jit(lambda x: 1 + jax.lax.with_sharding_constraint(jnp.sin(x), wanted)).lower(cube)
    with replicated_arrays() as found:
        lowered.compile()
        print("and something else", file=sys.stderr)
    assert len(found) == 1
    assert found[0].startswith("f32[8,16,4]")
    assert capfd.readouterr().err == "and something else\n"


def test_memory_is_the_compilers_own(counted):
    memory = counted["add"]["memory"]
    assert memory["fits"]
    assert memory["arguments"] == 2 * 4 * MATRIX
    assert memory["peak"] == 3 * 4 * MATRIX
    # in and out, and not what is on the chip meanwhile (VMEM: the carry of the loop, the sum over the devices)
    assert counted["stacked"]["memory"]["peak"] == pytest.approx((1 + LAYERS) * 4 * MATRIX, rel=0.01)
    assert counted["gradient"]["memory"]["peak"] == pytest.approx(2 * 2 * MATRIX + 1024 * SIDE * 2, rel=0.01)
    large = counted["too_large"]
    assert not large["fits"]
    assert large["peak"] > large["limit"] == int(15.75 * 2**30)


def plan(*flags):
    command = [sys.executable, "-m", "wavlm_jax.plan", "--config=configs/pretrain/demo.py", *flags]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


SMALL = (
    "--config.batch.row_multiple=16",
    "--config.batch.buckets=(32,)",
    "--config.data.evaluation_buckets=(32,)",
    "--config.train.eval_splits=('valid',)",
    "--config.model.hidden_size=64",
    "--config.model.intermediate_size=128",
    "--config.model.num_hidden_layers=2",
    "--config.model.conv_dim=(16,16,16,16,16,16,16)",
    "--config.model.num_conv_pos_embeddings=16",
    "--config.model.num_conv_pos_embedding_groups=1",
    "--config.compute.unroll=1",
)
"""libtpu compiles it in a quarter of the time that the demo's width takes."""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_run_is_planned_from_its_config_alone(dtype):
    """The real steps of a config whose corpus and labels do not exist, by the real compiler, without a TPU."""
    done = plan("--topology=v5e:2x2", "--json", f"--config.compute.dtype={dtype}", "--config.mesh.fsdp=1", *SMALL)
    assert done.returncode == 0, done.stderr[-3000:]
    made = json.loads(done.stdout)
    assert made["fits"]
    assert (made["devices"], made["processes"]) == (4, 1)
    assert {name.split()[0] for name in made["programs"]} == {"train", "valid", "labels"}
    assert [found["replicated"] for found in made["programs"].values()] == [[], [], []]
    train = next(found for name, found in made["programs"].items() if name.startswith("train"))
    assert train["memory"]["aliased"] >= made["state_bytes"] - 64  # the state is updated in place
    assert 0 < train["memory"]["peak"] < made["chip"]["memory"]
    kernels = [row for row in train["collectives"] if row["kind"] == "all-reduce" and row["payload"] > 100_000]
    assert {row["dtype"] for row in kernels} >= {{"bfloat16": "bf16", "float32": "f32"}[dtype]}
    assert not [row for row in train["collectives"] if row["kind"] == "all-gather"]
    hours = made["num_steps"] * made["step_seconds"] / 3600
    assert made["hours"] == pytest.approx(hours)
    assert made["chip_hours"] == pytest.approx(4 * hours)


def test_what_cannot_be_planned_is_one_message():
    done = plan("--topology=v5e:4x4")
    assert done.returncode == 2
    assert "make row_multiple (4) a multiple of 16 x 4 = 64" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v9:2x2", "found 'v9:2x2', expected one of v4, v5e, v5p, v6e, h100"),
        ("v5e:16", "v5e:16 has 1 axes, TPU v5e has 2"),
    ],
)
def test_a_topology_that_is_not_there_is_refused(topology, message):
    with pytest.raises(PlanTargetError, match=message):
        open_target(topology)


def test_no_slices_are_refused():
    with pytest.raises(PlanTargetError, match="--slices: found 0, expected 1 or more"):
        open_target("v5e:2x2", slices=0)


def test_the_nearest_settings_that_fit_are_one_change_each():
    """Memory as a formula instead of a compiler: full recomputation halves it, half the rows too, fsdp does nothing."""
    config = {
        "compute": {"remat": "none"},
        "batch": {"seconds_per_device": 80.0},
        "mesh": {"fsdp": 1},
        "model": {"hidden_size": 64},
    }

    def attempt(tried):
        if tried["batch"]["seconds_per_device"] < 30:
            raise ValueError("a row of 30 s does not fit into that")
        gib = 40 / {"none": 1, "dots": 1.5, "full": 2}[tried["compute"]["remat"]]
        peak = int(gib * tried["batch"]["seconds_per_device"] / 80)
        return Memory(limit=limit, peak=peak, fits=peak <= limit, arguments=0, aliased=0, temporaries=0, kept=0)

    limit = 20
    cures = find_cures(config, attempt, devices_a_slice=8)
    assert [cure.flags() for cure in cures] == ["--config.compute.remat=full", "--config.batch.seconds_per_device=40.0"]
    limit = 10
    (both,) = find_cures(config, attempt, devices_a_slice=8)
    assert both.flags() == "--config.compute.remat=full --config.batch.seconds_per_device=40.0"
    limit = 5
    assert find_cures(config, attempt, devices_a_slice=8) == []
    assert changed(config, {"mesh.fsdp": 4})["mesh"] == {"fsdp": 4}
    assert config["mesh"] == {"fsdp": 1}


def test_a_program_that_jaxlib_cannot_read_is_read_from_the_dump(tmp_path):
    """So Large on v5p: libtpu puts a scatter onto the sparse cores, by instructions that jaxlib does not know."""

    class Unreadable:
        def as_text(self) -> str:
            raise jax.errors.JaxRuntimeError("INTERNAL: async-update instruction should have 1 operands but sees 3")

    (tmp_path / "module_0000.jit_step.cl_1.after_optimizations.txt").write_text("HloModule step")
    assert program_text(Unreadable(), tmp_path) == "HloModule step"


def test_gpus_need_the_plugin_and_say_so(monkeypatch):
    monkeypatch.setattr(targets, "installed", lambda _: False)
    with pytest.raises(PlanTargetError, match="pip install --no-deps jax-cuda12-plugin=="):
        open_target("h100:8")
    with pytest.raises(PlanTargetError, match="just h100:N"):
        open_target("h100:8", slices=2)
    with pytest.raises(MissingExtraError, match=r"its compiler, not a TPU.*wavlm-jax\[plan\]"):
        open_target("v5e:2x2")
