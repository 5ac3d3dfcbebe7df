"""Real processes: killed, asked to stop, killed while they save; the final parameters are those of a run left alone."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.support import toy_task
from wavlm_jax.training.checkpoint import load_params, newest_valid, steps

SCRIPT = Path(toy_task.__file__)
STEPS, EVERY = 12, 3
PATIENCE = 600
"""Seconds; a busy machine is no failure."""


class Runner:
    """Starts the toy run in processes, which share the session's compiled programs."""

    def start(self, workdir: Path, **options: object) -> subprocess.Popen:
        flags = [f"--{name}={value}" for name, value in ({"num_steps": STEPS, "every": EVERY} | options).items()]
        return subprocess.Popen(
            [sys.executable, SCRIPT, f"--workdir={workdir}", *flags],
            env=os.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, workdir: Path, **options: object) -> tuple[int, str]:
        process = self.start(workdir, **options)
        output, _ = process.communicate(timeout=PATIENCE)
        return process.returncode, output


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner()


@pytest.fixture(scope="module")
def expected(runner: Runner, tmp_path_factory) -> str:
    """SHA-256 of the parameters of a run that nobody disturbs."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    code, output = runner.run(workdir)
    assert code == 0, output
    return digest(workdir)


def digest(workdir: Path) -> str:
    found, _ = newest_valid(workdir)
    assert found.step == STEPS
    return toy_task.digest(load_params(workdir)[1])


def logged(workdir: Path) -> list[tuple[str, int]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["kind"], line["step"]) for line in lines]


def goes_on_to_the_same_end(runner: Runner, workdir: Path, expected: str) -> None:
    code, output = runner.run(workdir)
    assert code == 0, output
    assert digest(workdir) == expected
    assert list((workdir / "checkpoints" / ".unfinished").iterdir()) == []
    assert sorted(logged(workdir)) == sorted(
        [("train", step) for step in range(1, STEPS + 1)] + [("eval/valid", step) for step in (5, 10, STEPS)]
    )


def test_killed_at_random_steps_it_goes_on_to_the_same_bits(runner: Runner, expected: str, tmp_path: Path) -> None:
    steps = np.random.default_rng().choice(np.arange(EVERY + 1, STEPS + 1), 2, replace=False)
    print(f"killed at {sorted(steps)}")
    for step in sorted(steps):
        code, output = runner.run(tmp_path, kill_at=f"step:{step}")
        assert code == -signal.SIGKILL, output
    goes_on_to_the_same_end(runner, tmp_path, expected)


@pytest.mark.parametrize(
    ("phase", "left"),
    [
        ("hash_files:1", []),  # the first save: arrays written, nothing committed; starts over
        ("arrays:6", [3]),  # Orbax's threads are writing
        ("write_manifest:2", [3]),  # checksums are known, the manifest is not there
        ("renamed:2", [3, 6]),  # renamed, nothing pruned
    ],
)
def test_killed_in_each_phase_of_a_save(runner: Runner, expected: str, tmp_path: Path, phase: str, left: list) -> None:
    code, output = runner.run(tmp_path, kill_at=phase, delay=0.05)
    assert code == -signal.SIGKILL, output
    assert steps(tmp_path) == left
    assert newest_valid(tmp_path)[1] == {}
    goes_on_to_the_same_end(runner, tmp_path, expected)


def wait_for_step(process: subprocess.Popen, workdir: Path, step: int) -> None:
    path = workdir / "metrics.jsonl"
    while process.poll() is None and not (path.is_file() and ("train", step) in logged_so_far(path)):
        time.sleep(0.02)


def logged_so_far(path: Path) -> list[tuple[str, int]]:
    complete = path.read_text().rpartition("\n")[0]
    return [(line["kind"], line["step"]) for line in map(json.loads, complete.splitlines())]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_says_so_and_goes_on(runner: Runner, expected: str, tmp_path: Path, number: int) -> None:
    process = runner.start(tmp_path, delay=0.2)
    wait_for_step(process, tmp_path, 4)
    process.send_signal(number)
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # the impatient second one changes nothing
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, output
    last = newest_valid(tmp_path)[0].step
    assert 4 <= last < STEPS
    assert f"outcome PREEMPTED {last}" in output
    assert logged(tmp_path)[-1] == ("train", last)
    goes_on_to_the_same_end(runner, tmp_path, expected)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start_two(runner: Runner, workdir: Path, **options: object) -> list[subprocess.Popen]:
    port = free_port()
    return [
        runner.start(workdir, coordinator=f"127.0.0.1:{port},{index},2", devices=1, **options) for index in range(2)
    ]


def finish(processes: list[subprocess.Popen]) -> tuple[list[int], list[str]]:
    outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    return [process.returncode for process in processes], outputs


def test_two_processes_stop_together_and_two_or_one_go_on(runner: Runner, expected: str, tmp_path: Path) -> None:
    """SIGTERM reaches one of them; both save the same step. Two processes give the bits of one with two devices."""
    together, alone = tmp_path / "together", tmp_path / "alone"
    processes = start_two(runner, together, delay=0.2)
    wait_for_step(processes[0], together, 4)
    processes[1].send_signal(signal.SIGTERM)
    codes, outputs = finish(processes)
    assert codes == [75, 75], outputs
    last = newest_valid(together)[0].step
    assert all(f"outcome PREEMPTED {last}" in output for output in outputs)
    shutil.copytree(together, alone)
    codes, outputs = finish(start_two(runner, together))
    assert codes == [0, 0], outputs
    assert digest(together) == expected
    goes_on_to_the_same_end(runner, alone, expected)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_stopped_while_it_imports_it_says_so_in_one_line(tmp_path: Path, number: int, code: int) -> None:
    """The signal comes in the middle of an import; a module that comes in its place sends it."""
    (tmp_path / "jax.py").write_text(f"import os\nos.kill(os.getpid(), {number:d})\nimport time\ntime.sleep(60)\n")
    process = subprocess.run(
        [sys.executable, "train.py"],
        cwd=SCRIPT.parents[2],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    name = signal.Signals(number).name
    assert (process.returncode, process.stdout) == (code, "")
    assert process.stderr == f"train.py: stopped by {name}; the same command goes on\n"


LOADER_FAULTS = """
import sys
import jax
from absl import flags
import train
from wavlm_jax.data.loader import LoaderError, LoaderLostError
from wavlm_jax.training.workdir import Workdir
flags.FLAGS(["train.py", "--config=configs/pretrain/demo.py", "--workdir=x"])
for index, error in enumerate((LoaderError("7 of 9 rows"), LoaderLostError("a loader process died"))):
    def fail(*_):
        raise error
    train.train, jax.process_index = fail, lambda: index
    print(train.attempt(Workdir(sys.argv[1])))
