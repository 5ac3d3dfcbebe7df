"""`python -m wavlm_jax diarize`: turns as RTTM, and their errors against a reference."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wavlm_jax.inference.diarization import TurnSettings, diarize, pieces_of
from wavlm_jax.inference.models import open_model
from wavlm_jax.inference.options import (
    UsageError,
    add_shared,
    choose_device,
    kept_if_stopped,
    progress_bar,
    recordings_of,
    run_settings,
    write_text,
)
from wavlm_jax.metrics.diarization import diarization_error, one_speaker, one_voice
from wavlm_jax.text.rttm import Region, Turn, read_rttm, read_uem, write_rttm

_COLUMNS = ("speech s", "missed", "false alarm", "confusion", "DER", "one speaker", "one voice")


def add_diarize(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    turns = TurnSettings()
    add_shared(parser, lengths=("as long as the rows it was trained on, 30 if unknown", "half a piece"))
    add = parser.add_argument
    add("--threshold", type=float, default=turns.threshold, help=f"default: {turns.threshold}")
    add(
        "--fill-seconds", type=float, default=turns.fill_seconds, help=f"shorter gaps go; default: {turns.fill_seconds}"
    )
    add("--least-seconds", type=float, default=turns.least_seconds, help=f"of a turn; default: {turns.least_seconds}")
    add("--reference", type=Path, nargs="+", metavar="RTTM", help="the truth: a table of errors goes to stderr")
    add("--uem", type=Path, help="what is scored (default: whole files); with --reference")
    add("--collar", type=float, default=0.0, help="seconds left out on each side of a boundary of the reference")
    add("--score-windows", type=float, metavar="SECONDS", help="a second table: each window with its own best speakers")
    parser.set_defaults(command=_diarize)


def _diarize(options: argparse.Namespace) -> None:
    if options.reference is None and (options.uem is not None or options.score_windows is not None):
        raise UsageError("--uem, --score-windows: say how to score; --reference, with what, is missing")
    if not options.collar >= 0 or (options.score_windows is not None and not options.score_windows > 0):
        given = f"{options.collar}, {options.score_windows}"
        raise UsageError(f"--collar, --score-windows: found {given}, expected 0 or more, more than 0")
    settings = TurnSettings(
        threshold=options.threshold, fill_seconds=options.fill_seconds, least_seconds=options.least_seconds
    )
    choose_device(options)
    opened = open_model(options, "WavLMForAudioFrameClassification")
    running = run_settings(options, pieces_of(opened.weights.origin.trained_seconds))
    recordings = recordings_of(options, opened.module.config)
    truth, regions = _reference(options, {recording.name: recording.seconds for recording in recordings})
    bar = progress_bar(recordings, options)
    with kept_if_stopped(recordings, _as_rttm, options) as done:
        found = diarize(opened.module, opened.params, recordings, running, settings, bar, done)
    write_text(_as_rttm(found), options)
    if truth:
        heard = [turn for turns in found.values() for turn in turns]
        print(report(truth, heard, regions, options.collar, options.score_windows), file=sys.stderr)


def _as_rttm(found: Mapping[Any, list[Turn]]) -> str:
    return "".join(map(write_rttm, found.values()))


def _reference(options: argparse.Namespace, seconds: Mapping[str, float]) -> tuple[dict[str, list[Turn]], list[Region]]:
    """The turns of each file of `--reference`, and what is scored, both of the recordings that have `seconds` only."""
    if options.reference is None:
        return {}, []
    regions = [Region(name, 0.0, length) for name, length in seconds.items()]
    if options.uem is not None:
        regions = [region for region in read_uem(options.uem) if region.recording in seconds]
        if not regions:
            raise UsageError(
                f"{options.uem}: has no region of any of the files; its first column is a name without ending"
            )
    names = {region.recording for region in regions}
    truth = {str(file): [turn for turn in read_rttm(file) if turn.recording in names] for file in options.reference}
    if silent := sorted(names - {turn.recording for turns in truth.values() for turn in turns}):
        raise UsageError(
            f"--reference: has no turn of {silent[0]}; its second column is the file's name without ending"
        )
    return truth, regions


def report(
    truth: dict[str, list[Turn]],
    heard: Sequence[Turn],
    regions: Sequence[Region],
    collar: float = 0.0,
    window: float | None = None,
) -> str:
    """Tables of errors in per cent of the speech: of each recording, of those of each reference file, and of all.

    The last two columns are the rates of the two answers that know no speaker: one speaker all the time, and one
    wherever somebody speaks (which only the truth can tell).

    Args:
        truth: reference file -> its turns.
        heard: what was found.
        regions: what is scored.
        collar: see `diarization_error`.
        window: seconds; a second table, see `diarization_error`.

    """
    groups = {name: {name} for name in dict.fromkeys(region.recording for region in regions)}
    if len(truth) > 1:
        groups |= {Path(file).name: {turn.recording for turn in turns} for file, turns in truth.items() if turns}
    groups["all"] = {region.recording for region in regions}
    everything = [turn for turns in truth.values() for turn in turns]
    tables = []
    for length in (None,) if window is None else (None, window):
        title = "recordings" if length is None else f"windows of {length} s"
        lines: list[tuple[str, ...]] = [(title, *_COLUMNS)]
        for group, names in groups.items():
            wanted, found = ([turn for turn in turns if turn.recording in names] for turns in (everything, heard))
            scored = [region for region in regions if region.recording in names]
            errors, *trivial = (
                diarization_error(wanted, answer, scored, collar=collar, window=length)
                for answer in (found, one_speaker(scored), one_voice(wanted))
            )
            parts = (errors.missed, errors.false_alarm, errors.confusion)
            shares = [part / max(errors.total, 1e-9) for part in parts] + [one.rate for one in (errors, *trivial)]
            lines.append((group, f"{errors.total:.1f}", *(f"{100 * share:.2f}" for share in shares)))
        tables.append(_aligned(lines))
    return "\n\n".join(tables)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        "  ".join([line[0].ljust(first), *(cell.rjust(width) for cell, width in zip(line[1:], others, strict=True))])
        for line in lines
    )
