"""The machines that the pre-training configs have presets for: --config configs/pretrain/base.py:v5e-256.

A preset says what machine it expects (a run on another is refused) and how the batch is cut there; `python -m
wavlm_jax.plan` shows that it fits, docs/pods.md has the figures.
"""

from typing import Any

from ml_collections import ConfigDict

MACHINES = {
    "v5e-16": {"platform": "tpu", "hosts": 4, "devices": 16},
    "v5e-256": {"platform": "tpu", "hosts": 64, "devices": 256},
    "v6e-256": {"platform": "tpu", "hosts": 64, "devices": 256},
    "v4-32": {"platform": "tpu", "hosts": 4, "devices": 16},
    "v5p-128": {"platform": "tpu", "hosts": 16, "devices": 64},
    "h100-8": {"platform": "gpu", "hosts": 1, "devices": 8},
    "h100-64": {"platform": "gpu", "hosts": 8, "devices": 64},
}
"""Name as its vendor sells it (v4 and v5p count cores, two a chip) -> what JAX finds there."""


def place(config: ConfigDict, machine: str | None, presets: dict[str, dict[str, Any]]) -> ConfigDict:
    """The config with a machine's preset: dotted keys of the config -> values."""
    if machine is None:
        return config
    if machine not in presets:
        raise ValueError(f"no preset for {machine!r}; there are {', '.join(presets)}")
    for key, value in MACHINES[machine].items():
        config.mesh[key] = value
    config.update_from_flattened_dict(presets[machine])
    return config
