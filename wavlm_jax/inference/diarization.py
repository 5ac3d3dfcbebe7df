"""Who spoke when: per-frame speaker activities of recordings to turns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import linear_sum_assignment

from wavlm_jax.audio.recordings import ChunkSettings, Inputs, Recording
from wavlm_jax.inference.running import Applied, Result, RunSettings, by_recording, geometry_of, in_order
from wavlm_jax.shapes import STANDARD, Geometry, Params, num_frames
from wavlm_jax.text.decoding import seconds
from wavlm_jax.text.records import Turn

Activity = Float[np.ndarray, "frames speakers"]


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


_FAMILIAR = 0.2
"""How much of an overlap may disagree for a voice to be a speaker who has said much, rather than one who has not."""


def pieces_of(trained_seconds: float | None) -> ChunkSettings:
    """How a long file is cut: as long as the rows of the training (`Origin.trained_seconds`), half of it shared.

    Outputs that were told apart over seconds do not keep their speakers over half a minute.
    """
    seconds = trained_seconds or ChunkSettings().seconds
    return ChunkSettings(seconds=seconds, overlap_seconds=seconds / 2)


def diarize(
    module: Applied,
    params: Params,
    recordings: Sequence[Recording],
    running: RunSettings,
    settings: TurnSettings,
    progress: Callable[[int], Any] = lambda _: None,
    done: dict[Recording, list[Turn]] | None = None,
) -> dict[Recording, list[Turn]]:
    """The turns of each recording; speakers are numbered; `done` gets each answer as it comes.

    Speakers have no order from piece to piece of a long file: see `join`. How long pieces should be: `pieces_of`.

    Raises:
        AudioFault: a file that cannot be read to its end.

    """

    @jax.jit
    def compute(inputs: Inputs) -> jax.Array:
        return jax.nn.sigmoid(module.apply({"params": params}, *inputs).logits)

    found = by_recording(recordings, compute, module.config, running, progress, framewise=False)
    answers = (
        (recording, turns(recording.name, join(results, geometry_of(module.config)), settings))
        for recording, results in found
    )
    return in_order(recordings, answers, done)


def join(results: Sequence[Result], geometry: Geometry = STANDARD) -> Activity:
    """Every frame of the file once, with one order of speakers.

    Each piece is matched to the one before by who is active in the frames that both saw. Whoever is silent there cannot
    be told from others who are: who says much in the new piece is then one of those who have said much so far.
    """
    joined: list[Activity] = []
    before: Result | None = None
    spoken = np.zeros(results[0].values.shape[1])
    for result in results:
        piece, values = result.job.piece, result.values
        if before is not None:
            values = values[:, _matched(before, result, spoken, geometry)]
        joined.append(values[piece.keep_from - piece.first_frame : piece.keep_to - piece.first_frame])
        spoken += joined[-1].sum(axis=0)
        before = Result(result.job, values)
    return np.concatenate(joined)


def turns(name: str, activity: Activity, settings: TurnSettings) -> list[Turn]:
    """The turns of a recording, by start; a frame that is active lasts for its 20 ms."""
    found = []
    for speaker in range(activity.shape[1]):
        for start, end in _stretches(activity[:, speaker] > settings.threshold, settings):
            found.append(Turn(name, seconds(start), seconds(end - start), f"speaker{speaker + 1}"))
    return sorted(found, key=lambda turn: (turn.start, turn.speaker))


def _matched(before: Result, after: Result, spoken: Float[np.ndarray, "speakers"], geometry: Geometry) -> np.ndarray:
    """For each speaker of `before`, which one of `after` agrees with it best in the frames that both saw."""
    start = after.job.piece.first_frame - before.job.piece.first_frame
    frames = int(num_frames(after.job.piece.num_samples, geometry))
    both = int(num_frames(before.job.piece.num_samples, geometry)) - start
    there, here = before.values[start : start + both], after.values[:both]
    cost = np.abs(there[:, :, None] - here[:, None, :]).mean(axis=0) if both else 0.0
    familiar = np.outer(spoken / max(spoken.max(), 1e-9), after.values[:frames].mean(axis=0))
    return np.asarray(linear_sum_assignment(cost - _FAMILIAR * familiar)[1])


def _stretches(active: Bool[np.ndarray, "frames"], settings: TurnSettings) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], active, [False]]).astype(np.int8)))
    merged: list[tuple[int, int]] = []
    for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        if merged and seconds(start - merged[-1][1]) < settings.fill_seconds:
            merged[-1] = merged[-1][0], end
        else:
            merged.append((start, end))
    return [(start, end) for start, end in merged if seconds(end - start) >= settings.least_seconds]
