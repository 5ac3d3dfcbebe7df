"""`python -m wavlm_jax COMMAND FILES... --model FOLDER`: what a trained model is used for."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from wavlm_jax.command_line import EXIT_WRONG, shortened
from wavlm_jax.inference.commands import COMMANDS

EXIT_LEFT_OUT = 3
"""Some files could not be used; the others have their answers."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 0, 3 where some files were left out, or 2 with a message on stderr."""
    parser = argparse.ArgumentParser(prog="python -m wavlm_jax", description=__doc__)
    parsers = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_options(parsers.add_parser(name, help=command.help, description=command.help))
    words = list(sys.argv[1:] if arguments is None else arguments)
    for word in words[: words.index("--")] if "--" in words else words:
        if word.startswith("-") and word != "-" and Path(word).is_file():
            parser.error(f"{word}: looks like an option; a file of this name is ./{word}, or stands behind --")
    options = parser.parse_args(words)
    try:
        work = COMMANDS[options.name].run(options)
    except (ValueError, OSError) as error:
        print(f"wavlm_jax {options.name}: {shortened(error)}", file=sys.stderr)
        return EXIT_WRONG
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    if work.faults:
        print(f"wavlm_jax {options.name}: {len(work.faults)} of {len(work.paths)} files left out", file=sys.stderr)
    return EXIT_LEFT_OUT if work.faults else 0


if __name__ == "__main__":
    sys.exit(main())
