"""One session of a run: the steps, and what happens between them. `loop.run` says the order of things."""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from wavlm_jax.training import compilation
from wavlm_jax.training.checkpoint import Checkpoints, CheckpointSettings
from wavlm_jax.training.compilation import Programs, out_of_memory_explained
from wavlm_jax.training.manifest import CheckpointError
from wavlm_jax.training.metrics import Clock, Interval, Totals
from wavlm_jax.training.optim import OptimSettings
from wavlm_jax.training.preemption import Preemption
from wavlm_jax.training.sharding import MeshSettings, place
from wavlm_jax.training.start import Start
from wavlm_jax.training.step import Report
from wavlm_jax.training.task import BatchSpec, BatchStream, LossSums, Task
from wavlm_jax.training.writers import Jsonl, Metrics, MetricsSettings, say


class Status(IntEnum):
    """How a session ended; the value is the exit code of train.py."""

    FINISHED = 0
    PREEMPTED = 75
    """A signal asked for it: saved; the same command goes on (EX_TEMPFAIL)."""
    DIVERGED = 76
    """Too many steps in a row were not finite: the last good state is saved."""


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

    def __post_init__(self) -> None:
        for name in ("num_steps", "eval_every", "max_nonfinite_in_a_row"):
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


class Outcome(NamedTuple):
    """What is left of a session."""

    status: Status
    step: int
    metrics: dict[str, dict[str, float]]
    """Of the last evaluation: split -> name -> value."""


class _Dispatched(NamedTuple):
    """A step that the devices are working on."""

    step: int
    spec: BatchSpec
    ids: np.ndarray
    report: Report


@dataclass
class Session:
    """One process's part in one session of a run."""

    task: Task
    settings: RunSettings
    mesh: Mesh
    start: Start
    streams: dict[str, BatchStream]
    programs: Programs
    checkpoints: Checkpoints
    metrics: Metrics
    nonfinite: Jsonl
    clock: Clock
    preemption: Preemption
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
        self.compiled = compilation.events()[compilation.COMPILES]
        if self.step and self.evaluation_due():
            self.evaluate()  # a stop may have come between the checkpoint and its evaluation
        batches = self.streams["train"].batches(self.step)
        while self.step < self.settings.train.num_steps:
            with self.clock.bucket("data"):
                spec, arrays = next(batches)
                batch = place(arrays, spec, self.mesh)
            with self.clock.bucket("step"):
                self.update(spec, batch, arrays["id"])
            if (status := self.boundary()) is not None:
                return Outcome(status, self.step, self.evaluation)
        return Outcome(Status.FINISHED, self.step, self.evaluation)

    def update(self, spec: BatchSpec, batch: dict[str, jax.Array], ids: np.ndarray) -> None:
        """Hands one step to the devices, and while they work reads what the step before it said."""
        before = self.dispatched
        with jax.transfer_guard("disallow"), out_of_memory_explained(f"batch {spec.name}"):
            self.state, report = self.programs.train[spec.name](self.state, batch)
        self.step += 1
        self.dispatched = _Dispatched(self.step, spec, ids, report)
        self.settle(before)

    def settle(self, done: _Dispatched | None) -> None:
        """Takes in the report of a dispatched step; waits for it if it is still running."""
        if done is None:
            return
        with out_of_memory_explained(f"batch {done.spec.name}"):
            report: Report = jax.device_get(done.report)
        self.interval.add(report, done.spec.seconds)
        if not report.finite:
            self.note_nonfinite(done, report)
        self.diverged |= int(report.skipped_in_a_row) >= self.settings.train.max_nonfinite_in_a_row
        if done.step % self.settings.metrics.log_every == 0:
            compiled = float(compilation.events()[compilation.COMPILES] - self.compiled)
            line = self.interval.summary(self.clock.take()) | {"compiles_after_start": compiled}
            self.metrics.write("train", done.step, line)
            self.interval = Interval()

    def settle_last(self) -> None:
        """Waits for the devices, so that log and state are of the same step."""
        with self.clock.bucket("step"):
            self.settle(self.dispatched)
            self.dispatched = None

    def note_nonfinite(self, done: _Dispatched, report: Report) -> None:
        """Which utterances were in the batch, so that the step can be looked into: seed and step say the rest."""
        name = self.streams["train"].name
        values = {
            "seed": self.settings.seed,
            "batch": done.spec.name,
            "loss": float(report.sums.loss),
            "grad_norm": float(report.values["grad_norm"]),
            "rows": [name(int(index)) for index in done.ids],
        }
        self.nonfinite.write("nonfinite", done.step, values)
        say(f"warning: step {done.step} is not finite and was skipped; its rows are in nonfinite.jsonl")

    def boundary(self) -> Status | None:
        """Between two steps: the reasons to save, to evaluate, to stop."""
        if complaint := self.checkpoints.poll():
            say(f"warning: {complaint}")
        stop = Status.DIVERGED if self.diverged else None
        if self.preemption.requested(self.step):
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
            self.evaluate()
        if last:
            self.save_surely()
        return None

    def evaluation_due(self) -> bool:
        """Every so many steps, and at the end."""
        return self.step % self.settings.train.eval_every == 0 or self.step == self.settings.train.num_steps

    def evaluate(self) -> None:
        """Every split once, every utterance once; the sums of a batch are read while the next one is computed."""
        for split in self.settings.train.eval_splits:
            totals, before = Totals(), None
            with self.clock.bucket("eval"):
                for spec, arrays in self.streams[split].batches():
                    batch = place(arrays, spec, self.mesh)
                    sums: LossSums = self.programs.evaluate[split][spec.name](self.state.params, batch)
                    if before is not None:
                        totals.add(jax.device_get(before))
                    before = sums
                if before is not None:
                    totals.add(jax.device_get(before))
            self.evaluation[split] = totals.means()
            self.metrics.write(f"eval/{split}", self.step, self.evaluation[split])

    def save(self) -> None:
        """Starts a checkpoint of this step, unless there is one."""
        if self.saved != self.step:
            with self.clock.bucket("save"):
                elapsed = self.start.elapsed + self.clock.elapsed
                self.checkpoints.save(self.state, self.step, self.start.record, elapsed)
            self.saved = self.step

    def save_surely(self) -> None:
        """A checkpoint of this step, finished. A failure is tried once more and is then the end."""
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
