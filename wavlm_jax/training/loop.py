"""The loop: what happens in which order. What happens is in the other modules of this package."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from wavlm_jax.training import compilation
from wavlm_jax.training.axes import WAVLM_AXES
from wavlm_jax.training.checkpoint import Checkpoints
from wavlm_jax.training.compilation import Programs
from wavlm_jax.training.disk import check_space
from wavlm_jax.training.metrics import Clock
from wavlm_jax.training.optim import adam, make_schedule
from wavlm_jax.training.preemption import listening
from wavlm_jax.training.session import Outcome, RunSettings, Session
from wavlm_jax.training.sharding import RULES, AxesTable, describe
from wavlm_jax.training.start import Layout, Start, begin, plan_layout, summarize
from wavlm_jax.training.state import root_key
from wavlm_jax.training.task import BatchStream, Task
from wavlm_jax.training.writers import Jsonl, Metrics, open_metrics, say


def run(
    task: Task,
    settings: RunSettings,
    mesh: Mesh,
    workdir: Path,
    *,
    config: Mapping[str, Any],
    table: AxesTable = WAVLM_AXES,
) -> Outcome:
    """Trains `task` in `workdir` until the last step, a signal or divergence; the same call again goes on.

    Args:
        task: what is trained.
        settings: how.
        mesh: of `make_mesh(settings.mesh)`, which the task was built for.
        workdir: gets checkpoints, metrics.jsonl, nonfinite.jsonl.
        config: resolved, as JSON values; kept in every checkpoint.
        table: logical axes of the parameters.

    Raises:
        ValueError: something in config, data or workdir cannot be right.
        OSError: the workdir cannot hold a checkpoint.
        OutOfMemory: the devices are too small.

    """
    # The order of things.
    # 1. Abstract: shapes, strict sharding table. Nothing is allocated before this holds.
    # 2. The workdir takes a checkpoint's bytes, really; leftovers of a killed save go.
    # 3. The state: own checkpoint, else init from the config, else scratch (`start.begin`).
    # 4. Every shape of every stream is compiled; from here on a compilation is a fault.
    # 5. A step: next batch, dispatch, then the report of the step before. The devices never wait for the host.
    # 6. Between steps: failed saves are reported; stop (save first); save; evaluate.
    # 7. The end: last checkpoint on disk, writers closed, whatever happened.
    clock = Clock()
    with ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(nn.logical_axis_rules(RULES))
        preemption = stack.enter_context(listening())
        with clock.bucket("init"):
            schedule = make_schedule(settings.optim, settings.train.num_steps)
            layout = plan_layout(task, adam(schedule, settings.optim.adam), mesh, table, settings.seed)
            _prepare(settings, layout, workdir)
            checkpoints = Checkpoints(workdir, settings.checkpoint, say)
            stack.callback(checkpoints.close)
            start = begin(task, layout, checkpoints, seed=settings.seed, config=config)
            streams = {split: task.stream(split) for split in ("train", *settings.train.eval_splits)}
            _introduce(task, layout, start, workdir)
        with clock.bucket("compile"):
            programs = _compile(task, settings, layout, streams)
        metrics, nonfinite = _open_logs(settings, workdir, start)
        stack.callback(metrics.close)
        stack.callback(nonfinite.close)
        session = Session(
            task, settings, mesh, start, streams, programs, checkpoints, metrics, nonfinite, clock, preemption
        )
        return session.train()


def _prepare(settings: RunSettings, layout: Layout, workdir: Path) -> None:
    if jax.process_index() == 0:
        check_space(workdir, layout.num_bytes)
    if settings.train.compilation_cache is not None:
        compilation.use_cache(workdir / settings.train.compilation_cache)


def _introduce(task: Task, layout: Layout, start: Start, workdir: Path) -> None:
    if jax.process_index() == 0:
        say(summarize(task, layout, start, workdir))
        (workdir / "parameters.txt").write_text(describe(layout.abstract.params, layout.shardings) + "\n")


def _compile(task: Task, settings: RunSettings, layout: Layout, streams: Mapping[str, BatchStream]) -> Programs:
    events = compilation.events()
    before = events.copy()
    own = Clock()
    schedule = make_schedule(settings.optim, settings.train.num_steps)
    programs = compilation.compile_programs(
        task,
        {split: stream.specs for split, stream in streams.items()},
        layout.abstract,
        layout.mesh,
        optimizer=layout.optimizer,
        schedule=schedule,
        max_grad_norm=settings.optim.max_grad_norm,
        key=root_key(settings.seed),
    )
    hits, misses = (events[name] - before[name] for name in (compilation.HITS, compilation.MISSES))
    count = len(programs.train) + sum(map(len, programs.evaluate.values()))
    say(f"compiled {count} programs in {own.elapsed:.1f} s (cache: {hits} found, {misses} not)")
    return programs


def _open_logs(settings: RunSettings, workdir: Path, start: Start) -> tuple[Metrics, Jsonl]:
    index = jax.process_index()
    name = "nonfinite.jsonl" if index == 0 else f"nonfinite-{index}.jsonl"
    nonfinite = Jsonl(workdir / name, start.step)
    if index != 0:
        return Metrics({}), nonfinite
    metrics = open_metrics(
        settings.metrics,
        workdir,
        resume=start.step,
        num_steps=settings.train.num_steps,
        run_id=start.record.run_id,
        config=start.record.config,
    )
    return metrics, nonfinite
