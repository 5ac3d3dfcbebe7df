"""SIGTERM and SIGINT become a request that all hosts hear at the same step."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils


class Preemption:
    """While entered, SIGTERM and the first SIGINT ask for a stop at the next step boundary; a second SIGINT interrupts.

    On several hosts JAX's own preemption service listens for SIGTERM and agrees on the step; SIGINT is passed on to it.
    """

    def __init__(self) -> None:
        self._asked = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Installs the handlers; outside the main thread Python allows none, and nothing is heard."""
        if threading.current_thread() is threading.main_thread():
            signals = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
            self._previous = {number: signal.signal(number, self._hear) for number in signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Puts the earlier handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        self._asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`; the same answer on all hosts. Call it once a step on each."""
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._asked
