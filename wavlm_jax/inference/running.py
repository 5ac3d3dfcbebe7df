"""Models on recordings of any length: cut into pieces, computed in batches of few static shapes, answers by recording.

Rows are padded to a few widths and batches to a few numbers of rows, so that a run compiles a few programs. With
`padding="exact"` no answer depends on what its recording was batched with.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from wavlm_jax.audio.recordings import ChunkSettings, Inputs, OnFault, Piece, Recording, Samples, cut, normalize, pad
from wavlm_jax.audio.wave import MOST_SECONDS, AudioFault
from wavlm_jax.config import WavLMConfig
from wavlm_jax.model.heads import HEADS
from wavlm_jax.shapes import SAMPLE_RATE, Geometry, num_frames, samples_for
from wavlm_jax.text.vocabulary import VOCABULARY, Vocabulary, parse_vocabulary
from wavlm_jax.weights import Model, ready

Compute: TypeAlias = Callable[[Inputs], Any]
"""A batch -> a tree of arrays whose first axis is rows and whose second axis is frames."""
ENCODER_COMMANDS = ("features",)
"""Commands that need no head."""
_WIDTH_STEP = 1.25
"""From one width of rows to the next: on average a tenth of a row is padding."""
_SMALLEST_WIDTH = 50
"""Frames."""
_WINDOW_BATCHES = 32
"""Recordings are sorted by length within about so many batches."""


class UsageError(ValueError):
    """A command, or a function of `inference.api`, that cannot be done with what it was given."""


@dataclass(frozen=True, kw_only=True)
class InferenceSettings:
    """How recordings are read, cut and batched."""

    chunks: ChunkSettings = field(default_factory=ChunkSettings)
    batch_seconds: float = 60.0
    """Most audio in a batch, padding included: bounds the memory."""
    on_fault: OnFault | None = None
    """Called for a recording that cannot be read or does not fit its text, and gets no answer; None: it is an error."""
    resampling: bool = False
    """Whether files at other rates than 16 kHz are taken; they are held in memory whole."""
    max_seconds: float = MOST_SECONDS
    """A file has at most as many samples as this has at 16 kHz."""


def model_for(model: Model, command: str) -> Model:
    """`model` as a command of `python -m wavlm_jax` wants it: with the right head, and padding that changes no answer.

    Raises:
        UsageError: it has another head, or none.

    """
    weights, path = model.current, model.weights.origin.path
    if command in ENCODER_COMMANDS:
        weights = replace(weights, task=None)
    else:
        expected = " or a ".join(kind for kind, row in HEADS.items() if command in row.commands)
        if weights.task is None:
            raise UsageError(f"{path}: an encoder without a head, which does `features`; expected a {expected}")
        kind, does = weights.task.kind, HEADS[weights.task.kind].commands
        if command not in does:
            raise UsageError(f"{path}: a {kind}, which does {', '.join(does) or 'none'}; expected a {expected}")
    return ready(replace(weights, config=replace(weights.config, padding="exact")))


def labels_of(model: Model) -> tuple[str, ...]:
    """The names of a classifier's classes; numbers where nobody named them."""
    task = model.weights.task
    if task is None or task.labels is None:
        return tuple(str(number) for number in range(model.module.head.num_labels))
    return task.labels


def vocabulary_of(model: Model) -> Vocabulary:
    """The vocabulary of a CTC model.

    Raises:
        UsageError: there is none.
        VocabularyError: it is damaged, or belongs to another model.

    """
    origin = model.weights.origin
    if VOCABULARY not in origin.files:
        raise UsageError(f"{origin.path}: has no {VOCABULARY}; a CTC model needs its vocabulary to spell")
    return parse_vocabulary(origin.files, Path(origin.path), num_outputs=model.module.head.vocab_size)


