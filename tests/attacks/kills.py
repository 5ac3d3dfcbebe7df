"""Kills of a real pre-training run (train.py), at moments spread over starts, steps, saves and evaluations.

    python -m tests.attacks.kills --seed 0 --count 60

One run goes undisturbed. A second one is killed again and again (every fifth time by SIGTERM) and started again, until
it ends; then there is a new one, until all kills are spent. Clean is: SIGKILL leaves only checkpoints that verify,
SIGTERM ends with 75, and each run ends with the undisturbed one's parameters, optimizer state and metrics, bit by bit,
without drafts.
"""

import json
import multiprocessing
import os
import runpy
import signal
import sys
import time
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import jax
import numpy as np
from orbax.checkpoint import v1 as orbax

import wavlm_jax.training.metric_writers
import wavlm_jax.training.watchdog  # noqa: F401  all of them: a fork has them then
from tests.attacks import ROOT, Tally, attempt, options
from tests.support.speech import make_corpora, tiny_flags
from tests.support.toy_task import digest
from wavlm_jax.training.checkpoint import CheckpointStore, newest_valid, verify

STEPS, SAVES, EVALUATIONS = 90, 2, 3
MOMENTS = ("step", "save", "evaluation", "save", "start", "evaluation", "step")
MOST_STEPS = 8
"""Of a session that is killed, about."""
TIMED = {"seconds", "_per_second", "wait", "time", "elapsed", "memory"}
"""Parts of names of metrics that a clock or the machine decides."""


def flags_of(root: Path) -> list[str]:
    """A tiny model with everything that is random, saved and evaluated all the time."""
    changes = {
        "train.num_steps": STEPS,
        "train.eval_every": EVALUATIONS,
        "train.compilation_cache": os.environ.get("JAX_COMPILATION_CACHE_DIR", root / "cache"),
        "checkpoint.every": SAVES,
        "checkpoint.keep_last": 2,
        "metrics.tensorboard": False,
        "model.num_hidden_layers": 1,
    }
    return tiny_flags(root, make_corpora(root, train=20, valid=8), changes)


def train(words: list[str], log: Path, fresh: bool) -> None:
    """train.py in this process, `fresh` from its imports on; else they are done, which saves most of a start's time."""
    for number in (1, 2):
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.chdir(ROOT)
    if fresh:
        os.execv(sys.executable, [sys.executable, "-u", *words])  # noqa: S606  no shell is meant
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.argv = words
    runpy.run_path("train.py", run_name="__main__")


def start(workdir: Path, flags: list[str], log: Path, *, fresh: bool) -> BaseProcess:
    words = ["train.py", "--config=configs/pretrain/demo.py", f"--workdir={workdir}", *flags]
    process = multiprocessing.get_context("fork").Process(target=train, args=(words, log, fresh))
    process.start()
    return process


