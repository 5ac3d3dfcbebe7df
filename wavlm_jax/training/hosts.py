"""Several hosts as one run: joining, waiting for one another, stopping at the same step, host memory.

Barriers and broadcasts here stand on JAX's coordination service (a key-value store on process 0), not on device
collectives: every wait is bounded and has a name, and a host whose devices hang can still be told from one that never
came. Importing this module defines the command line flags of a process.
"""

import itertools
import json
import os
import resource
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import jax
from absl import flags
from jax._src import distributed
from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster
from jax.experimental import multihost_utils
from jaxlib import _jax

from wavlm_jax.training.sharding import MeshSettings

_PLATFORM = flags.DEFINE_string("platform", None, "cpu, tpu or cuda: fail rather than take another.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, where no cluster tells it.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Of the whole run; with --coordinator.")
_PROCESS_INDEX = flags.DEFINE_integer("process_index", None, "Of this process, from 0 on; with --coordinator.")
_WAIT = flags.DEFINE_integer("wait_seconds", 300, "Seconds to wait for the other hosts at the start.", lower_bound=1)
_HEARTBEAT = flags.DEFINE_integer("heartbeat_seconds", 100, "A host not heard of for so long is dead.", lower_bound=1)


def join_from_flags() -> bool:
    """Connects with the others as the flags or the cluster say; see `hosts.join`. Comes before JAX sees a device.

    Raises:
        ValueError: incomplete flags, or a platform that is not here.

    """
    if _PLATFORM.value is not None:
        jax.config.update("jax_platforms", _PLATFORM.value)
    joined = join(
        _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_INDEX.value, _WAIT.value, heartbeat=_HEARTBEAT.value
    )
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # an assertion of JAX, where it has no plugin for the platform
        reason = str(error).partition("\n")[0] or "JAX has no plugin for it"
        wanted = f"--platform {_PLATFORM.value}" if _PLATFORM.value else "JAX_PLATFORMS"
        raise ValueError(
            f"{wanted}: no such device here ({reason}); look for its driver and JAX's plugin (pip install "
            "'wavlm-jax[tpu]' or 'wavlm-jax[cuda]'), or leave it out to take what there is"
        ) from error
    return joined


EXIT_MISSING = 2
"""Process 0 did not come: the message says which process waited."""
_FOR_THE_SERVICE = 20
"""Seconds that JAX's service on process 0 has to tell the others who is absent, before they give up on it."""
_LONGER_THAN_OURS = 60
"""Seconds by which JAX's own time limit comes after ours."""


