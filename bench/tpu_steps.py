"""HBM traffic and roofline of the pre-training step on one TPU chip, by libtpu's optimized program; nothing is run.

    python -m bench.tpu_steps            # a process a figure, half a minute of CPU each

The real step of the config, dropouts and mixing on, in rows of 768 frames. As in `bench.plan_table`, no machine code is
made, which takes ten times as long: `python -m wavlm_jax.plan` does.
"""

import argparse
import json
import os
import subprocess
import sys
from typing import Any

from bench.row_configs import row_config

FIGURES = {"v5e_base": ("base", "v5e:1x1", 16, 2), "v5p_large": ("large", "v5p:1x1x1", 8, 1)}
"""Name -> config, topology, rows of an update, micro-batches that they come in."""
AGAINST = {
    "v5e_base_hbm_mb_per_audio_s": ("dense attention in a plain prototype (issue 6)", 525.0),
    "v5e_base_bound": ("dense attention in a plain prototype (issue 6)", 0.36),
}


def main() -> None:
    """Print JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", nargs="+", default=tuple(FIGURES), choices=tuple(FIGURES))
    parser.add_argument("--here", choices=tuple(FIGURES), help="this one, in this process")
    arguments = parser.parse_args()
    if arguments.here:
        count(arguments.here)
    for name in arguments.figures:
        command = [sys.executable, "-m", "bench.tpu_steps", "--here", name]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def count(name: str) -> None:
    """Prints the figures of one step, and ends the process: only that stops the compiler.

    Raises:
        SystemExit: the step does not fit, or comes in other micro-batches than the figure says.

    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    from bench.plan_table import stopped, traced_step
    from wavlm_jax.plan.program import matrix_flops
    from wavlm_jax.plan.targets import open_target

    model, topology, rows, microbatches = FIGURES[name]
    target = open_target(topology)
    config = json.loads(row_config(model, rows, microbatches).to_json())
    traced, spec, mesh, _ = traced_step(config, target, "train")
    if spec.microbatches != microbatches:
        raise SystemExit(f"{model} on {topology}: {spec.microbatches} micro-batches, expected {microbatches}")
    found = stopped(traced, spec, mesh, target)
    if "failed" in found:
        raise SystemExit(f"{model} on {topology}: {found['failed']}")
    compute = matrix_flops(traced.jaxpr, target.platform) / target.chip.peak_flops
    memory = found["traffic"] / target.chip.bandwidth
    for figure, value, unit in (
        (f"{name}_hbm_mb_per_audio_s", found["traffic"] / 1e6 / spec.seconds, "MB/s"),
        (f"{name}_bound", compute / max(compute, memory), "of peak arithmetic"),
        (f"{name}_peak_gib", found["buffers"] / 2**30, "GiB"),
    ):
        line: dict[str, Any] = {"name": figure, "value": round(value, 3), "unit": unit, "runs": 1}
        if figure in AGAINST:
            against, reference = AGAINST[figure]
            line |= {"against": against, "ratio": round(max(reference / value, value / reference), 2)}
        print(json.dumps(line), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
