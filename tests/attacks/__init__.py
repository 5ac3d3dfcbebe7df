"""Attacks on the software that a person starts: python -m tests.attacks.NAME --seed S --count N.

Each prints one line per try and a summary, and exits with 1 when something was not clean. docs/reliability.md has the
figures. pytest does not collect them.
"""

import argparse
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
MEMORY = 2**31
"""Bytes that a try may take."""


def options(description: str | None, count: int) -> argparse.Namespace:
    """Seed, count, and a folder to work in."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--only", default="", help="tries whose name contains this")
    parser.add_argument("--work", type=Path, help="folder to work in, kept; a temporary one if not given")
    given = parser.parse_args()
    given.work = (given.work or Path(tempfile.mkdtemp(prefix="attack-"))).absolute()
    given.work.mkdir(parents=True, exist_ok=True)
    return given


class Came(NamedTuple):
    """What came of a try."""

    code: int
    """Exit code; minus the signal where one ended it."""
    out: str
    err: str
    seconds: float
    memory: int
    """Most bytes that were resident."""

    def fault(self) -> str | None:
        """What no try may do, whatever it was."""
        if self.code < 0:
            return f"ended by {signal.Signals(-self.code).name} after {self.seconds:.0f} s"
        if "Traceback (most recent" in self.out + self.err:
            return f"a traceback: {self.err.strip().splitlines()[-1][:300]}"
        return f"{self.memory / 2**20:,.0f} MiB of memory" if self.memory > MEMORY else None


def attempt(do: Callable[[], object], folder: Path, seconds: int = 90) -> Came:
    """Runs `do` in a fork of this process, which has imported everything and computed nothing.

    The exit code is that of SystemExit, 1 after another exception (with its traceback on stderr), else 0. The fork is
    killed after `seconds`, and cannot take more than 8 GiB.
    """
    began = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _prepare_child(folder, seconds)
            do()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
        except BaseException:  # noqa: BLE001 whatever a program lets through
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status, usage = os.wait4(child, 0)
    out, err = ((folder / name).read_text(errors="replace") for name in ("stdout", "stderr"))
    return Came(os.waitstatus_to_exitcode(status), out, err, time.monotonic() - began, usage.ru_maxrss * 1024)


def _prepare_child(folder: Path, seconds: int) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    resource.setrlimit(resource.RLIMIT_DATA, (2**33, 2**33))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)


class Tally:
    """What came of the tries."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.unclean: list[str] = []

    def add(self, name: str, kind: str, came: str, fault: str | None) -> None:
        """One line for one try; `fault` says what was not clean."""
        self.kinds[kind] += 1
        if fault:
            self.unclean.append(f"{name}: {fault}")
        print(f"{'NOT CLEAN ' if fault else 'clean     '}{name}: {came}{' | ' + fault if fault else ''}", flush=True)

    def close(self) -> int:
        """The summary; the exit code."""
        total = sum(self.kinds.values())
        kinds = ", ".join(f"{kind} {number}" for kind, number in sorted(self.kinds.items()))
        print(f"\n{total - len(self.unclean)} of {total} clean ({kinds})")
        for line in self.unclean:
            print(f"not clean: {line}")
        return int(bool(self.unclean))