def cluster_detected(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment is that of a job of several processes which JAX can find by itself."""
    counts = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
    if any(environment[name].isdecimal() and int(environment[name]) > 1 for name in counts if name in environment):
        return True
    return "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def join(
    coordinator: str | None,
    num_processes: int | None,
    process_index: int | None,
    seconds: int = 300,
    *,
    heartbeat: int = 100,
) -> bool:
    """Connects this process with the others of the run. When they do not come in time, the process ends.

    JAX's own service on process 0 then tells all who wait which processes are absent, and JAX aborts them (134). Where
    process 0 itself is absent, nobody can say, and the process ends with 2.

    Args:
        coordinator: "host:port" of process 0; None: only if a cluster is detected, which then knows all three.
        num_processes: of the whole run.
        process_index: of this one.
        seconds: to wait for the others at most.
        heartbeat: seconds after which a process that is not heard of is dead, and all others are aborted.

    Returns:
        Whether there are others.

    Raises:
        ValueError: some of the three are given, but not all.

    """
    given = [value is not None for value in (coordinator, num_processes, process_index)]
    if any(given) and not all(given):
        raise ValueError("--coordinator, --num_processes and --process_index: give all three or none")
    if not any(given) and not cluster_detected() and not GceTpuCluster.is_env_present():
        return False
    number = "a process" if process_index is None else f"process {process_index}"
    wanted = "the other processes" if num_processes is None else f"all {num_processes} processes"
    waited = f"{number} on {socket.gethostname()}: waited {seconds} s for {wanted} of {coordinator or 'the cluster'}"
    timers = [
        threading.Timer(seconds, _say, [f"{waited}; JAX names the absent next. Start the command on every host"]),
        threading.Timer(
            seconds + _FOR_THE_SERVICE, _give_up, [f"{waited}; process 0 is not there, or cannot be reached from here"]
        ),
    ]
    for timer in timers:
        timer.daemon = True
        timer.start()
    with _registration_ends_after(seconds + 1):
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_index,
            initialization_timeout=seconds + _LONGER_THAN_OURS,
            heartbeat_timeout_seconds=heartbeat,
        )
    for timer in timers:
        timer.cancel()
    return True


@contextmanager
def _registration_ends_after(seconds: int) -> Iterator[None]:
    """JAX waits an hour for the others, and only when that hour is over names the absent; it has no option for it."""
    jaxlib: Any = _jax  # where jax.distributed looks the function up
    made = jaxlib.get_distributed_runtime_service
    jaxlib.get_distributed_runtime_service = partial(made, cluster_register_timeout=seconds)
    try:
        yield
    finally:
        jaxlib.get_distributed_runtime_service = made


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _give_up(message: str) -> None:
    """Says who is missing and ends the process (2); JAX would abort it without naming anybody."""
    _say(message)
    os._exit(EXIT_MISSING)


def check_machine(settings: MeshSettings) -> None:
    """Checks that the machine is the one that the config was written for.

    Raises:
        ValueError: another platform, number of hosts or of devices; the hosts that are here are named by number.

    """
    found = {"platform": jax.default_backend(), "hosts": jax.process_count(), "devices": jax.device_count()}
    for name, value in found.items():
        wanted = getattr(settings, name)
        if wanted is not None and wanted != value:
            per_host = Counter(device.process_index for device in jax.devices())
            here = ", ".join(f"{count} on host {index}" for index, count in sorted(per_host.items()))
            raise ValueError(
                f"config.mesh.{name}: found {value}, expected {wanted} (devices here: {here}, {found['platform']}); "
                "start the command on every host of the machine, or give the config of this machine"
            )


PATIENCE = 1800.0
"""Seconds that a barrier waits by default; process 0 may have to read and hash a whole checkpoint meanwhile."""
_NUMBERS: Iterator[int] = itertools.count()
Result = TypeVar("Result")


class HostsMissing(RuntimeError):  # noqa: N818 named as people call it
    """Some hosts did not reach a barrier in time; the message names the barrier and the hosts."""


def barrier(name: str, seconds: float = PATIENCE) -> None:
    """Waits until all processes are here. All call it in the same order; alone it does nothing.

    Args:
        name: for the message.
        seconds: at most.

    Raises:
        HostsMissing: they did not all come.

    """
    all_gather(name, None, seconds)


def broadcast_one_to_all(name: str, value: Any) -> Any:
    """The value of process 0, on all processes; what the others give is ignored. See `all_gather`."""
    return all_gather(name, value)[0][2]


def all_gather(name: str, value: Any, seconds: float = PATIENCE, key: str | None = None) -> list[tuple[int, str, Any]]:
    """The values of all processes, on all of them: (process, host, value), by process.

    Args:
        name: for the message.
        value: of this process; JSON.
        seconds: at most, for the slowest.
        key: unique, where another thread than the main one calls; None: all processes call in the same order.

    Raises:
        HostsMissing: they did not all come.

    """
    if jax.process_count() == 1:
        return [(0, socket.gethostname(), value)]
    client, place = _client(), f"wavlm_jax/{next(_NUMBERS) if key is None else key}/{name}"
    client.key_value_set(f"{place}/{jax.process_index()}", json.dumps([socket.gethostname(), value]))
    try:
        client.wait_at_barrier(place, int(seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        raise HostsMissing(_absent(_read(client, place), name, seconds)) from error
    return _read(client, place)


def all_succeed(
    name: str,
    do: Callable[[], Result],
    *,
    catch: tuple[type[Exception], ...] = (OSError,),
    failure: Callable[[str], Exception] = OSError,
    describe: Callable[[Exception], str] = str,
    seconds: float = PATIENCE,
    key: str | None = None,
) -> Result:
    """What `do` returns here, once it has returned on all processes.

    Args:
        name: for messages.
        do: may fail on some processes only.
        catch: failures that the other processes hear of.
        failure: makes the exception that all processes raise, from the failures with their processes and hosts.
        describe: one failure as text.
        seconds: see `all_gather`.
        key: see `all_gather`.

    Raises:
        HostsMissing: not all processes came.

    Where `do` failed anywhere, all processes raise `failure`; alone, what `do` raised.

    """
    error, result = None, []
    try:
        result.append(do())
    except catch as found:
        if jax.process_count() == 1:
            raise
        error = found
    said = all_gather(name, None if error is None else describe(error), seconds, key)
    if failed := [f"process {index} ({host}): {text}" for index, host, text in said if text is not None]:
        raise failure("; ".join(failed)) from error
    return result[0]


def _read(client: Any, place: str) -> list[tuple[int, str, Any]]:
    return sorted((int(key.rsplit("/", 1)[1]), *json.loads(text)) for key, text in client.key_value_dir_get(place))


def _absent(came: list[tuple[int, str, Any]], name: str, seconds: float) -> str:
    missing = sorted(set(range(jax.process_count())) - {index for index, _, _ in came})
    here = ", ".join(f"{index} ({host})" for index, host, _ in came)
    return (
        f"{name}: after {seconds:.0f} s {len(came)} of {jax.process_count()} processes are here ({here}); missing: "
        f"process {', '.join(map(str, missing)) or 'none, but one left again'}; look at their logs, then start all "
        "hosts again"
    )


def _client() -> Any:
    """The client of JAX's coordination service; JAX has no public name for it."""
    return distributed.global_state.client


class Preemption:
    """A request to stop at the next step boundary."""

    def __init__(self) -> None:
        self._asked = False
        self._boundaries = 0

    def hear(self, number: int, _frame: FrameType | None) -> None:
        """Takes a signal; on several hosts passes SIGINT on to JAX's service, which hears SIGTERM only."""
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
        """Whether to stop at this step boundary; the same answer on all hosts. Call it once per step on each.

        JAX agrees on the boundary after the last one that any host has counted, and says yes at that number only. So
        boundaries are counted from the start of the session: a signal before the first one means number 1, which the
        step numbers of a resumed run would have passed long ago.
        """
        self._boundaries += 1
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(self._boundaries))
        return self._asked


@contextmanager
def listening() -> Iterator[Preemption]:
    """Inside, SIGTERM and the first SIGINT ask the run to stop; a second SIGINT interrupts it.

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


_STATM = Path("/proc/self/statm")


def resident_bytes() -> int:
    """Resident memory of this process; where the system does not tell (macOS), the peak so far."""
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
