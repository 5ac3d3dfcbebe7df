"""Decodes the opcodes of a pickle, one after the other; it builds and calls nothing.

Only what `torch.save` writes (protocol 2 and later) is known here. The text opcodes of protocol 0, calls of classes
(INST, OBJ) and the extension registry (EXT1, EXT2, EXT4) are refused before their argument is read. What each opcode
means stands in the standard library's `pickletools`.
"""

import struct
from collections.abc import Callable, Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple

from wavlm_jax.convert.faults import DamagedFile, HostileFile

MAX_OPCODES = 2_000_000
"""Weights and optimizer of a Large model need a twentieth of it."""
MAX_STRING_BYTES = 16 * 2**20
_MAX_NAME_BYTES = 512
_MAX_INTEGER_BYTES = 16


class Opcode(NamedTuple):
    """One step of a pickle."""

    name: str
    """As in `pickletools`."""
    argument: Any
    """A scalar, string or bytes; (module, attribute) for GLOBAL; None without one."""
    position: int
    """Bytes from the start of the file or archive member."""


_PLAIN = {
    b"(": "MARK",
    b".": "STOP",
    b"0": "POP",
    b"1": "POP_MARK",
    b"2": "DUP",
    b"N": "NONE",
    b"\x88": "NEWTRUE",
    b"\x89": "NEWFALSE",
    b")": "EMPTY_TUPLE",
    b"t": "TUPLE",
    b"\x85": "TUPLE1",
    b"\x86": "TUPLE2",
    b"\x87": "TUPLE3",
    b"]": "EMPTY_LIST",
    b"l": "LIST",
    b"a": "APPEND",
    b"e": "APPENDS",
    b"}": "EMPTY_DICT",
    b"d": "DICT",
    b"s": "SETITEM",
    b"u": "SETITEMS",
    b"\x8f": "EMPTY_SET",
    b"\x90": "ADDITEMS",
    b"\x91": "FROZENSET",
    b"\x94": "MEMOIZE",
    b"\x93": "STACK_GLOBAL",
    b"R": "REDUCE",
    b"\x81": "NEWOBJ",
    b"\x92": "NEWOBJ_EX",
    b"b": "BUILD",
    b"Q": "BINPERSID",
}
_FIXED = {
    b"\x80": ("PROTO", "<B"),
    b"\x95": ("FRAME", "<Q"),
    b"J": ("BININT", "<i"),
    b"K": ("BININT1", "<B"),
    b"M": ("BININT2", "<H"),
    b"G": ("BINFLOAT", ">d"),
    b"q": ("BINPUT", "<B"),
    b"r": ("LONG_BINPUT", "<L"),
    b"h": ("BINGET", "<B"),
    b"j": ("LONG_BINGET", "<L"),
}
"""Opcode -> name and the struct of its argument."""


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")


def _latin(raw: bytes) -> str:
    """Python 2's byte strings, which held text."""
    return raw.decode("latin-1")


def _integer(raw: bytes) -> int:
    return int.from_bytes(raw, "little", signed=True)


_COUNTED: dict[bytes, tuple[str, str, Callable[[bytes], Any]]] = {
    b"\x8a": ("LONG1", "<B", _integer),
    b"\x8b": ("LONG4", "<L", _integer),
    b"U": ("SHORT_BINSTRING", "<B", _latin),
    b"T": ("BINSTRING", "<L", _latin),
    b"C": ("SHORT_BINBYTES", "<B", bytes),
    b"B": ("BINBYTES", "<L", bytes),
    b"\x8e": ("BINBYTES8", "<Q", bytes),
    b"\x96": ("BYTEARRAY8", "<Q", bytes),
    b"\x8c": ("SHORT_BINUNICODE", "<B", _text),
    b"X": ("BINUNICODE", "<L", _text),
    b"\x8d": ("BINUNICODE8", "<Q", _text),
}
"""Opcode -> name, the struct of the number of bytes that follow, and what to make of them."""

_REFUSED = {
    b"i": "INST",
    b"o": "OBJ",
    b"\x82": "EXT1",
    b"\x83": "EXT2",
    b"\x84": "EXT4",
    b"P": "PERSID",
    b"\x97": "NEXT_BUFFER",
    b"\x98": "READONLY_BUFFER",
}
"""Ways to make or fetch objects that `torch.save` never uses."""


def opcodes(file: BufferedIOBase, path: Path) -> Iterator[Opcode]:
    """The opcodes from the file's position up to and with STOP; the file is then left right behind it.

    Raises:
        DamagedFile: the end is reached before STOP, or a byte is no opcode.
        HostileFile: an opcode that `torch.save` never writes, a string or a number out of all proportion, too many.

    """
    for _ in range(MAX_OPCODES):
        position = file.tell()
        opcode = _next(file, position, path)
        yield opcode
        if opcode.name == "STOP":
            return
    raise HostileFile(f"{path}: more than {MAX_OPCODES} pickle opcodes")


def _next(file: BufferedIOBase, position: int, path: Path) -> Opcode:
    code = _take(file, 1, path)
    if code in _PLAIN:
        return Opcode(_PLAIN[code], None, position)
    if code in _FIXED:
        name, layout = _FIXED[code]
        return Opcode(name, _number(file, layout, path), position)
    if code in _COUNTED:
        name, layout, decode = _COUNTED[code]
        raw = _counted(file, name, layout, path)
        try:
            return Opcode(name, decode(raw), position)
        except UnicodeDecodeError as error:
            raise DamagedFile(f"{path}: the text at byte {position} of the pickle is not UTF-8") from error
    if code == b"c":
        return Opcode("GLOBAL", (_line(file, path), _line(file, path)), position)
    if code in _REFUSED:
        raise HostileFile(f"{path}: pickle opcode {_REFUSED[code]} at byte {position}, which torch.save never writes")
    raise DamagedFile(f"{path}: byte {position} is 0x{code.hex()}, no pickle opcode that torch.save writes")


def _number(file: BufferedIOBase, layout: str, path: Path) -> Any:
    return struct.unpack(layout, _take(file, struct.calcsize(layout), path))[0]


def _counted(file: BufferedIOBase, name: str, layout: str, path: Path) -> bytes:
    count = int(_number(file, layout, path))
    limit = _MAX_INTEGER_BYTES if name.startswith("LONG") else MAX_STRING_BYTES
    if count > limit:
        raise HostileFile(f"{path}: a {name} of {count} bytes in the pickle, at most {limit} are read")
    return _take(file, count, path)


def _take(file: BufferedIOBase, count: int, path: Path) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise DamagedFile(f"{path}: ends in the middle of its pickle; it was cut off, fetch it again")
    return data


def _line(file: BufferedIOBase, path: Path) -> str:
    line = file.readline(_MAX_NAME_BYTES)
    if not line.endswith(b"\n"):
        raise DamagedFile(f"{path}: the name of a class has no end within {_MAX_NAME_BYTES} bytes")
    return line[:-1].decode("utf-8", "backslashreplace")
