"""Metrics on the host: the clock, sums that become means, and the writers.

metrics.jsonl is always written; TensorBoard, Weights & Biases and the terminal as the config says. Process 0 writes.
A writer that fails is reported once and never stops training.
"""

import errno
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from tqdm import tqdm

from wavlm_jax.extras import extra
from wavlm_jax.files import write_text
from wavlm_jax.training.step import Report

_MOST_WAITING = 10_000
"""Lines that are kept in memory while the disk does not take them."""
BUCKETS = ("init", "compile", "data", "step", "eval", "save", "other")


class Clock:
    """Counts every second since it was made in exactly one bucket, so that the buckets add up to the wall time."""

    def __init__(self) -> None:
        self.on_switch: Callable[[str], None] | None = None
        """Called with the new bucket whenever it changes."""
        self._started = self._since = time.monotonic()
        self._bucket = "other"
        self.total = dict.fromkeys(BUCKETS, 0.0)
        self._taken = dict(self.total)

    @contextmanager
    def bucket(self, name: str) -> Iterator[None]:
        """Counts the time inside in `name`, without that of inner buckets."""
        outer = self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, name: str) -> str:
        now = time.monotonic()
        self.total[self._bucket] += now - self._since
        self._since = now
        previous, self._bucket = self._bucket, name
        if self.on_switch is not None:
            self.on_switch(name)
        return previous

    def take(self) -> dict[str, float]:
        """Seconds of each bucket since the last call."""
        self._switch(self._bucket)
        result = {name: self.total[name] - self._taken[name] for name in BUCKETS}
        self._taken = dict(self.total)
        return result

    @property
    def elapsed(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._started


class Totals:
    """Sums and counts over batches, in float64, and the answers (`LossSums.answers`) of an evaluation."""

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        self._histograms: dict[str, np.ndarray] = {}
        self._answers: dict[str, list[np.ndarray]] = {}

    def add(self, sums: Any) -> None:
        """Adds the LossSums of one batch, as fetched from the device."""
        for name, values in sums.answers.items():
            self._answers.setdefault(name, []).append(np.asarray(values))
        for name, pair in {"loss": (sums.loss, sums.count), **sums.metrics}.items():
            self._sums[name] = self._sums.get(name, np.zeros(2)) + np.asarray(pair, np.float64)
        for name, counts in sums.histograms.items():
            self._histograms[name] = self._histograms.get(name, np.zeros(1)) + np.asarray(counts, np.float64)

    def answers(self) -> dict[str, np.ndarray]:
        """All answers, one per row, without those of filler rows (`id` -1)."""
        whole = {name: np.concatenate(parts) for name, parts in self._answers.items()}
        return {name: values[whole["id"] >= 0] for name, values in whole.items()}

    def means(self) -> dict[str, float]:
        """Name -> sum / count, and name -> entropy in nats of each histogram; what has no count is left out."""
        result = {name: float(total / count) for name, (total, count) in self._sums.items() if count > 0}
        for name, counts in self._histograms.items():
            if counts.sum() > 0:
                shares = counts[counts > 0] / counts.sum()
                result[name] = float(-(shares * np.log(shares)).sum())
        return result


class Interval:
    """What happened since the last line of metrics.jsonl."""

    def __init__(self) -> None:
        self._totals = Totals()
        self._values: dict[str, float] = {}
        self._audio_seconds = 0.0
        self._steps = 0

    def add(self, report: Report, audio_seconds: float) -> None:
        """Adds one step, as fetched. One that was not finite counts in steps and seconds of audio, not in the means."""
        self._audio_seconds += audio_seconds
        self._steps += 1
        if report.finite:
            self._totals.add(report.sums)
            self._values = {name: float(value) for name, value in report.values.items()}
        self._values["skipped"] = float(report.skipped)

    def summary(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """The numbers of one line; `seconds` are the clock's buckets over the same time."""
        busy = max(seconds["data"] + seconds["step"] + seconds["other"], 1e-9)
        result = self._totals.means() | self._values
        result |= {
            "audio_seconds_per_second": self._audio_seconds / busy,
            "steps_per_second": self._steps / busy,
            "data_wait_share": seconds["data"] / busy,
        }
        return result | {f"seconds_{name}": value for name, value in seconds.items()}


@dataclass(frozen=True, kw_only=True)
class WandbSettings:
    """Arguments of `wandb.init`."""

    project: str | None
    """None: nothing is sent to Weights & Biases."""
    entity: str | None
    name: str | None
    group: str | None
    mode: str | None
    """None: as WANDB_MODE says; "offline" for hosts without internet."""

    def __post_init__(self) -> None:
        others = {name: value for name, value in asdict(self).items() if name != "project" and value is not None}
        if self.project is None and others:
            raise ValueError(f"project: found None beside {others}, expected the project that the run belongs to")


@dataclass(frozen=True, kw_only=True)
class MetricsSettings:
    """How often metrics are written, and where besides metrics.jsonl."""

    log_every: int
    """Log metrics every this many steps."""
    tensorboard: bool
    """Into workdir/tensorboard; without tensorboardX (extra `tensorboard`) the start of a run says so and goes on."""
    progress: bool
    """A bar with the time left on a terminal, else a plain line per interval; False: neither."""
    wandb: WandbSettings | None

    def __post_init__(self) -> None:
        if self.log_every < 1:
            raise ValueError(f"log_every: found {self.log_every}, expected 1 or more")


@runtime_checkable
class Writer(Protocol):
    """Takes the metrics of one kind ("train", "eval/valid") at one step."""

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Writes them; `Metrics` catches whatever it raises."""
        ...

    def close(self) -> None:
        """Flushes and closes; likewise."""
        ...


class Jsonl:
    """One JSON object per line: step, kind, values. After a resume each step is still there once.

    What a full disk does not take waits, and is written when it does.
    """

    def __init__(self, path: Path, resume: int) -> None:
        """Drops the lines of steps after `resume`, and of the evaluation at it, which is repeated."""
        kept = [line for line in _lines(path) if _kept(line, resume)]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("ab", buffering=0)
        self._waiting: deque[bytes] = deque(maxlen=_MOST_WAITING)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line, after those that could not be written before; the file never keeps a part of a line."""
        line = json.dumps({"step": step, "kind": kind, **for_json(values)}, allow_nan=False)
        self._waiting.append(line.encode() + b"\n")
        self._write_waiting()

    def _write_waiting(self) -> None:
        size = self._file.seek(0, os.SEEK_END)
        while self._waiting:
            if self._file.write(self._waiting[0]) < len(self._waiting[0]):
                self._file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)
            size += len(self._waiting.popleft())

    def close(self) -> None:
        """Tries once more what waits, and closes the file."""
        try:
            self._write_waiting()
        finally:
            self._file.close()


class Tensorboard:
    """Scalars for TensorBoard, by tensorboardX."""

    def __init__(self, folder: Path, resume: int) -> None:
        with extra("tensorboard", "metrics.tensorboard", ", or set it to False"):
            from tensorboardX import SummaryWriter  # noqa: PLC0415

        self._writer = SummaryWriter(str(folder), purge_step=resume + 1)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """One scalar per value, tagged kind/name."""
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flushes and closes."""
        self._writer.close()


class Wandb:
    """A Weights & Biases run, continued under the run id in the checkpoint."""

    def __init__(self, settings: WandbSettings, folder: Path, run_id: str, config: Mapping[str, Any]) -> None:
        with extra("wandb", "metrics.wandb"):
            import wandb  # noqa: PLC0415

        self._run = wandb.init(**asdict(settings), dir=folder, id=run_id, resume="allow", config=dict(config))

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """All values at once."""
        self._run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


class Terminal:
    """A bar with the time left if stderr is a terminal, else plain lines on stdout."""

    def __init__(self, resume: int, num_steps: int) -> None:
        self._num_steps = num_steps
        bar = sys.stderr.isatty()
        self._bar = tqdm(total=num_steps, initial=resume, unit="step", dynamic_ncols=True) if bar else None

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """The bar moves with training; an evaluation is a line."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if not name.startswith("seconds_"))
        if self._bar is not None and kind == "train":
            shown = {name: f"{values[name]:.4g}" for name in ("loss", "masked_accuracy", "grad_norm") if name in values}
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        left = ""
        if kind == "train" and values["steps_per_second"] > 0:
            left = f"  left {_duration((self._num_steps - step) / values['steps_per_second'])}"
        tqdm.write(f"{kind} {step}/{self._num_steps}  {text}{left}", file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()


class Metrics:
    """All writers of a process. What a writer raises is reported once and goes no further."""

    def __init__(self, writers: Mapping[str, Writer]) -> None:
        self._writers = dict(writers)
        self._failed: set[str] = set()

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Passes the values to every writer."""
        for name, writer in self._writers.items():
            try:
                writer.write(kind, step, values)
            except Exception as error:  # noqa: BLE001 a tracker may raise anything; training goes on
                self._complain(name, error)

    def close(self) -> None:
        """Closes every writer."""
        for name, writer in self._writers.items():
            try:
                writer.close()
            except Exception as error:  # noqa: BLE001 as above
                self._complain(name, error)

    def _complain(self, name: str, error: Exception) -> None:
        if name not in self._failed:
            self._failed.add(name)
            say(f"warning: metrics: {name} failed ({type(error).__name__}: {error}); training goes on")


def say(text: str) -> None:
    """Prints a line for people, above a progress bar if there is one."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def open_metrics(
    settings: MetricsSettings, workdir: Path, *, resume: int, num_steps: int, run_id: str, config: Mapping[str, Any]
) -> Metrics:
    """The writers that `settings` asks for, on process 0; none on the others.

    Args:
        settings: which ones; one that cannot be opened is reported and left out.
        workdir: gets the files.
        resume: the step after which they go on.
        num_steps: of the whole run.
        run_id: under which a tracker continues its curves.
        config: resolved, for the trackers.

    """
    if jax.process_index() != 0:
        return Metrics({})
    makers: dict[str, Any] = {"metrics.jsonl": lambda: Jsonl(workdir / "metrics.jsonl", resume)}
    if settings.tensorboard:
        makers["tensorboard"] = lambda: Tensorboard(workdir / "tensorboard", resume)
    wandb = settings.wandb
    if wandb is not None and wandb.project is not None:
        makers["wandb"] = lambda: Wandb(wandb, workdir, run_id, config)
    if settings.progress:
        makers["terminal"] = lambda: Terminal(resume, num_steps)
    writers: dict[str, Writer] = {}
    for name, make in makers.items():
        try:
            writers[name] = make()
        except Exception as error:  # noqa: BLE001 a tracker may raise anything; training goes on
            say(f"warning: metrics: {name} could not be opened ({type(error).__name__}: {error})")
    return Metrics(writers)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file, without lines that a kill or a full disk cut short."""
    result = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            result.append(value)
    return result


def _kept(line: Mapping[str, Any], resume: int) -> bool:
    repeated = str(line.get("kind")).startswith("eval/") and line["step"] == resume
    return bool(line["step"] <= resume and not repeated)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def for_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values for strict JSON: what is not finite becomes a string ("nan", "inf")."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
