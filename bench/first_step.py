"""From launch to the first step of WavLM Base, with an empty compilation cache and with a warm one.

    python -m bench.first_step [--runs N]

Each run is a fresh process of train.py in a fresh workdir, on a corpus and labels that are there already; the clock
stops when the line of the first step appears. A step is 4 rows of 1.9 s in float32.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLAGS = (
    "--config=configs/pretrain/base.py",
    "--config.compute.dtype=float32",
    "--config.compute.remat=none",
    "--config.train.num_steps=1",
    "--config.optim.warmup_steps=0",
    "--config.train.eval_splits=()",
    "--config.metrics.log_every=1",
    "--config.metrics.tensorboard=False",
    "--config.batch.buckets=(96,)",
    "--config.batch.seconds_per_update=7.7",
    "--config.batch.row_multiple=4",
    "--config.data.evaluation=()",
    "--config.loader.workers=0",
    "--config.labels.make=True",
    "--config.labels.num_clusters=20",
    "--config.labels.kmeans.passes=2",
)


def main() -> None:
    """Print one JSON line for the cold and one for the warm start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="pairs of a cold and a warm start (default %(default)s)")
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        make_corpus(scratch / "corpus")
        first_step(scratch, "labels", scratch / "cache")
        cold, warm = [], []
        for number in range(runs):
            cache = scratch / f"cache-{number}"
            cold.append(first_step(scratch, f"cold-{number}", cache))
            warm.append(first_step(scratch, f"warm-{number}", cache))
    figure = {"unit": "s", "runs": runs}
    print(json.dumps({"name": "first_step_cold", "value": statistics.median(cold), **figure}), flush=True)
    ratio = statistics.median(slow / fast for slow, fast in zip(cold, warm, strict=True))
    against = {"against": "the same launch with an empty cache, just before", "ratio": ratio}
    print(json.dumps({"name": "first_step_warm", "value": statistics.median(warm), **figure, **against}), flush=True)


def make_corpus(out: Path) -> None:
    """A minute of the embedded speech."""
    command = [sys.executable, "-m", "wavlm_jax.data", "demo", "--out", str(out), "--voices", "6", "--sentences", "12"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def first_step(scratch: Path, name: str, cache: Path) -> float:
    """Seconds from launch to the line of the first step."""
    paths = (
        f"--workdir={scratch / name}",
        f"--config.train.compilation_cache={cache}",
        f"--config.data.train={scratch / 'corpus' / 'train'}",
        f"--config.labels.path={scratch / 'labels-store'}",
    )
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "cpu"}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "train.py", *FLAGS, *paths], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    with process:
        lines = []
        for line in process.stdout or ():
            lines.append(line)
            if line.startswith("train 1/1"):
                elapsed = time.perf_counter() - start
                break
        else:
            raise SystemExit(f"{name}: train.py ended before its first step:\n{''.join(lines)}")
        for _ in process.stdout or ():
            pass
    return elapsed


if __name__ == "__main__":
    main()
