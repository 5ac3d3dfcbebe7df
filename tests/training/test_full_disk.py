"""The disk fills up while a real process trains: that checkpoint is lost, the ones before it stay, training goes on."""

import contextlib
import re
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.training.test_train_processes import (
    Runner,
    digest,
    finish,
    free_port,
    goes_on_to_the_same_end,
    wait_for_step,
)
from wavlm_jax.training.checkpoint import newest_valid, steps

STEPS = 40


class Disk(NamedTuple):
    """A folder on a disk that a test can fill up for a process, and empty again."""

    folder: Path
    fill: Callable[[subprocess.Popen], None]
    free: Callable[[subprocess.Popen], None]


def small_disk(folder: Path) -> Disk:
    """A file system of 4 MiB."""
    ballast = folder / "ballast"

    def fill(_: subprocess.Popen) -> None:
        with ballast.open("wb", buffering=0) as file:
            for size in (2**16, 512, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(b"x" * size)

    return Disk(folder / "run", fill, lambda _: ballast.unlink())


def limited_files(folder: Path) -> Disk:
    """Where nobody may mount anything: the kernel refuses the process's files beyond some bytes."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(process: subprocess.Popen, size: int) -> None:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))

    return Disk(folder / "run", lambda process: limit(process, 200), lambda process: limit(process, hard))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """The real thing where the machine allows it, else the nearest to it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        yield limited_files(folder)
        return
    yield small_disk(folder)
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner()


@pytest.mark.parametrize("make", [None, limited_files])
def test_training_survives_a_full_disk(
    runner: Runner, disk: Disk, tmp_path: Path, make: Callable[[Path], Disk] | None
) -> None:
    if make is not None:
        disk = make(tmp_path)
    process = runner.start(disk.folder, num_steps=STEPS, every=3, delay=0.1)
    wait_for_step(process, disk.folder, 7)
    disk.fill(process)
    kept = newest_valid(disk.folder)[0].step
    for line in process.stdout:
        if match := re.search(r"warning: checkpoint (\d+) was not written \((.*)\); the ones before it", line):
            break
    assert kept in steps(disk.folder)
    disk.free(process)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert f"outcome FINISHED {STEPS}" in output
    found, refused = newest_valid(disk.folder)
    assert (found.step, refused) == (STEPS, {})
    assert int(match[1]) not in steps(disk.folder)


@pytest.mark.parametrize("process", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_what_one_host_cannot_write_is_no_checkpoint_on_any(runner: Runner, tmp_path: Path, process: int) -> None:
    port, expected = free_port(), tmp_path / "expected"
    options = {"devices": 1, "full": f"{process},6"}
    outputs = finish(
        [runner.start(tmp_path / "run", coordinator=f"127.0.0.1:{port},{index},2", **options) for index in range(2)]
    )
    codes, said = outputs
    assert codes == [0, 0], said
    for output in said:
        why = rf"CheckpointError: process {process} \(\S+\): OSError: \[Errno 28\]"
        assert re.search(rf"warning: checkpoint 6 was not written \({why}", output), output
    assert 6 not in steps(tmp_path / "run")
    code, output = runner.run(expected)
    assert code == 0, output
    goes_on_to_the_same_end(runner, tmp_path / "run", digest(expected))
