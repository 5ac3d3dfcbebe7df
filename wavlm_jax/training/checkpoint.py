"""Checkpoints: all or nothing, verified by checksum, restored strictly, resumed to the bit.

Orbax writes and reads the arrays; what makes them a checkpoint is here. Every checkpoint has a manifest.json with the
run record (step, resolved config, fingerprints of the data, versions) and the SHA-256 of every file, itself included,
written last:

    FOLDER/checkpoints/1000/{params,train,manifest.json,...}   committed by one rename
    FOLDER/checkpoints/.unfinished/2000                        being written
    gs://.../checkpoints/1000/{params,train,manifest.json,...} committed by its manifest: a bucket has no rename
    gs://.../checkpoints/2000/{params,...}                     being written
    gs://.../checkpoints/.manifest-last                        says so, and that what has no manifest may be deleted

Why not Orbax's `training.Checkpointer`: what 0.12.8 does, by experiment and source, and the tests that forbid it:
* Its commit writes _CHECKPOINT_METADATA with the time in it, after the last moment at which files can be hashed; hashed
  after the commit, a kill in between leaves a checkpoint without checksums
  (test_every_damaged_file_is_named_and_the_step_before_is_used, test_killed_in_each_phase_of_a_save).
* When one host cannot write, the others are told of a time limit and not of the host
  (test_what_one_host_cannot_write_is_no_checkpoint_on_any).
* In a bucket its clean-up deletes every folder without its own marker, other programs' too
  (test_only_a_workdir_with_our_mark_is_swept).
* After a failed save it leaves its temporary folder (test_a_failed_save_is_reported_once_and_leaves_the_others).
Without a test: damaged checkpoints count among those to keep, so that the last good one was deleted; an interrupted
deletion leaves half a checkpoint that is listed; files and renames are not synced to disk (fsync).
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as orbax

from wavlm_jax.settings import read
from wavlm_jax.training.hosts import all_gather, all_succeed, barrier, broadcast_one_to_all, resident_bytes
from wavlm_jax.training.sharding import path_name
from wavlm_jax.training.step import TrainState
from wavlm_jax.training.workdir import (
    VISIBLE_WITHIN,
    absolute,
    address,
    exists,
    file_sizes,
    fsync,
    list_names,
    read_bytes,
    remove,
    sha256,
    write_object,
)
from wavlm_jax.version import __version__

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
MARK = ".manifest-last"
_UNFINISHED = ".unfinished"
_MARK_TEXT = (
    b"A numbered folder without manifest.json is an unfinished checkpoint; the next start of the run removes it.\n"
)
_FORMAT = 2
"""1: manifests have no checksum of their own, and fingerprints of evaluation data as well."""
_BLANK = b"0" * 64
"""In the place of a manifest's own checksum while it is computed."""
_MAX_MANIFEST, _DEEPEST = 64 * 2**20, 64
"""Bytes of a manifest, and folders in the path of an array, that are read."""
_WRITE_AHEAD = 2**30
"""Bytes of host memory, besides the copy of this host's shards, that a save may take."""
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

    def superfluous(self, steps: Sequence[int]) -> list[int]:
        """Those of `steps`, oldest first, that are not kept."""
        older = steps[: -self.keep_last]
        return [step for step in older if self.keep_every is None or step % self.keep_every]


ArrayFacts: TypeAlias = tuple[tuple[int, ...], str]
"""Shape and dtype of an array."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, or none that can; the message says which file and what to do."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What every checkpoint of a session says about its run."""

    run_id: str
    """The same for all sessions of a run; a tracker continues its curve by it."""
    config: Mapping[str, Any]
    """Resolved."""
    fingerprints: Mapping[str, str]
    """`Task.fingerprints`."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that is known about a checkpoint without opening its arrays; `RunRecord` explains the first three."""

    run_id: str
    config: dict[str, Any]
    fingerprints: dict[str, str]
    format: int
    step: int
    elapsed: float
    """Seconds of all sessions up to here."""
    versions: dict[str, str]
    """Of the libraries that a checkpoint depends on."""
    arrays: dict[str, ArrayFacts]
    """Path of every array of the train state -> (shape, dtype)."""
    files: dict[str, tuple[int, str]]
    """Path of every file below the checkpoint's folder -> (bytes, SHA-256)."""

    def __post_init__(self) -> None:
        numbers = [self.step, *(size for size, _ in self.files.values())]
        for path, (shape, dtype) in self.arrays.items():
            if path.count("/") > _DEEPEST or not (dtype == "bool" or jnp.issubdtype(jnp.dtype(dtype), jnp.number)):
                raise ValueError(f"arrays: found {path:.80} of {dtype:.80}, expected the path of an array of numbers")
            numbers += shape
        if min(numbers) < 0 or not 0 <= self.elapsed < math.inf:
            raise ValueError("step, elapsed, sizes of files and arrays: expected no negative number, and finite ones")


