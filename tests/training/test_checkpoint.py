"""Checkpoints: all or nothing, strict, verified; a damaged one is refused by name and the one before it is used."""

import gc
import hashlib
import json
import re
import resource
import shutil
import tarfile
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import toy_task
from wavlm_jax.training import checkpoint
from wavlm_jax.training.checkpoint import (
    MANIFEST,
    CheckpointError,
    Checkpoints,
    CheckpointSettings,
    RunRecord,
    hash_files,
    load_params,
    steps,
    verify,
)
from wavlm_jax.training.hosts import resident_bytes
from wavlm_jax.training.sharding import MeshSettings, make_mesh
from wavlm_jax.training.start import make_builder
from wavlm_jax.training.step import Builder, TrainState, init_key
from wavlm_jax.training.workdir import check_room

RECORD = RunRecord(run_id="abc", config={"optim": {"learning_rate": 1.0}}, fingerprints={"corpus": "1f"})


def layout(fsdp: int = 1, task=None) -> Builder:
    chosen = make_mesh(MeshSettings.anywhere(data=-1, fsdp=fsdp, tensor=1))
    return make_builder(task or toy_task.make_task(), toy_task.make_settings(), chosen, toy_task.TABLE)


def state_of(plan: Builder, seed: int = 0):
    places = jax.tree.map(lambda leaf: leaf.sharding, plan.state.params)
    return plan.fresh(jax.jit(toy_task.init, out_shardings=places)(init_key(seed)))


def keeper(workdir: Path, keep_last: int = 3, keep_every: int | None = None) -> Checkpoints:
    settings = CheckpointSettings(every=1, keep_last=keep_last, keep_every=keep_every)
    return Checkpoints(workdir, settings, report=lambda _: None)


@pytest.fixture(scope="module")
def plan() -> Builder:
    return layout()


@pytest.fixture(scope="module")
def two(tmp_path_factory, plan: Builder) -> Path:
    """A workdir with checkpoints of steps 1 and 2, of different parameters."""
    workdir = tmp_path_factory.mktemp("run")
    checkpoints = keeper(workdir)
    for step in (1, 2):
        checkpoints.save(state_of(plan, step), step, RECORD, 1.5)
        assert checkpoints.wait() is None
    checkpoints.close()
    return workdir


@pytest.fixture
def workdir(two: Path, tmp_path: Path) -> Path:
    """A copy, to be harmed."""
    return Path(shutil.copytree(two, tmp_path / "run"))


def same(one, other) -> bool:
    return toy_task.digest(jax.device_get(one)) == toy_task.digest(jax.device_get(other))


@pytest.mark.parametrize("fsdp", [1, 8])
def test_restores_the_same_bits_on_another_mesh(two: Path, plan: Builder, fsdp: int) -> None:
    checkpoints = keeper(two)
    found = checkpoints.latest()
    assert (found.step, found.run_id, found.elapsed) == (2, "abc", 1.5)
    assert found.config == RECORD.config
    assert found.versions["jax"] == jax.__version__
    target = layout(fsdp)
    state = checkpoints.restore(found, target.state)
    assert same(state, state_of(plan, 2))
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, target.state)


def test_parameters_load_on_the_host(two: Path, plan: Builder) -> None:
    config, params = load_params(two)
    assert config == RECORD.config
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    assert same(params, state_of(plan, 2).params)
    assert same(load_params(two, 1)[1], state_of(plan, 1).params)
    with pytest.raises(CheckpointError, match=r"checkpoints/7/manifest\.json: missing"):
        load_params(two, 7)


def test_the_state_may_be_overwritten_as_soon_as_save_returns(tmp_path: Path, plan: Builder) -> None:
    checkpoints = keeper(tmp_path)
    clobber = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 + 7, tree), donate_argnums=0)
    for step in range(1, 4):
        state = state_of(plan, step)
        checkpoints.save(state, step, RECORD, 0.0)
        jax.block_until_ready(clobber(state))
    checkpoints.close()
    for step in range(1, 4):
        assert same(load_params(tmp_path, step)[1], state_of(plan, step).params)


