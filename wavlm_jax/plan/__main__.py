"""python -m wavlm_jax.plan: whether a run fits, how fast it can be, what it costs; compiled without the accelerator.

python -m wavlm_jax.plan --config configs/pretrain/base.py --topology v5e:16x16 [--config.batch.row_multiple=1024 ...]

Exit codes: 0 it fits, 1 it does not, 2 something in config or flags is wrong.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

import wavlm_jax.command_line
from pretrain.task import TASKS
from wavlm_jax.command_line import EXIT_WRONG
from wavlm_jax.plan.program import Memory, Plan, plan_run, same_programs
from wavlm_jax.plan.report import Cure, as_json, as_text, find_cures
from wavlm_jax.plan.targets import Target, open_target, with_memory

_CONFIG = config_flags.DEFINE_config_file("config", None, "What to train; see configs/.", lock_config=True)
_TOPOLOGY = flags.DEFINE_string("topology", None, "v5e:16x16, v4:2x2x4, v5p:4x4x4, v6e:16x16, h100:8, ...")
_SLICES = flags.DEFINE_integer("slices", 1, "Number of TPU slices of that topology.")
_MEMORY = flags.DEFINE_float("memory_gib", None, "Memory of a device, if less than the compiler allows.")
_JSON = flags.DEFINE_bool("json", False, "One JSON object instead of a table.")
_EVERY = flags.DEFINE_bool("every_bucket", False, "Compile every batch shape, not only the longest of each split.")
_CURES = flags.DEFINE_bool("cures", True, "If it does not fit, look for settings that do.")


def plan(
    config: Mapping[str, Any], target: Target, *, every_bucket: bool = False, cures: bool = True
) -> tuple[Plan, list[Cure]]:
    """The plan of a config, and what helps if it does not fit; the arguments are those of the command line.

    Raises:
        ValueError: a task that cannot be planned, or as `plan_run` does.

    """
    if config["task"] not in TASKS:
        raise ValueError(f"config.task: found {config['task']!r}; what can be planned: {', '.join(TASKS)}")
    kind = TASKS[config["task"]]
    made = plan_run(config, kind, target, every_bucket=every_bucket)
    too_large = tuple(dict.fromkeys(name.split()[0] for name in made.programs if not made.memory_of(name).fits))
    if not too_large or not cures:
        return made, []
    known: dict[str, Memory] = {}

    def attempt(changed: Mapping[str, Any]) -> Memory:
        key = same_programs(changed, kind, target, too_large)
        if key not in known:
            tried = plan_run(changed, kind, target, splits=too_large)
            found = [tried.memory_of(name) for name in tried.programs]
            known[key] = max(found, key=lambda memory: (not memory.fits, memory.peak))
        return known[key]

    return made, find_cures(config, attempt, len(target.devices) // target.slices)


def main(_: Sequence[str]) -> None:
    """From flags to a table and an exit code."""
    name = str(config_flags.get_config_filename(flags.FLAGS["config"]))
    try:
        target = open_target(str(_TOPOLOGY.value), _SLICES.value)
        if _MEMORY.value is not None:
            target = with_memory(target, _MEMORY.value)
        config = json.loads(_CONFIG.value.to_json())
        made, cures = plan(config, target, every_bucket=_EVERY.value, cures=_CURES.value)
    except ValueError as error:
        print(f"plan: {error}", file=sys.stderr)
        sys.exit(EXIT_WRONG)
    print(json.dumps(as_json(made, target, name, cures)) if _JSON.value else as_text(made, target, name, cures))
    sys.exit(0 if made.fits else 1)


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    wavlm_jax.command_line.run(main, required=["config", "topology"])
