"""`python -m wavlm_jax COMMAND FILES... --model FOLDER`: what a trained model is used for."""

import argparse
import sys
from collections.abc import Sequence

from wavlm_jax.command_line import EXIT_WRONG, shortened
from wavlm_jax.inference.commands import COMMANDS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 0, or 2 with a message on stderr."""
    parser = argparse.ArgumentParser(prog="python -m wavlm_jax", description=__doc__)
    parsers = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_options(parsers.add_parser(name, help=command.help, description=command.help))
    options = parser.parse_args(arguments)
    try:
        COMMANDS[options.name].run(options)
    except (ValueError, OSError) as error:
        print(f"wavlm_jax {options.name}: {shortened(error)}", file=sys.stderr)
        return EXIT_WRONG
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