"""


def test_batches_that_cannot_be_made_are_one_message_and_a_traceback_in_a_file_of_each_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOADER_FAULTS, tmp_path / "run"]
    found = subprocess.run(command, cwd=SCRIPT.parents[2], capture_output=True, text=True, check=True, timeout=PATIENCE)
    assert found.stdout.split() == ["2", "77"]
    assert re.findall(r"^train.py: (.*)", found.stderr, re.MULTILINE) == ["7 of 9 rows", "a loader process died"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["error-1.txt", "error.txt"]
    assert "LoaderError: 7 of 9 rows" in (tmp_path / "run" / "error.txt").read_text()


def test_what_a_person_got_wrong_is_one_message(tmp_path: Path) -> None:
    """train.py itself: exit code 2, the cure, no traceback."""
    demo = "configs/pretrain/demo.py"
    cases = {
        (
            demo,
            "--config.optim.learning_rat=1",
        ): "no such key as learning_rat; did you mean learning_rate?",
        (demo, "--config.optin.adam.b1=1"): "--config.optin.adam.b1: no such key as optin; did you mean optim?",
        (demo, "--config.data.train=nowhere"): "nowhere",
        (demo, "--platform=cuda"): "--platform cuda: no such device here (",
        (demo, "--config.mesh.platform=tpu"): "config.mesh.platform: found cpu, expected tpu",
        (demo, "--num_processes=2"): "--coordinator, --num_processes and --process_index: give all three or none",
        (demo, "--config.mesh.fsdp=3"): "config.mesh: data -1, fsdp 3, tensor 1 on 1 devices",
        (
            demo,
            "--config.model.hidden_size=1000000000",
        ): "model.hidden_size: found 1000000000, expected at most 1048576",
        ("configs/pretrain/none.py", "--config.seed=1"): "configs/pretrain/none.py",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "train.py", "--config", config, f"--workdir={tmp_path / str(index)}", override],
            cwd=SCRIPT.parents[2],
            env=os.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, (config, override) in enumerate(cases)
    ]
    outputs = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    for process, errors, message in zip(processes, outputs, cases.values(), strict=True):
        assert process.returncode == 2, errors
        assert message in errors
        assert "Traceback" not in errors
