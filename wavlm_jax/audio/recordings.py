"""Recordings on disk as model inputs: opened and checked, cut into overlapping pieces, normalised, padded.

Memory does not grow with the length of a recording: its statistics are computed in blocks, and it is read piece by
piece. Pieces start on the frame grid, so frame i of a piece that starts at frame s is frame s + i of the file: same
samples, same time. Each piece keeps half of an overlap, so every frame of the file is kept exactly once.

Normalisation is over the samples of one wave, before padding (FACTS B6): equal to transformers'
Wav2Vec2FeatureExtractor with an attention mask. Without one it would count the padding (FACTS E13).
"""

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float32, Int32

from wavlm_jax.audio.wave import (
    MOST_SECONDS,
    Audio,
    AudioFault,
    num_samples_of,
    open_audio,
    read_blocks,
    resample,
    to_mono,
    version_of,
)
from wavlm_jax.config import WavLMConfig
from wavlm_jax.files import printable
from wavlm_jax.shapes import SAMPLE_RATE, STANDARD, Geometry, num_frames, samples_for

Samples = Float32[np.ndarray, "samples"]


class Statistics(NamedTuple):
    """What normalisation uses: those of the whole wave, also for a piece of it."""

    mean: float
    variance: float


class Inputs(NamedTuple):
    """What a model is applied to."""

    waveform: Float32[np.ndarray, "rows samples"]
    num_samples: Int32[np.ndarray, "rows"]
    """Real samples of each row; zeros follow."""


def statistics(wave: Samples) -> Statistics:
    """Mean and population variance over all samples, accumulated in float64."""
    return Statistics(float(wave.mean(dtype=np.float64)), float(wave.var(dtype=np.float64)))


def normalize(wave: Samples, config: WavLMConfig, of: Statistics | None = None) -> Samples:
    """`wave` with mean 0 and variance 1 where the model's config says `do_normalize`, else unchanged.

    Args:
        wave: at 16 kHz.
        config: of the model; reads `do_normalize` and `normalize_eps` (1e-7 in Hugging Face's extractor, 1e-5 in the
            authors' code, FACTS E12).
        of: statistics of the whole utterance where `wave` is a piece of one; None: of `wave` itself.

    """
    if not config.do_normalize or not len(wave):
        return wave
    mean, variance = of or statistics(wave)
    return ((wave - np.float32(mean)) / np.float32(np.sqrt(variance + config.normalize_eps))).astype(np.float32)


def pad(waves: Sequence[Float32[np.ndarray, "_"]], samples: int | None = None) -> Inputs:
    """Waves as rows, padded with zeros at the end.

    Args:
        waves: one per row.
        samples: the width of the rows; None: of the longest wave.

    Raises:
        ValueError: a wave is longer than `samples`.

    """
    longest = max((len(wave) for wave in waves), default=0)
    width = longest if samples is None else samples
    if longest > width:
        raise ValueError(f"waves: the longest has {longest} samples, expected at most {width}; nothing is cut off here")
    waveform = np.zeros((len(waves), width), np.float32)
    for row, wave in zip(waveform, waves, strict=True):
        row[: len(wave)] = wave
    return Inputs(waveform, np.array([len(wave) for wave in waves], np.int32))


_MOST_LISTED = 10
_KEPT_BYTES = 2**29
"""Of decoded files that are held in memory: two hours and twenty minutes at 16 kHz."""


class RecordingError(ValueError):
    """Files that cannot be used; the message lists them, each with what is wrong and what to do."""


@dataclass(frozen=True)
class Recording:
    """An audio file whose header was read and that can be used."""

    name: str
    """For outputs: the file's name without its ending, or its path where two files share a name, with the
    ending where they share that too, numbered where only white space tells them apart. No white space."""
    path: Path
    rate: int
    num_samples: int
    """At 16 kHz."""
    in_memory: bool = False
    """Whether it is decoded as a whole: at another rate, or of a kind that cannot be sought in (GSM, m4a, webm)."""

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.num_samples / SAMPLE_RATE

    def read(self, start: int = 0, num_samples: int | None = None) -> Samples:
        """`num_samples` samples (None: to the end) from sample `start` on, mono, 16 kHz.

        Only the samples asked for are decoded, except of a file that is held in memory.

        Raises:
            AudioFault: whatever keeps them from being read.

        """
        wanted = self.num_samples - start if num_samples is None else num_samples
        with _naming(self.path):
            if self.in_memory:
                return self._whole()[start : start + wanted]
            with open_audio(self.path) as audio:
                audio.seek(start)
                samples = audio.read(wanted, dtype="float32", always_2d=True)
            if len(samples) != wanted:
                raise AudioFault("truncated", f"found {len(samples)} samples from {start} on, not {wanted}")
            if not np.isfinite(samples).all():
                raise AudioFault("not_finite", "has samples that are NaN or infinite")
            return to_mono(samples)

    def _whole(self) -> Samples:
        wave = _decoded(self.path)
        if len(wave) != self.num_samples:
            found = f"found {len(wave)} samples at {SAMPLE_RATE} Hz, {self.num_samples} when it was opened"
            raise AudioFault("length_mismatch", f"{found}; was it written anew?")
        return wave

    def statistics(self) -> Statistics:
        """Mean and variance of all samples, computed in blocks.

        Raises:
            AudioFault: whatever keeps them from being read.

        """
        with _naming(self.path):
            if self.in_memory:
                return _moments([self._whole()])
            with open_audio(self.path) as audio:
                blocks = (np.asarray(block, np.float32) for block in read_blocks(audio, "float32"))
                return _moments(to_mono(block) for block in blocks)


