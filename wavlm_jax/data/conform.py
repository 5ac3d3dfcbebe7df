"""One audio file brought to the form of a corpus: 16 kHz, mono, 16 bit, FLAC, with its faults named.

Works in blocks, so that a recording of hours takes no more memory than its FLAC bytes. A file that has the right form
is kept byte for byte.
"""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
import soxr
from jaxtyping import Float32, Int16

from wavlm_jax.audio import wave
from wavlm_jax.audio.wave import FULL_SCALE, AudioFault, AudioSource
from wavlm_jax.shapes import SAMPLE_RATE, samples_for

WarningName = Literal["down_mix_cancels", "silent", "clipped"]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What is done with audio that is not as wanted."""

    rate: Literal["error", "resample"] = "error"
    min_samples: int = samples_for(1)
    """At 16 kHz. Shorter utterances are dropped; 400 samples give one frame."""
    max_samples: int | None = None
    long: Literal["drop", "split"] = "drop"
    """Longer than `max_samples`: dropped, or cut into pieces of that length (which lose text and phones)."""

    def __post_init__(self) -> None:
        if self.max_samples is not None and self.max_samples < self.min_samples:
            raise ValueError(
                f"the longest utterance allowed has {self.max_samples} samples, the shortest {self.min_samples}; "
                "expected more (--max-seconds, --min-seconds)"
            )


@dataclass(frozen=True)
class Conformed:
    """One utterance as a corpus holds it."""

    flac: bytes
    num_samples: int
    mean: float
    variance: float
    """Mean and population variance in [-1, 1] scale, exact over the int16 samples."""
    digest: bytes
    """SHA-256 of the samples as little-endian int16."""


@dataclass
class Measures:
    """Sums over int16 samples, in exact integers, so that they do not depend on how the samples come in blocks."""

    num_samples: int = 0
    total: int = 0
    squares: int = 0
    sha256: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    def add(self, samples: Int16[np.ndarray, "samples"]) -> None:
        """Count one more block in."""
        wide = samples.astype(np.float64)  # exact: 2^30 per square and 2^18 samples a block stay below 2^53
        self.num_samples += len(samples)
        self.total += int(wide.sum())
        self.squares += int(np.square(wide, out=wide).sum())
        self.sha256.update(samples.astype("<i2", copy=False).tobytes())

    def conformed(self, flac: bytes) -> Conformed:
        """The utterance whose samples these are."""
        mean = self.total / self.num_samples
        variance = self.squares / self.num_samples - mean * mean
        return Conformed(
            flac, self.num_samples, mean / FULL_SCALE, max(variance, 0.0) / FULL_SCALE**2, self.sha256.digest()
        )


class Encoder:
    """A FLAC file in the making, and the measures of what went in."""

    def __init__(self) -> None:
        self.measures = Measures()
        self._buffer = io.BytesIO()
        self._file = soundfile.SoundFile(self._buffer, "w", SAMPLE_RATE, 1, "PCM_16", format="FLAC")

    def add(self, samples: Int16[np.ndarray, "samples"]) -> None:
        """Append a block."""
        self._file.write(samples)
        self.measures.add(samples)

    def close(self) -> Conformed:
        """Finish the file."""
        self._file.close()
        return self.measures.conformed(self._buffer.getvalue())


def conform(
    source: AudioSource, policy: Policy, declared: int | None = None
) -> tuple[list[Conformed], set[WarningName]]:
    """The utterances in an audio file: one, or several if the policy splits long ones.

    Args:
        source: bytes or path of an audio file.
        policy: limits, and what to do with other rates.
        declared: samples that a manifest claims, counted at the file's own rate.

    Raises:
        AudioFault: what is wrong, by name.

    """
    with wave.open_audio(source) as audio:
        _check_length(audio, declared)
        _check_policy(audio, policy)
        warnings: set[WarningName] = set()
        if _is_conform(audio) and (policy.max_samples is None or audio.frames <= policy.max_samples):
            flac = source.read_bytes() if isinstance(source, Path) else bytes(source)
            pieces = [_measure_as_is(audio, flac).conformed(flac)]
        else:
            limit = policy.max_samples if policy.long == "split" else None
            pieces = list(_encode(_int16_blocks(audio, warnings), limit))
    if not any(piece.variance for piece in pieces):
        warnings.add("silent")
    kept = [piece for piece in pieces if piece.num_samples >= policy.min_samples]
    if not kept:
        found = sum(piece.num_samples for piece in pieces)
        raise AudioFault("too_short", f"{found} samples, the shortest allowed are {policy.min_samples}")
    return kept, warnings


def _is_conform(audio: soundfile.SoundFile) -> bool:
    form = (audio.format, audio.subtype, audio.channels, audio.samplerate)
    return form == ("FLAC", "PCM_16", 1, SAMPLE_RATE)


def _check_length(audio: soundfile.SoundFile, declared: int | None) -> None:
    if declared is not None and declared != audio.frames:
        raise AudioFault("length_mismatch", f"found {audio.frames} samples, the manifest says {declared}")


def _check_policy(audio: soundfile.SoundFile, policy: Policy) -> None:
    if audio.samplerate != SAMPLE_RATE and policy.rate == "error":
        raise AudioFault("wrong_rate", f"{audio.samplerate} Hz, expected {SAMPLE_RATE}; pass --rate-policy resample")
    num_samples = round(audio.frames * SAMPLE_RATE / audio.samplerate)
    if policy.max_samples is not None and num_samples > policy.max_samples and policy.long == "drop":
        raise AudioFault("too_long", f"{num_samples} samples, the longest allowed are {policy.max_samples}")


def _measure_as_is(audio: soundfile.SoundFile, flac: bytes) -> Measures:
    """Decodes the whole file all the same: its header is believed only where its samples agree."""
    measures, md5 = Measures(), wave.samples_md5()
    for block in wave.read_blocks(audio, "int16"):
        measures.add(block[:, 0])
        md5.update(block.astype("<i2", copy=False).tobytes())
    wave.check_md5(flac, md5.hexdigest())
    return measures


def _int16_blocks(audio: soundfile.SoundFile, warnings: set[WarningName]) -> Iterator[Int16[np.ndarray, "samples"]]:
    """The file as 16 kHz mono int16; 16-bit mono at the right rate goes through untouched."""
    if (audio.subtype, audio.channels, audio.samplerate) == ("PCM_16", 1, SAMPLE_RATE):
        yield from (block[:, 0] for block in wave.read_blocks(audio, "int16"))
        return
    for block in _resampled(_mono_blocks(audio, warnings), audio.samplerate):
        if np.abs(block).max(initial=0.0) > 1:
            warnings.add("clipped")
        yield wave.to_int16(block)


def _mono_blocks(audio: soundfile.SoundFile, warnings: set[WarningName]) -> Iterator[Float32[np.ndarray, "samples"]]:
    mono_energy = channel_energy = 0.0
    for block in wave.read_blocks(audio, "float32"):
        mono = wave.to_mono(block).samples
        mono_energy += wave.power(mono) * len(mono)
        channel_energy += wave.power(block) * len(mono)
        yield mono
    if wave.cancels_out(mono_energy, channel_energy):
        warnings.add("down_mix_cancels")


def _resampled(blocks: Iterator[Float32[np.ndarray, "samples"]], rate: int) -> Iterator[Float32[np.ndarray, "samples"]]:
    if rate == SAMPLE_RATE:
        yield from blocks
        return
    stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")
    for block in blocks:
        yield stream.resample_chunk(block)
    yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def _encode(blocks: Iterator[Int16[np.ndarray, "samples"]], limit: int | None) -> Iterator[Conformed]:
    """FLAC files of at most `limit` samples each."""
    encoder = Encoder()
    for block in blocks:
        rest = block
        while limit is not None and encoder.measures.num_samples + len(rest) >= limit:
            room = limit - encoder.measures.num_samples
            encoder.add(rest[:room])
            yield encoder.close()
            encoder, rest = Encoder(), rest[room:]
        encoder.add(rest)
    if encoder.measures.num_samples:
        yield encoder.close()
