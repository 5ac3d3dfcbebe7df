"""Several hosts become one machine, when asked or when a cluster says so; must come before JAX sees a device."""

import os
from collections.abc import Mapping

import jax


def cluster_detected(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment is that of a job of several processes which JAX can find by itself."""
    counts = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
    if any(environment[name].isdecimal() and int(environment[name]) > 1 for name in counts if name in environment):
        return True
    return "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def join(coordinator: str | None, num_processes: int | None, process_index: int | None) -> bool:
    """Connects this process with the others of the run; every wait is bounded.

    Args:
        coordinator: "host:port" of process 0; None: only if a cluster is detected, which then knows all three.
        num_processes: of the whole run.
        process_index: of this one.

    Returns:
        Whether there are others.

    Raises:
        ValueError: some of the three are given, but not all.

    """
    given = [value is not None for value in (coordinator, num_processes, process_index)]
    if any(given) and not all(given):
        raise ValueError("--coordinator, --num_processes and --process_index: give all three or none")
    if not any(given) and not cluster_detected():
        return False
    jax.distributed.initialize(coordinator, num_processes, process_index)
    return True
