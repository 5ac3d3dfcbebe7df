"""Which checkpoints there are to be.

The manifest of a checkpoint: what it holds, what it was made from, and a checksum of every file.

It is the last file of a checkpoint to be written (`storage`); so a checkpoint without it is damaged, not unfinished.

Checkpoints where they are kept, for whoever reads them: the next session, another run, an export.

Checkpoints: Orbax writes the arrays, `storage` commits them, nothing is believed without its checksums.

A save runs in a thread of its own: copy to the host (before `save` returns), write, checksum, commit, prune. A failed
save leaves what was there, is reported once by `poll`, and training goes on.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as orbax

from wavlm_jax.training.hosts import Resident, agreed, from_first, meet
from wavlm_jax.training.sharding import path_name
from wavlm_jax.training.step import TrainState
from wavlm_jax.training.storage import FOLDER, NAME, Files, Storage, open_storage
from wavlm_jax.version import __version__


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

    def superfluous(self, steps: Sequence[int]) -> list[int]:
        """Those of `steps`, oldest first, that are not kept."""
        older = steps[: -self.keep_last]
        return [step for step in older if self.keep_every is None or step % self.keep_every]


FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, or none that can; the message says which file and what to do."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that is known about a checkpoint without opening its arrays."""

    format: int
    step: int
    run_id: str
    """The same for all sessions of a run; a tracker continues its curve by it."""
    elapsed: float
    """Seconds of all sessions up to here."""
    config: dict[str, Any]
    """Resolved."""
    fingerprints: dict[str, str]
    """Of everything outside the config that training depends on: corpus, labels, k-means."""
    versions: dict[str, str]
    arrays: dict[str, list[Any]]
    """Path of every array of the train state -> [shape, dtype]."""
    files: dict[str, list[Any]]
    """Path of every file below the checkpoint's folder -> [bytes, SHA-256]."""


def describe_arrays(tree: Any) -> dict[str, list[Any]]:
    """Path -> [shape, dtype], ready for JSON."""
    return {
        path_name(path): [list(leaf.shape), str(leaf.dtype)] for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def describe_files(files: Files) -> dict[str, list[Any]]:
    """Path -> [bytes, SHA-256] of every file but the manifest, each made durable first."""
    files.settle()
    sizes = _sizes(files)
    return {name: [sizes[name], digest] for name, digest in _digests(files, sizes)}


def write(manifest: Manifest, files: Files) -> None:
    """The manifest beside the files that it describes, durable when this returns."""
    files.write(NAME, json.dumps(asdict(manifest), indent=1).encode())


def read(files: Files) -> Manifest:
    """The manifest of the checkpoint that `files` are.

    Raises:
        CheckpointError: missing, damaged, or of a format that this version does not know.

    """
    path = f"{files.place}/{NAME}"
    try:
        values = json.loads(files.read(NAME))
        found = values["format"]
        manifest = Manifest(**values) if found == FORMAT else None
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing, so this checkpoint is damaged") from error
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: not a manifest ({error}), so this checkpoint is damaged") from error
    if manifest is None:
        raise CheckpointError(f"{path}: format {found}, this version reads {FORMAT}")
    _check_types(manifest, path)
    return manifest


def verify(files: Files, step: int) -> Manifest:
    """The manifest of the checkpoint of `step`, of which every file is as it was written.

    Raises:
        CheckpointError: naming the first file that is missing, changed or not listed.

    """
    manifest = read(files)
    if step != manifest.step:
        raise CheckpointError(
            f"{files.place}/{NAME}: is of step {manifest.step}, so this folder holds another checkpoint"
        )
    sizes = _sizes(files)
    for name in sorted(sizes.keys() ^ set(manifest.files)):
        raise CheckpointError(f"{files.place}/{name}: {'not in the manifest' if name in sizes else 'missing'}")
    for name, (size, _) in manifest.files.items():
        if sizes[name] != size:
            raise CheckpointError(f"{files.place}/{name}: {sizes[name]} bytes, expected {size}")
    for name, digest in _digests(files, sizes):
        if digest != manifest.files[name][1]:
            raise CheckpointError(f"{files.place}/{name}: contents have changed (SHA-256 differs)")
    return manifest


def _sizes(files: Files) -> dict[str, int]:
    return {name: size for name, size in files.sizes().items() if name != NAME}


def _digests(files: Files, sizes: Mapping[str, int]) -> Iterable[tuple[str, str]]:
    """SHA-256 of each, as many at a time as the place can take."""
    with ThreadPoolExecutor(files.readers) as pool:
        yield from zip(sizes, pool.map(files.digest, sizes, sizes.values()), strict=True)


def difference(expected: Mapping[str, list[Any]], found: Mapping[str, list[Any]]) -> list[str]:
    """Lines that say how two results of `describe_arrays` differ; none where they agree."""
    lines = [f"missing in the checkpoint: {name} {expected[name]}" for name in sorted(set(expected) - set(found))]
    lines += [f"only in the checkpoint: {name} {found[name]}" for name in sorted(set(found) - set(expected))]
    lines += [
        f"{name}: the checkpoint has {found[name][1]}{tuple(found[name][0])}, "
        f"expected {expected[name][1]}{tuple(expected[name][0])}"
        for name in sorted(set(found) & set(expected))
        if list(found[name]) != list(expected[name])
    ]
    return lines


def _check_types(manifest: Manifest, path: str) -> None:
    pairs = (
        [*manifest.arrays.values(), *manifest.files.values()] if _is_object(manifest.arrays, manifest.files) else [0]
    )
    shapes_are_lists = all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)  # noqa: PLR2004 two of each
    if not shapes_are_lists or not _is_object(manifest.config, manifest.fingerprints, manifest.versions):
        raise CheckpointError(f"{path}: entries have the wrong type, so this checkpoint is damaged")


