"""MP3 files counted frame by frame: what their bytes hold, where no header says it or the header is of one part only.

libsndfile takes the length from the Info (Xing) frame, or guesses it from the bit rate of the first frame, and reads no
further. A file without one, or of several that were joined, is given an Info frame that counts all of it.
Frame headers: ISO 11172-3 section 2.4.1.3 and ISO 13818-3.
"""

import re
import struct
from typing import NamedTuple

_KBITS = {
    True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
_SYNC_AND_LAYER, _SYNC_AND_LAYER_3 = 0xFFE60000, 0xFFE20000
_MPEG_1, _MONO, _NO_RATE = 3, 3, 3
_ROOM = 9
"""Index of a bit rate whose frames hold an Info header at every sampling rate."""
_FRAME_OR_TAG = re.compile(rb"\xff|ID3")
"""One search for both: a search for each would read the rest of a file without tags at every byte of 255."""


class _Frame(NamedTuple):
    size: int
    samples: int
    kind: bytes
    """What all frames of a stream have in common: version, layer and sampling rate."""


class Contents(NamedTuple):
    """Of an MP3 file's bytes."""

    start: int
    """The first frame's position."""
    num_frames: int
    num_samples: int
    """Of all channels at once; with the encoder's delay and the Info frame."""


def contents(data: bytes | memoryview) -> Contents:
    """The layer III frames in `data`; tags and rubbish between them are passed over."""
    data = bytes(data)
    at, start, num_frames, num_samples, kind, lost = 0, 0, 0, 0, b"", True
    while 0 <= at < len(data) - 4:
        if data[at : at + 3] == b"ID3":
            at, lost = at + 10 + synchsafe(data[at + 6 : at + 10]), True
            continue
        frame = _frame(data[at : at + 4])
        if frame is None or (kind and frame.kind != kind) or (lost and not _followed(data, at + frame.size, frame)):
            following = _FRAME_OR_TAG.search(data, at + 1)
            at, lost = following.start() if following else -1, True
            continue
        if not num_frames:
            start, kind = at, frame.kind
        num_frames, num_samples = num_frames + 1, num_samples + frame.samples
        at, lost = at + frame.size, False
    return Contents(start, num_frames, num_samples)


def with_length(data: bytes, found: Contents) -> tuple[bytes, range]:
    """An Info frame that counts all frames, and the bytes that follow it: from the first frame on."""
    head = bytearray(data[found.start : found.start + 4])
    head[1] |= 1  # no checksum
    head[2] = _ROOM << 4 | head[2] & 0b1100
    frame, first, mono = _frame(bytes(head)), head[1] >> 3 & 3 == _MPEG_1, head[3] >> 6 == _MONO
    side = (17 if mono else 32) if first else (9 if mono else 17)
    info = bytes(head) + bytes(side) + b"Info" + struct.pack(">II", 1, found.num_frames)
    return info.ljust(frame.size if frame else 0, b"\0"), range(found.start, len(data))


def _frame(head: bytes) -> _Frame | None:
    """A layer III frame's header, or None."""
    word = int.from_bytes(head[:4], "big")
    if word & _SYNC_AND_LAYER != _SYNC_AND_LAYER_3:
        return None
    version, rate, bits = head[1] >> 3 & 3, head[2] >> 2 & 3, head[2] >> 4
    if version not in _RATES or rate == _NO_RATE or bits in (0, 15):
        return None
    samples = 1152 if version == _MPEG_1 else 576
    size = samples // 8 * _KBITS[version == _MPEG_1][bits] * 1000 // _RATES[version][rate] + (head[2] >> 1 & 1)
    return _Frame(size, samples, bytes((version, rate)))


def _followed(data: bytes, at: int, frame: _Frame) -> bool:
    """Whether another frame of the same kind, or the end, stands at `at`: two bytes alone occur by chance."""
    following = _frame(data[at : at + 4])
    return at == len(data) or (following is not None and following.kind == frame.kind)


def synchsafe(size: bytes) -> int:
    """An ID3v2 size: seven bits per byte."""
    return sum((byte & 127) << 7 * (3 - number) for number, byte in enumerate(size))
