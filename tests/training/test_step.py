"""The step depends on the global batch alone; steps that are not finite change nothing; the state is donated."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh

from tests.support import toy_task
from wavlm_jax.training.metric_writers import Totals
from wavlm_jax.training.sharding import MESH_AXES, place
from wavlm_jax.training.start import make_builder
from wavlm_jax.training.step import (
    OutOfMemory,
    check_spec,
    init_key,
    out_of_memory_explained,
    root_key,
    split_rows,
)
from wavlm_jax.training.task import Task

ROWS, SEED = 32, 3


def mesh_of(*sizes: int) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


class Trainer:
    """A state and its compiled programs on a mesh."""

    def __init__(self, sizes: tuple[int, int, int], task: Task, *splits: str, b1: float = 0.9) -> None:
        settings = toy_task.make_settings()
        adam = dataclasses.replace(settings.optim.adam, b1=b1)
        optim = dataclasses.replace(settings.optim, schedule="constant", warmup_steps=0, max_grad_norm=None, adam=adam)
        self.task, self.mesh = task, mesh_of(*sizes)
        with jax.set_mesh(self.mesh):
            builder = make_builder(task, dataclasses.replace(settings, optim=optim), self.mesh, toy_task.TABLE)
            places = jax.tree.map(lambda leaf: leaf.sharding, builder.state.params)
            self.state = builder.fresh(jax.jit(task.init, out_shardings=places)(init_key(settings.seed)))
            self.programs = builder.compile({split: task.stream(split).specs[1:] for split in ("train", *splits)})

    def step(self, number: int, **changes: np.ndarray):
        spec, arrays = self.task.stream("train").global_batch(number)
        assert spec.name == "long"
        with jax.set_mesh(self.mesh):
            batch = place(arrays | changes, spec.arrays, self.mesh, spec.name)
            self.state, report = self.programs.executables["train"]["long"](self.state, batch)
        return jax.device_get(report)


@pytest.fixture(scope="module")
def oracle():
    """Gradient (Adam's first moment with b1 = 0), report and state after two steps: one device, one micro-batch."""
    return two_steps((1, 1, 1), 1)


def two_steps(sizes: tuple[int, int, int], microbatches: int):
    trainer = Trainer(sizes, toy_task.make_task(ROWS, microbatches), b1=0.0)
    reports = [trainer.step(1), trainer.step(3)]
    return jax.device_get(trainer.state.opt_state["mu"]), reports, jax.device_get(trainer.state)


@pytest.mark.parametrize(
    ("sizes", "microbatches"),
    [
        ((1, 1, 1), 8),
        ((8, 1, 1), 1),
        ((2, 1, 1), 4),
        ((4, 1, 1), 2),
        ((1, 8, 1), 2),
        ((1, 1, 8), 2),
        ((2, 2, 2), 1),
        ((2, 2, 2), 4),
    ],
)
def test_loss_and_gradient_do_not_depend_on_devices_or_accumulation(oracle, sizes, microbatches) -> None:
    expected, expected_reports, expected_state = oracle
    found, reports, state = two_steps(sizes, microbatches)
    for one, other in zip(reports, expected_reports, strict=True):
        np.testing.assert_allclose(one.sums.loss, other.sums.loss, rtol=1e-6)
        np.testing.assert_allclose(one.values["grad_norm"], other.values["grad_norm"], rtol=1e-6)
        assert one.sums.count == other.sums.count > 0
        assert one.sums.metrics["accuracy"] == other.sums.metrics["accuracy"]
        np.testing.assert_array_equal(one.sums.histograms["labels"], other.sums.histograms["labels"])
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(a - b).max() <= 1e-6 * np.abs(b).max(), path
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected_state.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_gradient_is_that_of_the_mean_over_counted_frames() -> None:
    task = toy_task.make_task(ROWS)
    _, arrays = task.stream("train").global_batch(1)
    batch = {name: jnp.asarray(array) for name, array in arrays.items()} | {"row": jnp.arange(ROWS)}
    key = jax.random.fold_in(root_key(SEED), 0)

    def mean(params):
        sums = task.loss(params, batch, key)
        return sums.loss / sums.count

    grads = jax.grad(mean)(task.init(init_key(SEED)))
    trainer = Trainer((1, 1, 1), task, b1=0.0)
    trainer.step(1)
    for a, b in zip(jax.tree.leaves(trainer.state.opt_state["mu"]), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def kept(state) -> str:
    """Hash of what a skipped step leaves alone."""
    return toy_task.digest((state.params, state.opt_state, state.updates, state.thaws))


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return Trainer((4, 2, 1), toy_task.make_task(ROWS, 2), "valid")


def test_a_step_that_is_not_finite_changes_nothing_but_counters(trainer: Trainer) -> None:
    trainer.step(1)
    before = jax.device_get(trainer.state)
    _, arrays = trainer.task.stream("train").global_batch(1)
    waveform, num_samples = arrays["waveform"].copy(), arrays["num_samples"].copy()
    waveform[5, 0], num_samples[5] = np.nan, waveform.shape[1]
    for expected in (1, 2):
        report = trainer.step(1, waveform=waveform, num_samples=num_samples)
        assert not report.finite
        assert (report.skipped, report.skipped_in_a_row) == (expected, expected)
    after = jax.device_get(trainer.state)
    assert after.step == before.step + 2
    assert kept(after) == kept(before)
    report = trainer.step(3)
    assert report.finite
    assert (report.skipped, report.skipped_in_a_row) == (2, 0)
    assert toy_task.digest(jax.device_get(trainer.state.params)) != toy_task.digest(before.params)


def test_an_infinite_gradient_of_a_finite_loss_is_skipped_too() -> None:
    def loss(params, batch, key):
        sums = toy_task.loss(params, batch, key)
        return sums.replace(loss=sums.loss + 0 * jnp.sqrt(0 * params["head"].sum()))

    broken = Trainer((1, 1, 1), toy_task.make_task(ROWS, loss=loss))
    report = broken.step(1)
    assert np.isfinite(report.sums.loss)
    assert not report.finite


def test_a_batch_without_counted_frames_has_no_gradient(trainer: Trainer) -> None:
    report = trainer.step(1, num_samples=np.zeros(ROWS, np.int32))
    assert report.finite
    assert report.sums.count == report.values["grad_norm"] == 0
    totals = Totals()
    totals.add(report.sums)
    assert totals.means() == {}


def test_the_whole_state_is_donated() -> None:
    single = Trainer((1, 1, 1), toy_task.make_task(ROWS))
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(single.state))
    assert single.programs.executables["train"]["long"].memory_analysis().alias_size_in_bytes == num_bytes
    before = single.state
    single.step(1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))


