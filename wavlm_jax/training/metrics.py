"""Where the time goes and what the numbers mean: a clock with buckets, and sums that become means. Host only."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from wavlm_jax.training.state import Report

BUCKETS = ("init", "compile", "data", "step", "eval", "save", "other")


class Clock:
    """Every second since it was made belongs to exactly one bucket, so that the buckets add up to the wall time."""

    def __init__(self) -> None:
        self.on_switch: Callable[[str], None] | None = None
        """Is told the bucket that time goes to from now on."""
        self._started = self._since = time.monotonic()
        self._bucket = "other"
        self.total = dict.fromkeys(BUCKETS, 0.0)
        self._taken = dict(self.total)

    @contextmanager
    def bucket(self, name: str) -> Iterator[None]:
        """The time inside goes to `name`; inner buckets take theirs out of the outer one."""
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
    """Sums and counts over batches, in float64, and the answers of an evaluation."""

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
        """All answers, without those of filler rows (`id` -1)."""
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
    """What happened since the last line of the log."""

    def __init__(self) -> None:
        self._totals = Totals()
        self._values: dict[str, float] = {}
        self._audio_seconds = 0.0
        self._steps = 0

    def add(self, report: Report, audio_seconds: float) -> None:
        """Adds one step, as fetched. A step that was not finite counts in time, not in the means."""
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
