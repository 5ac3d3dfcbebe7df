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
    """Connects with the others as the flags or the cluster say; see `hosts.join`. Comes before JAX sees a device.

    Raises:
        ValueError: incomplete flags, or a platform that is not here.

    """
    if _PLATFORM.value is not None:
        jax.config.update("jax_platforms", _PLATFORM.value)
    joined = hosts.join(
        _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_INDEX.value, _WAIT.value, heartbeat=_HEARTBEAT.value
    )
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # an assertion of JAX, where it has no plugin for the platform
        reason = str(error).partition("\n")[0] or "JAX has no plugin for it"
        wanted = f"--platform {_PLATFORM.value}" if _PLATFORM.value else "JAX_PLATFORMS"
        raise ValueError(
            f"{wanted}: no such device here ({reason}); look for its driver and JAX's plugin "
            "(pip install 'jax[tpu]' or 'jax[cuda12]'), or leave it out to take what there is"
        ) from error
    return joined
