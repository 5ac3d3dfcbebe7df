"""A run whose workdir is gs://: stopped, harmed, killed, gone on with on an empty machine, to the bits of a folder's.

The bucket is fake-gcs-server, a process of its own that we did not write; it is looked into through plain HTTP.
"""

import hashlib
import json
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gcsfs.core import GCSFileSystem

import wavlm_jax
from pretrain.labelling import make_labels
from pretrain.labels import LabelSettings
from tests.support import toy_task
from tests.support.buckets import NAME, Objects
from tests.support.pods import CONFIG, finish, free_port, spawn
from tests.training.test_pod_runs import pretraining, recognition
from tests.training.test_train_processes import STEPS as TOY_STEPS
from tests.training.test_train_processes import Runner, digest
from wavlm_jax.config import WavLMConfig
from wavlm_jax.data.corpus import DataSettings, open_corpora
from wavlm_jax.loading import load_weights
from wavlm_jax.model.wavlm import WavLM
from wavlm_jax.settings import read
from wavlm_jax.training import workdir as workdir_module
from wavlm_jax.training.checkpoint import (
    MARK,
    CheckpointError,
    Checkpoints,
    CheckpointSettings,
    CheckpointStore,
    RunRecord,
    load_params,
    newest_valid,
    steps,
)
from wavlm_jax.training.step import TrainState
from wavlm_jax.training.workdir import (
    Workdir,
    address,
    check_room,
    exists,
    file_sizes,
    list_names,
    read_bytes,
    remove,
    sha256,
    write_object,
)

PREEMPTED = 75


def session(folder: Path, config: dict, workdir: Path | str, stop: str = "", code: int = 0) -> str:
    """train.py on a machine of its own, which has nothing of the run; what it said."""
    machine, notes = folder / "tmp", folder / "notes"
    for path in (machine, notes):
        path.mkdir(parents=True)
    (folder / "config.py").write_text(CONFIG.format(text=json.dumps(config)))
    command = ["env", f"TMPDIR={machine}", sys.executable, "tests/support/noting_train.py", str(notes), stop]
    (output,) = finish(spawn([[*command, f"--config={folder}/config.py", f"--workdir={workdir}"]], 1), code)
    assert list(machine.glob("wavlm_jax-*")) == []
    return output


def trained(lines: list[dict]) -> dict[int, float]:
    """Step -> loss; each step once."""
    found = [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]
    assert [step for step, _ in found] == list(range(1, len(found) + 1))
    return dict(found)


def pretrained(root: Path) -> dict:
    """The config of a pre-training whose labels are there."""
    config = pretraining(root)
    make_labels(
        read(config["labels"], LabelSettings, "labels"), open_corpora(read(config["data"], DataSettings, "data"))
    )
    return config


def fine_tuned(root: Path) -> dict:
    """The config of a recognition whose body comes from a run in the bucket."""
    config, place = recognition(root), f"gs://{NAME}/body"
    sizes = read(config["model"], WavLMConfig, "model")
    params = jax.jit(WavLM(sizes).init)(jax.random.key(0), jnp.zeros((1, 8000)))["params"]
    zero = jnp.zeros((), jnp.int32)
    settings = CheckpointSettings(every=1, keep_last=1, keep_every=None)
    checkpoints = Checkpoints(place, settings)
    record = RunRecord(run_id="body", config={"model": config["model"]}, fingerprints={})
    checkpoints.save(TrainState(zero, {"wavlm": params}, {"m": zero}, zero, {}, zero, zero), 1, record, 0.0)
    assert checkpoints.wait() is None
    config["init"]["path"] = place
    return config


@pytest.mark.parametrize("kind", [fine_tuned, pytest.param(pretrained, marks=pytest.mark.slow)])
def test_stopped_and_harmed_it_goes_on_to_the_bits_of_a_run_in_a_folder(
    objects: Objects, tmp_path: Path, kind: Callable[[Path], dict]
) -> None:
    """Each session has an empty machine. The newest checkpoint is harmed in between, and refused by name."""
    config, run, alone = kind(tmp_path), f"runs/{kind.__name__}", tmp_path / "alone" / "run"
    config["train"]["eval_every"] = steps = config["train"]["num_steps"]
    config["checkpoint"].update({"every": 2, "keep_last": 2})
    place = f"gs://{NAME}/{run}"
    session(tmp_path / "alone", config, alone)
    config["train"]["compilation_cache"] = "programs"  # in the bucket, too
    session(tmp_path / "first", config, place, stop="0,4", code=PREEMPTED)
    stopped, refused = newest_valid(place)
    assert (stopped.step >= 4, refused) == (True, {})
    assert objects.lines(f"{run}/metrics.jsonl")[-1]["step"] == stopped.step
    harmed = max(stopped.files, key=lambda name: stopped.files[name][0])
    objects.flip(f"{run}/checkpoints/{stopped.step}/{harmed}")
    output = session(tmp_path / "second", config, place)
    assert f"checkpoint refused: {place}/checkpoints/{stopped.step}/{harmed}: contents have changed" in output
    assert re.search(rf"{place}: training resumed at step [24], run {stopped.run_id}", output)
    assert "(0 of them found in the cache)" not in output
    lines = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    assert trained(objects.lines(f"{run}/metrics.jsonl")) == trained(lines)
    assert toy_task.digest(load_params(place)[1]) == toy_task.digest(load_params(alone)[1])
    holds_what_a_folder_would(objects, run, steps, stopped.run_id)


