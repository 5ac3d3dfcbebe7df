"""Weights out: python -m wavlm_jax.convert export SOURCE OUT --to huggingface.

SOURCE is a run directory of ours or a Hugging Face folder. OUT then loads with transformers' `from_pretrained`.
"""

import argparse
import sys
from pathlib import Path

from wavlm_jax.convert.huggingface import export_huggingface
from wavlm_jax.loading import load_weights

EXIT_WRONG = 2


def main() -> int:
    """Convert what the command line names; 2 and a message where that cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m wavlm_jax.convert", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write weights in another project's format")
    export.add_argument("source", type=Path, help="workdir of a run, or a Hugging Face folder")
    export.add_argument("out", type=Path, help="folder to write")
    export.add_argument("--to", choices=["huggingface"], required=True, help="whose format")
    export.add_argument("--step", type=int, help="checkpoint of the run; the newest if not given")
    arguments = parser.parse_args()
    try:
        weights = load_weights(arguments.source, arguments.step)
        export_huggingface(weights.config, weights.params, arguments.out)
    except (ValueError, OSError) as error:
        print(f"wavlm_jax.convert: {error}", file=sys.stderr)
        return EXIT_WRONG
    print(f"{arguments.out}: {', '.join(sorted(path.name for path in arguments.out.iterdir()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
