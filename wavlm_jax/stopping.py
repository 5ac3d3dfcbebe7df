"""SIGINT and SIGTERM where there is nothing to save: one line and an exit code, from the first moment of a command.

Imports nothing that takes time. The training loop listens by itself, and saves first (`training.hosts.listening`).
"""

import os
import signal
from types import FrameType

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}


def stop_with_one_line(program: str, *, at_once: bool) -> None:
    """What the two signals do from now on in `program`.

    Args:
        program: for the line.
        at_once: the process ends where it stands, as slow imports need; else by SystemExit, which closes what is open.

    """

    def stop(number: int, _frame: FrameType | None) -> None:
        line = f"{program}: stopped by {signal.Signals(number).name}; the same command goes on\n"
        os.write(2, line.encode())  # print may be what was interrupted
        code = EXIT_CODES[signal.Signals(number)]
        if at_once:
            os._exit(code)
        raise SystemExit(code)

    for number in EXIT_CODES:
        signal.signal(number, stop)
