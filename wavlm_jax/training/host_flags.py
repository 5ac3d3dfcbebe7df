"""The flags with which a programme becomes one process of many; importing this module defines them."""

import jax
from absl import flags

from wavlm_jax.training import hosts

_PLATFORM = flags.DEFINE_string("platform", None, "cpu, tpu or cuda: fail rather than take another.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, where no cluster tells it.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator.")
_PROCESS_INDEX = flags.DEFINE_integer("process_index", None, "With --coordinator.")
_WAIT = flags.DEFINE_integer("wait_seconds", 300, "For the other hosts, at the start.", lower_bound=1)
_HEARTBEAT = flags.DEFINE_integer("heartbeat_seconds", 100, "A host not heard of for so long is dead.", lower_bound=1)


def join() -> bool:
    """Connects with the others as the flags or the cluster say; see `hosts.join`. Comes before JAX sees a device."""
    if _PLATFORM.value is not None:
        jax.config.update("jax_platforms", _PLATFORM.value)
    return hosts.join(
        _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_INDEX.value, _WAIT.value, heartbeat=_HEARTBEAT.value
    )
