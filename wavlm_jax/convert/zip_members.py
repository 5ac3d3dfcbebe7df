"""Where the members of a zip archive lie, for archives that store them uncompressed, as `torch.save` does.

Only stored members are accepted: what is read from the file is then never larger than the file, whatever its headers
claim, and a tensor is one stretch of the file. Layout: PKWARE's APPNOTE, sections 4.3 and 4.5.3 (zip64).
"""

import os
import struct
from io import BufferedIOBase
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from wavlm_jax.convert.faults import DamagedFile, HostileFile

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")

_MAX_COMMENT = 65535
_MAX_MEMBERS = 100_000
_MAX_DIRECTORY_BYTES = 64 * 2**20
_ENCRYPTED = 1
_ZIP64_EXTRA = 1
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF


class Place(NamedTuple):
    """A stretch of a file."""

    offset: int
    """Bytes from the start of the file."""
    num_bytes: int
    crc: int = 0
    """CRC-32 of the content; 0 where the writer left it out."""


class _Directory(NamedTuple):
    offset: int
    size: int
    num_entries: int


def members(file: BufferedIOBase, path: Path) -> dict[str, Place]:
    """Name -> place of every file in a zip archive; folders are left out.

    Args:
        file: the archive, open for reading at any position.
        path: its name, for messages.

    Raises:
        DamagedFile: cut off, overlapping its end, or with a directory that makes no sense.
        HostileFile: compressed or encrypted members, absolute or climbing names, too many members.

    """
    size = file.seek(0, os.SEEK_END)
    directory = _find_directory(file, size, path)
    if directory.num_entries > _MAX_MEMBERS or directory.size > _MAX_DIRECTORY_BYTES:
        raise HostileFile(
            f"{path}: an archive of {directory.num_entries} files with a directory of {directory.size} bytes; "
            f"at most {_MAX_MEMBERS} files and {_MAX_DIRECTORY_BYTES} bytes are read"
        )
    if directory.offset + directory.size > size:
        raise DamagedFile(f"{path}: the archive's directory lies past the end of the file; it was cut off")
    file.seek(directory.offset)
    data = file.read(directory.size)
    found: dict[str, Place] = {}
    position = 0
    for _ in range(directory.num_entries):
        name, header_offset, member, position = _entry(data, position, path)
        if name in found:
            raise HostileFile(f"{path}: holds {name!r} twice")
        if not name.endswith("/"):
            found[name] = member._replace(offset=_content_offset(file, header_offset, path))
            if found[name].offset + member.num_bytes > size:
                raise DamagedFile(f"{path}: {name} lies past the end of the file; it was cut off")
    if sum(member.num_bytes for member in found.values()) > size:
        raise HostileFile(f"{path}: its members claim more bytes than the file has; they overlap")
    return found


def _find_directory(file: BufferedIOBase, size: int, path: Path) -> _Directory:
    tail_size = min(size, _END.size + _MAX_COMMENT)
    file.seek(size - tail_size)
    tail = file.read(tail_size)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or at + _END.size > len(tail):
        raise DamagedFile(f"{path}: a zip archive without its directory; the file was cut off, fetch it again")
    _, _, _, _, count, directory_size, offset, _ = _END.unpack_from(tail, at)
    if count != _FULL16 and _FULL32 not in (directory_size, offset):
        return _Directory(offset, directory_size, count)
    return _find_directory64(file, size - tail_size + at, path)


def _find_directory64(file: BufferedIOBase, end: int, path: Path) -> _Directory:
    """The directory of an archive of more than 4 GiB or 65,535 members; `end` is where its plain end record lies."""
    file.seek(max(0, end - _END64_LOCATOR.size))
    locator = file.read(_END64_LOCATOR.size)
    if len(locator) == _END64_LOCATOR.size and locator.startswith(b"PK\6\7"):
        file.seek(min(_END64_LOCATOR.unpack(locator)[2], end))
        record = file.read(_END64.size)
        if len(record) == _END64.size and record.startswith(b"PK\6\6"):
            count, directory_size, offset = _END64.unpack(record)[7:]
            return _Directory(offset, directory_size, count)
    raise DamagedFile(f"{path}: a zip64 archive without its end record; the file was cut off, fetch it again")


def _entry(data: bytes, position: int, path: Path) -> tuple[str, int, Place, int]:
    """One entry of the directory: name, offset of the local header, member without offset, position of the next."""
    if position + _ENTRY.size > len(data) or data[position : position + 4] != b"PK\1\2":
        raise DamagedFile(f"{path}: entry at byte {position} of the archive's directory is no entry")
    fields = _ENTRY.unpack_from(data, position)
    flags, method, crc, packed, size = fields[3], fields[4], *fields[7:10]
    name_size, extra_size, comment_size, header_offset = *fields[10:13], fields[16]
    start = position + _ENTRY.size
    stop = start + name_size + extra_size + comment_size
    if stop > len(data):
        raise DamagedFile(f"{path}: the archive's directory is cut off in the entry at byte {position}")
    name = _checked_name(data[start : start + name_size], path)
    extra = data[start + name_size : start + name_size + extra_size]
    size, packed, header_offset = _zip64(extra, [size, packed, header_offset], name, path)
    if flags & _ENCRYPTED:
        raise HostileFile(f"{path}: {name} is encrypted")
    if method != 0 or packed != size:
        raise HostileFile(
            f"{path}: {name} is compressed ({packed} bytes claim to hold {size}); torch.save stores without "
            "compression. Load the file with torch where you trust it and save it again"
        )
    return name, header_offset, Place(0, size, crc), stop


def _checked_name(raw: bytes, path: Path) -> str:
    try:
        name = raw.decode()
    except UnicodeDecodeError as error:
        raise DamagedFile(f"{path}: a member's name is not UTF-8: {raw[:80]!r}") from error
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise HostileFile(f"{path}: a member is called {name[:80]!r}, which leads out of the archive")
    return name


def _zip64(extra: bytes, values: list[int], name: str, path: Path) -> list[int]:
    """Size, packed size and offset, with those that do not fit in 32 bits taken from the extra field."""
    missing = [index for index, value in enumerate(values) if value == _FULL32]
    position = 0
    while missing and position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        if kind == _ZIP64_EXTRA and length >= 8 * len(missing) and position + 4 + length <= len(extra):
            wide = struct.unpack_from(f"<{len(missing)}Q", extra, position + 4)
            for index, value in zip(missing, wide, strict=True):
                values[index] = value
            missing = []
        position += 4 + length
    if missing:
        raise DamagedFile(f"{path}: {name} is larger than 4 GiB but its entry does not say how large")
    return values


def _content_offset(file: BufferedIOBase, header_offset: int, path: Path) -> int:
    try:
        file.seek(header_offset)
    except (OSError, OverflowError) as error:
        raise DamagedFile(f"{path}: a member at byte {header_offset}, which no file has") from error
    header = file.read(_LOCAL.size)
    if len(header) < _LOCAL.size or not header.startswith(b"PK\3\4"):
        raise DamagedFile(f"{path}: no member begins at byte {header_offset}; the archive is damaged or cut off")
    name_size, extra_size = _LOCAL.unpack(header)[9:11]
    return header_offset + _LOCAL.size + int(name_size) + int(extra_size)
