"""Decodes the opcodes of a pickle, one after the other; it builds and calls nothing.

Only what `torch.save` writes (protocol 2 and later) is known here. The text opcodes of protocol 0, calls of classes
(INST, OBJ) and the extension registry (EXT1, EXT2, EXT4) are refused before their argument is read. What each opcode
means stands in the standard library's `pickletools`.

What a pickle may name, and what stands for the objects that it describes.

A pickle's opcodes, obeyed without ever calling anything that the pickle names.

The machine builds plain containers and scalars. A global name is only ever a name: it is looked up in a `Vocabulary` of
functions that the caller wrote, turned into an inert record, or refused. Memory stays within a small multiple of the
pickle's size, because every object that is made costs at least one opcode.
"""

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple

from wavlm_jax.files import DamagedFile, HostileFile

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


@dataclass(frozen=True, slots=True)
class Global:
    """The name of something importable, and nothing but the name."""

    name: str


@dataclass(slots=True, eq=False)
class Inert:
    """An object of a class that is allowed to be mentioned: what the pickle says of it, as data."""

    kind: str
    """Full name of the class, "argparse.Namespace"."""
    arguments: tuple[Any, ...]
    state: Any = None
    """What would have become its attributes."""
    items: list[Any] = field(default_factory=list)
    """Elements, or (key, value) pairs, where the class is a container."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What a pickle may name; everything else is refused."""

    calls: Mapping[str, Callable[..., Any]]
    """Full name -> our own function that stands for it."""
    names: frozenset[str]
    """Names that may stand as data."""
    inert: tuple[str, ...]
    """Classes ("argparse.Namespace") and packages ("omegaconf.") whose objects become `Inert`."""
    persistent: Callable[[Any], Any]
    """What the pickle's persistent ids stand for."""

    def knows(self, name: str) -> bool:
        """Whether a pickle may name this."""
        return all(map(str.isidentifier, name.split("."))) and (
            name in self.calls or name in self.names or self.is_inert(name)
        )

    def is_inert(self, name: str) -> bool:
        """Whether objects of this class become `Inert`."""
        return any(name == known or (known.endswith(".") and name.startswith(known)) for known in self.inert)


_MAX_MARKS = 1000
_MAX_KEY_PARTS = 16
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


def read_pickle(file: BufferedIOBase, vocabulary: Vocabulary, path: Path) -> Any:
    """The value of the pickle that begins at the file's position; the file is then left right behind it.

    Args:
        file: open for reading; for a pickle in an archive, the bytes of the member.
        vocabulary: what may be named.
        path: the file's name, for messages.

    Raises:
        HostileFile: it names something outside the vocabulary, or breaks a bound.
        DamagedFile: it is cut off or makes no sense.

    """
    machine = _Machine(vocabulary, path)
    for opcode in opcodes(file, path):
        try:
            machine.obey(opcode)
        except (HostileFile, DamagedFile):
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise DamagedFile(
                f"{path}: pickle opcode {opcode.name} at byte {opcode.position} makes no sense ({error})"
            ) from error
    return machine.result()


