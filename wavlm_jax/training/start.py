"""The sections of a config that belong to the training tower, in one dataclass.

From a task and a workdir to a state that can be trained: own checkpoint, else `init`, else scratch.
"""

import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from wavlm_jax.shapes import Params, StepKey
from wavlm_jax.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    CheckpointSettings,
    Manifest,
    RunRecord,
    describe_arrays,
    difference,
)
from wavlm_jax.training.hosts import from_first
from wavlm_jax.training.metric_writers import Jsonl, Metrics, MetricsSettings, open_writers, say
from wavlm_jax.training.optim import OptimSettings, Rules, adam, check_rules, joined, make_schedule, without_given
from wavlm_jax.training.sharding import AxesTable, MeshSettings, parameter_shardings, path_name, thin_shards
from wavlm_jax.training.step import Builder, TrainState, abstract_state, init_key, shard_state
from wavlm_jax.training.task import Task


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How long, and what happens on the way."""

    num_steps: int
    eval_every: int
    """Steps; the last step always has an evaluation."""
    eval_splits: tuple[str, ...]
    max_nonfinite_in_a_row: int
    """So many steps in a row that change nothing stop the run."""
    compilation_cache: str | None
    """Folder of compiled programs, relative to the workdir; None: compiled anew at every start."""
    max_step_seconds: float
    """A step, a wait for data or an evaluation batch that takes longer ends the process (`watchdog`)."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "eval_every", "max_nonfinite_in_a_row", "max_step_seconds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected 1 or more")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The sections of the config that belong to the training tower; `settings.read_sections` fills it."""

    seed: int
    train: LoopSettings
    optim: OptimSettings
    checkpoint: CheckpointSettings
    mesh: MeshSettings
    metrics: MetricsSettings


@dataclass(frozen=True)
class Layout:
    """Shapes and places of a train state that does not exist yet."""

    shardings: Mapping[str, NamedSharding]
    """Parameter path -> where it lives."""
    abstract: TrainState
    optimizer: optax.GradientTransformation
    mesh: Mesh
    freeze: Rules
    """Of the config and of the task; the optimizer knows them too."""

    @property
    def num_bytes(self) -> int:
        """Of the whole state, which is also what a checkpoint takes on disk."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.abstract))


@dataclass(frozen=True)
class Start:
    """Where training begins."""

    state: TrainState
    step: int
    record: RunRecord
    elapsed: float
    """Seconds that earlier sessions took."""
    mode: str
    """For people: "from scratch", "resumed at step 100"."""


def plan_layout(
    task: Task, optimizer: optax.GradientTransformation, mesh: Mesh, table: AxesTable, seed: int, freeze: Rules
) -> Layout:
    """Shapes by abstract evaluation, places by the strict table; no memory is taken.

    Raises:
        ValueError: a parameter that the table does not cover exactly once, or a frozen one that does not exist.

    """
    key = jax.eval_shape(lambda: init_key(seed))
    params = jax.eval_shape(task.init, key)  # the function itself: `begin` finds it traced
    shardings = parameter_shardings(params, table, mesh)
    check_rules(freeze, shardings)
    return Layout(shardings, abstract_state(params, optimizer, shardings, mesh), optimizer, mesh, freeze)


def lay_out(task: Task, settings: RunSettings, mesh: Mesh, table: AxesTable) -> Layout:
    """The layout that a config asks for; raises as `plan_layout` does."""
    freeze = joined(settings.optim.freeze, task.freeze)
    schedule = make_schedule(settings.optim, settings.train.num_steps)
    optimizer = adam(schedule, settings.optim.adam, freeze, settings.optim.groups)
    return plan_layout(task, optimizer, mesh, table, settings.seed, freeze)


def make_builder(task: Task, settings: RunSettings, layout: Layout, key: StepKey) -> Builder:
    """What traces the programs of a run: the loop's, and the planner's (`wavlm_jax.plan`).

    Args:
        task: what is trained.
        settings: how.
        layout: of `lay_out`.
        key: the root key of the run.

    """
    return Builder(
        task=task,
        state=layout.abstract,
        mesh=layout.mesh,
        optimizer=layout.optimizer,
        schedule=make_schedule(settings.optim, settings.train.num_steps),
        max_grad_norm=settings.optim.max_grad_norm,
        freeze=layout.freeze,
        key=key,
    )


def begin(task: Task, layout: Layout, checkpoints: Checkpoints, *, seed: int, config: Mapping[str, Any]) -> Start:
    """The state to train from, by the first that applies.

    1. The newest checkpoint of this workdir that verifies; fingerprints must agree, config changes are printed.
    2. What `task.initial_params` makes of fresh parameters: converted weights, an earlier run.
    3. Fresh parameters, when it gives back what it got.

    Raises:
        CheckpointError: there are checkpoints, but none can be used for this config and data.
        ValueError: initial parameters of another tree, shape or dtype.

    """
    manifest = checkpoints.latest()
    if manifest is not None:
        return _resume(manifest, task, layout, checkpoints, config)
    abstract = layout.abstract.params
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    fresh = jax.jit(task.init, out_shardings=places)(init_key(seed))
    params = task.initial_params(fresh)
    mode, given = "from scratch", set[str]()
    if params is not fresh:
        mode, given = "from given parameters", _given(params, fresh)
        if lines := difference(describe_arrays(abstract), describe_arrays(params)):
            raise ValueError("config.init: the parameters do not fit the model:\n  " + "\n  ".join(lines))
        params = _place(params, layout.shardings)
    run_id = from_first("run id", secrets.token_hex(8))
    record = RunRecord(run_id=run_id, config=config, fingerprints=task.fingerprints)
    state = shard_state(params, layout.optimizer, layout.mesh)
    thaws = without_given(layout.freeze, state.opt_state.thaws, given)
    return Start(replace(state, opt_state=state.opt_state._replace(thaws=thaws)), 0, record, 0.0, mode)


def _given(params: Params, fresh: Params) -> set[str]:
    """Paths of the parameters that are not the very arrays which were initialised."""
    born = {id(leaf) for leaf in jax.tree.leaves(fresh)}
    return {path_name(path) for path, leaf in jax.tree_util.tree_leaves_with_path(params) if id(leaf) not in born}


def _resume(
    manifest: Manifest, task: Task, layout: Layout, checkpoints: Checkpoints, config: Mapping[str, Any]
) -> Start:
    for name in sorted({*manifest.fingerprints, *task.fingerprints}):
        before, now = manifest.fingerprints.get(name), task.fingerprints.get(name)
        if before != now:
            raise CheckpointError(
                f"{checkpoints.place}: the run was trained with {name} {before}, now it is {now}; "
                f"bring the old data back, or start over in another workdir"
            )
    for line in config_changes(manifest.config, config):
        say(f"config changed since step {manifest.step}: {line}")
    state = checkpoints.restore(manifest, layout.abstract)
    record = RunRecord(run_id=manifest.run_id, config=config, fingerprints=task.fingerprints)
    return Start(state, manifest.step, record, manifest.elapsed, f"resumed at step {manifest.step}")


def config_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for every leaf that differs between two resolved configs."""
    old, new = _leaves(json.loads(json.dumps(before))), _leaves(json.loads(json.dumps(now)))
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    return [f"{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}" for name in names]