def describe_arrays(tree: Any) -> dict[str, ArrayFacts]:
    """Path -> (shape, dtype)."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in leaves}


def difference(expected: Mapping[str, ArrayFacts], found: Mapping[str, ArrayFacts]) -> list[str]:
    """Lines that say how two results of `describe_arrays` differ; none where they agree."""
    lines = [f"missing in the checkpoint: {name} {expected[name]}" for name in sorted(set(expected) - set(found))]
    lines += [f"only in the checkpoint: {name} {found[name]}" for name in sorted(set(found) - set(expected))]
    lines += [
        f"{name}: the checkpoint has {found[name][1]}{found[name][0]}, expected {expected[name][1]}{expected[name][0]}"
        for name in sorted(set(found) & set(expected))
        if found[name] != expected[name]
    ]
    return lines


def write_manifest(manifest: Manifest, folder: str) -> None:
    """Writes the last file of a checkpoint, beside those that it lists; durable when this returns."""
    content = json.dumps({"checksum": _BLANK.decode(), **asdict(manifest)}, indent=1).encode()
    write_object(f"{folder}/{MANIFEST}", content.replace(_BLANK, _hex_digest(content), 1))


def _hex_digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def read_manifest(folder: str) -> Manifest:
    """The manifest of the checkpoint in `folder`.

    Raises:
        CheckpointError: missing, damaged, or of a format that this version does not know.

    """
    path = f"{folder}/{MANIFEST}"
    try:
        content = read_bytes(path, _MAX_MANIFEST)
        values = json.loads(content)
        known, intact = values["format"] in (1, _FORMAT), True
        if values["format"] == _FORMAT:
            checksum = values.pop("checksum").encode()
            intact = _hex_digest(content.replace(checksum, _BLANK, 1)) == checksum
        manifest = read(values, Manifest, "manifest") if known and intact else None
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing, so this checkpoint is damaged") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a manifest ({error!s:.300}), so this checkpoint is damaged") from error
    if not intact:
        raise CheckpointError(f"{path}: contents have changed (SHA-256 differs), so this checkpoint is damaged")
    if manifest is None:
        raise CheckpointError(f"{path}: format {values['format']!s:.20}, this version reads 1 and {_FORMAT}")
    return manifest


def verify(folder: str, step: int) -> Manifest:
    """The manifest of the checkpoint of `step`, of which every file is as it was written.

    Raises:
        CheckpointError: naming the first file that is missing, changed or not listed.

    """
    manifest = read_manifest(folder)
    if step != manifest.step:
        raise CheckpointError(
            f"{folder}/{MANIFEST}: is of step {manifest.step}, so this folder holds another checkpoint"
        )
    sizes = _sizes(folder)
    for name in sorted(sizes.keys() ^ set(manifest.files)):
        raise CheckpointError(f"{folder}/{name}: {'not in the manifest' if name in sizes else 'missing'}")
    for name, (size, _) in manifest.files.items():
        if sizes[name] != size:
            raise CheckpointError(f"{folder}/{name}: {sizes[name]} bytes, expected {size}")
    for name, digest in _digests(folder, sizes):
        if digest != manifest.files[name][1]:
            raise CheckpointError(f"{folder}/{name}: contents have changed (SHA-256 differs)")
    return manifest


def _sizes(folder: str) -> dict[str, int]:
    return {name: size for name, size in file_sizes(folder).items() if name != MANIFEST}


def _digests(folder: str, sizes: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """SHA-256 of each; of a bucket, eight at a time."""
    with ThreadPoolExecutor(1 if address(folder) is None else 8) as pool:
        yield from zip(sizes, pool.map(lambda name: sha256(f"{folder}/{name}", sizes[name]), sizes), strict=True)


def hash_files(folder: str) -> dict[str, tuple[int, str]]:
    """Path -> (bytes, SHA-256) of the files in `folder` that this process has written, each made durable first.

    Orbax names the process in the path of what it writes for it; all other files are written by process 0.
    """
    end = time.monotonic() + VISIBLE_WITHIN
    while not (sizes := _sizes(folder)) and time.monotonic() < end:
        list_names(folder.rpartition("/")[0])  # makes NFS ask its server again
        time.sleep(0.5)
    writers = {name: re.search(r"(?:^|[/.])process_(\d+)(?:/|$)", name) for name in sizes}
    mine = {
        name: sizes[name] for name, found in writers.items() if int(found[1] if found else 0) == jax.process_index()
    }
    for name in mine:
        fsync(f"{folder}/{name}")
    return {name: (mine[name], digest) for name, digest in _digests(folder, mine)}


class CheckpointStore:
    """The checkpoints of one run, as files. Anybody may read; of several processes only process 0 changes it.

    Args:
        workdir: a folder or a gs:// address.

    """

    def __init__(self, workdir: Path | str) -> None:
        self.place = f"{absolute(workdir)}/{FOLDER}"
        self._in_bucket = address(workdir) is not None

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, valid or not, oldest first.

        In a bucket with our mark, a folder without a manifest is an unfinished save and is left out. Without the mark
        it is listed, and refused as damaged when it is verified.
        """
        names = list_names(self.place)
        found = sorted(int(name) for name in names if name.isdecimal())
        return [step for step in found if not self._in_bucket or MARK not in names or self._committed(step)]

    def path(self, step: int) -> str:
        """The folder of a checkpoint."""
        return f"{self.place}/{step}"

    def draft(self, step: int) -> str:
        """The folder that Orbax writes."""
        return self.path(step) if self._in_bucket else f"{self.place}/{_UNFINISHED}/{step}"

    def clean_up(self) -> None:
        """Deletes what unfinished saves have left; no save may be under way."""
        if not self._in_bucket:
            shutil.rmtree(f"{self.place}/{_UNFINISHED}", ignore_errors=True)
            Path(self.place, _UNFINISHED).mkdir(parents=True, exist_ok=True)
        elif MARK not in (names := list_names(self.place)):
            write_object(f"{self.place}/{MARK}", _MARK_TEXT)
        else:
            for name in filter(str.isdecimal, names):
                self.discard(int(name))

    def commit(self, step: int) -> None:
        """Makes the draft a checkpoint, in the place of whatever was there. In a bucket its manifest has done that."""
        if self._in_bucket:
            return
        if Path(self.path(step)).exists():  # refused before, and written again
            self.delete(step)
        Path(self.draft(step)).rename(self.path(step))
        fsync(self.place)

    def discard(self, step: int) -> None:
        """Deletes the draft of a failed save; in a bucket, one that has its manifest is a checkpoint and stays."""
        if not self._in_bucket:
            self.clean_up()  # Orbax has drafts of its own beside ours
        elif not self._committed(step):
            remove(self.draft(step))

    def delete(self, step: int) -> None:
        """Deletes a checkpoint; whatever interrupts it, no half of one stays visible."""
        if self._in_bucket:
            remove(f"{self.path(step)}/{MANIFEST}")
            remove(self.path(step))
        else:
            hidden = Path(self.place, _UNFINISHED, f"removed-{step}-{time.monotonic_ns()}")
            Path(self.path(step)).rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)

    def _committed(self, step: int) -> bool:
        return exists(f"{self.path(step)}/{MANIFEST}")


