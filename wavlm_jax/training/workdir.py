"""The workdir before anything is computed: room for a checkpoint, and one folder that all hosts see."""

import contextlib
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import jax

from wavlm_jax.training.disk import check_space
from wavlm_jax.training.waiting import agreed, from_first

_VISIBLE_WITHIN = 90.0
"""Seconds; a network file system may remember for a minute that a file was not there."""


def claim(workdir: Path, num_bytes: int) -> None:
    """Makes sure that every process can write into `workdir`, and that it is one folder. All processes call it.

    Args:
        workdir: as each process understands it.
        num_bytes: of a checkpoint; process 0 reserves and frees as many.

    Raises:
        OSError: on all processes; which of them cannot write or looks into another folder.

    """
    mark = workdir / f".shared-{from_first('name of the mark in the workdir', secrets.token_hex(8))}"
    first = jax.process_index() == 0
    try:
        _all("room in the workdir", lambda: check_space(workdir, num_bytes if first else 1))
        _all("a mark in the workdir", lambda: mark.touch() if first else None)
        _all("a workdir that all hosts share", lambda: _find(mark))
    finally:
        if first:
            with contextlib.suppress(OSError):
                mark.unlink()


def _all(name: str, do: Callable[[], None]) -> None:
    complaint = None
    try:
        do()
    except OSError as error:
        complaint = str(error)
    if found := agreed(name, complaint):
        raise OSError(found)


def _find(mark: Path) -> None:
    end = time.monotonic() + _VISIBLE_WITHIN
    while not mark.exists():
        if time.monotonic() > end:
            raise OSError(
                f"{mark}: process 0 has written this file, and it is not here after {_VISIBLE_WITHIN:.0f} s; give a "
                "--workdir on a file system that all hosts share"
            )
        list(mark.parent.iterdir())  # makes NFS look again
        time.sleep(0.5)
