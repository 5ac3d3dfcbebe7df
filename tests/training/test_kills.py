"""A run that is killed two dozen times, wherever it hurts, and ends in the bits of a run that nobody touched."""

import json
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.support import toy_task
from tests.training.test_train_processes import Runner, free_port, wait_for_step
from wavlm_jax.training.checkpoint import load_params, newest_valid, steps

STEPS, EVERY, KEPT = 160, 2, 2
KILLS = 24
ARMED = ("arrays", "hash_files", "write_manifest", "written", "renamed", "prune", "step")
"""Where a session kills itself; every fourth is killed from outside, at a random moment."""
PHASES = {"arrays", "checksums", "manifest", "renamed", "pruning", "between saves"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


def phase_of(workdir: Path) -> str:
    """How far the save was that a kill has interrupted, by what it left on the disk."""
    unfinished = list((workdir / "checkpoints" / ".unfinished").iterdir())
    if any(path.name.startswith("removed-") for path in unfinished):
        return "pruning"
    if unfinished:
        whole = [path for path in unfinished if path.name.isdecimal()]
        if not whole:
            return "arrays"
        return "manifest" if (whole[0] / "manifest.json").exists() else "checksums"
    return "renamed" if len(steps(workdir)) > KEPT else "between saves"


def newest(workdir: Path) -> int:
    """The newest checkpoint; every one of them is good."""
    found, refused = newest_valid(workdir)
    assert refused == {}
    return 0 if found is None else found.step


def armed(phase: str, step: int, random: np.random.Generator) -> str:
    """Where in the session after `step` the process is to kill itself."""
    after = int(random.integers(1, 3))
    if phase == "step":
        return f"step:{step + int(random.integers(1, 2 * EVERY))}"
    if phase == "arrays":
        return f"arrays:{step + EVERY * after}"
    return phase if phase == "prune" else f"{phase}:{after}"


def kill_once(runner: Runner, workdir: Path, number: int, random: np.random.Generator) -> None:
    """One session, from the start to its end by SIGKILL."""
    step, options = newest(workdir), {"num_steps": STEPS, "every": EVERY, "delay": 0.02}
    if number % 4:
        where = armed(ARMED[number % len(ARMED)], step, random)
        code, output = runner.run(workdir, kill_at=where, **options)
        assert code == -signal.SIGKILL, output
        return
    process = runner.start(workdir, **options)
    wait_for_step(process, workdir, step + 1)
    time.sleep(random.uniform(0, 0.15))
    process.kill()
    output, _ = process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL, output


def the_end(workdir: Path) -> tuple[str, list[tuple[int, float]]]:
    """Digest of the final parameters, and (step, loss) of every line of the log."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    losses = [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]
    return toy_task.digest(load_params(workdir, STEPS)[1]), losses


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner()


@pytest.fixture(scope="module")
def undisturbed(runner: Runner, tmp_path_factory) -> tuple[str, list[tuple[int, float]]]:
    workdir = tmp_path_factory.mktemp("undisturbed")
    code, output = runner.run(workdir, num_steps=STEPS, every=EVERY)
    assert code == 0, output
    return the_end(workdir)


def test_two_dozen_kills(runner: Runner, undisturbed: tuple, tmp_path: Path) -> None:
    seed = int(np.random.default_rng().integers(2**31))
    print(f"seed {seed}")
    random, phases, good, kills = np.random.default_rng(seed), Counter[str](), 0, 0
    while kills < KILLS or set(phases) != PHASES:
        assert kills < 3 * KILLS, phases
        kill_once(runner, tmp_path, kills, random)
        kills, good_before, good = kills + 1, good, newest(tmp_path)
        assert good >= good_before
        phases[phase_of(tmp_path)] += 1
        if good >= STEPS - 4 * EVERY:  # enough room for the next kill
            break
    code, output = runner.run(tmp_path, num_steps=STEPS, every=EVERY)
    assert code == 0, output
    print(f"{kills} kills: {dict(phases)}")
    assert kills >= 20
    assert set(phases) == PHASES
    assert the_end(tmp_path) == undisturbed
    assert [step for step, _ in undisturbed[1]] == list(range(1, STEPS + 1))


def test_one_of_two_processes_killed_in_a_save(runner: Runner, undisturbed: tuple, tmp_path: Path) -> None:
    """Neither a kill of the host that commits nor of the other leaves anything but a good checkpoint."""

    def session(**options: object) -> list[int]:
        port = free_port()
        common = {"num_steps": STEPS, "every": EVERY, "devices": 1, "heartbeat": 10}
        processes = [
            runner.start(
                tmp_path,
                coordinator=f"127.0.0.1:{port},{index},2",
                **common,
                **(options if index == options.get("who") else {}),
            )
            for index in range(2)
        ]
        for process in processes:
            process.communicate(timeout=600)
        return [process.returncode for process in processes]

    for who, where in ((1, "arrays:20"), (0, "write_manifest:3"), (0, "renamed:2")):
        before = newest(tmp_path)
        codes = session(who=who, kill_at=where)
        assert codes[who] == -signal.SIGKILL
        assert codes[1 - who] not in (0, -signal.SIGKILL)
        assert newest(tmp_path) >= before
    assert session() == [0, 0]
    assert the_end(tmp_path) == undisturbed
