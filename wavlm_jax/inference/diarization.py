"""Who spoke when: from speaker activities per frame to turns, over recordings of any length; tables of errors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import linear_sum_assignment

from wavlm_jax.audio.recordings import ChunkSettings, Recording
from wavlm_jax.inference.running import InferenceSettings, PieceResult, by_recording
from wavlm_jax.metrics import diarization_error, one_speaker, one_voice
from wavlm_jax.model.heads import FrameOutput
from wavlm_jax.shapes import STANDARD, Geometry, num_frames
from wavlm_jax.text.decoding import seconds
from wavlm_jax.text.records import Region, Turn
from wavlm_jax.weights import Model

Activity = Float[np.ndarray, "frames speakers"]
_FAMILIAR_WEIGHT = 0.2
"""Weight of a speaker's share of speech so far against the mean disagreement (0 to 1) in the frames that both share."""
_COLUMNS = ("speech s", "missed", "false alarm", "confusion", "DER", "one speaker", "one voice")


@dataclass(frozen=True, kw_only=True)
class TurnSettings:
    """From probabilities to turns."""

    threshold: float = 0.5
    fill_seconds: float = 0.2
    """Shorter gaps within a speaker's turn are filled."""
    least_seconds: float = 0.1
    """Shorter turns are dropped."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold: found {self.threshold}, expected a probability between 0 and 1")
        for name in ("fill_seconds", "least_seconds"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected 0 or more")


def pieces_of(trained_seconds: float | None) -> ChunkSettings:
    """How a long file is cut: into pieces as long as the rows of the training (`Origin.trained_seconds`), half shared.

    A model that learned to tell speakers apart within some seconds does not keep their order over half a minute.
    """
    length = trained_seconds or ChunkSettings().seconds
    return ChunkSettings(seconds=length, overlap_seconds=length / 2)


def diarize(
    model: Model, recordings: Sequence[Recording], settings: InferenceSettings, turn_settings: TurnSettings
) -> Iterator[tuple[Recording, list[Turn]]]:
    """The turns of each recording, its speakers numbered; short recordings come first.

    Outputs have another order of speakers in each piece of a long file: see `join`. How long pieces should be:
    `pieces_of`.

    Raises:
        AudioFault: a file that cannot be read to its end.

    """
    for recording, results in by_recording(model, _probabilities, recordings, settings, framewise=False):
        geometry = model.config.geometry
        yield recording, turns(recording.name, join(results, geometry), turn_settings, geometry)


def _probabilities(output: FrameOutput) -> jax.Array:
    return jax.nn.sigmoid(output.logits)


def join(results: Sequence[PieceResult], geometry: Geometry = STANDARD) -> Activity:
    """Every frame of the file once, with one order of speakers.

    Each piece is matched to the one before by who is active in the frames that both share. Speakers who are silent
    there cannot be told apart: an output that is active much in the new piece is then one of those who spoke much so
    far.
    """
    joined: list[Activity] = []
    before: PieceResult | None = None
    spoken = np.zeros(results[0].values.shape[1])
    for result in results:
        piece, values = result.job.piece, result.values
        if before is not None:
            values = values[:, _matched(before, result, spoken, geometry)]
        joined.append(values[piece.keep_from - piece.first_frame : piece.keep_to - piece.first_frame])
        spoken += joined[-1].sum(axis=0)
        before = PieceResult(result.job, values)
    return np.concatenate(joined)


def _matched(
    before: PieceResult, after: PieceResult, spoken: Float[np.ndarray, "speakers"], geometry: Geometry
) -> np.ndarray:
    """For each speaker of `before`, the output of `after` that agrees with it best in the frames that both share."""
    start = after.job.piece.first_frame - before.job.piece.first_frame
    frames = int(num_frames(after.job.piece.num_samples, geometry))
    shared = int(num_frames(before.job.piece.num_samples, geometry)) - start
    there, here = before.values[start : start + shared], after.values[:shared]
    cost = np.abs(there[:, :, None] - here[:, None, :]).mean(axis=0) if shared else 0.0
    familiar = np.outer(spoken / max(spoken.max(), 1e-9), after.values[:frames].mean(axis=0))
    return np.asarray(linear_sum_assignment(cost - _FAMILIAR_WEIGHT * familiar)[1])


def turns(name: str, activity: Activity, settings: TurnSettings, geometry: Geometry = STANDARD) -> list[Turn]:
    """The turns of a recording, by start; a frame that is active lasts until the next one begins (20 ms)."""
    found = []
    for speaker in range(activity.shape[1]):
        for start, end in _stretches(activity[:, speaker] > settings.threshold, settings, geometry):
            found.append(Turn(name, seconds(start, geometry), seconds(end - start, geometry), f"speaker{speaker + 1}"))
    return sorted(found, key=lambda turn: (turn.start, turn.speaker))


def _stretches(active: Bool[np.ndarray, "frames"], settings: TurnSettings, geometry: Geometry) -> list[tuple[int, int]]:
    """First frame of each turn, and one past its last."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], active, [False]]).astype(np.int8)))
    merged: list[tuple[int, int]] = []
    for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        if merged and seconds(start - merged[-1][1], geometry) < settings.fill_seconds:
            merged[-1] = merged[-1][0], end
        else:
            merged.append((start, end))
    return [(start, end) for start, end in merged if seconds(end - start, geometry) >= settings.least_seconds]


def error_table(
    reference: dict[str, list[Turn]],
    found: Sequence[Turn],
    regions: Sequence[Region],
    collar: float = 0.0,
    window: float | None = None,
) -> str:
    """Tables of errors in per cent of the speech: of each recording, of those of each reference file, and of all.

    The last two columns are the error rates of two baselines that know no speaker: one speaker all the time, and one
    wherever somebody speaks (which only the reference can tell).

    Args:
        reference: file -> its turns.
        found: the model's turns.
        regions: what is scored.
        collar: see `diarization_error`.
        window: seconds; a second table, see `diarization_error`.

    """
    groups = {name: {name} for name in dict.fromkeys(region.recording for region in regions)}
    if len(reference) > 1:
        groups |= {Path(file).name: {turn.recording for turn in turns} for file, turns in reference.items() if turns}
    groups["all"] = {region.recording for region in regions}
    everything = [turn for turns in reference.values() for turn in turns]
    tables = []
    for length in (None,) if window is None else (None, window):
        title = "recordings" if length is None else f"windows of {length} s"
        lines: list[tuple[str, ...]] = [(title, *_COLUMNS)]
        for group, names in groups.items():
            wanted, given = ([turn for turn in turns if turn.recording in names] for turns in (everything, found))
            scored = [region for region in regions if region.recording in names]
            errors, *baselines = (
                diarization_error(wanted, answer, scored, collar=collar, window=length)
                for answer in (given, one_speaker(scored), one_voice(wanted))
            )
            parts = (errors.missed, errors.false_alarm, errors.confusion)
            shares = [part / errors.total if errors.total else part and float("inf") for part in parts]
            shares += [one.rate for one in (errors, *baselines)]
            lines.append((group, f"{errors.total:.1f}", *(f"{100 * share:.2f}" for share in shares)))
        tables.append(_aligned(lines))
    return "\n\n".join(tables)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        "  ".join([line[0].ljust(first), *(cell.rjust(width) for cell, width in zip(line[1:], others, strict=True))])
        for line in lines
    )