OnFault: TypeAlias = Callable[[str, Path, ValueError], Any]
"""Takes name, path and fault of a recording that is left out."""


def open_recordings(
    paths: Sequence[Path],
    *,
    resampling: bool = False,
    geometry: Geometry = STANDARD,
    max_seconds: float = MOST_SECONDS,
    on_fault: OnFault | None = None,
) -> list[Recording]:
    """All files, checked before anything is computed: headers, and the sound of those that are decoded as a whole.

    Args:
        paths: audio files.
        resampling: also accept other rates than 16 kHz (such a file is held in memory as a whole).
        geometry: of the model; a file has to be long enough for one frame.
        max_seconds: a file has at most as many samples as this has at 16 kHz, whatever its own rate.
        on_fault: gets files that cannot be used, which are left out; None: they are an error.

    Raises:
        RecordingError: files that are given twice, and without `on_fault` those that are missing, empty, not audio, too
            short or long, or at another rate.

    """
    twice = [str(path) for path, given in Counter(paths).items() if given > 1]
    if twice:
        raise RecordingError(f"{', '.join(twice[:_MOST_LISTED])}: given more than once")
    names = _names(paths)
    recordings, faults = [], []
    for path, name in zip(paths, names, strict=True):
        try:
            with _naming(path):
                recordings.append(_opened(name, path, resampling, geometry, max_seconds))
        except AudioFault as fault:
            faults.append(str(fault))
            if on_fault is not None:
                on_fault(name, path, fault)
    if faults and on_fault is None:
        raise RecordingError(first_of(faults))
    return recordings


def first_of(faults: Sequence[str]) -> str:
    """A message that lists the faults of several recordings: the first ten, one per line, and how many more."""
    more = f"\n... and {len(faults) - _MOST_LISTED} more" if len(faults) > _MOST_LISTED else ""
    return "\n".join(faults[:_MOST_LISTED]) + more


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts `path` in front of the message of an `AudioFault` that does not have it."""
    try:
        yield
    except AudioFault as fault:
        if str(path) in fault.detail:
            raise
        raise AudioFault(fault.fault, f"{path}: {fault.detail}") from fault


def _names(paths: Sequence[Path]) -> list[str]:
    """For each file the shortest name that no other file has: stem, path without ending, whole path.

    White space becomes _, as RTTM and CTM are split at it, bytes that are not UTF-8 become escapes; paths that are then
    equal are numbered.
    """
    stems, bare, whole = (
        (
            ["_".join(printable(name).split()) for name in names]
            for names in zip(*((path.stem, str(path.with_suffix("")), str(path)) for path in paths), strict=True)
        )
        if paths
        else ([], [], [])
    )
    names = stems
    for longer in (bare, whole):
        shared = Counter(names)
        names = [name if shared[name] == 1 else long for name, long in zip(names, longer, strict=True)]
    taken = set(names)
    seen: set[str] = set()
    for number, name in enumerate(names):
        if name in seen:
            names[number] = next(other for copy in count(2) if (other := f"{name}_{copy}") not in taken)
            taken.add(names[number])
        seen.add(names[number])
    return names


def renamed(recordings: Sequence[Recording]) -> list[str]:
    """A line for each recording whose name is neither its file's nor its path: white space, or a number behind it."""
    return [
        f"{printable(one.path)} as {one.name}"
        for one in recordings
        if one.name not in map(printable, (one.path.stem, one.path.with_suffix(""), one.path))
    ]


