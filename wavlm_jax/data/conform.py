"""One audio file brought to the form of a corpus: 16 kHz, mono, 16 bit, FLAC, with its faults named.

Works in blocks, so that a recording of hours takes no more memory than its FLAC bytes. A file that has this form
already is kept byte for byte, after all of it was decoded and compared with the checksum in its header.
"""

import dataclasses
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

from wavlm_jax.audio.wave import (
    FULL_SCALE,
    MOST_SECONDS,
    Audio,
    AudioFault,
    AudioSource,
    is_about,
    open_audio,
    read_blocks,
    to_int16,
    to_mono,
)
from wavlm_jax.shapes import SAMPLE_RATE, samples_for

WarningName = Literal["down_mix_cancels", "silent", "clipped", "rest_too_short"]
"""What is odd about a file that is kept. "rest_too_short": what followed its last whole piece was left out."""
_CANCELLED_POWER = 0.01
"""Share of the channels' power that a down-mix keeps at least, unless they cancel each other (one microphone wired the
wrong way round). Unrelated channels keep 1 / channels."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What to do with audio of another rate or length than a corpus should have."""

    rate: Literal["error", "resample"] = "error"
    min_samples: int = samples_for(1)
    """At 16 kHz. Shorter utterances are dropped; 400 samples give one frame."""
    max_samples: int | None = None
    long: Literal["drop", "split"] = "drop"
    """Longer than `max_samples`: dropped, or cut into pieces of that length. The text and phones of the
    whole are not those of a piece, so that no piece has any."""

    def __post_init__(self) -> None:
        if self.max_samples is not None and self.max_samples < self.min_samples:
            raise ValueError(
                f"the longest utterance allowed has {self.max_samples} samples, the shortest {self.min_samples}; "
                "expected more (--max-seconds, --min-seconds)"
            )


@dataclass(frozen=True)
class Conformed:
    """One utterance as a corpus stores it."""

    flac: bytes
    num_samples: int
    mean: float
    variance: float
    """Mean and population variance in [-1, 1] scale, exact over the int16 samples."""
    digest: bytes
    """SHA-256 of the samples as little-endian int16."""
    piece: int | None = None
    """Which piece of a file that was cut, from 0 on; None: the whole file."""


def conform(
    source: AudioSource, policy: Policy, declared: int | None = None
) -> tuple[list[Conformed], set[WarningName]]:
    """The utterances in an audio file: one, or several where the policy splits long ones.

    Args:
        source: bytes or path of an audio file.
        policy: limits, and what to do with other rates.
        declared: samples that a manifest claims, counted at the file's own rate.

    Raises:
        AudioFault: what is wrong, by name.

    """
    with open_audio(source) as audio:
        _check(audio, policy, declared)
        warnings: set[WarningName] = set()
        kept_form = not audio.mended and (audio.format, audio.subtype, audio.channels, audio.samplerate) == (
            "FLAC",
            "PCM_16",
            1,
            SAMPLE_RATE,
        )
        if kept_form and (policy.max_samples is None or audio.frames <= policy.max_samples):
            flac = source.read_bytes() if isinstance(source, Path) else bytes(source)
            pieces = [_measured(audio, flac)]
        else:
            limit = policy.max_samples if policy.long == "split" else None
            pieces = list(_encoded(_int16_blocks(audio, warnings), limit))
            if len(pieces) > 1:
                pieces = [dataclasses.replace(piece, piece=number) for number, piece in enumerate(pieces)]
    if not any(piece.variance for piece in pieces):
        warnings.add("silent")
    kept = [piece for piece in pieces if piece.num_samples >= policy.min_samples]
    if not kept:
        found = sum(piece.num_samples for piece in pieces)
        raise AudioFault("too_short", f"{found} samples, the shortest allowed are {policy.min_samples}")
    if len(kept) < len(pieces):
        warnings.add("rest_too_short")
    return kept, warnings


def _check(audio: Audio, policy: Policy, declared: int | None) -> None:
    """What a header tells: the manifest's length, the rate, the longest length."""
    if declared is not None and not is_about(declared, audio):
        raise AudioFault("length_mismatch", f"found {audio.frames} samples, the manifest says {declared}")
    if audio.samplerate != SAMPLE_RATE and policy.rate == "error":
        raise AudioFault("wrong_rate", f"{audio.samplerate} Hz, expected {SAMPLE_RATE}; pass --rate-policy resample")
    num_samples = round(audio.frames * SAMPLE_RATE / audio.samplerate)
    most = int(MOST_SECONDS * SAMPLE_RATE) if policy.max_samples is None else policy.max_samples
    if num_samples > most and policy.long == "drop":
        raise AudioFault("too_long", f"{num_samples} samples, the longest allowed are {most} (--max-seconds)")