def steps(workdir: Path | str) -> list[int]:
    """See `CheckpointStore.steps`."""
    return CheckpointStore(workdir).steps()


def newest_valid(workdir: Path | str) -> tuple[Manifest | None, dict[int, str]]:
    """The newest checkpoint of which every checksum holds, and why each newer one was refused."""
    store, refused = CheckpointStore(workdir), dict[int, str]()
    for step in reversed(store.steps()):
        try:
            return verify(store.path(step), step), refused
        except (CheckpointError, OSError) as error:
            refused[step] = str(error)
    return None, refused


def load_params(workdir: Path | str, step: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and parameters of a run, on the host, whatever devices it was trained on; as `load_stored`."""
    manifest, params = load_stored(workdir, step)
    return manifest.config, params


def load_stored(workdir: Path | str, step: int | None = None) -> tuple[Manifest, dict[str, Any]]:
    """Manifest and parameters (numpy arrays) of a checkpoint, on the host, whatever devices it was trained on.

    Args:
        workdir: of the run, a folder or a gs:// address.
        step: None: the newest checkpoint that verifies.

    Raises:
        CheckpointError: no such checkpoint, it does not verify, or claims more than this machine's memory.

    """
    store = CheckpointStore(workdir)
    if step is not None:
        manifest: Manifest | None = verify(store.path(step), step)
    else:
        manifest, refused = newest_valid(workdir)
    if manifest is None:
        reasons = "".join(f"\n  {reason}" for reason in refused.values())
        raise CheckpointError(f"{store.place}: no usable checkpoint{reasons}")
    path = store.path(manifest.step)
    try:
        abstract, stored = _abstract_params(manifest), orbax.checkpointables_metadata(path).metadata["params"]
        if lines := difference(describe_arrays(abstract), describe_arrays(stored)):
            raise ValueError(f"{MANIFEST} and arrays differ: {lines[0]}")  # noqa: TRY301 as what Orbax finds
        return manifest, orbax.load_checkpointables(path, {"params": abstract})["params"]
    except Exception as error:
        if step is None and manifest.step not in (left := store.steps()) and left:
            return load_stored(workdir)  # the run goes on, and has deleted this checkpoint meanwhile
        if isinstance(error, OSError):
            raise
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error!s:.300})") from error


def _abstract_params(manifest: Manifest) -> dict[str, Any]:
    """The tree of parameters, of arrays that take no memory."""
    abstract: dict[str, Any] = {}
    total, memory = 0, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path, (shape, dtype) in manifest.arrays.items():
        first, *parents, last = path.split("/")
        if first == "params":
            node = abstract
            for name in parents:
                node = node.setdefault(name, {})
            node[last] = np.broadcast_to(np.empty((), dtype), shape)
            total += node[last].nbytes
    if total > memory:
        raise ValueError(
            f"parameters of {total / 2**30:,.0f} GiB, this machine has {memory / 2**30:,.0f} GiB of memory"
        )
    return abstract


def _checkpointables(state: TrainState) -> dict[str, Any]:
    """What Orbax stores apart from each other, so that parameters can be read alone."""
    opt_state = {**state.opt_state, "updates": state.updates, "thaws": state.thaws}
    train = {"step": state.step, "skipped": state.skipped, "in_a_row": state.skipped_in_a_row, "opt_state": opt_state}
    return {"params": state.params, "train": train}


def _train_state(checkpointables: dict[str, Any]) -> TrainState:
    """The inverse of `_checkpointables`."""
    params, train = checkpointables["params"], checkpointables["train"]
    opt_state = dict(train["opt_state"])
    updates, thaws = opt_state.pop("updates"), opt_state.pop("thaws")
    return TrainState(train["step"], params, opt_state, updates, thaws, train["skipped"], train["in_a_row"])


class Checkpoints:
    """The checkpoints of one run, for the training loop. All processes call the same methods in the same order.

    A save runs in a thread: copy to the host (before `save` returns), write, hash, commit, delete old ones. A failed
    one leaves what was there, is reported once by `poll`, and training goes on.

    Args:
        workdir: a folder or a gs:// address.
        settings: when, and which are kept.
        report: takes a line for people.
        publish: called on each process before a checkpoint is committed; what it raises is the failure of the save.

    """

    def __init__(
        self,
        workdir: Path | str,
        settings: CheckpointSettings,
        report: Callable[[str], None] = print,
        publish: Callable[[], None] = lambda: None,
    ) -> None:
        self.workdir = workdir
        self.store = CheckpointStore(workdir)
        self.settings = settings
        self.report = report
        self.refused: dict[int, str] = {}
        self._publish = publish
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        self._saves = 0
        if jax.process_index() == 0:
            self.store.clean_up()
        barrier("leftovers of an earlier save removed")

    def latest(self) -> Manifest | None:
        """The newest checkpoint that verifies; None where there never was one.

        Raises:
            CheckpointError: there are checkpoints, but none verifies.

        """
        chosen = None
        if jax.process_index() == 0:
            chosen, self.refused = newest_valid(self.workdir)
            for reason in self.refused.values():
                self.report(f"checkpoint refused: {reason}")
        step = broadcast_one_to_all("newest checkpoint that verifies", None if chosen is None else chosen.step)
        if step is not None:
            return read_manifest(self.store.path(step))
        if self.store.steps():
            reasons = "\n  ".join(self.refused.values()) or "see the log of process 0"
            raise CheckpointError(
                f"{self.store.place}: no checkpoint is usable:\n  {reasons}\n"
                f"Bring one back from a copy, or remove the folder to start over."
            )
        return None

    def restore(self, manifest: Manifest, abstract: TrainState) -> TrainState:
        """The state of a verified checkpoint, on the shardings of `abstract` (which may differ from the saved ones).

        Raises:
            CheckpointError: names, shapes or dtypes differ; every difference is printed.

        """
        wanted, path = _checkpointables(abstract), self.store.path(manifest.step)
        if lines := difference(describe_arrays(wanted), manifest.arrays):
            text = "\n  ".join(lines)
            raise CheckpointError(
                f"{path}: is not a checkpoint of this config:\n  {text}\n"
                f"Use the config that it was written with, or another workdir."
            )
        return _train_state(orbax.load_checkpointables(path, wanted))

    def save(self, state: TrainState, step: int, record: RunRecord, elapsed: float) -> None:
        """Starts writing `state`; when this returns, the state may be donated. Waits for the save before it."""
        if complaint := self.wait():
            self.report(f"warning: {complaint}")
        items = _checkpointables(state)
        libraries = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
        versions = {"wavlm-jax": __version__} | {name: version(name) for name in libraries}
        facts: dict[str, Any] = {"step": step, "elapsed": elapsed, "versions": versions, "files": {}}
        manifest = Manifest(**asdict(record), format=_FORMAT, arrays=describe_arrays(items), **facts)
        self._saves += 1
        memory = {"before": resident_bytes()}
        try:
            with _bounded_writing(items):
                response = orbax.save_checkpointables_async(self.store.draft(step), items, overwrite=True)
        except Exception as error:  # noqa: BLE001 whatever a disk or Orbax does, training goes on
            response = Future[None]()
            response.set_exception(error)
        memory["copied"] = resident_bytes()
        self._pending = (step, self._thread.submit(self._finish, response, manifest, memory))

    def _finish(self, response: Any, manifest: Manifest, memory: dict[str, int]) -> None:
        """All processes write and hash, then process 0 commits; what fails anywhere is the failure of all."""
        draft = self.store.draft(manifest.step)

        def write() -> dict[str, tuple[int, str]]:
            response.result()
            self._publish()
            return hash_files(draft)

        mine = self._together("written", write)
        memory["written"] = resident_bytes()
        hashed = all_gather("checksums of a checkpoint", mine, _WRITE_SECONDS, f"save/{self._saves}")
        files = {name: (size, digest) for _, _, theirs in hashed for name, (size, digest) in sorted(theirs.items())}
        self._together("committed", lambda: self._commit(replace(manifest, files=files)))
        if jax.process_index() == 0:
            moments = ", ".join(f"{moment} {value / 2**20:,.0f}" for moment, value in memory.items())
            self.report(f"checkpoint {manifest.step} is written; host memory in MiB: {moments}")

    def _together(self, stage: str, do: Callable[[], Any]) -> Any:
        return all_succeed(
            f"a checkpoint {stage}",
            do,
            catch=(Exception,),  # the others wait, whatever it is
            failure=CheckpointError,
            describe=lambda error: f"{type(error).__name__}: {error}",
            seconds=_WRITE_SECONDS,
            key=f"save/{self._saves}",
        )

    def _commit(self, manifest: Manifest) -> None:
        if jax.process_index() != 0:
            return
        draft = self.store.draft(manifest.step)
        if unknown := _sizes(draft).keys() ^ manifest.files.keys():
            raise CheckpointError(f"{draft}: no process has hashed, or one cannot see, {', '.join(sorted(unknown))}")
        write_manifest(manifest, draft)
        self.store.commit(manifest.step)
        self.refused.pop(manifest.step, None)
        with self._tolerated("older checkpoints"):
            good = [step for step in self.store.steps() if step not in self.refused]
            for step in self.settings.superfluous(good):
                self.store.delete(step)
            self.store.clean_up()

    @contextlib.contextmanager
    def _tolerated(self, what: str) -> Iterator[None]:
        """What cannot be deleted now is no reason to lose a checkpoint, or a run; later saves and starts try again."""
        try:
            yield
        except OSError as error:
            self.report(f"warning: {what} could not be removed: {error}")

    def poll(self) -> str | None:
        """What went wrong with the last save, said once; None while it runs and when it is fine. Never waits."""
        if self._pending is None or not self._pending[1].done():
            return None
        (step, future), self._pending = self._pending, None
        if (error := future.exception()) is None:
            return None
        if jax.process_index() == 0:
            with self._tolerated(f"what there is of checkpoint {step}"):
                self.store.discard(step)
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


def _bounded_writing(items: Any) -> orbax.Context:
    """Orbax's options. Host memory besides the copy of the shards is bounded (by the largest array where that is more).

    One replica writes each array whole, since slicing it among the replicas would compile a program for every shape.
    """
    context = orbax.Context()
    context.array_options.saving.use_replica_parallel = False
    context.memory_options.write_concurrent_bytes = max(_WRITE_AHEAD, *(leaf.nbytes for leaf in jax.tree.leaves(items)))
    context.async_options.timeout_secs = int(_WRITE_SECONDS)
    return context