def _opened(name: str, path: Path, resampling: bool, geometry: Geometry, max_seconds: float) -> Recording:
    with open_audio(path) as audio:
        rate = audio.samplerate
        if audio.frames > max_seconds * SAMPLE_RATE:
            most = f"{max_seconds * SAMPLE_RATE:.0f} ({max_seconds:g} s at {SAMPLE_RATE} Hz)"
            raise AudioFault("too_long", f"{audio.frames} samples, expected at most {most}; allow more (--max-seconds)")
        if rate != SAMPLE_RATE and not resampling:
            asked = "--resample, InferenceSettings(resampling=True)"
            expected = f"expected {SAMPLE_RATE} Hz; resample it, or ask for it ({asked})"
            raise AudioFault("wrong_rate", f"found {rate} Hz, {expected}")
        in_memory = rate != SAMPLE_RATE or not audio.seekable() or audio.transcoded
        num_samples = len(_decoded(path, audio)) if in_memory else num_samples_of(audio)
    if num_samples < geometry.receptive_field:
        raise AudioFault("too_short", f"{num_samples} samples, expected at least {geometry.receptive_field} (25 ms)")
    return Recording(name, path, rate, num_samples, in_memory)


_waves: OrderedDict[tuple[Path, tuple[int, ...]], Samples] = OrderedDict()
_waves_lock = threading.Lock()


def _decoded(path: Path, opened: Audio | None = None) -> Samples:
    """The whole file, mono, at 16 kHz. Those used last are kept; one that is written anew is decoded anew."""
    try:
        key = path, version_of(path.stat())
    except OSError as error:
        raise AudioFault("missing", f"{path}: {error.strerror}") from error
    with _waves_lock:
        wave = _waves.pop(key, None)
    if wave is None and opened is not None:
        wave = _read(opened)
    elif wave is None:
        with open_audio(path) as audio:
            wave = _read(audio)
    with _waves_lock:
        _waves[key] = wave
        kept = sum(one.nbytes for one in _waves.values())
        while kept > _KEPT_BYTES and len(_waves) > 1:
            kept -= _waves.popitem(last=False)[1].nbytes
    return wave


def _read(audio: Audio) -> Samples:
    blocks = [to_mono(np.asarray(block, np.float32)) for block in read_blocks(audio, "float32")]
    return resample(np.concatenate(blocks), audio.samplerate)


def _moments(blocks: Iterable[Samples]) -> Statistics:
    """Mean and variance of all blocks together, merged pairwise so that no precision is lost (Chan et al. 1979)."""
    count, mean, deviation = 0, 0.0, 0.0
    for block in blocks:
        size, block_mean = len(block), float(block.mean(dtype=np.float64))
        shift = block_mean - mean
        deviation += float(block.var(dtype=np.float64)) * size + shift**2 * count * size / (count + size)
        mean += shift * size / (count + size)
        count += size
    return Statistics(mean, deviation / count)


@dataclass(frozen=True, kw_only=True)
class ChunkSettings:
    """How long recordings are cut into pieces; one that is not longer than a piece stays whole."""

    seconds: float = 30.0
    """Length of a piece."""
    overlap_seconds: float = 6.0
    """Shared by two neighbouring pieces: each kept frame has at least half of it as context on both sides."""

    def __post_init__(self) -> None:
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"seconds: found a piece of {self.seconds} s, expected more than 0")
        if not 0 <= self.overlap_seconds < self.seconds:
            raise ValueError(
                f"overlap_seconds: found {self.overlap_seconds}, expected 0 or more and less than the {self.seconds} s "
                "of a piece"
            )


class Piece(NamedTuple):
    """A part of a recording. Frames are numbered within the whole recording."""

    start_sample: int
    num_samples: int
    first_frame: int
    """The frame that starts at `start_sample`."""
    keep_from: int
    keep_to: int
    """Frames keep_from ... keep_to - 1 are taken from this piece."""


def cut(num_samples: int, settings: ChunkSettings, geometry: Geometry = STANDARD) -> list[Piece]:
    """The pieces of a file, in order; together they keep frames 0 ... num_frames(num_samples) - 1.

    All pieces of a long file have the same length (one compilation); the last one ends with the file's last frame, so
    it shares more with the one before. A file that fits into one piece is one piece, its last samples included.

    Raises:
        ValueError: the file has no frame.

    """
    total = num_frames(num_samples, geometry)
    if total < 1:
        raise ValueError(
            f"audio: found {num_samples} samples, expected at least {geometry.receptive_field} for one frame"
        )
    size = max(1, num_frames(round(settings.seconds * SAMPLE_RATE), geometry))
    if total <= size:
        return [Piece(0, num_samples, 0, 0, total)]
    overlap = min(round(settings.overlap_seconds * SAMPLE_RATE / geometry.hop), size - 1)
    starts = [*range(0, total - size, size - overlap), total - size]
    edges = [0, *((before + size + start) // 2 for before, start in pairwise(starts)), total]
    width = samples_for(size, geometry)
    return [
        Piece(start * geometry.hop, width, start, edges[number], edges[number + 1])
        for number, start in enumerate(starts)
    ]
