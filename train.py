"""The one entry point for training.

python train.py --config configs/pretrain/base.py --workdir runs/base [--config.optim.learning_rate=3e-4 ...]

The same command again goes on where the last one stopped. Exit codes: 0 finished, 2 something in config or data is
wrong, or the workdir belongs to another process, 75 stopped by a signal (saved; run it again), 76 diverged (the last
good state is saved), 77 stuck, or a loader process was lost (run it again; stacks-*.txt in the workdir says where),
130 interrupted before there was anything to save, or by a second SIGINT. Other codes: JAX itself ended the process, for
instance because another host is gone; run it again.
"""

from wavlm_jax.stopping import EXIT_CODES, stop_with_one_line

if __name__ == "__main__":
    stop_with_one_line("train.py", at_once=True)  # the imports take seconds

import contextlib
import json
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

import wavlm_jax.command_line
from pretrain.task import TASKS
from wavlm_jax.command_line import EXIT_WRONG
from wavlm_jax.data.loader import LoaderError, LoaderLostError
from wavlm_jax.settings import read_sections
from wavlm_jax.training import hosts, loop
from wavlm_jax.training.hosts import HostsMissing
from wavlm_jax.training.lease import owned_workdir
from wavlm_jax.training.sharding import make_mesh
from wavlm_jax.training.start import RunSettings
from wavlm_jax.training.step import OutOfMemory
from wavlm_jax.training.task import Topology
from wavlm_jax.training.watchdog import Status
from wavlm_jax.training.workdir import Workdir, open_workdir

_CONFIG = config_flags.DEFINE_config_file("config", None, "What to train and how; see configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Checkpoints, metrics and the config go here: a folder, or gs://bucket/run."
)


def train(config: dict[str, Any], workdir: Workdir) -> int:
    """Reads the settings, builds the task, trains; returns the exit code."""
    settings = read_sections(config, RunSettings)
    if config["task"] not in TASKS:
        raise ValueError(f"config.task: found {config['task']!r}, expected one of {', '.join(TASKS)}")
    hosts.check_machine(settings.mesh)
    mesh = make_mesh(settings.mesh)
    task = TASKS[config["task"]].build(config, Topology.of(mesh))
    return int(loop.run(task, settings, mesh, workdir, config={**config, **task.resolved}).status)


def attempt(workdir: Workdir) -> int:
    """Trains in a workdir that is ours; returns the exit code. A user's mistake is one message, and error.txt there."""
    try:
        return train(json.loads(_CONFIG.value.to_json()), workdir)
    except (ValueError, OSError, OutOfMemory, HostsMissing, LoaderError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        index = jax.process_index()
        name = f"error-{index}.txt" if index else "error.txt"
        with contextlib.suppress(OSError):  # the disk may be the problem
            workdir.folder.mkdir(parents=True, exist_ok=True)
            (workdir.folder / name).write_text(traceback.format_exc())
            print(f"(traceback: {workdir.lasting(name)})", file=sys.stderr)
        return int(Status.STUCK) if isinstance(error, LoaderLostError) else EXIT_WRONG


def main(_: Sequence[str]) -> None:
    """Opens the workdir, trains, exits."""
    stop_with_one_line("train.py", at_once=False)
    code = 0
    try:
        with open_workdir(str(_WORKDIR.value)) as workdir:
            hosts.join_from_flags()
            with owned_workdir(workdir):
                code = attempt(workdir)
    except (ValueError, OSError, HostsMissing) as error:
        print(f"train.py: {error}", file=sys.stderr)
        code = code or EXIT_WRONG
    except KeyboardInterrupt:
        print("train.py: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        code = EXIT_CODES[signal.SIGINT]
    sys.exit(code)


if __name__ == "__main__":
    wavlm_jax.command_line.run(main, required=["config", "workdir"])
