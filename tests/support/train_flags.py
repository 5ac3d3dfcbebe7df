"""The flags of train.py as absl and ml_collections read them, without a process."""

from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

ROOT = Path(__file__).parents[2]


def parsed(config: str, *overrides: str) -> ConfigDict:
    """The config file `config`, relative to the repository, with `--config.x.y=z` in `overrides`."""
    alone, arguments = flags.FlagValues(), [f"--config={ROOT / config}", *overrides]
    config_flags.DEFINE_config_file("config", None, "", flag_values=alone, lock_config=True, sys_argv=arguments)
    alone(["train.py", *arguments])
    return alone["config"].value
