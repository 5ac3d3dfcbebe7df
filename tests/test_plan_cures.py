"""Cures of the planner by libtpu itself: a run that does not fit, what it is told to change, and that it then fits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = (
    "--config=configs/pretrain/demo.py",
    "--topology=v5e:2x2",
    "--json",
    "--config.batch.buckets=(256,)",
    "--config.batch.row_multiple=32",
    "--config.batch.seconds_per_update=160.0",
    "--config.batch.seconds_per_device=50.0",
    "--config.mixing.group=4",
    "--config.train.eval_splits=()",
    "--config.model.num_hidden_layers=2",
    "--config.compute.unroll=1",
    "--config.model.conv_dim=(32,32,32,32,32,32,32)",
    "--config.mesh.fsdp=4",
    "--config.compute.remat=full",
)
"""8 rows a chip at a time; nothing is left to spread or to recompute, so one knob is tried: fewer rows at a time."""


def planned(code: int, *flags: str) -> dict:
    """What `python -m wavlm_jax.plan` prints; it has to end with `code`."""
    command = [sys.executable, "-m", "wavlm_jax.plan", *SMALL, *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr[-3000:]
    return json.loads(done.stdout)


def train_memory(plan: dict) -> dict:
    """Of the training step."""
    (found,) = [program["memory"] for name, program in plan["programs"].items() if name.startswith("train ")]
    return found


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_cure_that_is_named_cures():
    """On chips with two thirds of what the step takes; the cure is compiled when it is tried, and again when used."""
    takes = train_memory(planned(0))["peak"]
    tight = f"--memory_gib={takes * 2 / 3 / 2**30}"
    made = planned(1, tight)
    assert not made["fits"]
    assert train_memory(made)["peak"] == takes > train_memory(made)["limit"]
    (cure,) = made["cures"]
    assert set(cure["changes"]) == {"batch.seconds_per_device"}
    cured = planned(0, tight, *(f"--config.{key}={value}" for key, value in cure["changes"].items()))
    assert cured["fits"]
    assert train_memory(cured)["peak"] == cure["memory"]["peak"] <= cure["memory"]["limit"]