def _leaves(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result = {}
    for name, value in config.items():
        inner = _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
        result.update(inner)
    return result


def _place(params: Params, shardings: Mapping[str, NamedSharding]) -> Params:
    """Host or device parameters, the same on all hosts, onto their shardings."""

    def place(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        sharding = shardings[path_name(path)]
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree_util.tree_map_with_path(place, params)


def summarize(task: Task, layout: Layout, start: Start, workdir: str) -> str:
    """What is about to happen, for people: mode, devices, batch arithmetic, parameters and where they live."""
    mesh = layout.mesh
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    kind = jax.devices()[0].device_kind
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    precision = jax.config.values["jax_default_matmul_precision"] or "the device's default"
    lines = [
        f"{workdir}: training {start.mode}, run {start.record.run_id}",
        f"{jax.device_count()} x {kind} on {jax.process_count()} hosts, mesh {sizes}",
        f"float32 matrix products: precision {precision}",
    ]
    for spec in task.stream("train").specs:
        rows = next(iter(spec.arrays.values())).shape[0]
        seconds = spec.seconds / (shards * spec.microbatches)
        lines.append(
            f"batch {spec.name}: {seconds:.1f} s/device x {shards} devices x {spec.microbatches} micro-batches "
            f"= {spec.seconds:.1f} s of audio per update ({rows} rows)"
        )
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(layout.abstract.params))
    lines.append(f"{count:,} parameters, train state {layout.num_bytes / 2**20:,.1f} MiB")
    if complaint := thin_shards(layout.abstract.params, layout.shardings):
        lines.append(f"warning: {complaint}")
    return "\n".join(lines)


def open_metrics(settings: MetricsSettings, workdir: Path, start: Start, num_steps: int) -> Metrics:
    """Process 0's writers, which go on where `start` does; none elsewhere."""
    if jax.process_index() != 0:
        return Metrics({})
    record = start.record
    return Metrics(
        open_writers(
            settings, workdir, resume=start.step, num_steps=num_steps, run_id=record.run_id, config=record.config
        )
    )


def open_nonfinite(workdir: Path, start: Start) -> Jsonl:
    """Where this process names the rows of steps that were not finite."""
    index = jax.process_index()
    return Jsonl(workdir / ("nonfinite.jsonl" if index == 0 else f"nonfinite-{index}.jsonl"), start.step)
