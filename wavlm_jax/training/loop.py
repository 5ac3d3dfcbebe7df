"""The training loop: what happens in which order.

One step is `train.py` -> `run`, `_Session.update` (here) -> `step.train_step`, which `step.Builder` compiles.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from wavlm_jax.files import write_text
from wavlm_jax.training.checkpoint import CheckpointError, Checkpoints
from wavlm_jax.training.hosts import Preemption, barrier, listening
from wavlm_jax.training.lease import owned_workdir
from wavlm_jax.training.metric_writers import Clock, Interval, Jsonl, Metrics, Totals, open_metrics, say
from wavlm_jax.training.sharding import RULES, WAVLM_AXES, AxesTable, describe, place
from wavlm_jax.training.start import RunSettings, Start, begin, make_builder, summarize
from wavlm_jax.training.step import Builder, Programs, Report, num_compilations, out_of_memory_explained, use_cache
from wavlm_jax.training.task import BatchSpec, BatchStream, Score, Task
from wavlm_jax.training.watchdog import Outcome, Status, Watchdog
from wavlm_jax.training.workdir import Workdir


class _Dispatched(NamedTuple):
    """A step that was dispatched, and whose report has not been read."""

    step: int
    spec: BatchSpec
    ids: np.ndarray
    report: Report


@dataclass
class _Session:
    """One process's part of a run, from one start to the next stop."""

    settings: RunSettings
    mesh: Mesh
    start: Start
    streams: dict[str, BatchStream]
    programs: Programs
    checkpoints: Checkpoints
    metrics: Metrics
    nonfinite: Metrics
    clock: Clock
    preemption: Preemption
    score: Score
    state: Any = None
    step: int = 0
    saved: int = -1
    compiled: int = 0
    diverged: bool = False
    dispatched: _Dispatched | None = None
    interval: Interval = field(default_factory=Interval)
    evaluation: dict[str, dict[str, float]] = field(default_factory=dict)

    def train(self) -> Outcome:
        """From the start to the last step, or to the first reason to stop."""
        self.state, self.step = self.start.state, self.start.step
        self.saved = self.step if self.start.step else -1
        self.compiled = num_compilations()
        if self.step and self.evaluation_due() and not self.evaluate():  # a stop may have come before it was done
            return Outcome(Status.PREEMPTED, self.step, self.evaluation)
        batches = self.streams["train"].batches(self.step)
        while self.step < self.settings.train.num_steps:
            with self.clock.bucket("data"):
                spec, arrays = self.take(batches)
                batch = place(arrays, spec.arrays, self.mesh, spec.name)
            with self.clock.bucket("step"):
                self.update(spec, batch, arrays["id"])
            if (status := self.boundary()) is not None:
                return Outcome(status, self.step, self.evaluation)
        return Outcome(Status.FINISHED, self.step, self.evaluation)

    def take(self, batches: Iterator[tuple[BatchSpec, dict[str, np.ndarray]]]) -> tuple[BatchSpec, dict[str, Any]]:
        """The next batch. If loading fails, a single host saves what it has trained; several cannot agree on a step."""
        try:
            return next(batches)
        except Exception:
            if jax.process_count() == 1 and self.step > max(self.saved, 0):
                self.settle_last()
                self.save_surely()
            raise

    def update(self, spec: BatchSpec, batch: dict[str, jax.Array], ids: np.ndarray) -> None:
        """Dispatches one step, and while the devices work reads the report of the step before."""
        before = self.dispatched
        with jax.transfer_guard("disallow"), out_of_memory_explained(f"batch {spec.name}"):
            self.state, report = self.programs.executables["train"][spec.name](self.state, batch)
        self.step += 1
        self.dispatched = _Dispatched(self.step, spec, ids, report)
        self.settle(before)

    def settle(self, done: _Dispatched | None) -> None:
        """Reads the report of a dispatched step; waits for the step if it is still running."""
        if done is None:
            return
        with out_of_memory_explained(f"batch {done.spec.name}"):
            report: Report = jax.device_get(done.report)
        self.interval.add(report, done.spec.seconds)
        if not report.finite:
            self.note_nonfinite(done, report)
        self.diverged |= int(report.skipped_in_a_row) >= self.settings.train.max_nonfinite_in_a_row
        if done.step % self.settings.metrics.log_every == 0:
            compiled = float(num_compilations() - self.compiled)
            line = self.interval.summary(self.clock.take()) | {"compiles_after_start": compiled}
            self.metrics.write("train", done.step, line)
            self.interval = Interval()

    def settle_last(self) -> None:
        """Waits for the last dispatched step, so that log and state are of the same step."""
        with self.clock.bucket("step"):
            self.settle(self.dispatched)
            self.dispatched = None

    def note_nonfinite(self, done: _Dispatched, report: Report) -> None:
        """Notes which utterances were in the batch: with seed and step this is enough to repeat the step."""
        name = self.streams["train"].name
        values = {
            "seed": self.settings.seed,
            "batch": done.spec.name,
            "loss": float(report.sums.loss),
            "grad_norm": float(report.values["grad_norm"]),
            "rows": [name(int(index)) for index in done.ids if index >= 0],
        }
        self.nonfinite.write("nonfinite", done.step, values)
        say(f"warning: step {done.step} is not finite and was skipped; its rows are in nonfinite.jsonl")

    def boundary(self) -> Status | None:
        """Between two steps: stops, saves and evaluates where there is a reason. Returns a status to stop with."""
        if complaint := self.checkpoints.poll():
            say(f"warning: {complaint}")
        stop = Status.DIVERGED if self.diverged else None
        if self.preemption.requested():
            stop = stop or Status.PREEMPTED
        if stop is not None:
            self.settle_last()
            self.save_surely()
            return stop
        last = self.step == self.settings.train.num_steps
        if last or self.step % self.settings.checkpoint.every == 0:
            self.settle_last()
            self.save()
        if self.evaluation_due():
            self.settle_last()
            if not self.evaluate():
                self.save_surely()  # at this step, so that the next session begins with the evaluation
                return Status.PREEMPTED
        if last:
            self.save_surely()
        return None

    def evaluation_due(self) -> bool:
        """Whether this step is followed by an evaluation."""
        return self.step % self.settings.train.eval_every == 0 or self.step == self.settings.train.num_steps

    def evaluate(self) -> bool:
        """Every split once, every utterance once; the sums of a batch are read while the next one is computed.

        Returns False if a signal interrupted it: then nothing is logged, and the next session repeats it.
        """
        for split in self.settings.train.eval_splits:
            totals, before = Totals(), None
            with self.clock.bucket("eval"):
                for spec, arrays in self.streams[split].batches():
                    if self.preemption.heard:
                        return False
                    with self.clock.bucket("eval"):  # one batch, as far as the watchdog is concerned
                        batch = place(arrays, spec.arrays, self.mesh, spec.name)
                    sums = self.programs.executables[split][spec.name](self.state.params, batch)
                    if before is not None:
                        totals.add(jax.device_get(before))
                    before = sums
                if before is not None:
                    totals.add(jax.device_get(before))
                self.evaluation[split] = totals.means() | dict(self.score(split, totals.answers()))
            self.metrics.write(f"eval/{split}", self.step, self.evaluation[split])
        return True

    def save(self) -> None:
        """Starts a checkpoint of this step, unless there is one."""
        if self.saved != self.step:
            with self.clock.bucket("save"):
                elapsed = self.start.elapsed + self.clock.elapsed
                self.checkpoints.save(self.state, self.step, self.start.record, elapsed)
            self.saved = self.step

    def save_surely(self) -> None:
        """Writes a checkpoint of this step and waits for it; tries twice.

        Raises:
            CheckpointError: both failed.

        """
        self.save()
        with self.clock.bucket("save"):
            complaint = self.checkpoints.wait()
        if complaint:
            say(f"warning: {complaint}")
            self.saved = -1
            self.save()
            with self.clock.bucket("save"):
                complaint = self.checkpoints.wait()
        if complaint:
            raise CheckpointError(complaint)


