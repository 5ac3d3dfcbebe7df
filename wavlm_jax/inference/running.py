"""From a folder to a model that does what a command asks for, or a message that says what it does instead.

A compiled function over pieces of recordings: batches of one static shape, results in pieces again.

Rows are padded to a few widths and batches to a few numbers of rows, so a run compiles a few programmes; with
`padding="exact"` no result depends on what it was batched with.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

import jax
import numpy as np

from wavlm_jax.audio.recordings import ChunkSettings, Inputs, Piece, Recording, Samples, Statistics, cut, normalize, pad
from wavlm_jax.config import WavLMConfig
from wavlm_jax.model.heads import HEADS, module_of
from wavlm_jax.shapes import SAMPLE_RATE, Geometry, Params, num_frames, samples_for
from wavlm_jax.text.vocabulary import VOCABULARY, Vocabulary, parse_vocabulary
from wavlm_jax.weights import Weights


class Opened(NamedTuple):
    """A model with a head, on the device."""

    module: Any
    params: Params
    weights: Weights


def open_model(options: argparse.Namespace, command: str) -> Opened:
    """The model of `--model`, for a command of `python -m wavlm_jax`.

    Raises:
        UsageError: see `opened`.
        ValueError: see `loading.load_weights`, which the command line hands down (`options.load`).

    """
    return opened(options.load(options.model, options.step), command)


def opened(weights: Weights, command: str) -> Opened:
    """The model of these weights, which has a head for `command`; padding never changes its answers.

    Raises:
        UsageError: it has another head, or none.

    """
    task, where = weights.task, weights.origin.path
    expected = " or a ".join(kind for kind, row in HEADS.items() if command in row.commands)
    if task is None:
        raise UsageError(f"{where}: an encoder without a head, which does `features`; expected a {expected}")
    if command not in (does := HEADS[task.kind].commands):
        raise UsageError(f"{where}: a {task.kind}, which does {', '.join(does) or 'none'}; expected a {expected}")
    config = dataclasses.replace(weights.config, padding="exact")
    params = jax.tree.map(jax.device_put, dict(weights.tree))
    return Opened(module_of(config, task.kind, task.config), params, weights)


def labels_of(model: Opened) -> tuple[str, ...]:
    """The names of a classifier's classes; numbers where nobody named them."""
    task = model.weights.task
    if task is None or task.labels is None:
        return tuple(str(number) for number in range(model.module.head.num_labels))
    return task.labels


def vocabulary_of(model: Opened) -> Vocabulary:
    """What a CTC model speaks.

    Raises:
        UsageError: there is none.

    """
    origin = model.weights.origin
    if VOCABULARY not in origin.files:
        raise UsageError(f"{origin.path}: has no {VOCABULARY}; a CTC model needs its vocabulary to spell")
    return parse_vocabulary(origin.files, Path(origin.path))


AnyAnswer = TypeVar("AnyAnswer")
"""What a command finds out of one recording."""
Compute: TypeAlias = Callable[[Inputs], Any]
"""A batch -> a tree of arrays whose first axis is rows and whose second axis is frames."""


@runtime_checkable
class Applied(Protocol):
    """A Flax model of any kind, as far as whoever only runs it needs to know."""

    config: WavLMConfig

    def apply(self, variables: dict[str, Any], *args: Any) -> Any:
        """What the model gives for these parameters and arguments."""
        ...


class UsageError(ValueError):
    """A command line that cannot be done."""


