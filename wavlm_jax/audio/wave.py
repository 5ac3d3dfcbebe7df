"""Decoding of audio files: bytes to samples, down-mixing and resampling, with a name for every fault (USERS #15).

Everything is read through libsndfile (wav, flac, mp3, ogg, opus). Files are hostile: a FIFO does not hang, a header
that lies is found by counting samples, and no memory is allocated for samples that a header only claims. Long files can
be read in blocks, so that memory does not grow with their length.
"""

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import soundfile
import soxr
from jaxtyping import Float32, Int16

from wavlm_jax.audio.mpeg import contents, with_length
from wavlm_jax.files import open_regular
from wavlm_jax.shapes import SAMPLE_RATE

FaultName = Literal[
    "missing",
    "not_a_file",
    "outside_root",
    "unreadable",
    "damaged",
    "truncated",
    "empty",
    "not_finite",
    "wrong_rate",
    "length_unknown",
    "length_mismatch",
    "checksum_mismatch",
    "too_short",
    "too_long",
]
"""What can be wrong with an audio file. "unreadable": not audio; "damaged": the decoder stopped with an error;
"truncated": fewer samples than its header says. too_short and too_long come from the length limits of a corpus, they
are not faults of the file."""

AudioSource: TypeAlias = "bytes | memoryview | Path"
FULL_SCALE = 32768
"""int16 samples are float samples in [-1, 1) times this."""

BLOCK_SAMPLES = 1 << 18
_MOST_SAMPLES = 1 << 40
"""libsndfile reports 2^63 - 1 samples for a FLAC whose header does not say; 2^40 are two years of 16 kHz audio."""


_LOSSY_SECONDS = 0.1
_ROUNDED_SECONDS = 0.05
_LOSSY = ("MP3", "OGG")
_DELAY_FRAMES = 6
"""Of MP3, at both ends: samples that are in the bytes and that the Info frame tells decoders to leave out."""


class AudioFault(ValueError):  # noqa: N818  (a fault is counted and skipped, an error stops)
    """One file or utterance that cannot be used: `fault` is a short name for counting, `detail` says what was found."""

    def __init__(self, fault: FaultName, detail: str) -> None:
        if fault not in get_args(FaultName):
            raise KeyError(fault)
        super().__init__(fault, detail)
        self.fault = fault
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.detail} ({self.fault})"


@dataclass(frozen=True)
class Wave:
    """Decoded audio: `samples` in [-1, 1] (floating-point files may exceed it) at `rate` Hz."""

    samples: Float32[np.ndarray, "samples channels"]
    rate: int


def decode(source: AudioSource) -> Wave:
    """The whole of an audio file.

    Raises:
        AudioFault: missing, not_a_file, unreadable, damaged, truncated, empty, not_finite, length_unknown.

    """
    with open_audio(source) as audio:
        samples = np.concatenate(list(read_blocks(audio, "float32")))
        return Wave(samples=samples, rate=audio.samplerate)


@contextmanager
def open_audio(source: AudioSource) -> Iterator[soundfile.SoundFile]:
    """An open libsndfile handle whose header was checked; errors of libsndfile inside the block become `AudioFault`.

    Raises:
        AudioFault: missing, not_a_file, unreadable, truncated, empty, length_unknown; damaged for what libsndfile
            reports while the caller reads.

    """
    handle = _regular_file(source) if isinstance(source, Path) else io.BytesIO(source)
    with handle:
        if not handle.seek(0, os.SEEK_END):
            raise AudioFault("empty", "0 bytes")
        handle.seek(0)
        try:
            with soundfile.SoundFile(handle) as audio:
                whole = _whole_mp3(audio, handle) if audio.format == "MP3" else None
                if whole is None:
                    _check_header(audio, handle)
                    yield audio
            if whole is not None:
                with soundfile.SoundFile(whole) as audio:
                    yield audio
        except (soundfile.LibsndfileError, soundfile.SoundFileRuntimeError, OSError) as error:
            raise _as_fault(error) from error