def holds_what_a_folder_would(objects: Objects, run: str, steps: int, run_id: str) -> None:
    """By plain HTTP: the small files, the two newest checkpoints and no other, every file as its manifest says."""
    found, refused = newest_valid(f"gs://{NAME}/{run}")
    assert (found.step, found.run_id, refused) == (steps, run_id, {})
    names = [name.removeprefix(f"{run}/") for name in objects.names(f"{run}/")]
    assert {"config.json", "metrics.jsonl", "nonfinite.jsonl", "parameters.txt"} <= set(names)
    kept = {name.split("/")[1] for name in names if name.startswith("checkpoints/")}
    assert kept == {str(steps - 2), str(steps), MARK}
    for name, (size, checksum) in found.files.items():
        content = objects.read(f"{run}/checkpoints/{steps}/{name}")
        assert (len(content), hashlib.sha256(content).hexdigest()) == (size, checksum)
    assert not any(name.startswith((".probe", ".shared")) for name in names)


@pytest.mark.usefixtures("objects")
def test_a_run_in_a_bucket_is_loaded_where_it_is(tmp_path: Path) -> None:
    place = fine_tuned(tmp_path)["init"]["path"]
    model = wavlm_jax.load(place)
    assert model.weights.origin.notes == ("step 1 of run body",)
    assert np.isfinite(model(np.ones((1, 16_000), np.float32)).last_hidden_state).all()
    one, other = load_weights(f"{place}/checkpoints/1"), load_weights(Path(place), 1)  # pathlib makes one slash of two
    assert toy_task.digest(one.params) == toy_task.digest(other.params) == toy_task.digest(model.weights.params)


def test_what_is_no_run_has_to_be_copied_first(objects: Objects) -> None:
    objects.write("models/base.pt", b"x")
    with pytest.raises(
        ValueError, match=rf"gs://{NAME}/models: no run here .* gcloud storage cp -r gs://{NAME}/models"
    ):
        load_weights(f"gs://{NAME}/models")


def test_killed_before_the_manifest_there_is_no_checkpoint(objects: Objects, tmp_path: Path) -> None:
    """Everything else is there; two processes go on from the checkpoint before it, to the bits of one in a folder."""
    runner, workdir = Runner(), f"gs://{NAME}/runs/toy"
    code, output = runner.run(workdir, kill_at="write_manifest:2")
    assert code == -signal.SIGKILL, output
    left = objects.names("runs/toy/checkpoints/6/")
    assert any(name.endswith("commit_success.txt") for name in left)  # Orbax was done
    assert steps(workdir) == [3]
    port = free_port()
    finish([runner.start(workdir, coordinator=f"127.0.0.1:{port},{index},2", devices=1) for index in range(2)])
    assert runner.run(tmp_path / "run")[0] == 0
    assert digest(workdir) == digest(tmp_path / "run")
    assert steps(workdir) == [9, TOY_STEPS]
    assert {name.split("/")[3] for name in objects.names("runs/toy/checkpoints/")} == {MARK, "9", str(TOY_STEPS)}
    lines = [(line["kind"], line["step"]) for line in objects.lines("runs/toy/metrics.jsonl")]
    assert [step for kind, step in lines if kind == "train"] == list(range(1, TOY_STEPS + 1))


def test_only_a_workdir_with_our_mark_is_swept(objects: Objects) -> None:
    """Folders of another program, or half of a copy, are refused by name and stay."""
    place = f"gs://{NAME}/theirs"
    objects.write("theirs/checkpoints/7/model", b"x")
    with pytest.raises(CheckpointError, match=rf"{place}/checkpoints/7/manifest\.json: missing"):
        load_params(place)
    CheckpointStore(place).clean_up()
    assert "theirs/checkpoints/7/model" in objects.names("theirs/")