_STEP = 1.25
"""From one width to the next: on average a tenth of a row is padding."""
_SMALLEST = 50


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How recordings are read and batched."""

    chunks: ChunkSettings = field(default_factory=ChunkSettings)
    batch_seconds: float = 60.0
    """Most audio in a batch, padding included: what memory has to hold."""
    resampling: bool = False
    """Whether files at other rates than 16 kHz are taken; they are held in memory whole."""


class Job(NamedTuple):
    """One piece of one recording."""

    recording: Recording
    piece: Piece


class Result(NamedTuple):
    """What the function gave for the frames that a piece keeps."""

    job: Job
    values: Any
    """The tree of the function, this row, frames keep_from ... keep_to - 1 of the file on axis 0."""


def geometry_of(config: WavLMConfig) -> Geometry:
    """The frames of a model."""
    return Geometry(config.conv_kernel, config.conv_stride)


def jobs_of(recordings: Iterable[Recording], config: WavLMConfig, settings: RunSettings) -> Iterator[Job]:
    """The pieces of all recordings, in order."""
    for recording in recordings:
        for piece in cut(recording.num_samples, settings.chunks, geometry_of(config)):
            yield Job(recording, piece)


def run(
    jobs: Iterable[Job], compute: Compute, config: WavLMConfig, settings: RunSettings, *, framewise: bool = True
) -> Iterator[Result]:
    """Results of `jobs` in their order, computed in batches of neighbours that have the same width.

    Args:
        jobs: sort recordings by length before, and little is padded.
        compute: compiled; called with (rows, samples) of few different shapes.
        config: of the model, for normalisation and frames.
        settings: of batches.
        framewise: whether the function's second axis is frames; otherwise a result is its whole row.

    Raises:
        AudioFault: a file that cannot be read to its end.

    """
    geometry = geometry_of(config)
    statistics = _StatisticsOf(config)
    batch: list[Job] = []
    width = 0

    def computed(batch: list[Job], width: int) -> Any:
        waves = [samples_of(job, config, statistics(job)) for job in batch]
        rows = min(_rows(width, settings), 1 << (len(waves) - 1).bit_length())
        waves += [np.zeros(0, np.float32)] * (rows - len(waves))
        return jax.device_get(compute(pad(waves, width)))

    for job in jobs:
        fitting = _width(job.piece.num_samples, geometry)
        if batch and (fitting != width or len(batch) == _rows(width, settings)):
            yield from _results(batch, computed(batch, width), framewise)
            batch = []
        batch.append(job)
        width = fitting
    if batch:
        yield from _results(batch, computed(batch, width), framewise)


def by_recording(
    recordings: Iterable[Recording],
    compute: Compute,
    config: WavLMConfig,
    settings: RunSettings,
    progress: Callable[[int], Any],
    *,
    framewise: bool,
) -> Iterator[tuple[Recording, list[Result]]]:
    """Each recording with the results of all its pieces in order, short recordings first (see `run`).

    `progress` is told how many samples were just done.
    """
    parts: list[Result] = []
    by_length = sorted(recordings, key=lambda recording: recording.num_samples)
    for result in run(jobs_of(by_length, config, settings), compute, config, settings, framewise=framewise):
        parts.append(result)
        recording, piece = result.job
        if piece.keep_to == frames_of(recording, config):
            yield recording, parts
            progress(recording.num_samples)
            parts = []


def in_order(
    recordings: Iterable[Recording],
    answers: Iterable[tuple[Recording, AnyAnswer]],
    done: dict[Recording, AnyAnswer] | None,
) -> dict[Recording, AnyAnswer]:
    """The answers in the order of `recordings`; each is in `done` as soon as it is there, whatever happens later."""
    found = {} if done is None else done
    for recording, answer in answers:
        found[recording] = answer
    return {recording: found[recording] for recording in recordings}


def samples_of(job: Job, config: WavLMConfig, of: Statistics | None) -> Samples:
    """The samples of a piece, normalised by the whole recording where the model wants it."""
    recording, piece = job
    wave = recording.read(piece.start_sample, piece.num_samples)
    return normalize(wave, config, of)


class _StatisticsOf:
    """Mean and variance of a whole recording, computed once for its pieces; None where nobody needs them."""

    def __init__(self, config: WavLMConfig) -> None:
        self.config = config
        self._recording: Recording | None = None
        self._last: Statistics | None = None

    def __call__(self, job: Job) -> Statistics | None:
        if not self.config.do_normalize or job.piece.num_samples == job.recording.num_samples:
            return None
        if self._recording != job.recording:
            self._recording, self._last = job.recording, job.recording.statistics()
        return self._last


def _results(batch: list[Job], values: Any, framewise: bool) -> Iterator[Result]:
    for row, job in enumerate(batch):
        kept = slice(job.piece.keep_from - job.piece.first_frame, job.piece.keep_to - job.piece.first_frame)
        yield Result(
            job, jax.tree.map(lambda array, row=row, kept=kept: array[row][kept] if framewise else array[row], values)
        )


def _width(num_samples: int, geometry: Geometry) -> int:
    """The samples of the row that holds a piece: the next of a few widths."""
    frames = _SMALLEST
    while samples_for(frames, geometry) < num_samples:
        frames = max(frames + 1, round(frames * _STEP))
    return samples_for(frames, geometry)


def _rows(width: int, settings: RunSettings) -> int:
    return max(1, int(settings.batch_seconds * SAMPLE_RATE / width))


def frames_of(recording: Recording, config: WavLMConfig) -> int:
    """Frames that the whole recording has."""
    return int(num_frames(recording.num_samples, geometry_of(config)))