class Span(NamedTuple):
    """A part of a file: seconds, and one of its channels (None: all)."""

    start: float
    duration: float | None = None
    channel: int | None = None


def cut(path: Path, span: Span) -> "Path | bytes":
    """A part of an audio file as a WAV of the same samples; the file itself where the part is all of it.

    An end within 0.05 s of the file's end is the file's end: lists round.

    Raises:
        AudioFault: length_mismatch for a part that is not in the file; what `open_audio` raises.

    """
    with open_audio(path) as audio:
        rate, first = audio.samplerate, round(span.start * audio.samplerate)
        last = audio.frames if span.duration is None else round((span.start + span.duration) * rate)
        if abs(last - audio.frames) <= _ROUNDED_SECONDS * rate:
            last = audio.frames
        if not 0 <= first < last <= audio.frames or (span.channel or 0) >= audio.channels:
            found = f"{audio.frames / rate:.3f} s of {audio.channels} channels"
            raise AudioFault(
                "length_mismatch", f"found {found}, the list says {tuple(span)} (start, duration, channel)"
            )
        if (first, last) == (0, audio.frames) and (span.channel is None or audio.channels == 1):
            return path
        audio.seek(first)
        samples = audio.read(last - first, dtype="int16" if audio.subtype == "PCM_16" else "float32", always_2d=True)
    if len(samples) != last - first:
        raise AudioFault("truncated", f"found {len(samples)} samples from sample {first} on, expected {last - first}")
    kept = samples if span.channel is None else samples[:, span.channel]
    buffer = io.BytesIO()
    soundfile.write(buffer, kept, rate, format="WAV", subtype="PCM_16" if kept.dtype == np.int16 else "FLOAT")
    return buffer.getvalue()


def read_blocks(
    audio: soundfile.SoundFile, dtype: Literal["int16", "float32"]
) -> Iterator[Float32[np.ndarray, "samples channels"] | Int16[np.ndarray, "samples channels"]]:
    """The file from its start in blocks of at most `BLOCK_SAMPLES` values; checked: finite, as many as the header says.

    A lossy file may have 0.1 s less.

    Raises:
        AudioFault: not_finite, truncated.

    """
    done, size = 0, BLOCK_SAMPLES // audio.channels
    while done < audio.frames:
        block = audio.read(min(size, audio.frames - done), dtype=dtype, always_2d=True)
        if not len(block) and done and is_about(done, audio):
            return
        if not len(block):
            raise AudioFault("truncated", f"found {done} samples, its header says {audio.frames}")
        if block.dtype != np.int16 and not np.isfinite(block).all():
            where = done + int(np.argmin(np.isfinite(block).all(axis=1)))
            raise AudioFault("not_finite", f"sample {where} is NaN or infinite")
        done += len(block)
        yield block


def is_about(num_samples: int, audio: soundfile.SoundFile) -> bool:
    """Whether a file can have `num_samples`: lossy encoders' delay makes what their headers say a hint (0.1 s)."""
    slack = _LOSSY_SECONDS * audio.samplerate if audio.format in _LOSSY else 0
    return abs(num_samples - audio.frames) <= slack


def num_samples_of(audio: soundfile.SoundFile) -> int:
    """Samples that reading gives: of a lossy file by decoding it, as its header is a hint; else the header's number."""
    if audio.format not in _LOSSY:
        return audio.frames
    counted = sum(len(block) for block in read_blocks(audio, "float32"))
    audio.seek(0)
    return counted


