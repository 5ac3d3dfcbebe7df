"""Decoding of audio files: bytes to samples, down-mixing and resampling, with a name for every fault (USERS #15).

Everything is read through libsndfile (wav, flac, mp3, ogg, opus), what it does not know through PyAV (m4a, webm). Files
are hostile: a FIFO does not hang, a header that lies is found by comparing it with the bytes and with the samples, and
no memory is allocated for samples that a header only claims. Long files can be read in blocks, so that memory does not
grow with their length.
"""

import errno
import io
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import soundfile
import soxr
from jaxtyping import Float32, Int16

from wavlm_jax.audio.containers import CHECKED, ContradictionError, Parts, Spliced, Stream, whole
from wavlm_jax.audio.transcoding import as_au, demuxer_of
from wavlm_jax.extras import MissingExtraError
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
    "length_mismatch",
    "checksum_mismatch",
    "too_short",
    "too_long",
]
"""What can be wrong with an audio file. "unreadable": not audio; "damaged": the decoder stopped with an error;
"truncated": fewer samples than its header says; "length_mismatch": more, or another number than a manifest says.
too_short and too_long come from the length limits of a corpus, they are not faults of the file."""

AudioSource: TypeAlias = "bytes | memoryview | Path"
FULL_SCALE = 32768
"""int16 samples are float samples in [-1, 1) times this."""

BLOCK_SAMPLES = 1 << 18
_LOSSY_SECONDS = 0.1
_ROUNDED_SECONDS = 0.05
_LOSSY = ("MP3", "OGG")
_RATES = (2_000, 768_000)
"""Hz. A header that claims less or more makes hours of a few bytes, or the other way round."""
MOST_SECONDS = 24 * 3600.0
"""Of one file, where nobody gives another limit: what cannot be meant is refused."""
_MOST_SCANS = 4096


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
        AudioFault: whatever keeps it from being read.

    """
    with open_audio(source) as audio:
        samples = np.concatenate(list(read_blocks(audio, "float32")))
        return Wave(samples=samples, rate=audio.samplerate)


class Audio(soundfile.SoundFile):
    """A libsndfile handle whose errors are an `AudioFault`: those of others are not touched."""

    mended = False
    """Whether its header is one of ours."""
    transcoded = False
    """Whether its samples were decoded before, by PyAV."""

    def read(self, *how: Any, **more: Any) -> Any:
        """See soundfile."""
        with _as_faults():
            return super().read(*how, **more)

    def seek(self, frames: int, whence: int = os.SEEK_SET) -> int:
        """See soundfile. A file that cannot seek (GSM) is read up to there, from where it stands."""
        with _as_faults():
            if self.seekable():
                return int(super().seek(frames, whence))
            left = frames
            while left and (found := len(super().read(min(left, BLOCK_SAMPLES)))):
                left -= found
            return frames - left


@contextmanager
def open_audio(source: AudioSource, *, joined: bool = True) -> Iterator[Audio]:
    """An open libsndfile handle whose header was checked, and compared with the bytes that are there.

    Args:
        source: bytes or path of an audio file.
        joined: see `containers.whole`; what a corpus stores was searched when it was made.

    Raises:
        AudioFault: missing, not_a_file, unreadable, truncated, empty, wrong_rate (no rate of sound), length_mismatch;
            damaged for what libsndfile reports while the caller reads.

    """
    with ExitStack() as stack:
        handle: Stream = _regular_file(source) if isinstance(source, Path) else io.BytesIO(source)
        stack.enter_context(handle)
        with _as_faults():
            if not handle.seek(0, os.SEEK_END):
                raise AudioFault("empty", "0 bytes")
            handle.seek(0)
            demuxer = demuxer_of(handle.read(16))
            handle.seek(0)
            if demuxer is not None:
                handle = stack.enter_context(as_au(handle, demuxer))
            parts = _scanned(handle, joined) if demuxer is None else None
            audio = stack.enter_context(Audio(handle if parts is None else Spliced(handle, parts)))
        audio.mended, audio.transcoded = parts is not None, demuxer is not None
        _check_header(audio)
        yield audio


_scans: dict[tuple[int, ...], Parts | None] = {}


def _scanned(handle: Stream, joined: bool) -> Parts | None:
    """`containers.whole`, once for each version of a file: some formats have to be read to their end."""
    version = version_of(os.fstat(handle.fileno())) if isinstance(handle, io.FileIO) else ()
    if version in _scans:
        return _scans[version]
    parts = whole(handle, joined=joined or bool(version))
    handle.seek(0)
    if version:
        if len(_scans) >= _MOST_SCANS:
            _scans.clear()
        _scans[version] = parts
    return parts


def version_of(status: os.stat_result) -> tuple[int, ...]:
    """Another tuple for another file, and for one that was written anew."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


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
    with open_audio(source, joined=False) as audio:
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


def _check_header(audio: Audio) -> None:
    if audio.format not in CHECKED:
        raise AudioFault(
            "unreadable", f"{audio.format}, a kind whose length cannot be checked; convert it to wav or flac"
        )
    if audio.frames == 0:
        raise AudioFault("empty", "0 samples")
    if not _RATES[0] <= audio.samplerate <= _RATES[1]:
        found = f"its header says {audio.samplerate} Hz"
        raise AudioFault("wrong_rate", f"{found}, expected {_RATES[0]} to {_RATES[1]}; the header is damaged")


@contextmanager
def _as_faults() -> Iterator[None]:
    """Errors of libsndfile, and of reading a file's bytes, as an `AudioFault`."""
    try:
        yield
    except ContradictionError as error:
        raise AudioFault(*error.args) from error
    except MissingExtraError as error:
        raise AudioFault("unreadable", str(error)) from error
    except soundfile.SoundFileError as error:
        message = str(error).removeprefix("Error : ")
        if "Error opening" in message:
            detail = f"not audio that libsndfile knows ({message.rpartition(': ')[2]})"
            raise AudioFault("unreadable", detail) from error
        raise AudioFault("damaged", f"libsndfile stopped reading: {message}") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:  # of the place for temporary files
            raise
        raise AudioFault("unreadable", f"its bytes cannot be read: {error.strerror}") from error