def test_evaluation_leaves_filler_rows_out_and_repeats_to_the_bit(trainer: Trainer) -> None:
    spec, arrays = trainer.task.stream("valid").global_batch(1)
    garbage = {name: array.copy() for name, array in arrays.items()}
    garbage["waveform"][-1], garbage["labels"][-1] = 1e6, 0
    evaluate, params = trainer.programs.executables["valid"]["long"], trainer.state.params
    with jax.set_mesh(trainer.mesh):
        batches = [place(each, spec.arrays, trainer.mesh, "long") for each in (arrays, arrays, garbage)]
        sums = [jax.device_get(evaluate(params, batch)) for batch in batches]
    assert arrays["weight"][-1] == 0
    assert toy_task.digest(sums[0]) == toy_task.digest(sums[1]) == toy_task.digest(sums[2])


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=12, deadline=None)
def test_the_split_keeps_groups_whole_and_rows_on_their_device(shards, microbatches, group, multiple) -> None:
    rows = shards * microbatches * group * multiple
    with jax.set_mesh(mesh_of(1, 1, 1)):
        parts = np.asarray(split_rows({"row": jnp.arange(rows)}, microbatches, group)["row"])
    assert parts.shape == (microbatches, rows // microbatches)
    assert sorted(parts.ravel()) == list(range(rows))
    for part in parts:
        groups = part.reshape(-1, group)
        assert (groups[:, 0] % group == 0).all()
        assert (groups == groups[:, :1] + np.arange(group)[None, :]).all()
        devices = np.repeat(np.arange(shards), len(part) // shards)
        assert (part // (rows // shards) == devices).all()  # nothing moves between devices


def test_rows_that_cannot_be_split_are_named() -> None:
    spec = toy_task.Stream(24, 2).specs[0]
    with pytest.raises(ValueError, match=r"batch short: 24 rows; expected a multiple of 32 = 2 micro-batches x groups"):
        check_spec(spec, 2, 8)
    arrays = dict(spec.arrays) | {"id": jax.ShapeDtypeStruct((8,), np.int32)}
    with pytest.raises(ValueError, match=r"arrays have \[8, 24\] rows"):
        check_spec(spec._replace(arrays=arrays), 2, 8)


def test_a_compilation_out_of_memory_says_what_helps() -> None:
    message = r"(?s)batch\.seconds_per_device .* compute\.remat .*mesh\.fsdp"
    with (
        pytest.raises(OutOfMemory, match=message),
        out_of_memory_explained("batch long"),
    ):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), out_of_memory_explained("batch long"):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