@pytest.mark.parametrize("where", ["folder", "bucket"])
def test_a_folder_and_a_bucket_keep_one_contract(tmp_path: Path, where: str) -> None:
    place = str(tmp_path) if where == "folder" else f"gs://{NAME}/contract"
    assert (list_names(place), file_sizes(f"{place}/nothing")) == ([], {})
    check_room(place, 1000)
    assert list_names(place) == []
    if where == "folder":
        (tmp_path / "inner").mkdir()
    content = np.random.default_rng(1).bytes(100_000)
    write_object(f"{place}/inner/b", content)
    write_object(f"{place}/a", b"")
    assert file_sizes(place) == {"a": 0, "inner/b": 100_000}
    assert list_names(place) == ["a", "inner"]
    assert read_bytes(f"{place}/inner/b") == content
    assert sha256(f"{place}/inner/b", 100_000) == hashlib.sha256(content).hexdigest()
    assert sha256(f"{place}/a", 0) == hashlib.sha256(b"").hexdigest()
    assert [exists(f"{place}/{name}") for name in ("a", "inner", "inner/b", "inner/c")] == [True, False, True, False]
    with pytest.raises(FileNotFoundError):
        read_bytes(f"{place}/nothing")
    for _ in range(2):
        remove(f"{place}/a")
        remove(f"{place}/inner")
    assert file_sizes(place) == {}


def test_the_mirror_brings_what_was_there_and_uploads_what_changed(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "checkpoints").mkdir(parents=True)
    for name in ("metrics.jsonl", "config.json", ".shared-by-another-host"):
        (home / name).write_text("old")
    mirror = Workdir(home, tmp_path / "mirror")
    mirror.folder.mkdir()
    (mirror.folder / "config.json").write_text("new")
    mirror.publish()
    assert (home / "config.json").read_text() == "old"  # nobody has shown yet that it may be written
    mirror.fetch()
    assert sorted(path.name for path in mirror.folder.iterdir()) == ["config.json", "metrics.jsonl"]
    (home / "metrics.jsonl").write_text("changed by another process")
    (mirror.folder / "metrics.partial").write_text("half")
    mirror.publish()
    assert (home / "config.json").read_text() == "new"
    assert (home / "metrics.jsonl").read_text() == "changed by another process"
    with (mirror.folder / "metrics.jsonl").open("a") as file:
        file.write(" and more")
    mirror.close()
    assert (home / "metrics.jsonl").read_text() == "old and more"
    assert not mirror.folder.exists()
    assert not (home / "metrics.partial").exists()


def test_of_a_file_that_grew_the_end_is_uploaded(objects: Objects, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(workdir_module, "_SMALL", 10)
    sent = list[int]()
    pipe = GCSFileSystem._pipe_file

    async def counted(self, path, data, **named):
        sent.append(len(data))
        return await pipe(self, path, data, **named)

    monkeypatch.setattr(GCSFileSystem, "_pipe_file", counted)
    (tmp_path / "mirror").mkdir()
    mirror = Workdir(f"gs://{NAME}/grows", tmp_path / "mirror")
    mirror.fetch()
    path = mirror.folder / "metrics.jsonl"
    for number in range(3):
        with path.open("ab") as file:
            file.write(bytes([65 + number]) * 20)
        mirror.publish()
    assert (objects.read("grows/metrics.jsonl"), sent) == (b"A" * 20 + b"B" * 20 + b"C" * 20, [20, 20, 20])
    path.write_bytes(b"D" * 70)  # written anew, and longer
    mirror.publish()
    objects.write("grows/metrics.jsonl", b"another's")
    with path.open("ab") as file:
        file.write(b"E")
    mirror.publish()
    assert (objects.read("grows/metrics.jsonl"), sent[3:]) == (b"D" * 70 + b"E", [70, 71])
    assert objects.names("grows/") == ["grows/metrics.jsonl"]


def test_a_file_that_vanishes_while_it_is_uploaded_is_left_out(tmp_path: Path, monkeypatch) -> None:
    for name in ("home", "mirror", "mirror/wandb", "mirror/wandb/gone"):
        (tmp_path / name).mkdir()
    mirror = Workdir(tmp_path / "home", tmp_path / "mirror")
    mirror.fetch()
    for name in ("a", "wandb/b", "wandb/gone/c", "z"):
        (mirror.folder / name).write_text("x")
    stamp = workdir_module._stamp

    def vanishing(path: Path) -> tuple[int, int]:
        if path.name == "a":
            shutil.rmtree(mirror.folder / "wandb" / "gone")
        if path.name == "b":
            path.unlink()
        return stamp(path)

    monkeypatch.setattr(workdir_module, "_stamp", vanishing)
    mirror.publish()
    assert file_sizes(str(tmp_path / "home")) == {"a": 1, "z": 1}


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("gs://bucket/run/", "gs://bucket/run"),
        (Path("gs://bucket/run"), "gs://bucket/run"),
        ("gs://bucket", "gs://bucket"),
        ("runs/base", None),
        ("gs:relative", None),
        ("s3://bucket/run", None),
    ],
)
def test_an_address_is_told_from_a_path(written: str | Path, found: str | None) -> None:
    assert address(written) == found
