"""Recordings on disk that are looked at piece by piece, so that memory does not grow with their length."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from wavlm_jax.audio.inputs import Samples, Statistics
from wavlm_jax.audio.wave import AudioFault, decode, open_audio, read_blocks, resample, to_mono
from wavlm_jax.shapes import SAMPLE_RATE, STANDARD, Geometry

_LISTED = 10


class RecordingError(ValueError):
    """Files that cannot be used; the message lists them, each with what is wrong and what to do."""


@dataclass(frozen=True)
class Recording:
    """One usable file: its header was read and fits."""

    name: str
    """For outputs: the file's name without its ending, or its path where two files share a name, with the
    ending where they share that too. No white space."""
    path: Path
    rate: int
    num_samples: int
    """At 16 kHz."""

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.num_samples / SAMPLE_RATE

    def read(self, start: int = 0, num_samples: int | None = None) -> Samples:
        """`num_samples` samples (None: all that are left) from sample `start` on, mono, 16 kHz.

        A file at another rate is decoded and resampled whole; others are read where they are asked for.

        Raises:
            AudioFault: whatever keeps them from being read.

        """
        with _naming(self.path):
            return self._read(start, num_samples)

    def _read(self, start: int, num_samples: int | None) -> Samples:
        if self.rate != SAMPLE_RATE:
            whole = _resampled(self.path)
            return whole[start : None if num_samples is None else start + num_samples]
        wanted = self.num_samples - start if num_samples is None else num_samples
        with open_audio(self.path) as audio:
            audio.seek(start)
            samples = audio.read(wanted, dtype="float32", always_2d=True)
        if len(samples) != wanted:
            raise AudioFault("truncated", f"found {len(samples)} samples from {start} on, not {wanted}")
        if not np.isfinite(samples).all():
            raise AudioFault("not_finite", "has samples that are NaN or infinite")
        return to_mono(samples).samples

    def statistics(self) -> Statistics:
        """Mean and variance of all samples, read in blocks.

        Raises:
            AudioFault: whatever keeps them from being read.

        """
        with _naming(self.path):
            return self._statistics()

    def _statistics(self) -> Statistics:
        if self.rate != SAMPLE_RATE:
            return _moments([_resampled(self.path)])
        with open_audio(self.path) as audio:
            return _moments(to_mono(np.asarray(block, np.float32)).samples for block in read_blocks(audio, "float32"))


def open_recordings(
    paths: Sequence[Path], *, resampling: bool = False, geometry: Geometry = STANDARD
) -> list[Recording]:
    """Every file's header, read and checked before anything is computed.

    Args:
        paths: audio files.
        resampling: take other rates than 16 kHz too (such files are held in memory whole).
        geometry: of the model; a file needs samples for one frame.

    Raises:
        RecordingError: files that are missing, empty, no audio, too short, at another rate, or named twice.

    """
    twice = [str(path) for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise RecordingError(f"{', '.join(twice[:_LISTED])}: given more than once")
    names = _names(paths)
    recordings, faults = [], []
    for path, name in zip(paths, names, strict=True):
        try:
            with _naming(path):
                recordings.append(_opened(name, path, resampling, geometry))
        except AudioFault as fault:
            faults.append(str(fault))
    if faults:
        raise RecordingError(first_of(faults))
    return recordings


def first_of(faults: Sequence[str]) -> str:
    """A message of what is wrong with several recordings: the first ten, a line each, and how many more there are."""
    more = f"\n... and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
    return "\n".join(faults[:_LISTED]) + more


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Faults of a file say which one it is."""
    try:
        yield
    except AudioFault as fault:
        if str(path) in fault.detail:
            raise
        raise AudioFault(fault.fault, f"{path}: {fault.detail}") from fault


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest that tell the files apart: without folder and ending, without ending, whole."""
    names: list[str] = [path.stem for path in paths]
    for longer in ([str(path.with_suffix("")) for path in paths], [str(path) for path in paths]):
        shared = Counter(names)
        names = [name if shared[name] == 1 else long for name, long in zip(names, longer, strict=True)]
    return ["_".join(name.split()) for name in names]


def _opened(name: str, path: Path, resampling: bool, geometry: Geometry) -> Recording:
    with open_audio(path) as audio:
        rate, frames = audio.samplerate, audio.frames
    if rate == SAMPLE_RATE:
        num_samples = frames
    elif resampling:
        num_samples = len(_resampled(path))
    else:
        expected = f"expected {SAMPLE_RATE} Hz; resample it, or ask for it (--resample, RunSettings(resampling=True))"
        raise AudioFault("wrong_rate", f"found {rate} Hz, {expected}")
    if num_samples < geometry.receptive_field:
        raise AudioFault("too_short", f"{num_samples} samples, expected at least {geometry.receptive_field} (25 ms)")
    return Recording(name, path, rate, num_samples)


@lru_cache(maxsize=1)
def _resampled(path: Path) -> Samples:
    wave = decode(path)
    return resample(to_mono(wave.samples).samples, wave.rate)


def _moments(blocks: Iterable[Samples]) -> Statistics:
    """Of all blocks together; means and deviations are merged, so that nothing cancels."""
    count, mean, deviation = 0, 0.0, 0.0
    for block in blocks:
        size, block_mean = len(block), float(block.mean(dtype=np.float64))
        shift = block_mean - mean
        deviation += float(block.var(dtype=np.float64)) * size + shift**2 * count * size / (count + size)
        mean += shift * size / (count + size)
        count += size
    return Statistics(mean, deviation / count)
