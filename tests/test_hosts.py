"""Several hosts: who is missing, stuck or dead is named, the others end in time, and the run goes on afterwards."""

import dataclasses
import re
import signal
import subprocess
import time
from pathlib import Path

import jax
import pytest
from test_train_processes import Runner, free_port, wait_for_step

from wavlm_jax.training.hosts import check_machine
from wavlm_jax.training.mesh import MeshSettings
from wavlm_jax.training.waiting import from_first, meet

STUCK = 77


@pytest.fixture(scope="module")
def runner(tmp_path_factory) -> Runner:
    return Runner(tmp_path_factory.mktemp("cache"))


def start(runner: Runner, workdir: Path, count: int, *, of: int | None = None, **options: object) -> list:
    port = free_port()
    return [
        runner.start(workdir, coordinator=f"127.0.0.1:{port},{index},{of or count}", **options)
        for index in range(count)
    ]


def ended(process: subprocess.Popen, seconds: float) -> str:
    """Its output; it has to end by itself, and not well, within `seconds`."""
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode != 0, output
    return output


def test_one_host_too_few_is_an_error_and_no_wait_for_ever(runner: Runner, tmp_path: Path) -> None:
    (alone,) = start(runner, tmp_path, 1, of=2, wait=5)
    output = ended(alone, 90)
    assert alone.returncode == 2
    assert re.search(r"process 0 on \S+: waited 5 s for all 2 processes of 127.0.0.1:\d+;", output), output


def test_a_host_whose_loader_stands_still_is_named_and_all_end(runner: Runner, tmp_path: Path) -> None:
    processes = start(runner, tmp_path, 2, stall="1,5", max_step_seconds=8)
    outputs = [ended(process, 240) for process in processes]
    assert STUCK in [process.returncode for process in processes], outputs
    stacks = next(path for path in tmp_path.glob("stacks-*.txt"))
    assert "toy_task.py" in stacks.read_text()
    said = "".join(outputs)
    assert re.search(r"process 1 \([^)]*\)( has been in|:) 'data'", said), said
    finished = start(runner, tmp_path, 2)
    for process in finished:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output


@pytest.mark.parametrize(
    "number",
    [signal.SIGSTOP, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)],  # JAX's heartbeat notices after 100 s
)
def test_when_one_host_is_frozen_or_killed_the_other_ends(runner: Runner, tmp_path: Path, number: int) -> None:
    processes = start(runner, tmp_path, 2, delay=0.3, num_steps=200, max_step_seconds=8)
    wait_for_step(processes[0], tmp_path, 4)
    processes[1].send_signal(number)
    before = time.monotonic()
    try:
        output = ended(processes[0], 200)
    finally:
        processes[1].kill()
        processes[1].communicate()
    assert time.monotonic() - before < 200
    if number == signal.SIGSTOP:
        assert processes[0].returncode == STUCK
        assert re.search(r"watchdog: process 1 \([^)]*\): ", output), output


def test_the_machine_has_to_be_the_one_of_the_config() -> None:
    """Under pytest: 8 CPU devices in one process."""
    check_machine(MeshSettings(data=-1, fsdp=1, tensor=1, platform="cpu", hosts=1, devices=jax.device_count()))
    for name, wanted, message in (
        ("platform", "tpu", "config.mesh.platform: found cpu, expected tpu"),
        ("hosts", 4, "config.mesh.hosts: found 1, expected 4"),
        ("devices", 16, "config.mesh.devices: found 8, expected 16 (devices here: 8 on host 0, cpu)"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            check_machine(dataclasses.replace(MeshSettings.anywhere(data=-1, fsdp=1, tensor=1), **{name: wanted}))


def test_alone_nobody_waits() -> None:
    meet("nothing")
    assert from_first("word", "said") == "said"
