"""How a session of training ends."""

from enum import IntEnum
from typing import NamedTuple


class Status(IntEnum):
    """How a session ended; the value is the exit code of train.py."""

    FINISHED = 0
    PREEMPTED = 75
    """A signal asked for it: saved; the same command goes on (EX_TEMPFAIL)."""
    DIVERGED = 76
    """Too many steps in a row were not finite: the last good state is saved."""
    STUCK = 77
    """A step took longer than `train.max_step_seconds`: stacks are in the workdir, run it again."""


class Outcome(NamedTuple):
    """What is left of a session."""

    status: Status
    step: int
    metrics: dict[str, dict[str, float]]
    """Of the last evaluation: split -> name -> value."""