@dataclass
class _Measures:
    """Sums over int16 samples in exact integers, so that they do not depend on the blocks."""

    num_samples: int = 0
    total: int = 0
    squares: int = 0
    sha256: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    def add(self, samples: Int16[np.ndarray, "samples"]) -> None:
        wide = samples.astype(np.float64)  # exact: 2^30 per square and 2^18 samples a block stay below 2^53
        self.num_samples += len(samples)
        self.total += int(wide.sum())
        self.squares += int(np.square(wide, out=wide).sum())
        self.sha256.update(samples.astype("<i2", copy=False).tobytes())

    def conformed(self, flac: bytes) -> Conformed:
        """The utterance with these samples."""
        mean = self.total / self.num_samples
        variance = max(self.squares / self.num_samples - mean * mean, 0.0)
        return Conformed(flac, self.num_samples, mean / FULL_SCALE, variance / FULL_SCALE**2, self.sha256.digest())


def _measured(audio: soundfile.SoundFile, flac: bytes) -> Conformed:
    """A FLAC file that is stored as it is; its samples are decoded and compared with the MD5 in its first block."""
    measures, md5 = _Measures(), hashlib.md5(usedforsecurity=False)  # against damage, not against an adversary
    for block in read_blocks(audio, "int16"):
        measures.add(block[:, 0])
        md5.update(block.astype("<i2", copy=False).tobytes())
    stored = flac[26:42] if flac[:4] == b"fLaC" else b""
    if any(stored) and stored != md5.digest():  # all zero: the encoder left it out
        raise AudioFault(
            "checksum_mismatch", f"samples have MD5 {md5.hexdigest()}, the FLAC header says {stored.hex()}"
        )
    return measures.conformed(flac)


def _int16_blocks(audio: soundfile.SoundFile, warnings: set[WarningName]) -> Iterator[Int16[np.ndarray, "samples"]]:
    """The file as 16 kHz mono int16; 16-bit mono at 16 kHz passes unchanged."""
    if (audio.subtype, audio.channels, audio.samplerate) == ("PCM_16", 1, SAMPLE_RATE):
        yield from (block[:, 0] for block in read_blocks(audio, "int16"))
        return
    for block in _resampled(_mono_blocks(audio, warnings), audio.samplerate):
        if np.abs(block).max(initial=0.0) > 1:
            warnings.add("clipped")
        yield to_int16(block)


def _mono_blocks(audio: soundfile.SoundFile, warnings: set[WarningName]) -> Iterator[Float32[np.ndarray, "samples"]]:
    mono_energy = channel_energy = 0.0
    for block in read_blocks(audio, "float32"):
        mono = to_mono(block)
        mono_energy += float(np.square(mono, dtype=np.float64).sum())
        channel_energy += float(np.square(block, dtype=np.float64).sum()) / audio.channels
        yield mono
    if mono_energy < _CANCELLED_POWER * channel_energy:
        warnings.add("down_mix_cancels")


def _resampled(blocks: Iterator[Float32[np.ndarray, "samples"]], rate: int) -> Iterator[Float32[np.ndarray, "samples"]]:
    if rate == SAMPLE_RATE:
        yield from blocks
        return
    stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")
    for block in blocks:
        yield stream.resample_chunk(block)
    yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


class _FlacWriter:
    """A FLAC file in memory, and the measures of its samples."""

    def __init__(self) -> None:
        self.measures = _Measures()
        self._buffer = io.BytesIO()
        self._file = soundfile.SoundFile(self._buffer, "w", SAMPLE_RATE, 1, "PCM_16", format="FLAC")

    def add(self, samples: Int16[np.ndarray, "samples"]) -> None:
        self._file.write(samples)
        self.measures.add(samples)

    def close(self) -> Conformed:
        self._file.close()
        return self.measures.conformed(self._buffer.getvalue())


def _encoded(blocks: Iterator[Int16[np.ndarray, "samples"]], limit: int | None) -> Iterator[Conformed]:
    """FLAC files of at most `limit` samples each."""
    writer = _FlacWriter()
    for block in blocks:
        rest = block
        while limit is not None and writer.measures.num_samples + len(rest) >= limit:
            room = limit - writer.measures.num_samples
            writer.add(rest[:room])
            yield writer.close()
            writer, rest = _FlacWriter(), rest[room:]
        writer.add(rest)
    if writer.measures.num_samples:
        yield writer.close()
