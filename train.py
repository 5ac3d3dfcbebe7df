"""The one entry point for training.

python train.py --config configs/pretrain/base.py --workdir runs/base [--config.optim.learning_rate=3e-4 ...]

The same command again goes on where the last one stopped. Exit codes: 0 finished, 2 something in config or data is
wrong, 75 stopped by a signal (saved; run it again), 76 diverged (the last good state is saved), 77 stuck (run it
again; stacks-*.txt in the workdir says where). Other codes: JAX itself ended the process, for instance because another
host is gone; run it again.
"""

import contextlib
import json
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
from wavlm_jax.settings import read_sections
from wavlm_jax.training import hosts, loop
from wavlm_jax.training.hosts import HostsMissing
from wavlm_jax.training.sharding import make_mesh
from wavlm_jax.training.start import RunSettings
from wavlm_jax.training.step import OutOfMemory
from wavlm_jax.training.task import Topology
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
    """Returns the exit code. A user's mistake is one message; its traceback is written to error.txt."""
    try:
        hosts.join_from_flags()
        config = json.loads(_CONFIG.value.to_json())
        if jax.process_index() == 0:
            workdir.folder.mkdir(parents=True, exist_ok=True)
            (workdir.folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        return train(config, workdir)
    except (ValueError, OSError, OutOfMemory, HostsMissing) as error:
        print(f"train.py: {error}", file=sys.stderr)
        with contextlib.suppress(OSError):  # the disk may be the problem
            (workdir.folder / "error.txt").write_text(traceback.format_exc())
            print(f"(traceback: {workdir.lasting('error.txt')})", file=sys.stderr)
        return EXIT_WRONG


def main(_: Sequence[str]) -> None:
    """Opens the workdir, trains, exits."""
    code = 0
    try:
        with open_workdir(str(_WORKDIR.value)) as workdir:
            code = attempt(workdir)
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        code = code or EXIT_WRONG
    sys.exit(code)


if __name__ == "__main__":
    wavlm_jax.command_line.run(main, required=["config", "workdir"])