def test_retention(tmp_path: Path, plan: Builder) -> None:
    checkpoints = keeper(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 8):
        checkpoints.save(state_of(plan), step, RECORD, 0.0)
    checkpoints.close()
    assert steps(tmp_path) == [4, 6, 7]
    assert list((tmp_path / "checkpoints" / ".unfinished").iterdir()) == []


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("harm", ["empty", "half", "flip", "delete", "swap", "extra"])
def test_every_damaged_file_is_named_and_the_step_before_is_used(two: Path, tmp_path: Path, harm: str) -> None:
    for original in files_of(two / "checkpoints" / "2"):
        workdir = Path(shutil.copytree(two, tmp_path / "run"))
        path = workdir / original.relative_to(two)
        content = path.read_bytes()
        if not content and harm in ("empty", "half", "flip", "swap"):
            content = b"\0"  # files that are empty by design are harmed by not being so
            path.write_bytes(content)
        elif harm == "empty":
            path.write_bytes(b"")
        elif harm == "half":
            path.write_bytes(content[: len(content) // 2])
        elif harm == "flip":
            middle = len(content) // 2
            path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        elif harm == "delete":
            path.unlink()
        elif harm == "extra":
            path = path.with_name("stray")
            path.write_bytes(b"x")
        elif not _swap(path, workdir):
            shutil.rmtree(workdir)
            continue
        checkpoints = keeper(workdir)
        assert checkpoints.latest().step == 1, path
        assert str(path) in checkpoints.refused[2] or path.name == MANIFEST
        shutil.rmtree(workdir)


def _swap(path: Path, workdir: Path) -> bool:
    """Puts the other step's file of the same name in the place of `path`; False where there is none or it is equal."""
    other = workdir / "checkpoints" / "1" / path.relative_to(workdir / "checkpoints" / "2")
    if not other.is_file() or other.read_bytes() == path.read_bytes():
        return False
    path.write_bytes(other.read_bytes())
    return True


def test_with_no_valid_checkpoint_it_stops_and_never_starts_over(workdir: Path) -> None:
    for step in (1, 2):
        (workdir / "checkpoints" / str(step) / MANIFEST).unlink()
    with pytest.raises(
        CheckpointError, match=r"(?s)no checkpoint is usable.*2/manifest.json: missing.*1/manifest.json"
    ):
        keeper(workdir).latest()
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        load_params(workdir)


def test_a_refused_step_is_written_again_and_does_not_push_good_ones_out(workdir: Path, plan: Builder) -> None:
    (workdir / "checkpoints" / "2" / "commit_success.txt").unlink()
    checkpoints = keeper(workdir, keep_last=2)
    assert checkpoints.latest().step == 1
    checkpoints.save(state_of(plan, 2), 2, RECORD, 0.0)
    checkpoints.close()
    assert steps(workdir) == [1, 2]
    assert keeper(workdir).latest().step == 2


@pytest.mark.parametrize(
    "content", [b"[]", b"{", b"null", b'{"format": 99}', b'{"format": 1}', b"\xff\xfe", b'{"format": 1, "files": 3}']
)
def test_a_hostile_manifest_is_refused(workdir: Path, content: bytes) -> None:
    path = workdir / "checkpoints" / "2" / MANIFEST
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"2/manifest\.json"):
        verify(str(path.parent), 2)
    values = json.loads((workdir / "checkpoints" / "1" / MANIFEST).read_text())
    del values["checksum"]
    values |= {"step": 2, "format": 1}
    deep = {"a/" * 100 + "b": [[1], "float32"]}
    for key, harm in (
        *((key, "x") for key in ("arrays", "files", "config", "fingerprints", "step", "elapsed", "versions")),
        *(("arrays", {"a": fact}) for fact in ([[-1], "float32"], [[1], "O"], [[1], "f4,f4"], [[1.5], "int8"], [], 3)),
        *(("files", {"a": fact}) for fact in ([-1, ""], [1], ["1", ""])),
        *(("arrays", deep), ("step", -2), ("elapsed", float("nan")), ("run_id", 3), ("fingerprints", {"corpus": 3})),
    ):
        path.write_text(json.dumps(values | {key: harm}))
        with pytest.raises(CheckpointError, match=r"2/manifest\.json: not a manifest"):
            verify(str(path.parent), 2)
    path.write_bytes(b"[" * 100_000)
    with pytest.raises(CheckpointError, match=r"2/manifest\.json: not a manifest"):
        verify(str(path.parent), 2)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"params/head": [[2**50], "float32"]}, r"GiB, this machine has"),
        ({"params/head": [[8, 6], "float32"]}, r"manifest.json and arrays differ: head: the checkpoint has float32"),
        ({"params/head/a": [[1], "int8"], "params/head": [[1], "int8"]}, r"checkpoints/2: cannot be read"),
        ({"params/head": [[1], "int8"], "params/head/a": [[1], "int8"]}, r"checkpoints/2: cannot be read"),
        ({"params": [[1], "int8"]}, r"checkpoints/2: cannot be read"),
        ({"params/other": [[1], "int8"]}, r"checkpoints/2: cannot be read"),
    ],
)
def test_arrays_that_a_hostile_manifest_claims_are_one_message(workdir: Path, arrays: dict, message: str) -> None:
    path = workdir / "checkpoints" / "2" / MANIFEST
    values = json.loads(path.read_text())
    del values["checksum"]
    path.write_text(json.dumps(values | {"format": 1, "arrays": values["arrays"] | arrays}))
    with pytest.raises(CheckpointError, match=message):
        load_params(workdir, 2)


