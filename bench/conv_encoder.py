"""HBM traffic of the conv encoder, forward and backward, on one TPU chip, by libtpu's optimized program.

    python -m bench.conv_encoder            # a process a figure, about 10 s of CPU each
    python -m bench.conv_encoder --lines    # also what each instruction moves, from 50 MB on

Rows of 768 frames, bfloat16, gradients of all parameters for a given gradient of the features. As in
`bench.plan_table`, no machine code is made.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FIGURES = {"v5e_base_conv_gb": ("base", "v5e:1x1", 16), "v5p_large_conv_gb": ("large", "v5p:1x1x1", 8)}
"""Name -> model, topology, rows."""
AGAINST = {"v5e_base_conv_gb": 15.21, "v5p_large_conv_gb": 13.82}
"""GB before the norm of the first layer was folded away (commit 79c88a8)."""
SAMPLES = 768 * 320 + 80
LINE_BYTES = 50e6


def main() -> None:
    """Print one JSON line a figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", action="store_true", help="list the instructions that move most")
    parser.add_argument("--figure", choices=tuple(FIGURES), help="this one, in this process")
    arguments = parser.parse_args()
    if arguments.figure:
        count(arguments.figure, lines=arguments.lines)
    for name in FIGURES:
        command = [sys.executable, "-m", "bench.conv_encoder", "--figure", name, *(["--lines"] * arguments.lines)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def count(name: str, *, lines: bool) -> None:
    """Prints a figure, and ends the process: only that stops the compiler."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from bench.plan_table import optimized
    from wavlm_jax.plan.cost import Module, executed, memory_traffic, moved

    with tempfile.TemporaryDirectory(prefix="wavlm-conv-") as dumped:
        outcome = optimized(traced(*FIGURES[name]).lower(), Path(dumped))
    if isinstance(outcome, str):
        raise SystemExit(f"{name}: {outcome}")
    module = Module.parse(outcome[0])
    value = memory_traffic(module) / 1e9
    figure = {"name": name, "value": round(value, 2), "unit": "GB", "runs": 1}
    print(json.dumps(figure | {"against": "79c88a8", "ratio": round(AGAINST[name] / value, 2)}), flush=True)
    for placed in executed(module) if lines else ():
        if not placed.in_fusion and (size := moved(module, placed)) > LINE_BYTES:
            print(f"  {size / 1e9:.2f} GB  {placed.line.text.strip()[:250]}", flush=True)
    os._exit(0)


def traced(model: str, topology: str, rows: int) -> Any:
    """The program: features and gradients of the parameters."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from wavlm_jax.config import Compute, WavLMConfig
    from wavlm_jax.model.frontend import FeatureExtractor
    from wavlm_jax.plan.targets import open_target

    place = SingleDeviceSharding(open_target(topology).devices[0])
    extractor = FeatureExtractor(getattr(WavLMConfig, model)(), Compute(dtype="bfloat16"))

    def features(params: Any, waveform: Any) -> Any:
        return extractor.apply({"params": params}, waveform, None)

    def step(params: Any, waveform: Any, direction: Any) -> Any:
        output, pull = jax.vjp(lambda params: features(params, waveform), params)
        return output, pull(direction)

    wave = jax.ShapeDtypeStruct((rows, SAMPLES), jnp.float32)
    params = jax.eval_shape(lambda wave: extractor.init(jax.random.key(0), wave, None), wave)["params"]
    arguments = (params, wave, jax.eval_shape(features, params, wave))
    return jax.jit(step).trace(*jax.tree.map(lambda x: x.update(sharding=place), arguments))


if __name__ == "__main__":
    main()
