"""What a container promises and what its bytes hold, compared before anything is decoded.

libsndfile takes the smaller of the two and says nothing, and takes no part of what is joined behind it. Here a file
that was cut off and one that holds more than its header counts are named; one whose header does not know its length (a
stream, a recorder that was killed) gets a header that does. Layouts: RIFF, RF64 (EBU Tech 3306), Sony Wave64, AIFF
(EA IFF 85), CAF, AU, NIST SPHERE, FLAC (RFC 9639), Ogg (RFC 3533).
"""

import io
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import soundfile

from wavlm_jax.audio.mpeg import contents, synchsafe, with_length

CHECKED = frozenset({"WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "NIST", "CAF", "FLAC", "OGG", "MP3", "HTK"})
"""Formats whose length is compared with the bytes; of HTK libsndfile does it."""
Stream: TypeAlias = io.FileIO | io.BufferedIOBase
Parts: TypeAlias = Sequence[bytes | range]
"""A file as pieces: bytes of ours, and ranges of its own."""

_MOST_CHUNKS = 100_000
_STREAM_SIZES = (0x7F000000, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)
"""What programs that write to a pipe put in the place of a size (sox, arecord, ffmpeg and others), or a header less."""
_TO_THE_END = (b"riff", b"NIST")
"""Formats of which libsndfile takes whatever follows the samples as samples."""
_HEADER_BYTES = 4096
_BLOCK = 1 << 20
_DELAY_FRAMES = 6
"""Of MP3, at both ends: samples that are in the bytes and that the Info frame tells decoders to leave out."""
_MP3_COUNTS = (b"Xing", b"Info", b"VBRI")
"""In the first frame of an MP3 that says how many there are."""
_FLAC_STREAM = b"fLaC\0\0\0\x22"
_FLAC_TOTAL = 21
"""Where its 36 bits begin: in the lower half of this byte."""
_CONTINUED, _BEGINS, _ENDS = 1, 2, 4


class ContradictionError(ValueError):
    """A header and its bytes disagree. Arguments: the name of the fault, and what was found."""


class Spliced(io.RawIOBase):
    """A file to read that consists of `parts` of `file`."""

    def __init__(self, file: Stream, parts: Parts) -> None:
        self._file, self._parts, self._at = file, parts, 0

    def readable(self) -> bool:  # noqa: D102
        return True

    def seekable(self) -> bool:  # noqa: D102
        return True

    def tell(self) -> int:  # noqa: D102
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:  # noqa: D102
        self._at = offset + (0, self._at, sum(map(len, self._parts)))[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:  # noqa: D102
        view, done, begin = memoryview(buffer).cast("B"), 0, 0
        for part in self._parts:
            inside = self._at + done - begin
            if 0 <= inside < len(part) and done < len(view):
                piece = part[inside : inside + len(view) - done]
                data = piece if isinstance(piece, bytes) else _bytes_at(self._file, piece.start, len(piece))
                view[done : done + len(data)] = data
                done += len(data)
            begin += len(part)
        self._at += done
        return done


def whole(file: Stream, *, joined: bool = True) -> Parts | None:
    """The parts of `file` with a header that is true; None: the file as it is.

    Args:
        file: an audio file.
        joined: whether a FLAC is searched for another behind it, which reads all of it.

    Raises:
        ContradictionError: truncated, length_mismatch.

    """
    size = file.seek(0, io.SEEK_END)
    head = _bytes_at(file, 0, 64)
    skipped = 10 + synchsafe(head[6:10]) if head[:3] == b"ID3" else 0
    if _bytes_at(file, skipped, 4) == b"fLaC":
        return _whole_flac(file, skipped, size, joined=joined)
    if head[:4] == b"OggS":
        return _whole_ogg(file, size)
    extent = _extent(file, head, size)
    if extent is not None:
        return _whole_extent(file, head, size, extent)
    file.seek(0)
    with soundfile.SoundFile(file) as audio:
        return _whole_mp3(audio, file, size) if audio.format == "MP3" else None


class _Extent(NamedTuple):
    """Where the samples lie."""

    start: int
    claimed: int
    """Bytes, as the header says."""
    field: range = range(0)
    """The bytes of the header that say so."""
    order: str = "little"
    align: int = 1


class _Form(NamedTuple):
    """How a format of chunks is laid out."""

    first: int
    name: int
    """Bytes of a chunk's name."""
    width: int
    """Bytes of a chunk's size."""
    order: str
    align: int
    samples: bytes
    """The chunk that has the samples."""
    counts_itself: bool = False


_FORMS = {
    b"RIFF": _Form(12, 4, 4, "little", 2, b"data"),
    b"RIFX": _Form(12, 4, 4, "big", 2, b"data"),
    b"RF64": _Form(12, 4, 4, "little", 2, b"data"),
    b"BW64": _Form(12, 4, 4, "little", 2, b"data"),
    b"riff": _Form(40, 16, 8, "little", 8, b"data", counts_itself=True),
    b"FORM": _Form(12, 4, 4, "big", 2, b"SSND"),
    b"caff": _Form(8, 4, 8, "big", 1, b"data"),
}


def _bytes_at(file: Stream, at: int, count: int) -> bytes:
    file.seek(at)
    return file.read(count)


def _extent(file: Stream, head: bytes, size: int) -> _Extent | None:
    """Of a file of chunks, an AU or a NIST; None: of another format, or nothing is found."""
    magic = head[:4]
    if magic in _FORMS:
        return _chunk(file, _FORMS[magic], size)
    if magic in (b".snd", b"dns."):
        order = "big" if magic == b".snd" else "little"
        return _Extent(_number(head[4:8], order), _number(head[8:12], order), range(8, 12), order)
    if head[:7] == b"NIST_1A":
        return _nist(_bytes_at(file, 0, _HEADER_BYTES))
    return None


def _number(data: bytes, order: str) -> int:
    return int.from_bytes(data, "big" if order == "big" else "little")


def _chunk(file: Stream, form: _Form, size: int) -> _Extent | None:
    at, long = form.first, _Extent(0, 0)
    for _ in range(_MOST_CHUNKS):
        head = _bytes_at(file, at, form.name + form.width)
        body = at + len(head)
        if len(head) < form.name + form.width:
            return None
        claimed = _number(head[form.name :], form.order)
        if form.counts_itself:
            claimed = max(claimed - len(head), 0)
        if head[:4] == form.samples:
            if claimed == 2**32 - 1 and long.field:
                return long._replace(start=body)
            return _Extent(body, claimed, range(at + form.name, body), form.order, form.align)
        if head[:4] == b"ds64":
            long = _Extent(0, _number(_bytes_at(file, body + 8, 8), "little"), range(body + 8, body + 16), align=2)
        at = body + claimed
        at += -at % form.align
        if at >= size:
            return None
    return None


def _nist(header: bytes) -> _Extent | None:
    fields = dict(re.findall(rb"^(\S+) -i (\d{1,15})\s*$", header, re.MULTILINE))
    start = header[8:16].strip()
    if b"pcm,embedded" in header or not start.isdigit() or b"sample_count" not in fields:
        return None
    claimed = 1
    for name in (b"sample_count", b"channel_count", b"sample_n_bytes"):
        claimed *= int(fields.get(name, b"1"))
    return _Extent(int(start), claimed)


def _whole_extent(file: Stream, head: bytes, size: int, extent: _Extent) -> Parts | None:
    start, claimed, field, order, align = extent
    held = max(size - start, 0)
    behind = _bytes_at(file, start, 64)
    unknown = claimed > held and any(0 <= limit - claimed <= _HEADER_BYTES for limit in _STREAM_SIZES)
    if unknown or (not claimed and behind and not _is_name(behind[:4])):
        known = min(held + (24 if order == "little" and head[:4] == b"riff" else 0), 256 ** len(field) - 1)
        if not field:
            return None
        size_bytes = known.to_bytes(len(field), "big" if order == "big" else "little")
        return [range(field.start), size_bytes, range(field.stop, size)]
    if claimed > held:
        raise ContradictionError("truncated", f"found {held} bytes of samples, its header says {claimed}")
    end = start + claimed
    tail = _bytes_at(file, end + -end % align, _HEADER_BYTES)
    if head[:4] in tail[:16]:  # whatever the padding
        raise ContradictionError(
            "length_mismatch", f"another file is joined to it at byte {end}; split them, or decode and join the samples"
        )
    if len(tail) == _HEADER_BYTES and any(tail) and not _is_name(tail[:4]):
        found = f"found {size - end} bytes behind the samples, its header says {claimed} of {held}"
        raise ContradictionError("length_mismatch", f"{found} bytes are samples; encode it again")
    return [range(end)] if tail and head[:4] in _TO_THE_END else None


def _is_name(four: bytes) -> bool:
    """Whether these bytes can be the name of a chunk or tag: printable, as samples seldom are."""
    return len(four) == 4 and all(32 <= byte < 127 for byte in four)  # noqa: PLR2004


def _whole_flac(file: Stream, start: int, size: int, *, joined: bool) -> Parts | None:
    rest = b""
    for at in range(start + len(_FLAC_STREAM), size, _BLOCK) if joined else ():
        rest = rest[-len(_FLAC_STREAM) :] + _bytes_at(file, at, _BLOCK)
        if _FLAC_STREAM in rest:
            raise ContradictionError(
                "length_mismatch", "another FLAC is joined to it; split them, or decode and join the samples"
            )
    info = bytearray(_bytes_at(file, start, _FLAC_TOTAL + 5))
    if len(info) <= _FLAC_TOTAL or info[_FLAC_TOTAL] & 15 or any(info[_FLAC_TOTAL + 1 :]):
        return None
    file.seek(0)
    with _InOrder(file) as audio:
        total = 0
        while found := len(audio.read(_BLOCK // audio.channels, dtype="int16", always_2d=True)):
            total += found
    info[_FLAC_TOTAL:] = (info[_FLAC_TOTAL] << 32 | total).to_bytes(5, "big")
    return [bytes(info), range(start + len(info), size)]


class _InOrder(soundfile.SoundFile):
    """Reads without seeking, which soundfile does after each block and which needs a known length."""

    def seekable(self) -> bool:
        return False


class _Page(NamedTuple):
    start: int
    size: int
    flags: int


def _whole_ogg(file: Stream, size: int) -> Parts | None:
    """Pages from beginning to end; the last one gets its end flag where a stream has none."""
    page, begun, end = _Page(0, 0, 0), False, 0
    for page in _pages(file):
        end = page.start + page.size
        if end > size:
            raise ContradictionError("truncated", f"found {size} bytes, its last page ends at byte {end}")
        if begun and page.flags & _BEGINS:
            raise ContradictionError(
                "length_mismatch", f"another Ogg is joined to it at byte {page.start}; decode and join the samples"
            )
        begun = begun or not page.flags & _BEGINS
    if b"OggS" in _bytes_at(file, end + 1, _BLOCK):
        raise ContradictionError("damaged", f"found no page at byte {end}, but pages behind it")
    if page.flags & _ENDS or not begun:
        return [range(end)] if begun and end < size else None
    if end < size:
        raise ContradictionError("truncated", f"found {size - end} bytes behind its last page, which is not the end")
    data = bytearray(_bytes_at(file, page.start, page.size))
    data[5] |= _ENDS
    data[22:26] = bytes(4)
    data[22:26] = _ogg_checksum(bytes(data)).to_bytes(4, "little")
    return [range(page.start), bytes(data)]


def _pages(file: Stream) -> Iterator[_Page]:
    at = 0
    while (head := _bytes_at(file, at, 27 + 255))[:4] == b"OggS" and len(head) >= 27:  # noqa: PLR2004
        size = 27 + head[26] + sum(head[27 : 27 + head[26]])
        yield _Page(at, size, head[5])
        at += size


_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg_checksum(data: bytes) -> int:
    """CRC-32 with the bits of zlib's in the other order, from 0 and not inverted (RFC 3533 section 6)."""
    mirrored = zlib.crc32(data.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{mirrored:032b}"[::-1], 2)


def _whole_mp3(audio: soundfile.SoundFile, file: Stream, size: int) -> Parts | None:
    """A header that counts all its frames, where the one it has counts fewer, or libsndfile would guess."""
    data = _bytes_at(file, 0, size)
    found = contents(data)
    if not found.num_frames:
        return None
    delay = _DELAY_FRAMES * found.num_samples // found.num_frames
    counted = any(tag in data[found.start : found.start + 200] for tag in _MP3_COUNTS)
    return None if counted and found.num_samples <= audio.frames + delay else with_length(data, found)
