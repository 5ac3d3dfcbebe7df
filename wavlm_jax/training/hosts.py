"""Several hosts become one machine, when asked or when a cluster says so; must come before JAX sees a device."""

import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster
from jaxlib import _jax

from wavlm_jax.training.mesh import MeshSettings

EXIT_MISSING = 2
"""Process 0 did not come: the message says which process waited."""
_FOR_THE_SERVICE = 20
"""Seconds that process 0 has for telling the others who is absent."""
_LONGER_THAN_OURS = 60


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
    """Instead of JAX, which ends the process without a word on the others."""
    _say(message)
    os._exit(EXIT_MISSING)


def check_machine(settings: MeshSettings) -> None:
    """Whether the machine is the one that the config was written for.

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