def lines_of(workdir: Path) -> list[tuple[int, str]]:
    """(step, kind) of the whole lines of the log as it is now."""
    try:
        text = (workdir / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    records = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [(record["step"], record["kind"]) for record in records]


def drafts(workdir: Path) -> list[str]:
    """What unfinished saves have in the folder now."""
    try:
        return sorted(path.name for path in (workdir / "checkpoints" / ".unfinished").iterdir())
    except FileNotFoundError:
        return []


class Session:
    """One start of train.py, and how far it has come."""

    def __init__(self, workdir: Path, flags: list[str], log: Path, *, fresh: bool = False) -> None:
        self.workdir = workdir
        self.before = max((step for step, kind in lines_of(workdir) if kind == "train"), default=0)
        found, _ = newest_valid(workdir) if (workdir / "checkpoints").is_dir() else (None, {})
        self.resumed = 0 if found is None else found.step
        self.began = log.stat().st_size if log.exists() else 0
        self.log, self.process = log, start(workdir, flags, log, fresh=fresh)

    def last(self) -> int:
        """The last step that this session has printed; 0 before the first."""
        with self.log.open("rb") as file:
            file.seek(self.began)
            said = [line for line in file.read().decode().splitlines() if line.startswith("train ")]
        return int(said[-1].split()[1].partition("/")[0]) if said else 0

    def reached(self, moment: str, step: int) -> bool:
        """Whether the run is at `step` or later, and at a moment of this kind now."""
        last = self.last()
        if last < step:
            return False
        if moment == "save":
            return bool(drafts(self.workdir))
        if moment == "evaluation":  # the step before it is printed, the one after it is not
            return (last + 1) % EVALUATIONS == 0
        return True

    def here(self) -> str:
        """Where the run is, by what it has printed and left on the disk."""
        last = self.last()
        if last == 0:
            return "start"
        evaluated = max((step for step, kind in lines_of(self.workdir) if kind.startswith("eval/")), default=0)
        due = last // EVALUATIONS * EVALUATIONS
        if due > max(evaluated, self.resumed) or (last + 1) % EVALUATIONS == 0:
            return "evaluation"
        return "save" if drafts(self.workdir) else "step"

    def kill(self, moment: str, how: signal.Signals, random: np.random.Generator, starting: float) -> str | None:
        """Waits for the moment, then kills; where that was. None: the run ended before."""
        if moment == "start":
            time.sleep(random.uniform(0, starting))
        else:
            step = self.resumed + int(random.integers(1, MOST_STEPS))
            while not self.reached(moment, step):
                if not self.process.is_alive():
                    return None
                time.sleep(0.002)
            time.sleep(random.uniform(0, 0.12 if moment == "save" else 0.3))
        where = self.here()
        if self.process.is_alive():
            os.kill(self.process.pid or 0, how)
        return None if self.code() == 0 else where

    def code(self) -> int | None:
        """The exit code, once the run has ended."""
        self.process.join(300)
        return self.process.exitcode


def digests(path: str) -> None:
    state = orbax.load_checkpointables(path)
    print({name: digest(jax.device_get(state[name])) for name in ("params", "train")})


_LONGEST_START = 20.0
"""Seconds; the first one compiles, the others do not."""


def the_end(workdir: Path) -> dict[str, object]:
    """Digests of the last state, and every number of the log that no clock decides."""
    path = CheckpointStore(workdir).path(STEPS)
    verify(path, STEPS)
    folder = workdir.parent
    came = attempt(partial(digests, path), folder)
    found: dict[str, object] = {"state": came.out if came.code == 0 else came.err}
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        name = f"{record['kind']} {record['step']}"
        if name in found:
            raise ValueError(f"metrics.jsonl has {name} twice")
        found[name] = {key: value for key, value in record.items() if not any(part in key for part in TIMED)}
    return found


def difference(workdir: Path, expected: dict[str, object]) -> str | None:
    """What the end of a run has other than the undisturbed one."""
    try:
        found = the_end(workdir)
    except (ValueError, OSError) as error:
        return f"the end: {type(error).__name__}: {error}"
    if left := drafts(workdir):
        return f"drafts are left: {left}"
    other = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    return f"other than undisturbed: {sorted(other)[:5]}" if other else None


def judge(session: Session, how: signal.Signals) -> str | None:
    """What a kill has done that it should not have."""
    code = session.code()
    if code != (-how if how == signal.SIGKILL else 75):
        return f"{how.name} ended with {code}"
    if not (session.workdir / "checkpoints").is_dir():
        return None
    found, refused = newest_valid(session.workdir)
    step = 0 if found is None else found.step
    if refused or step < session.resumed:
        return f"checkpoint {step} after {session.resumed}; refused: {refused}"
    return None


def main() -> int:
    given, tally = options(__doc__, 60), Tally()
    random, log, began = np.random.default_rng(given.seed), given.work / f"log-{given.seed}.txt", time.monotonic()
    log.touch()
    undisturbed, known = given.work / "undisturbed", given.work / "known.json"
    if not known.exists():
        if (came := attempt(lambda: print(json.dumps(flags_of(given.work / "data"))), given.work, 300)).code:
            raise SystemExit(came.err)
        flags, beginning = json.loads(came.out.splitlines()[-1]), time.monotonic()
        first = Session(undisturbed, flags, log, fresh=True)
        while not first.last() and first.process.is_alive():
            time.sleep(0.05)
        starting = time.monotonic() - beginning
        if first.code() != 0:
            raise SystemExit(log.read_text())
        known.write_text(json.dumps([flags, min(starting, _LONGEST_START)]))
    flags, starting = json.loads(known.read_text())
    expected = the_end(undisturbed)
    print(f"undisturbed: {time.monotonic() - began:.0f} s, {starting:.0f} s of them to the first step", flush=True)
    print(expected["state"], len(expected), "lines", flush=True)
    kills = chain = 0
    while kills < given.count:
        chain, ended = chain + 1, False
        workdir = given.work / f"killed-{given.seed}-{chain}"
        while kills < given.count and not ended:
            moment = MOMENTS[kills % len(MOMENTS)]
            how = signal.SIGTERM if kills % 5 == 4 else signal.SIGKILL
            session = Session(workdir, flags, log, fresh=moment == "start")
            where = session.kill(moment, how, random, starting)
            if ended := where is None:
                break
            kills += 1
            came_of = f"{how.name} at {where}, after step {session.last() or session.resumed}"
            tally.add(f"kill {kills}", str(where), came_of, judge(session, how))
        last = session if ended else Session(workdir, flags, log)
        code = last.code()
        tally.add(f"run {chain}", "runs", "ended", f"exit code {code}" if code else difference(workdir, expected))
    code = tally.close()
    print(f"{time.monotonic() - began:.0f} s; in {given.work}")
    return code


if __name__ == "__main__":
    sys.exit(main())
