"""How a run starts: its settings, its programs' `Builder`, and the state to train from.

The state is that of the workdir's own checkpoint, else what `init` of the config says, else fresh.
"""

import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from wavlm_jax.shapes import Params
from wavlm_jax.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    CheckpointSettings,
    Manifest,
    RunRecord,
    describe_arrays,
    difference,
)
from wavlm_jax.training.hosts import broadcast_one_to_all
from wavlm_jax.training.metric_writers import MetricsSettings, say
from wavlm_jax.training.optim import OptimSettings, check_freeze, make_optimizer
from wavlm_jax.training.sharding import (
    WAVLM_AXES,
    AxesTable,
    MeshSettings,
    parameter_shardings,
    path_name,
    row_shards,
    thin_shards,
)
from wavlm_jax.training.step import Builder, TrainState, abstract_state, init_key, root_key
from wavlm_jax.training.task import Task


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """The config section `train`."""

    num_steps: int
    eval_every: int
    """Steps between two evaluations; there is always one after the last step."""
    eval_splits: tuple[str, ...]
    max_nonfinite_in_a_row: int
    """The run stops (status "diverged") after so many steps in a row whose loss or gradient was not finite."""
    compilation_cache: str | None
    """Folder of JAX's compilation cache, relative to the workdir; None: everything is compiled at every start."""
    max_step_seconds: float
    """The process ends when a step, a wait for data or an evaluation batch takes longer (`watchdog`)."""

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


def make_builder(task: Task, settings: RunSettings, mesh: Mesh, table: AxesTable = WAVLM_AXES) -> Builder:
    """Shapes by abstract evaluation, placed by the strict table; no memory of the devices is taken.

    Args:
        task: what is trained.
        settings: how.
        mesh: its devices may be descriptions of other machines' (`plan`), as long as nothing is run.
        table: logical axes of the parameters.

    Raises:
        ValueError: a parameter that the table does not cover exactly once, a frozen one that does not exist, or as
            `make_optimizer` does.

    """
    key = root_key(settings.seed)
    first = jax.eval_shape(lambda: init_key(settings.seed))
    params = jax.eval_shape(
        task.init, first
    )  # not wrapped: `begin` jits the same object, and JAX does not trace it again
    shardings = parameter_shardings(params, table, mesh)
    optimizer = make_optimizer(settings.optim, settings.train.num_steps, task.freeze)
    check_freeze(optimizer.freeze, shardings)
    return Builder(task, optimizer, mesh, key, shardings, abstract_state(params, optimizer, shardings, mesh))


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


def begin(builder: Builder, checkpoints: Checkpoints, *, seed: int, config: Mapping[str, Any]) -> Start:
    """The state to train from, by the first of these that applies.

    1. The newest checkpoint of this workdir that verifies; fingerprints must agree, config changes are printed.
    2. What `task.initial_params` makes of fresh parameters: converted weights, an earlier run.
    3. Fresh parameters, where it returns them unchanged.

    Raises:
        CheckpointError: there are checkpoints, but none can be used for this config and data.
        ValueError: initial parameters of another tree, shape or dtype.

    """
    task, abstract = builder.task, builder.state.params
    manifest = checkpoints.latest()
    if manifest is not None:
        return _resume(manifest, builder, checkpoints, config)
    fresh = jax.jit(task.init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))(init_key(seed))
    params = task.initial_params(fresh)
    mode, given = "from scratch", set[str]()
    if params is not fresh:
        mode, given = "from given parameters", _given(params, fresh)
        if lines := difference(describe_arrays(abstract), describe_arrays(params)):
            raise ValueError("config.init: the parameters do not fit the model:\n  " + "\n  ".join(lines))
        params = _place(params, builder.shardings)
    run_id = broadcast_one_to_all("run id", secrets.token_hex(8))
    record = RunRecord(run_id=run_id, config=config, fingerprints=task.fingerprints)
    return Start(builder.fresh(params, given), 0, record, 0.0, mode)


def _given(params: Params, fresh: Params) -> set[str]:
    """Paths of the parameters that are not the initialised arrays themselves."""
    born = {id(leaf) for leaf in jax.tree.leaves(fresh)}
    return {path_name(path) for path, leaf in jax.tree_util.tree_leaves_with_path(params) if id(leaf) not in born}


def _resume(manifest: Manifest, builder: Builder, checkpoints: Checkpoints, config: Mapping[str, Any]) -> Start:
    task = builder.task
    old = _without_evaluation(manifest)
    for name in sorted({*old, *task.fingerprints}):
        before, now = old.get(name), task.fingerprints.get(name)
        if before != now:
            raise CheckpointError(
                f"{checkpoints.store.place}: the run was trained with {name} {before}, now it is {now}; "
                f"bring the old data back, or start over in another workdir"
            )
    for line in config_changes(manifest.config, config):
        say(f"config changed since step {manifest.step}: {line}")
    state = checkpoints.restore(manifest, builder.state)
    record = RunRecord(run_id=manifest.run_id, config=config, fingerprints=task.fingerprints)
    return Start(state, manifest.step, record, manifest.elapsed, f"resumed at step {manifest.step}")


def _without_evaluation(manifest: Manifest) -> dict[str, str]:
    """The fingerprints of training. Checkpoints of format 1 have those of evaluation sets, by folder name, as well."""
    paths = _leaves(manifest.config).get("data.evaluation")
    if manifest.format > 1 or not isinstance(paths, list):
        return manifest.fingerprints
    sets = {Path(str(path)).name for path in paths}
    return {name: value for name, value in manifest.fingerprints.items() if name.partition(".")[2] not in sets}


def config_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for every leaf that differs between two resolved configs."""
    old, new = _leaves(before), _leaves(now)
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    return [f"{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}" for name in names]


def _leaves(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value, as JSON has it; an empty section is a value."""
    plain = json.loads(json.dumps(config))
    found = jax.tree_util.tree_leaves_with_path(plain, is_leaf=lambda node: not isinstance(node, dict) or not node)
    return {jax.tree_util.keystr(path, simple=True, separator="."): value for path, value in found}


def _place(params: Params, shardings: Mapping[str, NamedSharding]) -> Params:
    """Parameters on the host or on devices, the same on all hosts, moved to their shardings."""

    def place(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        sharding = shardings[path_name(path)]
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree_util.tree_map_with_path(place, params)


def summarize(builder: Builder, start: Start, workdir: str) -> str:
    """What is about to happen, for people: mode, devices, batch arithmetic, number of parameters."""
    mesh, params = builder.mesh, builder.state.params
    shards = row_shards(mesh)
    kind = jax.devices()[0].device_kind
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    precision = jax.config.values["jax_default_matmul_precision"] or "the device's default"
    lines = [
        f"{workdir}: training {start.mode}, run {start.record.run_id}",
        f"{jax.device_count()} x {kind} on {jax.process_count()} hosts, mesh {sizes}",
        f"float32 matrix products: precision {precision}",
    ]
    for spec in builder.task.stream("train").specs:
        rows = next(iter(spec.arrays.values())).shape[0]
        seconds = spec.seconds / (shards * spec.microbatches)
        lines.append(
            f"batch {spec.name}: {seconds:.1f} s/device x {shards} devices x {spec.microbatches} micro-batches "
            f"= {spec.seconds:.1f} s of audio per update ({rows} rows)"
        )
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    lines.append(f"{count:,} parameters, train state {builder.state.num_bytes / 2**20:,.1f} MiB")
    if advice := thin_shards(params, builder.shardings):
        lines.append(f"warning: {advice}")
    return "\n".join(lines)