# Invariants of a run:
# 1. Shapes and shardings are checked before memory is allocated, and the workdir is shown to hold a checkpoint's bytes
#    before anything is computed.
# 2. Every shape of every stream is compiled before the first step; a compilation after that is counted as a fault.
# 3. A step is dispatched before the report of the step before is read, so that the devices never wait for the host.
# 4. Where a checkpoint or an evaluation is made, state, log and data position are of the same step (`settle_last`), so
#    that a resumed run computes the same bits.
# 5. A stop saves first. Whatever ends the run, saves under way are finished and the writers closed.


def run(
    task: Task,
    settings: RunSettings,
    mesh: Mesh,
    workdir: Workdir,
    *,
    config: Mapping[str, Any],
    table: AxesTable = WAVLM_AXES,
) -> Outcome:
    """Trains `task` in `workdir` until the last step, a signal or divergence; the same call again goes on.

    Args:
        task: what is trained.
        settings: how.
        mesh: of `make_mesh(settings.mesh)`, which the task was built for.
        workdir: gets checkpoints, config.json, metrics.jsonl, nonfinite.jsonl. `Workdir` of a folder, or of
            `open_workdir`.
        config: resolved, as JSON values; kept in every checkpoint, and in config.json once the start has succeeded.
        table: logical axes of the parameters.

    Raises:
        ValueError: something in config, data or workdir cannot be right.
        OSError: the workdir cannot hold a checkpoint.
        OutOfMemory: the devices are too small.

    """
    clock = Clock()
    with ExitStack() as stack:
        stack.enter_context(owned_workdir(workdir))
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(nn.logical_axis_rules(RULES))
        preemption = stack.enter_context(listening())
        with clock.bucket("init"):
            builder = make_builder(task, settings, mesh, table)
            workdir.claim(builder.state.num_bytes)
            if settings.train.compilation_cache is not None:
                use_cache(workdir.within(settings.train.compilation_cache))
            checkpoints = Checkpoints(workdir.place, settings.checkpoint, say, workdir.publish)
            stack.callback(checkpoints.close)
            start = begin(builder, checkpoints, seed=settings.seed, config=config)
            streams = {split: task.stream(split) for split in ("train", *settings.train.eval_splits)}
            _introduce(builder, start, workdir)
        with clock.bucket("compile"):
            programs = builder.compile({split: stream.specs for split, stream in streams.items()})
            if jax.process_index() == 0:
                say(f"compiled {programs.describe()}")
            barrier("programs compiled")  # gloo waits 30 s for the first collective of the slowest host, and says less
        with clock.bucket("init"):
            metrics, nonfinite = _open_logs(settings, workdir, start)
            stack.callback(metrics.close)
            stack.callback(nonfinite.close)
            watchdog = Watchdog(settings.train.max_step_seconds, workdir.folder, workdir.publish)
            stack.callback(watchdog.close)
            clock.on_switch = watchdog.enter
        parts = streams, programs, checkpoints, metrics, nonfinite, clock, preemption, task.score
        return _Session(settings, mesh, start, *parts).train()


def _introduce(builder: Builder, start: Start, workdir: Workdir) -> None:
    if jax.process_index() == 0:
        say(summarize(builder, start, workdir.place))
        write_text(workdir.folder / "config.json", json.dumps(start.record.config, indent=1) + "\n")
        write_text(workdir.folder / "parameters.txt", describe(builder.state.params, builder.shardings) + "\n")


def _open_logs(settings: RunSettings, workdir: Workdir, start: Start) -> tuple[Metrics, Metrics]:
    """(the writers of metrics, the writer of this process's nonfinite.jsonl)."""
    record, index = start.record, jax.process_index()
    metrics = open_metrics(
        settings.metrics,
        workdir.folder,
        resume=start.step,
        num_steps=settings.train.num_steps,
        run_id=record.run_id,
        config=record.config,
    )
    name = "nonfinite.jsonl" if index == 0 else f"nonfinite-{index}.jsonl"
    return metrics, Metrics({name: Jsonl(workdir.folder / name, start.step)})
