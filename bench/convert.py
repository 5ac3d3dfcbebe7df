"""Import and export of Base and Large at full size with random weights, against plain loads of the same file.

    python -m bench.convert [--sizes base large] [--runs N]

Each figure is a fresh process: seconds from after the imports, and how much the peak memory grew. The reference of an
import from safetensors is `safetensors.numpy.load_file`, of one from `.pt` it is `torch.load`; an export is compared
with the plain load too.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

PRELUDE = """
import resource, sys, time
from pathlib import Path
source, out = Path(sys.argv[1]), Path(sys.argv[2])
"""
BODIES = {
    "load_safetensors": ("from safetensors.numpy import load_file", "kept = load_file(source / 'model.safetensors')"),
    "load_torch": ("import torch", "kept = torch.load(source.with_suffix('.pt'), weights_only=True)"),
    "import_safetensors": ("from wavlm_jax.loading import load_weights", "kept = load_weights(source)"),
    "import_pt": ("from wavlm_jax.loading import load_weights", "kept = load_weights(source.with_suffix('.pt'))"),
    "import_export": (
        "from wavlm_jax.loading import load; from wavlm_jax.export import save_huggingface",
        "save_huggingface(load(source), out, compared=False)",
    ),
    "import_export_microsoft": (
        "from wavlm_jax.loading import load; from wavlm_jax.export import save_microsoft",
        "save_microsoft(load(source), out.with_suffix('.pt'), compared=False)",
    ),
}
"""Name -> (imports, which are not counted; what is measured)."""
AGAINST = {
    "import_safetensors": "load_safetensors",
    "import_pt": "load_torch",
    "import_export": "load_safetensors",
    "import_export_microsoft": "load_torch",
}
END = """
print(time.perf_counter() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
MAKE = """
import sys, jax, numpy as np
from pathlib import Path
from wavlm_jax.config import WavLMConfig
from wavlm_jax.convert.huggingface import export_huggingface
from wavlm_jax.convert.microsoft import export_microsoft
from wavlm_jax.model.heads import tree_shapes
from wavlm_jax.weights import Weights
config = getattr(WavLMConfig, sys.argv[2])()
random = np.random.default_rng(0)
shapes = tree_shapes(config)
params = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32), shapes)
export_huggingface(Weights(config, params, None), Path(sys.argv[1]))
export_microsoft(Weights(config, params, None), Path(sys.argv[1]).with_suffix(".pt"))
"""


def main() -> None:
    """Print one JSON line a figure and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=["base", "large"], default=["base", "large"])
    parser.add_argument("--runs", type=int, default=3, help="of each figure (default %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for size in arguments.sizes:
            source = Path(folder) / size
            python(MAKE, str(source), size)
            num_bytes = (source / "model.safetensors").stat().st_size
            found = {name: measure(name, source, arguments.runs) for name in BODIES}
            for name, (seconds, peak) in found.items():
                line = {"name": f"convert_{size}_{name}", "value": round(seconds, 3), "unit": "s"}
                line |= {"peak_share_of_file": round(peak / num_bytes, 3), "runs": arguments.runs}
                if name in AGAINST:
                    reference = found[AGAINST[name]]
                    line |= {"against": AGAINST[name], "ratio": round(seconds / reference[0], 2)}
                    line |= {"peak_ratio": round(peak / reference[1], 2)}
                print(json.dumps(line), flush=True)


def measure(name: str, source: Path, runs: int) -> tuple[float, float]:
    """Median seconds, and the largest growth of the peak memory in bytes."""
    imports, body = BODIES[name]
    count = "\nbefore = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nstart = time.perf_counter()\n"
    results = []
    for number in range(runs):
        out = source.parent / f"{name}-{number}"
        text = python(PRELUDE + imports + count + body + END, str(source), str(out))
        results.append([float(value) for value in text.split()])
    return statistics.median(seconds for seconds, _ in results), max(peak for _, peak in results)


def python(code: str, *arguments: str) -> str:
    """What a fresh Python process prints."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