def read_crop(source: AudioSource, start: int, num_samples: int | None) -> Int16[np.ndarray, "samples"]:
    """`num_samples` samples (None: all that are left) from sample `start` on of a mono 16-bit file; decodes only those.

    Raises:
        AudioFault: whatever keeps the crop from being read, and truncated where it is shorter than asked for.

    """
    with open_audio(source) as audio:
        wanted = audio.frames - start if num_samples is None else num_samples
        if start:
            audio.seek(start)
        samples: Int16[np.ndarray, "samples"] = audio.read(wanted, dtype="int16")
    if samples.ndim != 1 or len(samples) != wanted:
        found = "x".join(str(size) for size in samples.shape)
        raise AudioFault("truncated", f"found {found} samples from sample {start} on, expected {wanted}")
    return samples


def to_mono(samples: Float32[np.ndarray, "samples channels"]) -> Float32[np.ndarray, "samples"]:
    """The mean over the channels (the down-mix rule for stereo, 5.1 and the rest)."""
    return samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)


def resample(
    samples: Float32[np.ndarray, "samples"], rate: int, target: int = SAMPLE_RATE
) -> Float32[np.ndarray, "resampled"]:
    """`samples` at `target` Hz (soxr, high quality); about len(samples) * target / rate of them."""
    if rate == target:
        return samples
    resampled: Float32[np.ndarray, "resampled"] = soxr.resample(samples, rate, target)
    return resampled


def to_int16(samples: Float32[np.ndarray, "samples"]) -> Int16[np.ndarray, "samples"]:
    """Rounded to int16 and clipped at full scale; no dither, so the result is deterministic."""
    return np.clip(np.rint(samples * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)


def encode_flac(samples: Int16[np.ndarray, "samples"], rate: int = SAMPLE_RATE) -> bytes:
    """A mono 16-bit FLAC file."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def _regular_file(path: Path) -> io.FileIO:
    try:
        return open_regular(path)
    except FileNotFoundError as error:
        raise AudioFault("missing", f"{path}: no such file, or a link to nowhere") from error
    except OSError as error:
        fault: FaultName = "not_a_file" if error.errno == errno.EINVAL else "unreadable"
        raise AudioFault(fault, f"{path}: {error.strerror}") from error


def _whole_mp3(audio: soundfile.SoundFile, handle: io.IOBase) -> io.BytesIO | None:
    """The file with a header that counts all its frames, where the one it has counts fewer; else None."""
    position = handle.tell()
    handle.seek(0)
    data = handle.read()
    handle.seek(position)
    found = contents(data)
    if not found.num_frames:
        return None
    delay = _DELAY_FRAMES * found.num_samples // found.num_frames
    return io.BytesIO(with_length(data, found)) if found.num_samples > audio.frames + delay else None


def _check_header(audio: soundfile.SoundFile, handle: io.IOBase) -> None:
    if audio.frames > _MOST_SAMPLES:
        raise AudioFault(
            "length_unknown", "its header does not say how many samples it holds (written to a pipe?); encode it again"
        )
    if audio.frames == 0:
        raise AudioFault("empty", "0 samples")
    if audio.format == "WAV":
        _check_riff_size(audio, handle)


def _check_riff_size(audio: soundfile.SoundFile, handle: io.IOBase) -> None:
    """Refuses a WAV that was cut off: libsndfile shortens it silently, but its RIFF header says the original size.

    0 and 2^32 - 1 mean that the size was unknown when the header was written (a stream).
    """
    position = handle.tell()
    handle.seek(4)
    claimed = int.from_bytes(handle.read(4), "little")
    found = handle.seek(0, os.SEEK_END)
    handle.seek(position)
    if claimed not in (0, 0xFFFFFFFF) and claimed + 8 > found + 1:
        raise AudioFault(
            "truncated", f"{found} bytes ({audio.frames} samples), its RIFF header says {claimed + 8} bytes"
        )


def _as_fault(error: Exception) -> AudioFault:
    message = str(error).removeprefix("Error : ")
    if "Error opening" in message:
        return AudioFault("unreadable", f"not audio that libsndfile knows ({message.rpartition(': ')[2]})")
    return AudioFault("damaged", f"libsndfile stopped reading: {message}")
