"""SIGTERM and SIGINT become a request that all hosts hear at the same step."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Preemption:
    """A request to stop at the next step boundary."""

    def __init__(self) -> None:
        self._asked = False
        self._boundaries = 0

    def hear(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler."""
        self._asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)

    @property
    def heard(self) -> bool:
        """Whether to stop at once. Never on several hosts, which could not agree between two steps."""
        return self._asked and jax.process_count() == 1

    def requested(self) -> bool:
        """Whether to stop at this step boundary; the same answer on all hosts. Call it once a step on each.

        JAX agrees on the boundary after the last that any host has counted, and stops there and nowhere else. So they
        are counted from the start of the session: a signal that comes before the first one means number 1, which the
        steps of a run that was resumed would never come by.
        """
        self._boundaries += 1
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(self._boundaries))
        return self._asked


@contextmanager
def listening() -> Iterator[Preemption]:
    """While entered, SIGTERM and the first SIGINT are requests; a second SIGINT interrupts.

    On several hosts JAX's own preemption service listens for SIGTERM and agrees on the step; SIGINT is passed on to it.
    Outside the main thread Python allows no handlers, and nothing is heard.
    """
    preemption, previous = Preemption(), {}
    if threading.current_thread() is threading.main_thread():
        signals = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
        previous = {number: signal.signal(number, preemption.hear) for number in signals}
    try:
        yield preemption
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
