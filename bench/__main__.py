"""All figures, one JSON line each, every benchmark in a process of its own: python -m bench [NAME ...]."""

import argparse
import subprocess
import sys

BENCHMARKS = (
    *("base_cpu", "loader", "labels", "first_step", "long_audio", "attention"),
    *("tpu_steps", "conv_encoder", "convert"),
)
EVERY = (*BENCHMARKS, "gpu_steps")
"""The last needs a GPU."""


def main() -> int:
    """Run the named benchmarks (all by default); the exit code is the number of those that failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(EVERY)}; default: those that need no GPU"
    )
    names = parser.parse_args().names or BENCHMARKS
    unknown = sorted(set(names) - set(EVERY))
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(EVERY)}")
    return sum(subprocess.run([sys.executable, "-m", f"bench.{name}"], check=False).returncode != 0 for name in names)


if __name__ == "__main__":
    sys.exit(main())
