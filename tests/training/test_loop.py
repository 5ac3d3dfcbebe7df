"""The loop in one process: order of starting, resume to the bit, non-finite steps, one log, no late compilations."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.support import toy_task
from wavlm_jax.data.loader import LoaderError
from wavlm_jax.training import checkpoint, loop
from wavlm_jax.training.checkpoint import CheckpointError
from wavlm_jax.training.lease import TakenError, held
from wavlm_jax.training.sharding import make_mesh
from wavlm_jax.training.start import config_changes
from wavlm_jax.training.watchdog import Outcome, Status
from wavlm_jax.training.workdir import Workdir


def run(workdir: Path, task=None, config=None, **changes) -> Outcome:
    settings = toy_task.make_settings(**changes)
    config = {"optim": {"learning_rate": 0.01}} if config is None else config
    return loop.run(
        task or toy_task.make_task(),
        settings,
        make_mesh(settings.mesh),
        Workdir(workdir),
        config=config,
        table=toy_task.TABLE,
    )


def lines(workdir: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def params_digest(workdir: Path) -> str:
    return toy_task.digest(checkpoint.load_params(workdir)[1])


@pytest.fixture(scope="module")
def oracle(tmp_path_factory) -> Path:
    """Twelve steps without a stop."""
    workdir = tmp_path_factory.mktemp("oracle")
    assert run(workdir).status is Status.FINISHED
    return workdir


def test_it_learns_and_logs_every_step_once(oracle: Path) -> None:
    found = lines(oracle)
    assert [line["step"] for line in found if line["kind"] == "train"] == list(range(1, 13))
    assert [line["step"] for line in found if line["kind"] == "eval/valid"] == [5, 10, 12]
    train = [line for line in found if line["kind"] == "train"]
    assert train[0]["learning_rate"] == 0
    assert train[1]["learning_rate"] == pytest.approx(0.01 / 3)
    evaluations = [line["loss"] for line in found if line["kind"] == "eval/valid"]
    assert evaluations[-1] < evaluations[0]
    assert checkpoint.steps(oracle) == [8, 12]
    assert "592 parameters" in (oracle / "parameters.txt").read_text()


def test_nothing_is_compiled_after_the_start(oracle: Path) -> None:
    assert {line["compiles_after_start"] for line in lines(oracle) if line["kind"] == "train"} == {0}


def test_the_time_buckets_of_the_log_add_up(tmp_path: Path) -> None:
    import time

    started = time.monotonic()
    run(tmp_path)
    wall = time.monotonic() - started
    logged = sum(value for line in lines(tmp_path) for name, value in line.items() if name.startswith("seconds_"))
    assert 0 < logged < wall
    assert logged > 0.5 * wall  # the rest is the last evaluation and save, after the last line


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_request_to_stop_saves_at_the_boundary_and_the_next_call_goes_on_to_the_same_bits(
    oracle: Path, tmp_path: Path, monkeypatch, stop: int
) -> None:
    original = loop._Session.update

    def update(self, *arguments) -> None:
        original(self, *arguments)
        if self.step == stop:
            signal.raise_signal(signal.SIGTERM if stop % 2 else signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Session, "update", update)
        outcome = run(tmp_path)
    assert (outcome.status, outcome.step, int(outcome.status)) == (Status.PREEMPTED, stop, 75)
    assert checkpoint.steps(tmp_path)[-1] == stop
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert run(tmp_path).status is Status.FINISHED
    assert params_digest(tmp_path) == params_digest(oracle)
    ours, theirs = lines(tmp_path), lines(oracle)
    keys = ("step", "kind", "loss", "accuracy", "grad_norm", "skipped")
    assert [[line.get(key) for key in keys] for line in ours] == [[line.get(key) for key in keys] for line in theirs]


def test_a_stop_between_checkpoint_and_evaluation_loses_no_evaluation(tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loop._Session, "evaluate", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path, every=5)
    assert checkpoint.steps(tmp_path) == [5]
    run(tmp_path, every=5)
    assert [line["step"] for line in lines(tmp_path) if line["kind"] == "eval/valid"] == [5, 10, 12]


def test_a_stop_in_an_evaluation_stops_at_once_and_evaluates_after_the_resume(oracle: Path, tmp_path: Path) -> None:
    class Signalling(toy_task.Stream):
        def batches(self, start: int = 0):
            signal.raise_signal(signal.SIGTERM)
            yield from super().batches(start)

    train, valid = toy_task.Stream(16), Signalling(16, 1, 3)
    outcome = run(tmp_path, toy_task.make_task(stream={"train": train, "valid": valid}.__getitem__))
    assert (outcome.status, outcome.step) == (Status.PREEMPTED, 5)
    assert checkpoint.steps(tmp_path) == [4, 5]
    run(tmp_path)
    assert [line["step"] for line in lines(tmp_path) if line["kind"] == "eval/valid"] == [5, 10, 12]
    assert params_digest(tmp_path) == params_digest(oracle)


def test_a_finished_run_only_evaluates_again(oracle: Path) -> None:
    before = params_digest(oracle), lines(oracle)
    outcome = run(oracle)
    assert (outcome.status, outcome.step) == (Status.FINISHED, 12)
    assert outcome.metrics["valid"]["loss"] == before[1][-1]["loss"]
    assert (params_digest(oracle), lines(oracle)) == before


def test_one_bad_step_is_skipped_and_its_rows_are_named(tmp_path: Path) -> None:
    outcome = run(tmp_path, toy_task.make_task(poison=(4,)))
    assert outcome.status is Status.FINISHED
    (line,) = lines(tmp_path, "nonfinite.jsonl")
    assert (line["step"], line["batch"], line["loss"], line["seed"]) == (5, "short", "nan", 3)
    assert line["rows"] == [f"utterance-{index}" for index in range(64, 80)]
    train = [line for line in lines(tmp_path) if line["kind"] == "train"]
    assert [line["skipped"] for line in train] == [0] * 4 + [1] * 8
    assert "loss" not in train[4]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(checkpoint.load_params(tmp_path)[1]))


def test_several_bad_steps_in_a_row_stop_the_run_with_the_last_good_state(tmp_path: Path) -> None:
    task = toy_task.make_task(poison=tuple(range(5, 100)))
    outcome = run(tmp_path, task, every=12)
    assert (outcome.status, int(outcome.status)) == (Status.DIVERGED, 76)
    assert outcome.step in (8, 9)  # three bad steps, and the one that was under way
    assert [line["step"] for line in lines(tmp_path, "nonfinite.jsonl")][:3] == [6, 7, 8]
    params = checkpoint.load_params(tmp_path)[1]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    found = checkpoint.newest_valid(tmp_path)[0]
    assert found.step == outcome.step
    again = run(tmp_path, task, every=12)
    assert again.status is Status.DIVERGED
    assert outcome.step < again.step <= outcome.step + 2
    assert toy_task.digest(checkpoint.load_params(tmp_path)[1]) == toy_task.digest(params)


def test_start_order_own_checkpoint_then_given_parameters_then_scratch(tmp_path: Path, capsys) -> None:
    given = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.125, leaf.dtype), toy_task.init(jax.random.key(0)))
    seen = []

    def spy(params):
        seen.append(params)
        return given

    run(tmp_path, toy_task.make_task(initial_params=spy))
    assert "training from given parameters" in capsys.readouterr().out
    assert len(seen) == 1
    trained = params_digest(tmp_path)
    run(tmp_path, toy_task.make_task(initial_params=spy))
    assert "training resumed at step 12" in capsys.readouterr().out
    assert params_digest(tmp_path) == trained != toy_task.digest(given)
    assert len(seen) == 1
    wrong = toy_task.make_task(initial_params=lambda params: {**params, "head": np.zeros((8, 4), np.float32)})
    with pytest.raises(ValueError, match=r"config\.init: .*\n  head: the checkpoint has float32\(8, 4\), expected"):
        run(tmp_path / "wrong", wrong)


def test_changed_data_is_refused_and_a_changed_config_is_printed(oracle: Path, capsys) -> None:
    with pytest.raises(CheckpointError, match="trained with corpus None, now it is 2a"):
        run(oracle, toy_task.make_task(fingerprints={"corpus": "2a"}))
    run(oracle, config={"optim": {"learning_rate": 0.02}})
    assert "config changed since step 12: optim.learning_rate: 0.01 -> 0.02" in capsys.readouterr().out
    assert config_changes({"a": {"b": [1]}, "c": {}}, {"a": {"b": (1,)}, "d": 1}) == [
        "c: {} -> absent",
        "d: absent -> 1",
    ]


def test_evaluation_data_are_no_part_of_what_a_resume_insists_on(tmp_path: Path) -> None:
    """Runs of before noted them: sets may be more, fewer, or in a folder of another name, training data may not."""
    config = {"data": {"train": "x/train", "evaluation": ["x/dev", "x/noise"]}}
    run(tmp_path, toy_task.make_task(fingerprints={"corpus.train": "1"}), config, num_steps=4)
    path = tmp_path / "checkpoints" / "4" / "manifest.json"
    values = json.loads(path.read_text())
    del values["checksum"]
    values["fingerprints"] |= {"corpus.dev": "2", "labels.dev": "3", "corpus.rooms": "4"}
    path.write_text(json.dumps(values | {"format": 1}))
    same = toy_task.make_task(fingerprints={"corpus.train": "1", "corpus.rooms": "4"})
    moved = {"data": {"train": "y/other", "evaluation": ["y/validation"]}}
    assert run(tmp_path, same, moved, num_steps=5).step == 5
    with pytest.raises(CheckpointError, match=r"trained with corpus.rooms 4, now it is None"):
        run(tmp_path, toy_task.make_task(fingerprints={"corpus.train": "1"}), moved, num_steps=6)


def test_a_start_that_is_refused_leaves_the_config_of_the_run(tmp_path: Path) -> None:
    run(tmp_path, config={"a": 1}, num_steps=4)
    with pytest.raises(CheckpointError):
        run(tmp_path, toy_task.make_task(fingerprints={"corpus": "2a"}), {"a": 2}, num_steps=5)
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}
    run(tmp_path, config={"a": 3}, num_steps=5)
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 3}


def test_where_no_batch_is_to_be_had_what_was_trained_is_saved(oracle: Path, tmp_path: Path) -> None:
    class Broken(toy_task.Stream):
        def batches(self, start: int = 0):
            for number, batch in enumerate(super().batches(start), start):
                if number == 6:
                    raise LoaderError("7 of 9 rows could not be decoded")
                yield batch

    streams = {"train": Broken(16), "valid": toy_task.Stream(16, 1, 3)}
    for _ in range(2):
        with pytest.raises(LoaderError, match="7 of 9 rows"):
            run(tmp_path, toy_task.make_task(stream=streams.__getitem__))
        assert checkpoint.steps(tmp_path) == [4, 6]
    run(tmp_path)
    assert params_digest(tmp_path) == params_digest(oracle)


def test_a_workdir_has_one_run_at_a_time(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(TakenError, match=rf"{tmp_path}: belongs to process {os.getpid()} on "):
        run(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_on_the_way_costs_that_checkpoint_only(oracle: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    original = checkpoint.hash_files

    def fail_at_8(folder: str) -> dict:
        if Path(folder).name == "8":
            raise OSError(28, "No space left on device")
        return original(folder)

    monkeypatch.setattr(checkpoint, "hash_files", fail_at_8)
    assert run(tmp_path).status is Status.FINISHED
    assert checkpoint.steps(tmp_path) == [4, 12]
    assert "warning: checkpoint 8 was not written" in capsys.readouterr().out
    assert params_digest(tmp_path) == params_digest(oracle)


def test_a_last_save_that_fails_twice_is_an_error(tmp_path: Path, monkeypatch) -> None:
    def fail(_: str) -> dict:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "hash_files", fail)
    with pytest.raises(CheckpointError, match="checkpoint 4 was not written"):
        run(tmp_path, num_steps=4)


@pytest.fixture
def _cache_of_its_own():
    """Afterwards programs are kept where the session keeps them again."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.usefixtures("_cache_of_its_own")
def test_the_second_start_finds_its_programs(tmp_path: Path, monkeypatch, capsys) -> None:
    settings = toy_task.make_settings(num_steps=4)
    train = dataclasses.replace(settings.train, compilation_cache="programs")
    monkeypatch.setattr(toy_task, "make_settings", lambda **_: dataclasses.replace(settings, train=train))
    run(tmp_path)
    assert "(0 of them found in the cache)" in capsys.readouterr().out
    run(tmp_path)
    assert "4 programs in" in capsys.readouterr().out


def test_a_workdir_that_cannot_be_written_stops_before_anything_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="choose another --workdir"):
        run(tmp_path / "file")
