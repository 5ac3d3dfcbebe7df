"""One owner per folder: a lease with host, process and heartbeat, in a folder of this machine or in a bucket.

The lease is a small file, changed by compare-and-swap: only where its content is still what was read. A process takes
over the lease of a dead owner: at once where it can tell that the owner is dead (same machine, and no process of that
number and start), else after the heartbeat's number has not changed for `STALE` seconds. Clocks of hosts are not
compared. An owner that finds its lease taken, because it was suspended for longer than that, ends its process (exit 2).
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax

from wavlm_jax.settings import SettingsError, read
from wavlm_jax.training.hosts import all_succeed
from wavlm_jax.training.workdir import Workdir, absolute, cure, read_bytes, swap

NAME = ".owner.json"
BEAT, STALE = 10.0, 60.0
"""Seconds from one heartbeat to the next, and without one after which an owner counts as dead."""
_SIZE = 4096
"""Bytes of a lease, always: it is replaced in place, which a full disk allows."""
_EXIT_TAKEN = 2


class TakenError(OSError):
    """The folder belongs to another process; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """What a lease says."""

    host: str
    pid: int
    born: str
    """Start of the process, as its machine counts; tells it from a later process of the same number."""
    machine: str
    """Tells containers and boots of a machine apart: process numbers of another one mean nothing here."""
    place: str
    """The folder that is leased: a lease may have been copied with its folder."""
    since: str
    """Date and time, for messages."""
    token: str
    """Random; tells two leases of one process apart."""
    beat: int = 0
    """Heartbeats so far."""

    def dead(self) -> bool:
        """Whether this machine knows that the process has ended."""
        return self.machine == _machine() and self.born != _born(self.pid)

    def alive(self, place: str) -> bool:
        """Whether this machine knows that the process still runs, and owns `place`."""
        return self.machine == _machine() and self.born == _born(self.pid) and self.place == place


class Lease:
    """The lease of `place`, a folder or a gs:// address; `ended` is called when another process has taken it."""

    def __init__(self, place: str | Path, ended: Callable[[str], None] | None = None) -> None:
        self.place = absolute(place)
        self._path = f"{self.place}/{NAME}"
        self._ended = ended or _end
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._owner = Owner(
            host=socket.gethostname(),
            pid=os.getpid(),
            born=_born(os.getpid()) or "",
            machine=_machine(),
            place=self.place,
            since=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
            token=secrets.token_hex(8),
        )

    def take(self) -> None:
        """Takes the lease and begins its heartbeat; waits `STALE` s where nothing else tells that its owner is dead.

        Raises:
            TakenError: it has an owner that lives.
            OSError: the lease cannot be written.

        """
        try:
            self._follow()
        except TakenError:
            raise
        except OSError as error:
            raise OSError(f"{self.place}: cannot be written ({error.strerror or error}); {cure(self.place)}") from error
        threading.Thread(target=self._keep, name="lease", daemon=True).start()

    def _follow(self) -> None:
        found = _content(self._path)
        while not (found == self._text() or (self._free(found) and swap(self._path, found, self._text()))):
            found = _content(self._path)

    def beat(self) -> None:
        """Writes the next heartbeat.

        Raises:
            TakenError: another process has taken the lease.
            OSError: it cannot be written now.

        """
        with self._lock:
            before, self._owner = self._text(), replace(self._owner, beat=self._owner.beat + 1)
            if not self._stop.is_set() and not swap(self._path, before, self._text()):
                found = _content(self._path)
                if (owner := _owner(found)) is None or owner.token != self._owner.token:
                    raise TakenError(f"{self.place}: {_named(found)} has taken this folder; this process ends")
                self._owner = owner

    def release(self) -> None:
        """Gives the lease up, so that the next process need not wait."""
        self._stop.set()
        with self._lock, contextlib.suppress(OSError):
            found = _content(self._path)
            if (owner := _owner(found)) is not None and owner.token == self._owner.token:
                swap(self._path, found, None)

    def _text(self) -> bytes:
        return json.dumps(asdict(self._owner)).encode().ljust(_SIZE)

    def _free(self, found: bytes | None) -> bool:
        owner = _owner(found)
        if found is None or (owner is not None and owner.dead()):
            return True
        refusal = (
            f"{self.place}: belongs to {_named(found)}; wait until it has ended or stop it, or choose another folder"
        )
        if owner is not None and owner.alive(self.place):
            raise TakenError(refusal)
        print(f"{self.place}: {_named(found)} was here; waiting {STALE:.0f} s for a sign of its life", flush=True)
        end = time.monotonic() + STALE
        while (now := _content(self._path)) == found:
            if time.monotonic() > end:
                return True
            time.sleep(min(BEAT, STALE) / 10)
        if now is None:
            return False  # it ended well; to be looked at again
        raise TakenError(refusal)

    def _keep(self) -> None:
        while not self._stop.wait(BEAT):
            try:
                self.beat()
            except TakenError as error:
                self._ended(str(error))
                return
            except OSError:
                continue  # a full disk, a network that is away; tried again


@contextmanager
def held(place: str | Path) -> Iterator[Lease]:
    """Inside, this process owns `place`; see `Lease.take`."""
    lease = Lease(place)
    lease.take()
    try:
        yield lease
    finally:
        lease.release()


@contextmanager
def owned(place: str | Path) -> Iterator[Lease | None]:
    """Like `held`, for several processes together: process 0 takes the lease; all call this, and fail with it."""
    with contextlib.ExitStack() as stack:
        yield all_succeed(
            "owner of the folder", lambda: stack.enter_context(held(place)) if jax.process_index() == 0 else None
        )


@contextmanager
def owned_workdir(workdir: Workdir) -> Iterator[None]:
    """Inside, no other run starts in `workdir`, and nothing is published into one that was taken. May be nested."""
    if workdir.guard is not None:
        yield
        return
    with owned(workdir.place) as lease:
        workdir.guard = (lambda: None) if lease is None else lease.beat
        try:
            yield
        finally:
            workdir.guard = None


def _content(path: str) -> bytes | None:
    with contextlib.suppress(FileNotFoundError):
        return read_bytes(path, 16 * _SIZE) or None
    return None


def _owner(content: bytes | None) -> Owner | None:
    try:
        return None if content is None else read(json.loads(content), Owner, "owner")
    except (SettingsError, ValueError, RecursionError):
        return None


def _named(content: bytes | None) -> str:
    owner = _owner(content)
    return "an unknown process" if owner is None else f"process {owner.pid} on {owner.host!r} since {owner.since!r}"


def _machine() -> str:
    """Host name, boot, and namespace of process numbers, as far as the system tells."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            str(Path("/proc/self/ns/pid").readlink()),
        ]
    return " ".join(parts)


def _born(pid: int) -> str | None:
    """When a process of this machine began ("": the system does not tell); None: there is none, or a zombie."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass  # of another user
    try:
        state, *facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return None if state in "ZX" else facts[18]


def _end(message: str) -> None:
    """The process may not write another byte."""
    print(message, file=sys.stderr, flush=True)
    os._exit(_EXIT_TAKEN)
