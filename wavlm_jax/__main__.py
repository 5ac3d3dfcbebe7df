"""`python -m wavlm_jax COMMAND FILES... --model FOLDER`: what a trained model is used for."""

import argparse
import sys
from collections.abc import Sequence

from wavlm_jax.inference import commands
from wavlm_jax.inference.commands import add_diarize, add_features
from wavlm_jax.loading import load_weights

EXIT_WRONG = 2
COMMANDS = {
    "transcribe": (commands.add_transcribe, "what is said, with the times of words"),
    "align": (commands.add_align, "when the words of a given text are said"),
    "embed": (commands.add_embed, "speaker embeddings"),
    "verify": (commands.add_verify, "whether two recordings are of one speaker; a whole trial list"),
    "diarize": (add_diarize, "who speaks when, as RTTM"),
    "classify": (commands.add_classify, "which class a recording belongs to"),
    "features": (add_features, "hidden states of one layer or all, to npy shards"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 0, or 2 with a message on stderr."""
    parser = argparse.ArgumentParser(prog="python -m wavlm_jax", description=__doc__)
    parsers = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    for name, (add, what) in COMMANDS.items():
        add(parsers.add_parser(name, help=what, description=what))
    options = parser.parse_args(arguments, argparse.Namespace(load=load_weights))
    try:
        options.command(options)
    except (ValueError, OSError) as error:
        print(f"wavlm_jax {options.name}: {error}", file=sys.stderr)
        return EXIT_WRONG
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