def _is_object(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


def steps(workdir: Path | str) -> list[int]:
    """Steps that have a checkpoint, valid or not, oldest first."""
    return open_storage(workdir).steps()


def newest_valid(workdir: Path | str) -> tuple[Manifest | None, dict[int, str]]:
    """The newest checkpoint of which every checksum holds, and why each newer one was refused."""
    return newest_valid_of(open_storage(workdir))


def newest_valid_of(storage: Storage) -> tuple[Manifest | None, dict[int, str]]:
    """As `newest_valid`."""
    refused: dict[int, str] = {}
    for step in reversed(storage.steps()):
        try:
            return verify(storage.checkpoint(step), step), refused
        except (CheckpointError, OSError) as error:
            refused[step] = str(error)
    return None, refused


def load_params(workdir: Path | str, step: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and parameters of a run, on the host, whatever devices it was trained on.

    Args:
        workdir: of the run, a folder or a gs:// address.
        step: None: the newest checkpoint that verifies.

    Returns:
        (resolved config, nested dict of numpy arrays).

    Raises:
        CheckpointError: no such checkpoint, or it does not verify.

    """
    manifest, params = load_stored(workdir, step)
    return manifest.config, params


def load_stored(workdir: Path | str, step: int | None = None) -> tuple[Manifest, dict[str, Any]]:
    """As `load_params`, with the whole manifest."""
    storage = open_storage(workdir)
    if step is not None:
        manifest: Manifest | None = verify(storage.checkpoint(step), step)
    else:
        manifest, refused = newest_valid_of(storage)
    if manifest is None:
        reasons = "".join(f"\n  {reason}" for reason in refused.values())
        raise CheckpointError(f"{storage.files.place}/{FOLDER}: no usable checkpoint{reasons}")
    abstract: dict[str, Any] = {}
    for path, (shape, dtype) in manifest.arrays.items():
        first, *parents, last = path.split("/")
        if first == "params":
            node = abstract
            for name in parents:
                node = node.setdefault(name, {})
            node[last] = np.empty(shape, dtype)
    place = storage.checkpoint(manifest.step).place
    try:
        return manifest, orbax.load_checkpointables(place, {"params": abstract})["params"]
    except (OSError, ValueError, KeyError):
        if step is None and manifest.step not in (left := storage.steps()) and left:
            return load_stored(workdir)  # the run goes on, and its retention has removed it under our eyes
        raise


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
    opt_state = {**state.opt_state, "updates": state.updates, "thaws": state.thaws}
    train = {"step": state.step, "skipped": state.skipped, "in_a_row": state.skipped_in_a_row, "opt_state": opt_state}
    return {"params": state.params, "train": train}


def _state(items: dict[str, Any]) -> TrainState:
    """The inverse of `_items`."""
    train, opt_state = items["train"], dict(items["train"]["opt_state"])
    updates, thaws = opt_state.pop("updates"), opt_state.pop("thaws")
    return TrainState(train["step"], items["params"], opt_state, updates, thaws, train["skipped"], train["in_a_row"])


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
        return _state(orbax.load_checkpointables(self.storage.checkpoint(manifest.step).place, items))

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