def test_no_flipped_bit_passes(workdir: Path) -> None:
    """Of any file, the manifest included; the checkpoint before is taken."""
    random, files = np.random.default_rng(), files_of(workdir / "checkpoints" / "2")
    manifest = workdir / "checkpoints" / "2" / MANIFEST
    paths = [path for path in files if path.stat().st_size]
    for path in [manifest] * 150 + [paths[index] for index in random.integers(len(paths), size=150)]:
        content = path.read_bytes()
        place, bit = int(random.integers(len(content))), int(random.integers(8))
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            verify(str(manifest.parent), 2)
        path.write_bytes(content)
    path = manifest
    path.write_bytes(path.read_bytes().replace(b'"corpus": "1f"', b'"corpus": "2f"'))
    checkpoints = keeper(workdir)
    assert checkpoints.latest().step == 1
    assert "2/manifest.json: contents have changed (SHA-256 differs)" in checkpoints.refused[2]


def test_a_manifest_of_format_1_has_no_checksum_and_still_counts(workdir: Path) -> None:
    path = workdir / "checkpoints" / "2" / MANIFEST
    values = json.loads(path.read_text())
    del values["checksum"]
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="'checksum'"):
        verify(str(path.parent), 2)
    path.write_text(json.dumps(values | {"format": 1}, indent=1))
    assert keeper(workdir).latest().step == 2


def test_a_moved_checkpoint_is_still_valid_and_is_kept(two: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "run.tar", "w") as archive:
        archive.add(two, "run")
    with tarfile.open(tmp_path / "run.tar") as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python before 3.11.4 has none
        archive.extractall(tmp_path)  # noqa: S202  written above
    assert keeper(tmp_path / "run").latest().step == 2
    assert steps(tmp_path / "run") == [1, 2]


def _changed_task(change: str):
    def init(key):
        params = toy_task.init(key)
        if change == "shape":
            params["head"] = params["head"][:, :4]
        elif change == "dtype":
            params["head"] = params["head"].astype("bfloat16")
        elif change == "layers":
            params["layers"] = jax.tree.map(lambda x: x[:1], params["layers"])
        elif change == "dropped":
            del params["layers"]["down"]
        else:
            params["front"]["kernel2"] = params["front"]["kernel"]
        return params

    return toy_task.make_task(init=init)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("shape", r"params/head: the checkpoint has float32\(8, 5\), expected float32\(8, 4\)"),
        ("dtype", r"params/head: the checkpoint has float32\(8, 5\), expected bfloat16\(8, 5\)"),
        ("layers", r"params/layers/up: the checkpoint has float32\(2, 8, 16\), expected float32\(1, 8, 16\)"),
        ("dropped", r"only in the checkpoint: params/layers/down"),
        ("added", r"missing in the checkpoint: params/front/kernel2"),
    ],
)
def test_another_architecture_is_refused_with_the_difference(two: Path, monkeypatch, change, message) -> None:
    monkeypatch.setattr(toy_task, "TABLE", (*toy_task.TABLE, (r"front/kernel2", (None, "embed"))))
    checkpoints = keeper(two)
    with pytest.raises(CheckpointError, match=f"(?s)is not a checkpoint of this config.*{message}"):
        checkpoints.restore(checkpoints.latest(), layout(task=_changed_task(change)).state)


def test_a_failed_save_is_reported_once_and_leaves_the_others(workdir: Path, plan: Builder, monkeypatch) -> None:
    checkpoints = keeper(workdir)
    leftover = workdir / "checkpoints" / ".unfinished" / "3.orbax-checkpoint-tmp"

    def fail(_: str) -> None:
        leftover.mkdir()  # as Orbax leaves it when a disk is full
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "hash_files", fail)
        checkpoints.save(state_of(plan), 3, RECORD, 0.0)
        assert "checkpoint 3 was not written (OSError: [Errno 28]" in checkpoints.wait()
    assert checkpoints.poll() is None
    assert steps(workdir) == [1, 2]
    assert list((workdir / "checkpoints" / ".unfinished").iterdir()) == []
    checkpoints.save(state_of(plan), 4, RECORD, 0.0)
    assert checkpoints.wait() is None
    assert steps(workdir) == [1, 2, 4]


