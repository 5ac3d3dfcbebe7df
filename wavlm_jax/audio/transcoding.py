"""What libsndfile does not know (m4a, mp4, webm, aac, wma, amr), decoded by PyAV where it is installed.

ffmpeg is told which demuxer to use, by the first bytes: those that open other files or addresses (playlists) are not
among them.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from wavlm_jax.audio.containers import ContradictionError, Stream
from wavlm_jax.extras import extra

_SLACK_SECONDS = 0.2
"""By which a header may count more: priming, and a last packet that is not full."""
_MOST_VALUES = 2**31
"""Samples of all channels: six hours of stereo at 48 kHz, 8 GiB of temporary file."""
_ADTS_SYNC, _ADTS_MASK = 0xFFF0, 0xFFF6
_AU_FLOAT = 6
_MAGIC = (
    (4, b"ftyp", "mov"),
    (4, b"moov", "mov"),
    (0, b"\x1aE\xdf\xa3", "matroska"),
    (0, b"0&\xb2u\x8ef\xcf\x11", "asf"),
    (0, b"#!AMR", "amr"),
)
_KEEPS_TIME = ("mov", "matroska")
"""Whose lengths are written down; of others ffmpeg only guesses them."""


def demuxer_of(head: bytes) -> str | None:
    """The name that ffmpeg has for the container that begins with these (at least 8) bytes; None: not one for PyAV."""
    found = next((name for at, magic, name in _MAGIC if head[at : at + len(magic)] == magic), None)
    return "aac" if found is None and int.from_bytes(head[:2], "big") & _ADTS_MASK == _ADTS_SYNC else found


@contextmanager
def as_au(file: Stream, demuxer: str) -> Iterator[Stream]:
    """The first sound track of `file` as a temporary AU file of float32 samples.

    Raises:
        MissingExtraError: PyAV is not installed.
        ContradictionError: unreadable, damaged, truncated, empty, too_long.
        OSError: the temporary file cannot be written.

    """
    with extra("containers", demuxer, ", or convert it to flac"):
        import av  # noqa: PLC0415 an extra
    with tempfile.TemporaryFile() as out:
        rate = channels = written = 0
        claimed = 0.0
        try:
            with av.open(file, format=demuxer) as container:
                if not container.streams.audio:
                    raise ContradictionError("unreadable", f"a {demuxer} without sound")
                claimed = _seconds(container) if demuxer in _KEEPS_TIME else 0.0
                for block in _blocks(av, container):
                    if not written:
                        rate, channels = block.sample_rate, len(block.layout.channels)
                        header = (24, 2**32 - 1, _AU_FLOAT, rate, channels)
                        out.write(b".snd" + b"".join(value.to_bytes(4, "big") for value in header))
                    samples = block.to_ndarray().astype(">f4")
                    written += samples.size
                    if written > _MOST_VALUES:
                        raise ContradictionError("too_long", f"more than {_MOST_VALUES} samples; split it")
                    out.write(samples.tobytes())
        except av.error.FFmpegError as error:
            raise ContradictionError("damaged", f"PyAV stopped reading: {error.strerror}") from error
        if not written:
            raise ContradictionError("empty", "0 samples")
        seconds = written / channels / rate
        if seconds < claimed - _SLACK_SECONDS:
            raise ContradictionError("truncated", f"found {seconds:.2f} s of sound, its header says {claimed:.2f} s")
        out.seek(0)
        yield out


def _seconds(container: Any) -> float:
    """How long the container says that the sound is; 0 where it does not (a recording of a browser)."""
    stream = container.streams.audio[0]
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    alone = len(container.streams) == 1 and container.duration is not None
    return container.duration / 1e6 if alone else 0.0


def _blocks(av: Any, container: Any) -> Iterator[Any]:
    """Frames of interleaved float32, all like the first."""
    resampler = None
    for frame in container.decode(container.streams.audio[0]):
        if resampler is None:
            resampler = av.AudioResampler(format="flt", layout=frame.layout, rate=frame.sample_rate)
        yield from resampler.resample(frame)
    if resampler is not None:
        yield from resampler.resample(None)
