"""Checkpoints: Orbax writes the arrays, one rename commits a folder, nothing is believed without its checksums.

    workdir/checkpoints/1000/{params,train,manifest.json,...}   committed
    workdir/checkpoints/.unfinished/2000                        being written; removed at the next start

A save runs in a thread of its own: copy to the host (before `save` returns), write, checksum, rename, prune. A failed
save leaves what was there, is reported once by `poll`, and training goes on.
"""

import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as orbax

from wavlm_jax.training.disk import push
from wavlm_jax.training.host_memory import Resident
from wavlm_jax.training.manifest import (
    FORMAT,
    CheckpointError,
    Manifest,
    describe_arrays,
    describe_files,
    difference,
    read,
    write,
)
from wavlm_jax.training.state import TrainState
from wavlm_jax.training.stored import FOLDER, newest_valid, steps
from wavlm_jax.training.waiting import agreed, from_first, meet
from wavlm_jax.version import __version__

UNFINISHED = ".unfinished"
_WRITE_AHEAD = 2**30
"""Bytes of host memory, besides the copy of this host's shards, that a save may take while it writes."""
_WRITE_SECONDS = 1200.0
"""For the slowest host to have written its shards; the watchdog may be less patient."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """When a checkpoint is written, and which are kept."""

    every: int
    """Steps from one to the next; the last step always has one."""
    keep_last: int
    """The newest n stay."""
    keep_every: int | None
    """Those at multiples of this many steps stay for ever; None: none."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep_last < 1 or (self.keep_every is not None and self.keep_every < 1):
            raise ValueError(
                f"every {self.every}, keep_last {self.keep_last}, keep_every {self.keep_every}: expected 1 or more"
            )


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What goes into each manifest besides the state."""

    run_id: str
    config: Mapping[str, Any]
    fingerprints: Mapping[str, str]


def versions() -> dict[str, str]:
    """Of the libraries that a checkpoint depends on."""
    names = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
    return {"wavlm-jax": __version__} | {name: version(name) for name in names}


def _items(state: TrainState) -> dict[str, Any]:
    """What Orbax stores apart from each other, so that parameters can be read alone."""
    train = {"step": state.step, "opt_state": state.opt_state}
    return {"params": state.params, "train": train | {"skipped": state.skipped, "in_a_row": state.skipped_in_a_row}}


class Checkpoints:
    """The checkpoints of one workdir. All processes make one and call the same methods in the same order."""

    def __init__(self, workdir: Path, settings: CheckpointSettings, report: Callable[[str], None] = print) -> None:
        self.folder = workdir.absolute() / FOLDER
        self.settings = settings
        self.report = report
        self.refused: dict[int, str] = {}
        self._workdir = workdir
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        self._saves = 0
        if jax.process_index() == 0:
            shutil.rmtree(self.folder / UNFINISHED, ignore_errors=True)
            (self.folder / UNFINISHED).mkdir(parents=True, exist_ok=True)
        meet("leftovers of an earlier save removed")

    def latest(self) -> Manifest | None:
        """The newest checkpoint that verifies; None where there never was one.

        Raises:
            CheckpointError: there are checkpoints, but none verifies.

        """
        chosen = None
        if jax.process_index() == 0:
            chosen, self.refused = newest_valid(self._workdir)
            for reason in self.refused.values():
                self.report(f"checkpoint refused: {reason}")
        step = int(from_first("newest checkpoint that verifies", str(-1 if chosen is None else chosen.step)))
        if step >= 0:
            return read(self.folder / str(step))
        if steps(self._workdir):
            reasons = "\n  ".join(self.refused.values()) or "see the log of process 0"
            raise CheckpointError(
                f"{self.folder}: no checkpoint is usable:\n  {reasons}\n"
                f"Bring one back from a copy, or remove the folder to start over."
            )
        return None

    def restore(self, manifest: Manifest, abstract: TrainState) -> TrainState:
        """The state of a verified checkpoint, on the shardings of `abstract` (which may differ from the saved ones).

        Raises:
            CheckpointError: names, shapes or dtypes differ; every difference is printed.

        """
        items = _items(abstract)
        if lines := difference(describe_arrays(items), manifest.arrays):
            text = "\n  ".join(lines)
            raise CheckpointError(
                f"{self.folder / str(manifest.step)}: is not a checkpoint of this config:\n  {text}\n"
                f"Use the config that it was written with, or another workdir."
            )
        loaded = orbax.load_checkpointables(self.folder / str(manifest.step), items)
        train = loaded["train"]
        return TrainState(train["step"], loaded["params"], train["opt_state"], train["skipped"], train["in_a_row"])

    def save(self, state: TrainState, step: int, record: RunRecord, elapsed: float) -> None:
        """Starts writing `state`; when this returns, the state may be donated. Waits for the save before it."""
        if complaint := self.wait():
            self.report(f"warning: {complaint}")
        items = _items(state)
        manifest = Manifest(
            format=FORMAT,
            step=step,
            run_id=record.run_id,
            elapsed=elapsed,
            config=dict(record.config),
            fingerprints=dict(record.fingerprints),
            versions=versions(),
            arrays=describe_arrays(items),
            files={},
        )
        unfinished = self.folder / UNFINISHED / str(step)
        memory, self._saves = Resident(), self._saves + 1
        try:
            with _bounded_writing(items):
                response = orbax.save_checkpointables_async(unfinished, items, overwrite=True)
        except Exception as error:  # noqa: BLE001 whatever a disk or Orbax does, training goes on
            response = _Failed(error)
        memory.note("copied")
        self._pending = (step, self._thread.submit(self._commit, response, manifest, unfinished, memory))

    def _commit(self, response: Any, manifest: Manifest, unfinished: Path, memory: Resident) -> None:
        """All processes write, then process 0 commits; what fails anywhere is the failure of all."""
        self._together("written", response.result)
        memory.note("written")
        self._together("committed", lambda: self._rename(manifest, unfinished) if jax.process_index() == 0 else None)
        if jax.process_index() == 0:
            self.report(f"checkpoint {manifest.step} is written; {memory.describe()}")

    def _together(self, stage: str, do: Callable[[], Any]) -> None:
        error: Exception | None = None
        try:
            do()
        except Exception as found:  # noqa: BLE001 the others wait, whatever it is
            error = found
        place = f"save/{self._saves}/{stage}"
        here = None if error is None else f"{type(error).__name__}: {error}"
        complaint = agreed(f"a checkpoint {stage}", here, _WRITE_SECONDS, place)
        if error is not None and jax.process_count() == 1:
            raise error
        if complaint:
            raise CheckpointError(complaint)

    def _rename(self, manifest: Manifest, unfinished: Path) -> None:
        write(replace(manifest, files=describe_files(unfinished)), unfinished)
        final = self.folder / str(manifest.step)
        if final.exists():  # refused before, and written again
            self._remove(manifest.step)
        unfinished.rename(final)
        push(self.folder)
        self.refused.pop(manifest.step, None)
        self._prune()

    def _prune(self) -> None:
        good = [step for step in steps(self._workdir) if step not in self.refused]
        kept = set(good[-self.settings.keep_last :])
        if self.settings.keep_every:
            kept |= {step for step in good if step % self.settings.keep_every == 0}
        for step in good:
            if step not in kept:
                self._remove(step)

    def _remove(self, step: int) -> None:
        """Out of sight by one rename first, so that a kill leaves no half of a checkpoint."""
        hidden = self.folder / UNFINISHED / f"removed-{step}-{time.monotonic_ns()}"
        (self.folder / str(step)).rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)

    def poll(self) -> str | None:
        """What went wrong with the last save, said once; None while it runs and when it is fine. Never waits."""
        if self._pending is None or not self._pending[1].done():
            return None
        (step, future), self._pending = self._pending, None
        error = future.exception()
        if error is None:
            return None
        if jax.process_index() == 0:
            shutil.rmtree(self.folder / UNFINISHED / str(step), ignore_errors=True)
        return f"checkpoint {step} was not written ({type(error).__name__}: {error}); the ones before it are untouched"

    def wait(self) -> str | None:
        """Like `poll`, after the save under way has ended."""
        if self._pending is not None:
            self._pending[1].exception()
        return self.poll()

    def close(self) -> None:
        """Waits for the save under way."""
        self.wait()
        self._thread.shutdown()


@dataclass(frozen=True)
class _Failed:
    """A save that did not even begin."""

    error: Exception

    def result(self) -> None:
        """Like the response of a save that failed later."""
        raise self.error


def _bounded_writing(items: Any) -> orbax.Context:
    """One replica writes each array whole: slicing it among the replicas compiles a program for every shape.

    Memory besides the copy of the shards is bounded, by the largest array where that is more.
    """
    context = orbax.Context()
    context.array_options.saving.use_replica_parallel = False
    context.memory_options.write_concurrent_bytes = max(_WRITE_AHEAD, *(leaf.nbytes for leaf in jax.tree.leaves(items)))
    context.async_options.timeout_secs = int(_WRITE_SECONDS)
    return context
