"""Stages as commands that a person could type: shown, then run with this interpreter."""

import shlex
import subprocess
import sys


def python(*arguments: str) -> None:
    """Show a command, then run it.

    Raises:
        SystemExit: it failed; its own message has been printed.

    """
    print("\n$ python " + shlex.join(arguments), flush=True)
    code = subprocess.run([sys.executable, *arguments], check=False).returncode  # noqa: S603  our own arguments
    if code:
        sys.exit(code)
