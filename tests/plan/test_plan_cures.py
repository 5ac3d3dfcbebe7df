"""Cures of the planner by libtpu itself: a run that does not fit, what it is told to change, and that it then fits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = (
    "--config=configs/pretrain/demo.py",
    "--topology=v5e:1x1",
    "--json",
    "--config.batch.buckets=(128,)",
    "--config.batch.row_multiple=32",
    "--config.batch.seconds_per_update=82.1",
    "--config.batch.seconds_per_device=83.0",
    "--config.mixing.group=4",
    "--config.train.eval_splits=()",
    "--config.model.num_hidden_layers=1",
    "--config.model.conv_dim=(32,32,32,32,32,32,32)",
    "--config.model.num_conv_pos_embeddings=16",
    "--config.model.num_conv_pos_embedding_groups=1",
    "--config.compute.attention=dense",
    "--config.compute.unroll=1",
    "--config.compute.remat=full",
)
"""32 rows at a time on one chip. Nothing is left to recompute or to spread, so fewer rows at a time are all that helps;
one layer and a narrow positional convolution, because every program is a minute of CPU."""
MEMORY = "--memory_gib=0.2"
"""About two thirds of what that takes: 313 MB with libtpu 0.0.52."""
ROWS_AT_A_TIME = {"batch.seconds_per_device", "mixing.group"}


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
    """It is compiled when it is tried, and again when it is used: then the run fits, in as much memory as was said."""
    made = planned(1, MEMORY)
    before = train_memory(made)
    assert not made["fits"]
    assert not before["fits"]
    assert before["peak"] > before["limit"] == int(0.2 * 2**30)
    (cure,) = made["cures"]
    assert {"batch.seconds_per_device"} <= set(cure["changes"]) <= ROWS_AT_A_TIME
    assert cure["memory"]["fits"]
    assert cure["memory"]["peak"] <= cure["memory"]["limit"] == before["limit"]
    cured = planned(0, MEMORY, *(f"--config.{key}={value}" for key, value in cure["changes"].items()))
    assert cured["fits"]
    assert train_memory(cured) == cure["memory"]