def digest_of(model: Model) -> str:
    """SHA-256 of the parameters."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(dict(model.params)):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def frames_of(recording: Recording, config: WavLMConfig) -> int:
    """Frames of the whole recording."""
    return int(num_frames(recording.num_samples, config.geometry))


class Job(NamedTuple):
    """One piece of one recording."""

    recording: Recording
    piece: Piece


class PieceResult(NamedTuple):
    """What was computed of one piece."""

    job: Job
    values: Any
    """A tree of arrays: frames keep_from ... keep_to - 1 of the file on axis 0, or the whole row (see `run`)."""


def jobs_of(recordings: Iterable[Recording], config: WavLMConfig, settings: InferenceSettings) -> Iterator[Job]:
    """The pieces of all recordings, in order."""
    for recording in recordings:
        for piece in cut(recording.num_samples, settings.chunks, config.geometry):
            yield Job(recording, piece)


def run(
    jobs: Iterable[Job], compute: Compute, config: WavLMConfig, settings: InferenceSettings, *, framewise: bool = True
) -> Iterator[PieceResult]:
    """Results of `jobs` in their order, computed in batches of neighbours that have the same width.

    Args:
        jobs: best sorted by the length of their recordings, so that little is padded.
        compute: compiled; called with (rows, samples) of few different shapes.
        config: of the model, for normalisation and frames.
        settings: of batches.
        framewise: whether the function's second axis is frames; otherwise a result is its whole row.

    Raises:
        AudioFault: a file that cannot be read to its end, where `settings.on_fault` does not take it.

    """
    geometry = config.geometry
    statistics = lru_cache(maxsize=1)(Recording.statistics)  # once for all pieces of a recording
    failed = set[Recording]()

    def samples(job: Job) -> Samples | None:
        recording, piece = job
        if recording in failed:
            return None
        try:
            wave = recording.read(piece.start_sample, piece.num_samples)
            cut_up = config.do_normalize and piece.num_samples < recording.num_samples
            return normalize(wave, config, statistics(recording) if cut_up else None)
        except AudioFault as fault:
            if settings.on_fault is None:
                raise
            failed.add(recording)
            settings.on_fault(recording.name, recording.path, fault)
            return None

    for width, group in groupby(jobs, lambda job: _width(job.piece.num_samples, geometry)):
        most = max(1, int(settings.batch_seconds * SAMPLE_RATE / width))
        while batch := list(islice(group, most)):
            read = [(job, wave) for job in batch if (wave := samples(job)) is not None]
            if not read:
                continue
            waves = [wave for _, wave in read]
            rows = min(most, 1 << (len(waves) - 1).bit_length())
            waves += [np.zeros(0, np.float32)] * (rows - len(waves))
            values = jax.device_get(compute(pad(waves, width)))
            for row, (job, _) in enumerate(read):
                first, keep_from, keep_to = job.piece.first_frame, job.piece.keep_from, job.piece.keep_to
                kept = (row, slice(keep_from - first, keep_to - first)) if framewise else (row,)
                yield PieceResult(job, jax.tree.map(lambda array, kept=kept: array[kept], values))


def _width(num_samples: int, geometry: Geometry) -> int:
    """The samples of the row that holds a piece: the next of a few widths."""
    frames = _SMALLEST_WIDTH
    while samples_for(frames, geometry) < num_samples:
        frames = max(frames + 1, round(frames * _WIDTH_STEP))
    return samples_for(frames, geometry)


def by_recording(
    model: Model,
    answer: Callable[[Any], Any],
    recordings: Iterable[Recording],
    settings: InferenceSettings,
    *,
    framewise: bool,
) -> Iterator[tuple[Recording, list[PieceResult]]]:
    """Each recording with the results of all its pieces in order; short ones first among those of about half an hour.

    Args:
        model: of `model_for`.
        answer: from the model's output to what leaves the device; compiled with the model.
        recordings: of any length.
        settings: of pieces and batches.
        framewise: see `run`.

    Raises:
        AudioFault: a file that cannot be read to its end.

    """
    compute = jax.jit(lambda inputs: answer(model.module.apply({"params": model.params}, *inputs)))
    for window in _windows(recordings, settings.batch_seconds * _WINDOW_BATCHES * SAMPLE_RATE):
        jobs = jobs_of(sorted(window, key=lambda recording: recording.num_samples), model.config, settings)
        parts: list[PieceResult] = []
        for result in run(jobs, compute, model.config, settings, framewise=framewise):
            recording, piece = result.job
            if parts and parts[0].job.recording != recording:  # its end could not be read
                parts = []
            parts.append(result)
            if piece.keep_to == frames_of(recording, model.config):
                yield recording, parts
                parts = []


def _windows(recordings: Iterable[Recording], most: float) -> Iterator[list[Recording]]:
    """Neighbours with `most` samples together: answers come while later recordings wait."""
    window, samples = list[Recording](), 0
    for recording in recordings:
        window.append(recording)
        samples += recording.num_samples
        if samples >= most:
            yield window
            window, samples = [], 0
    yield window
