"""Several hosts: who is missing, stuck or dead is named, the others end in time, and the run goes on afterwards."""

import dataclasses
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from tests.training.test_train_processes import Runner, free_port, wait_for_step
from wavlm_jax.training.hosts import barrier, broadcast_one_to_all, check_machine
from wavlm_jax.training.sharding import MeshSettings

STUCK = 77
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner()


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


def test_those_who_do_not_come_are_named(runner: Runner, tmp_path: Path) -> None:
    """Processes 0 and 2 of 4; the others never start."""
    port = free_port()
    here = [runner.start(tmp_path, coordinator=f"127.0.0.1:{port},{index},4", wait=8) for index in (0, 2)]
    for index, process in zip((0, 2), here, strict=True):
        output = ended(process, 120)
        assert re.search(rf"process {index} on \S+: waited 8 s for all 4 processes of 127.0.0.1:\d+; JAX names", output)
        names = re.search(
            r"# of tasks that reached the barrier: 2/4.\n.*Some timed out task names:\n(\d)\n(\d)\n", output
        )
        assert names is not None, output
        assert set(names.groups()) == {"1", "3"}


def test_where_the_first_host_is_missing_it_is_named(runner: Runner, tmp_path: Path) -> None:
    process = runner.start(tmp_path, coordinator=f"127.0.0.1:{free_port()},1,2", wait=2)
    output = ended(process, 120)
    assert process.returncode == 2
    assert re.search(r"process 1 on \S+: waited 2 s for all 2 processes of \S+; process 0 is not there", output), output


def test_a_host_whose_loader_stands_still_is_named_and_all_end(runner: Runner, tmp_path: Path) -> None:
    processes = start(runner, tmp_path, 2, stall="1,5", max_step_seconds=15)
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


def test_when_one_host_is_frozen_the_other_ends(runner: Runner, tmp_path: Path) -> None:
    processes = start(runner, tmp_path, 2, delay=0.3, num_steps=200, max_step_seconds=15)
    wait_for_step(processes[0], tmp_path, 4)
    processes[1].send_signal(signal.SIGSTOP)
    try:
        output = ended(processes[0], 200)
    finally:
        processes[1].kill()
        processes[1].communicate()
    assert processes[0].returncode == STUCK
    assert re.search(r"watchdog: process 1 \([^)]*\): ", output), output


@pytest.mark.parametrize(
    ("killed", "said"),
    [
        (1, r"unhealthy \(stopped sending heartbeats\):\n1\n"),
        # Process 0 is the one that would say who is missing.
        pytest.param(0, r"coordination service", marks=pytest.mark.slow),
    ],
)
def test_when_one_host_is_killed_the_other_names_it_and_ends(
    runner: Runner, tmp_path: Path, killed: int, said: str
) -> None:
    """By JAX's heartbeat, whatever the devices wait for meanwhile."""
    processes = start(runner, tmp_path, 2, delay=0.3, num_steps=400, heartbeat=15)
    wait_for_step(processes[0], tmp_path, 4)
    processes[killed].kill()
    before = time.monotonic()
    output = ended(processes[1 - killed], 200)
    processes[killed].communicate()
    assert time.monotonic() - before < 90
    assert re.search(said, output), output


def test_a_workdir_that_is_another_folder_on_one_host_is_an_error_on_all(runner: Runner, tmp_path: Path) -> None:
    port = free_port()
    processes = [
        runner.start(tmp_path / str(index), coordinator=f"127.0.0.1:{port},{index},2", visible=1) for index in range(2)
    ]
    for process in processes:
        output = ended(process, 120)
        assert re.search(r"process 1 \(\S+\): .*1/\.shared-\w+: process 0 has written this file", output), output
        assert not list((tmp_path / "0").glob(".shared-*"))


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
    barrier("nothing")
    assert broadcast_one_to_all("word", "said") == "said"


@pytest.mark.parametrize("programme", ["train", "pretrain.make_labels"])
def test_nothing_that_a_programme_imports_looks_at_a_device(programme: str) -> None:
    """Devices are found at the first look, and after it no other host can join."""
    code = f"import {programme}, jax; print(jax._src.xla_bridge.backends_are_initialized())"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False"]
