"""Several hosts become one machine, when asked or when a cluster says so; must come before JAX sees a device."""

import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import Mapping

import jax
from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster

from wavlm_jax.training.mesh import MeshSettings

EXIT_MISSING = 2
"""Not all hosts came: the message says which process waited, and for how many."""
_LONGER_THAN_OURS = 60


def cluster_detected(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment is that of a job of several processes which JAX can find by itself."""
    counts = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
    if any(environment[name].isdecimal() and int(environment[name]) > 1 for name in counts if name in environment):
        return True
    return "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def join(coordinator: str | None, num_processes: int | None, process_index: int | None, seconds: int = 300) -> bool:
    """Connects this process with the others of the run. When they do not come in time, the process ends with 2.

    Args:
        coordinator: "host:port" of process 0; None: only if a cluster is detected, which then knows all three.
        num_processes: of the whole run.
        process_index: of this one.
        seconds: to wait for the others at most.

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
    message = (
        f"{number} on {socket.gethostname()}: waited {seconds} s for {wanted} of {coordinator or 'the cluster'}; the "
        "hosts that print no such line are missing. Start the same command on every host"
    )
    giving_up = threading.Timer(seconds, _give_up, [message])
    giving_up.daemon = True
    giving_up.start()
    jax.distributed.initialize(
        coordinator, num_processes, process_index, initialization_timeout=seconds + _LONGER_THAN_OURS
    )
    giving_up.cancel()
    return True


def _give_up(message: str) -> None:
    """Instead of JAX, which ends the process without a word on the others."""
    print(message, file=sys.stderr, flush=True)
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