class _Machine:
    """Stack, marks and memo; one method an opcode, or a family of them."""

    def __init__(self, vocabulary: Vocabulary, path: Path) -> None:
        self.vocabulary, self.path = vocabulary, path
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def obey(self, opcode: Opcode) -> None:
        if opcode.name in _LITERALS:
            self.stack.append(opcode.argument)
        elif opcode.name in _FRESH:
            self.stack.append(_FRESH[opcode.name]())
        elif opcode.name in _WITH_ARGUMENT:
            _WITH_ARGUMENT[opcode.name](self, opcode.argument)
        elif opcode.name in _ON_STACK:
            _ON_STACK[opcode.name](self)

    def result(self) -> Any:
        if len(self.stack) != 1 or self.below:
            raise DamagedFile(f"{self.path}: its pickle ends with {len(self.stack)} values, expected one")
        return self.stack[0]

    # Stack, marks, memo.

    def mark(self) -> None:
        if len(self.below) >= _MAX_MARKS:
            raise HostileFile(f"{self.path}: containers nested more than {_MAX_MARKS} deep in the pickle")
        self.below.append(self.stack)
        self.stack = []

    def pop_to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def pop(self) -> Any:
        return self.stack.pop()

    def duplicate(self) -> None:
        self.stack.append(self.stack[-1])

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    # Containers.

    def tuple_of(self, count: int) -> None:
        items = [self.stack.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def tuple_to_mark(self) -> None:
        items = self.pop_to_mark()
        self.stack.append(tuple(items))

    def list_to_mark(self) -> None:
        items = self.pop_to_mark()
        self.stack.append(items)

    def dict_to_mark(self) -> None:
        pairs = self.pop_to_mark()
        self.stack.append({})
        self.extend_pairs(pairs)

    def append(self) -> None:
        self.extend([self.stack.pop()])

    def appends(self) -> None:
        self.extend(self.pop_to_mark())

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        items = target.items if isinstance(target, Inert) else target
        if not isinstance(items, list):
            raise TypeError(f"a {type(items).__name__} takes no elements")
        items.extend(values)

    def set_item(self) -> None:
        value = self.stack.pop()
        self.extend_pairs([self.stack.pop(), value])

    def set_items(self) -> None:
        self.extend_pairs(self.pop_to_mark())

    def extend_pairs(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        items = zip(pairs[::2], pairs[1::2], strict=True)
        if isinstance(target, Inert):
            target.items.extend(items)
        elif isinstance(target, dict):
            target.update((_as_key(key), value) for key, value in items)
        else:
            raise TypeError(f"a {type(target).__name__} takes no keys")

    def add_items(self) -> None:
        values = self.pop_to_mark()
        self.stack[-1].update(map(_as_key, values))

    def frozen_set(self) -> None:
        values = self.pop_to_mark()
        self.stack.append(frozenset(map(_as_key, values)))

    # Names and what stands for objects.

    def name(self, module_and_attribute: tuple[Any, Any]) -> None:
        module, attribute = module_and_attribute
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise TypeError("a class is not named by two strings")
        name = f"{_PYTHON_2.get(module, module)}.{attribute}"
        if not self.vocabulary.knows(name):
            raise HostileFile(
                f"{self.path}: asks for {name[:120]!r}, which is not among the few names that a checkpoint needs. "
                "Nothing was run. Where you trust the file, load it with torch and save its state dict alone"
            )
        self.stack.append(Global(name))

    def name_on_stack(self) -> None:
        attribute = self.stack.pop()
        self.name((self.stack.pop(), attribute))

    def call(self) -> None:
        """What the call of a name stands for; `NEWOBJ` is no different."""
        arguments = self.stack.pop()
        callee = self.stack.pop()
        if not isinstance(callee, Global):
            raise HostileFile(f"{self.path}: calls a {type(callee).__name__}, which is data and not a known name")
        if not isinstance(arguments, tuple):
            raise TypeError(f"arguments of {callee.name} are a {type(arguments).__name__}")
        if callee.name in self.vocabulary.calls:
            self.stack.append(self.vocabulary.calls[callee.name](*arguments))
        elif self.vocabulary.is_inert(callee.name):
            self.stack.append(Inert(callee.name, arguments))
        else:
            raise HostileFile(f"{self.path}: calls {callee.name}, which may only be mentioned")

    def new_object_with_keywords(self) -> None:
        if self.stack.pop():
            raise TypeError("an object made with keyword arguments")
        self.call()

    def set_state(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Inert):
            target.state = state
        elif not isinstance(target, dict):  # a state dict's `_metadata` is bookkeeping of torch
            raise TypeError(f"a {type(target).__name__} has no state")

    def persistent(self) -> None:
        self.stack.append(self.vocabulary.persistent(self.stack.pop()))


def _as_key(value: Any) -> Any:
    """A key that is cheap to hash: tuples of tuples of tuples could take for ever."""
    parts = value if isinstance(value, tuple) else (value,)
    if len(parts) > _MAX_KEY_PARTS or not all(part is None or isinstance(part, _SCALARS) for part in parts):
        raise TypeError(f"a {type(value).__name__} as a key of a dictionary")
    return value


_SCALARS = (str, bytes, int, float, Global)
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING", "NONE"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
"""Opcodes that push their argument. PROTO, FRAME and STOP do nothing."""
_FRESH: dict[str, Callable[[], Any]] = {
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_WITH_ARGUMENT: dict[str, Callable[[_Machine, Any], None]] = {
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "GLOBAL": _Machine.name,
}
_ON_STACK: dict[str, Callable[[_Machine], Any]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_to_mark,
    "DUP": _Machine.duplicate,
    "MEMOIZE": _Machine.memoize,
    "TUPLE1": lambda machine: machine.tuple_of(1),
    "TUPLE2": lambda machine: machine.tuple_of(2),
    "TUPLE3": lambda machine: machine.tuple_of(3),
    "TUPLE": _Machine.tuple_to_mark,
    "LIST": _Machine.list_to_mark,
    "DICT": _Machine.dict_to_mark,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "ADDITEMS": _Machine.add_items,
    "FROZENSET": _Machine.frozen_set,
    "STACK_GLOBAL": _Machine.name_on_stack,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "NEWOBJ_EX": _Machine.new_object_with_keywords,
    "BUILD": _Machine.set_state,
    "BINPERSID": _Machine.persistent,
}
