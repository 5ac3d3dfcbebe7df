"""Numbers that can be trusted: sums before means, one line a step, time that adds up, trackers that may fail."""

import contextlib
import json
import math
import resource
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event  # the reader's side of what we write

from wavlm_jax.training.metric_writers import (
    Clock,
    Interval,
    Jsonl,
    Metrics,
    MetricsSettings,
    Terminal,
    Totals,
    WandbSettings,
    for_json,
    open_metrics,
)
from wavlm_jax.training.step import Report
from wavlm_jax.training.task import LossSums


def sums(loss: float, count: float, **metrics: tuple[float, float]) -> LossSums:
    return LossSums(np.float32(loss), np.float32(count), metrics)


def report(loss: float, count: float, *, finite: bool = True, skipped: int = 0) -> Report:
    return Report(sums(loss, count), {"grad_norm": np.float32(loss)}, np.bool_(finite), np.int32(skipped), np.int32(0))


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 50)), min_size=1))
def test_means_are_of_sums_never_of_means(batches: list[tuple[int, int]]) -> None:
    totals = Totals()
    for loss, count in batches:
        totals.add(sums(loss, count, accuracy=(loss, 2 * count)))
    loss, count = (sum(column) for column in zip(*batches, strict=True))
    assert totals.means() == ({"loss": loss / count, "accuracy": loss / (2 * count)} if count else {})


def test_histograms_become_entropies() -> None:
    totals = Totals()
    for counts in ([1.0, 0.0, 3.0, 0.0], [3.0, 0.0, 1.0, 0.0]):
        totals.add(LossSums(np.float32(0), np.float32(0), {}, {"labels": np.float32(counts)}))
    assert totals.means() == {"labels": pytest.approx(math.log(2))}


def test_an_interval_leaves_steps_that_are_not_finite_out_of_the_means() -> None:
    interval = Interval()
    interval.add(report(2.0, 1), 10.0)
    interval.add(report(math.nan, 1, finite=False, skipped=1), 10.0)
    interval.add(report(4.0, 1, skipped=1), 10.0)
    seconds = dict.fromkeys(Clock().total, 0.0) | {"step": 3.0, "data": 1.0, "eval": 99.0}
    line = interval.summary(seconds)
    assert (line["loss"], line["grad_norm"], line["skipped"]) == (3.0, 4.0, 1)
    assert line["audio_seconds_per_second"] == 30 / 4
    assert (line["steps_per_second"], line["data_wait_share"]) == (3 / 4, 1 / 4)


def test_the_buckets_add_up_to_the_wall_time() -> None:
    started, clock = time.monotonic(), Clock()
    with clock.bucket("init"):
        time.sleep(0.03)
        with clock.bucket("compile"):
            time.sleep(0.05)
    first = clock.take()
    with contextlib.suppress(KeyError), clock.bucket("step"):
        time.sleep(0.02)
        raise KeyError
    second = clock.take()
    total = time.monotonic() - started
    assert sum(first.values()) + sum(second.values()) == pytest.approx(total, rel=0.01)
    assert 0.03 <= first["init"] < first["compile"] < 0.08 + (total - 0.1)
    assert second["step"] >= 0.02
    assert second["init"] == 0


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl_has_each_step_once_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = Jsonl(path, 0)
    for step in range(1, 7):
        writer.write("train", step, {"loss": float(step)})
        if step % 2 == 0:
            writer.write("eval/valid", step, {"loss": 0.5})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 7, "ki')  # killed in the middle of a line
    again = Jsonl(path, 4)
    assert [(line["kind"], line["step"]) for line in lines(path)] == [
        ("train", 1),
        ("train", 2),
        ("eval/valid", 2),
        ("train", 3),
        ("train", 4),  # the evaluation of step 4 is done again
    ]
    again.write("train", 5, {"loss": math.nan})
    again.close()
    assert lines(path)[-1] == {"step": 5, "kind": "train", "loss": "nan"}


def test_strict_json_holds_whatever_a_loss_becomes() -> None:
    values = for_json({"a": math.inf, "b": -math.inf, "c": math.nan, "d": 1.5, "e": ["x"]})
    assert values == {"a": "inf", "b": "-inf", "c": "nan", "d": 1.5, "e": ["x"]}


