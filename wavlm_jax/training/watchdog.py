"""How a session of training ends: its exit codes, and the watchdog, which ends a session that hangs.

When a step takes longer than the limit, the watchdog dumps all stacks and exits with 77, so that the scheduler can
start the run again.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax._src import distributed


class Status(IntEnum):
    """How a session ended; the value is the exit code of train.py."""

    FINISHED = 0
    PREEMPTED = 75
    """A signal asked for it: saved; the same command goes on (EX_TEMPFAIL)."""
    DIVERGED = 76
    """Too many steps in a row were not finite: the last good state is saved."""
    STUCK = 77
    """A step took longer than `train.max_step_seconds`: stacks are in the workdir, run it again."""


class Outcome(NamedTuple):
    """What is left of a session."""

    status: Status
    step: int
    metrics: dict[str, dict[str, float]]
    """Of the last evaluation: split -> name -> value."""


PROGRESS = "wavlm_jax/progress/"
"""Prefix of the keys in JAX's coordination service under which each process says what it does."""
_WATCHED = {"data": 1.0, "step": 1.0, "eval": 1.0, "save": 6.0}
"""Time bucket of the clock -> how many times the limit it may take."""
_LAST_WORDS = 5.0
"""Seconds for each thing that is done before the process ends."""


class Watchdog:
    """Ends the process when one step, wait for data, evaluation batch or save takes too long.

    Python's stacks go to stderr and into a file. What every process did last is printed, which names the one that the
    others wait for. A host that is dead or frozen is found by JAX's heartbeat instead.

    Args:
        seconds: the limit; a save may take six times as long.
        folder: gets stacks-PROCESS.txt.
        publish: uploads that file; it has a few seconds.

    """

    def __init__(self, seconds: float, folder: Path, publish: Callable[[], None]) -> None:
        self._upload = publish
        self._seconds = seconds
        self._folder = folder
        self._index, self._alone = jax.process_index(), jax.process_count() == 1
        self._doing, self._since = "", time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def enter(self, bucket: str) -> None:
        """Notes what the process does from now on: a time bucket of the clock."""
        self._doing, self._since = bucket, time.monotonic()

    def close(self) -> None:
        """Stops watching."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(min(self._seconds / 10, 5.0)):
            doing, taken = self._doing, time.monotonic() - self._since
            if not self._alone:
                self._tell_others(doing)
            if doing in _WATCHED and taken > self._seconds * _WATCHED[doing]:
                self._end(doing, taken)

    def _tell_others(self, doing: str) -> None:
        record = json.dumps({"host": socket.gethostname(), "doing": doing, "since": time.time() - self._taken()})
        client: Any = distributed.global_state.client
        try:
            client.key_value_set(f"{PROGRESS}{self._index}", record, allow_overwrite=True)
        except jax.errors.JaxRuntimeError as error:
            print(f"watchdog: {error}", file=sys.stderr, flush=True)

    def _taken(self) -> float:
        return time.monotonic() - self._since

    def _end(self, doing: str, taken: float) -> None:
        print(
            f"watchdog: process {self._index} ({socket.gethostname()}) has been in {doing!r} for {taken:.0f} s, more "
            f"than train.max_step_seconds allows ({self._seconds:.0f} s); ending with code {Status.STUCK.value}",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"stacks-{self._index}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        _try_for(_LAST_WORDS, self._upload)
        if not self._alone:
            _try_for(_LAST_WORDS, self._print_others)
        os._exit(Status.STUCK.value)

    def _print_others(self) -> None:
        client: Any = distributed.global_state.client
        for key, text in sorted(client.key_value_dir_get(PROGRESS)):
            record = json.loads(text)
            print(
                f"watchdog: process {key.rsplit('/', 1)[1]} ({record['host']}): {record['doing']!r} for "
                f"{time.time() - record['since']:.0f} s",
                file=sys.stderr,
                flush=True,
            )


def _try_for(seconds: float, do: Callable[[], None]) -> None:
    """Waits at most so long for `do`, which may hang itself: a bucket or process 0 may not answer."""
    trying = threading.Thread(target=do, daemon=True)
    trying.start()
    trying.join(seconds)