# Orbax leaves coroutines of its aborted writers to the garbage collector, which complains about them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("limit", [0, 64, 300, 600])
def test_a_file_size_limit_in_the_middle_of_a_save_is_survived(workdir: Path, plan: Builder, limit: int) -> None:
    """The real thing: the kernel refuses bytes, whoever writes them."""
    import signal

    checkpoints = keeper(workdir)
    state = state_of(plan)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        checkpoints.save(state, 3, RECORD, 0.0)
        complaint = checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
        gc.collect()
    assert "checkpoint 3 was not written" in complaint
    checkpoints.save(state, 4, RECORD, 0.0)
    assert checkpoints.wait() is None
    assert list((workdir / "checkpoints" / ".unfinished").iterdir()) == []
    assert keeper(workdir).latest().step == 4
    assert steps(workdir) == [1, 2, 4]


def test_a_save_takes_bounded_host_memory_and_says_so(tmp_path: Path, monkeypatch) -> None:
    """256 MiB of state: one copy of it, and while it is written what the bound allows."""
    monkeypatch.setattr(checkpoint, "_WRITE_AHEAD", 64 * 2**20)
    zero, lines = jnp.zeros((), jnp.int32), []
    params = {f"part{index}": jnp.full((2**20, 4), index, jnp.float32) for index in range(16)}
    state = TrainState(zero, params, {"count": zero}, zero, {}, zero, zero)
    checkpoints = Checkpoints(tmp_path, CheckpointSettings(every=1, keep_last=1, keep_every=None), lines.append)
    before, peak, done = resident_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    checkpoints.save(state, 1, RECORD, 0.0)
    assert checkpoints.wait() is None
    done.set()
    watcher.join()
    checkpoints.close()
    assert peak - before < (256 + 64 + 64) * 2**20  # the last 64 for Orbax's threads
    (line,) = lines
    assert re.fullmatch(
        r"checkpoint 1 is written; host memory in MiB: before [\d,]+, copied [\d,]+, written [\d,]+", line
    )


def test_room_is_asked_for_at_the_start(tmp_path: Path) -> None:
    check_room(str(tmp_path / "new" / "run"), 1 << 20)
    assert list((tmp_path / "new" / "run").iterdir()) == []
    too_much = shutil.disk_usage(tmp_path).free * 2
    with pytest.raises(OSError, match=r"a checkpoint of .* MiB cannot be written here .* make room or choose"):
        check_room(str(tmp_path), too_much)
    assert list(tmp_path.iterdir()) == [tmp_path / "new"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written here"):
        check_room(str(tmp_path / "file"), 1)


def test_each_host_hashes_what_it_wrote(tmp_path: Path, monkeypatch) -> None:
    """Two hosts together hash every file once."""
    names = ["params/manifest.ocdbt", "train/d/process_1x", "_METADATA"]
    names += [
        f"{part}/{kind}process_{host}"
        for part in ("params", "train")
        for kind in ("ocdbt.", "array_metadatas/")
        for host in (0, 1)
    ]
    for number, name in enumerate(names):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(number))
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    theirs = hash_files(str(tmp_path))
    monkeypatch.undo()
    assert set(theirs) == {name for name in names if name.endswith("process_1")}
    ours = hash_files(str(tmp_path))
    assert set(ours) == set(names) - set(theirs)
    assert (ours | theirs)["train/ocdbt.process_1"] == (
        names.index("train/ocdbt.process_1"),
        hashlib.sha256(bytes(names.index("train/ocdbt.process_1"))).hexdigest(),
    )


def test_leftovers_of_a_killed_save_go_at_the_next_start(workdir: Path) -> None:
    leftover = workdir / "checkpoints" / ".unfinished" / "3.orbax-checkpoint-tmp"
    leftover.mkdir(parents=True)
    (leftover / "half").write_bytes(b"x")
    assert keeper(workdir).latest().step == 2
    assert not leftover.exists()


def test_settings_that_keep_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 1 or more"):
        CheckpointSettings(every=1, keep_last=0, keep_every=None)
