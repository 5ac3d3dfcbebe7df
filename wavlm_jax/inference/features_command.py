"""`python -m wavlm_jax features`: hidden states to npy shards."""

import argparse
import dataclasses
import sys
from typing import Literal

from wavlm_jax.inference.features import FeatureSettings, write_features
from wavlm_jax.inference.options import (
    UsageError,
    add_shared,
    choose_device,
    progress_bar,
    recordings_of,
    run_settings,
)


def add_features(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_shared(parser)
    parser.add_argument(
        "--layer",
        required=True,
        type=_layer,
        help="0: the input of the first Transformer layer; l: the raw output of layer l; all: every one, on axis 1",
    )
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of the files")
    parser.set_defaults(command=features)


def features(options: argparse.Namespace) -> None:
    """Write the shards.

    Raises:
        ValueError: whatever cannot be done, with what to do instead.

    """
    if options.out is None:
        raise UsageError("--out: missing; expected a folder for the features")
    choose_device(options)
    running = run_settings(options)
    weights = options.load(options.model, options.step)
    config = dataclasses.replace(weights.config, padding="exact")
    recordings = recordings_of(options, config)
    settings = FeatureSettings(layer=options.layer, dtype=options.dtype)
    bar = progress_bar(recordings, options)
    shards = write_features(recordings, config, weights.params, options.out, settings, running, bar)
    frames = sum(sum(shard.frames) for shard in shards)
    print(f"{options.out}: {len(recordings)} recordings, {frames} frames in {len(shards)} shards", file=sys.stderr)


def _layer(text: str) -> int | Literal["all"]:
    if text == "all":
        return "all"
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number or all") from error
