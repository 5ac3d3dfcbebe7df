"""HBM traffic and roofline of the pre-training step on one TPU chip, as `wavlm_jax.plan` counts them: nothing is run.

    python -m bench.tpu_steps [--figures v5e_base v5p_large]

The real step of the config, dropouts and mixing on, in rows of 768 frames. Minutes of compiling each.
"""

import argparse
import json
import os
from typing import Any

from bench.row_configs import row_config

FIGURES = {"v5e_base": ("base", "v5e:1x1", 16, 2), "v5p_large": ("large", "v5p:1x1x1", 8, 1)}
"""Name -> config, topology, rows of an update, micro-batches that they come in."""
AGAINST = {
    "v5e_base_hbm_mb_per_audio_s": ("dense attention in a plain prototype (issue 6)", 525.0),
    "v5e_base_bound": ("dense attention in a plain prototype (issue 6)", 0.36),
}


def main() -> None:
    """Print one JSON line a figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", nargs="+", default=tuple(FIGURES), choices=tuple(FIGURES))
    names = parser.parse_args().figures
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name in names:
        step = planned(*FIGURES[name])
        roofline = step.roofline
        bound = roofline.compute / max(roofline.compute, roofline.memory)
        for figure, value, unit in (
            (f"{name}_hbm_mb_per_audio_s", step.traffic / 1e6 / step.audio_seconds, "MB/s"),
            (f"{name}_bound", bound, "of peak arithmetic"),
            (f"{name}_peak_gib", step.memory.peak / 2**30, "GiB"),
        ):
            line: dict[str, Any] = {"name": figure, "value": round(value, 3), "unit": unit, "runs": 1}
            if figure in AGAINST:
                against, reference = AGAINST[figure]
                line |= {"against": against, "ratio": round(max(reference / value, value / reference), 2)}
            print(json.dumps(line), flush=True)


def planned(config_name: str, topology: str, rows: int, microbatches: int) -> Any:
    """What the planner counts of the training step of `rows` rows of 768 frames on one chip.

    Raises:
        SystemExit: the step does not fit.

    """
    from pretrain.task import outline
    from wavlm_jax.plan.program import Counted
    from wavlm_jax.plan.run import plan_run
    from wavlm_jax.plan.targets import open_target

    config = row_config(config_name, rows, microbatches)
    plan = plan_run(json.loads(config.to_json()), outline, open_target(topology), splits=("train",))
    (step,) = plan.programs.values()
    if not isinstance(step, Counted):
        raise SystemExit(f"{config_name} on {topology} does not fit: {step}")
    if step.microbatches != microbatches:
        raise SystemExit(f"{config_name} on {topology}: {step.microbatches} micro-batches, expected {microbatches}")
    return step


if __name__ == "__main__":
    main()
