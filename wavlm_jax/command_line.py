"""Shared by the commands: numbers of options, checked overrides of a config, messages instead of tracebacks."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from wavlm_jax.settings import PLAIN, is_plain, nearest

EXIT_WRONG = 2
"""Exit code: something in flags, config or data is wrong, and the message says what."""


_MOST_SHOWN = 3000


def shortened(message: object) -> str:
    """A message with at most 3,000 characters, its end kept; what it quotes from a file may be megabytes."""
    text = str(message)
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN // 2]} [...] {text[-_MOST_SHOWN // 2 :]}"


def plain_number(text: str) -> float:
    """The value of an option of argparse, refused as a config's would be (`settings.is_plain`)."""
    value = float(text)
    if not is_plain(value):
        raise argparse.ArgumentTypeError(f"found {text}, expected {PLAIN}")
    return value


def parse(arguments: Sequence[str]) -> list[str]:
    """Parses the flags of a command with `--config`; for `app.run(main, flags_parser=parse)`.

    Exits with one message for an override that the config does not have, naming the nearest key.
    """
    program = Path(arguments[0]).name
    try:
        rest = list(flags.FLAGS(last_overrides(arguments)))
        for name, value in flags.FLAGS.flag_values_dict().items():
            if isinstance(value, float) and not is_plain(value):
                raise flags.IllegalFlagValueError(f"--{name}: found {value}, expected {PLAIN}")
        if flags.FLAGS["verbosity"].using_default_value:
            logging.set_verbosity(logging.WARNING)  # Orbax tells about every file that it writes
    except (AttributeError, KeyError) as error:
        print(f"{program}: {shortened(_unknown_key(arguments) or error)}", file=sys.stderr)
    except (TypeError, ValueError, OSError, flags.Error) as error:
        said, _, trace = str(error).partition("Traceback (most recent call last):\n")  # of a config file
        place = " / ".join(line.strip() for line in trace.rstrip().splitlines()[-3:])
        print(f"{program}: {shortened(said.rstrip() + ' ' * bool(place) + place)}", file=sys.stderr)
    else:
        if len(rest) == 1:
            return rest
        print(f"{program}: unexpected arguments: {' '.join(rest[1:])}", file=sys.stderr)
    sys.exit(EXIT_WRONG)


def last_overrides(arguments: Sequence[str]) -> list[str]:
    """The arguments without each `--config.x.y=z` that a later one replaces: ml_collections would join tuples."""
    last = {word.partition("=")[0]: index for index, word in enumerate(arguments) if word.startswith("--config.")}
    return [word for index, word in enumerate(arguments) if last.get(word.partition("=")[0], index) == index]


def run(main: Any, required: Sequence[str]) -> None:
    """Runs `main`; the flags `required` have to be given."""
    flags.mark_flags_as_required(list(required))
    app.run(main, flags_parser=parse)


def _unknown_key(arguments: Sequence[str]) -> str | None:
    """Which `--config.x.y=z` the config file does not know, and the nearest key that it does."""
    overrides = [argument for argument in arguments if argument.startswith("--config.")]
    alone = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", None, "", flag_values=alone, sys_argv=[])
    alone([argument for argument in arguments if argument not in overrides], known_only=True)
    for override in overrides:
        node: Any = config.value
        name = override.partition("=")[0]
        for key in name.split(".")[1:]:
            if not hasattr(node, "keys") or key not in node:
                hint = nearest(key, node) if hasattr(node, "keys") else "what it is a part of is a value"
                return f"{name}: no such key as {key}; {hint}"
            node = node[key]
    return None