def test_a_full_disk_costs_no_line_and_leaves_no_half_of_one(tmp_path: Path) -> None:
    """The kernel refuses bytes beyond some size."""
    path = tmp_path / "metrics.jsonl"
    writer = Jsonl(path, 0)
    writer.write("train", 1, {})
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step, more in ((2, 9), (3, 0)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + more, hard))
        try:
            with pytest.raises(OSError, match=r"No space|too large"):
                writer.write("train", step, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert [line["step"] for line in lines(path)] == [1]
    writer.write("train", 4, {})
    assert [line["step"] for line in lines(path)] == [1, 2, 3, 4]
    writer.close()


class Broken:
    def write(self, *_: object) -> None:
        raise RuntimeError("the tracker's server is away")

    def close(self) -> None:
        raise RuntimeError("still away")


def test_a_tracker_that_fails_on_every_call_changes_nothing(tmp_path: Path, capsys) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics({"wandb": Broken(), "metrics.jsonl": Jsonl(path, 0)})
    for step in (1, 2, 3):
        metrics.write("train", step, {"loss": 1.0})
    metrics.close()
    assert [line["step"] for line in lines(path)] == [1, 2, 3]
    assert capsys.readouterr().out.count("wandb failed (RuntimeError: the tracker's server is away)") == 1


def settings(**changes) -> MetricsSettings:
    return MetricsSettings(**({"log_every": 1, "tensorboard": False, "progress": False, "wandb": None} | changes))


def open_all(workdir: Path, **changes) -> Metrics:
    return open_metrics(settings(**changes), workdir, resume=0, num_steps=10, run_id="ab", config={"seed": 0})


def test_a_tracker_that_is_not_installed_is_reported_and_left_out(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    wandb = WandbSettings(project="p", entity=None, name=None, group=None, mode="offline")
    metrics = open_all(tmp_path, wandb=wandb)
    metrics.write("train", 1, {"loss": 1.0})
    metrics.close()
    assert "wandb could not be opened (MissingExtraError: metrics.wandb needs" in capsys.readouterr().out
    assert len(lines(tmp_path / "metrics.jsonl")) == 1


def test_a_run_at_wandb_has_a_project(tmp_path: Path) -> None:
    """Without one, as the configs are, nothing is opened there; other settings without one are a mistake."""
    nothing = dict.fromkeys(("project", "entity", "name", "group", "mode"))
    metrics = open_all(tmp_path, wandb=WandbSettings(**nothing))
    metrics.close()
    assert list(metrics._writers) == ["metrics.jsonl"]
    with pytest.raises(ValueError, match=r"project: found None beside \{'group': 'g'\}"):
        WandbSettings(**(nothing | {"group": "g"}))


def test_tensorboard_finds_the_scalars(tmp_path: Path) -> None:
    metrics = open_all(tmp_path, tensorboard=True)
    metrics.write("eval/valid", 3, {"loss": 0.25})
    metrics.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, found = path.read_bytes(), []
    while data:  # records: length (8), checksum (4), event, checksum (4)
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        data = data[16 + size :]
    assert found == [("eval/valid/loss", 3, 0.25)]


def test_plain_lines_where_nobody_looks(capsys) -> None:
    terminal = Terminal(0, 10)
    terminal.write("train", 4, {"loss": 1.25, "steps_per_second": 2.0, "seconds_step": 9.0})
    terminal.write("eval/valid", 4, {"loss": 1.5})
    terminal.close()
    assert capsys.readouterr().out.splitlines() == [
        "train 4/10  loss 1.25  steps_per_second 2  left 0:00:03",
        "eval/valid 4/10  loss 1.5",
    ]


def test_a_bar_on_a_terminal(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    terminal = Terminal(2, 10)
    terminal.write("train", 4, {"loss": 1.25, "steps_per_second": 2.0})
    terminal.close()
    captured = capsys.readouterr()
    assert "4/10" in captured.err
    assert "loss=1.25" in captured.err
    assert captured.out == ""
