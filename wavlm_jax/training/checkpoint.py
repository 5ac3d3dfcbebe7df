"""Checkpoints: Orbax writes the arrays, `storage` commits them, nothing is believed without its checksums.

A save runs in a thread of its own: copy to the host (before `save` returns), write, checksum, commit, prune. A failed
save leaves what was there, is reported once by `poll`, and training goes on.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import jax
from orbax.checkpoint import v1 as orbax

from wavlm_jax.training.files import Files
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
from wavlm_jax.training.retention import CheckpointSettings
from wavlm_jax.training.state import TrainState
from wavlm_jax.training.storage import FOLDER, Storage
from wavlm_jax.training.stored import newest_valid_of
from wavlm_jax.training.waiting import agreed, from_first, meet
from wavlm_jax.version import __version__

_WRITE_AHEAD = 2**30
"""Bytes of host memory, besides the copy of this host's shards, that a save may take while it writes."""
_WRITE_SECONDS = 1200.0
"""For the slowest host to have written its shards; the watchdog may be less patient."""


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
    """The checkpoints of one run. All processes make one and call the same methods in the same order.

    Args:
        storage: where they are.
        settings: when, and which are kept.
        report: takes a line for people.
        publish: called on each process before a checkpoint is committed; what it raises is the failure of the save.

    """

    def __init__(
        self,
        storage: Storage,
        settings: CheckpointSettings,
        report: Callable[[str], None] = print,
        publish: Callable[[], None] = lambda: None,
    ) -> None:
        self.storage = storage
        self.place = f"{storage.files.place}/{FOLDER}"
        self.settings = settings
        self.report = report
        self.refused: dict[int, str] = {}
        self._publish = publish
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        self._saves = 0
        if jax.process_index() == 0:
            storage.sweep()
        meet("leftovers of an earlier save removed")

    def latest(self) -> Manifest | None:
        """The newest checkpoint that verifies; None where there never was one.

        Raises:
            CheckpointError: there are checkpoints, but none verifies.

        """
        chosen = None
        if jax.process_index() == 0:
            chosen, self.refused = newest_valid_of(self.storage)
            for reason in self.refused.values():
                self.report(f"checkpoint refused: {reason}")
        step = int(from_first("newest checkpoint that verifies", str(-1 if chosen is None else chosen.step)))
        if step >= 0:
            return read(self.storage.checkpoint(step))
        if self.storage.steps():
            reasons = "\n  ".join(self.refused.values()) or "see the log of process 0"
            raise CheckpointError(
                f"{self.place}: no checkpoint is usable:\n  {reasons}\n"
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
                f"{self.place}/{manifest.step}: is not a checkpoint of this config:\n  {text}\n"
                f"Use the config that it was written with, or another workdir."
            )
        loaded = orbax.load_checkpointables(self.storage.checkpoint(manifest.step).place, items)
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
        draft = self.storage.draft(step)
        memory, self._saves = Resident(), self._saves + 1
        try:
            with _bounded_writing(items):
                response = orbax.save_checkpointables_async(draft.place, items, overwrite=True)
        except Exception as error:  # noqa: BLE001 whatever a disk or Orbax does, training goes on
            response = _Failed(error)
        memory.note("copied")
        self._pending = (step, self._thread.submit(self._commit, response, manifest, draft, memory))

    def _commit(self, response: Any, manifest: Manifest, draft: Files, memory: Resident) -> None:
        """All processes write, then process 0 commits; what fails anywhere is the failure of all."""

        def write_all() -> None:
            response.result()
            self._publish()

        self._together("written", write_all)
        memory.note("written")
        self._together("committed", lambda: self._finish(manifest, draft) if jax.process_index() == 0 else None)
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

    def _finish(self, manifest: Manifest, draft: Files) -> None:
        write(replace(manifest, files=describe_files(draft)), draft)
        self.storage.commit(manifest.step)
        self.refused.pop(manifest.step, None)
        self._tidy("older checkpoints", self._prune)

    def _prune(self) -> None:
        good = [step for step in self.storage.steps() if step not in self.refused]
        for step in self.settings.superfluous(good):
            self.storage.remove(step)

    def poll(self) -> str | None:
        """What went wrong with the last save, said once; None while it runs and when it is fine. Never waits."""
        if self._pending is None or not self._pending[1].done():
            return None
        (step, future), self._pending = self._pending, None
        error = future.exception()
        if error is None:
            return None
        if jax.process_index() == 0:
            self._tidy(f"what there is of checkpoint {step}", lambda: self.storage.discard(step))
        return f"checkpoint {step} was not written ({type(error).__name__}: {error}); the ones before it are untouched"

    def _tidy(self, what: str, do: Callable[[], None]) -> None:
        """What cannot be removed now is no reason to lose a checkpoint, or a run; later saves and starts try again."""
        try:
            do()
        except OSError as error:
            self.report(f"warning: {what} could not be removed: {error}")

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
