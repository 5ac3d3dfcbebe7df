"""Reads a pickle without ever calling anything that it names.

`pickletools.genops` of the standard library decodes the opcodes, and a small stack machine obeys those that
`torch.save` writes. It builds plain containers and scalars. A global name is only ever looked up: in a table of our
own functions that stand for it, in a list of classes whose objects become inert records, or else it is refused. Every
object that is made is counted by its size, so memory stays within 16 MiB and 16 times the file.
"""

import pickletools
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any

from wavlm_jax.files import DamagedFile, HostileFile

_MAX_OPCODES = 2_000_000
"""Weights and optimizer of a Large model need a twentieth of it."""
_MAX_READ_BYTES = 16 * 2**20
_MAX_LINE_BYTES = 512
_MAX_MARKS = 1000
_MAX_KEY_PARTS = 16
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_PYTHON_2_NAMES = {"builtins.long": "builtins.int", "builtins.unicode": "builtins.str"}
"""What protocol 2 calls modules and types; pickle's own tables do the same."""
_FREE_BYTES = 16 * 2**20
_BYTES_PER_BYTE = 16
"""Memory that a pickle may fill for each byte of its file: twice what optimizer states need, the densest there are."""


class BoundedReader(BufferedReader):
    """A file that refuses to read much at once: a claimed length costs no memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        """As `BufferedReader.read`.

        Raises:
            HostileFile: `size` is above 16 MiB.

        """
        if size is not None and size > _MAX_READ_BYTES:
            raise HostileFile(f"{self.name}: claims a part of {size} bytes, at most {_MAX_READ_BYTES} are read")
        return super().read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        """As `BufferedReader.readline`, for lines of at most 512 bytes; of a longer one only the beginning."""
        return super().readline(_MAX_LINE_BYTES if size is None or size < 0 else size)


@dataclass(frozen=True, slots=True)
class Global:
    """The name of something importable; it is never imported."""

    name: str


@dataclass(slots=True, eq=False)
class Inert:
    """What a pickle says of an object of a foreign class, as data."""

    kind: str
    """Full name of the class, "argparse.Namespace"."""
    arguments: tuple[Any, ...]
    state: Any = None
    """What would have become its attributes."""
    items: list[Any] = field(default_factory=list)
    """Elements, or (key, value) pairs, where the class is a container."""


@dataclass(frozen=True, kw_only=True)
class KnownNames:
    """What a pickle may name; everything else is refused."""

    calls: Mapping[str, Callable[..., Any]]
    """Full name -> our own function that stands for it."""
    names: frozenset[str]
    """Names that may stand as data."""
    inert: tuple[str, ...]
    """Classes ("argparse.Namespace") and packages ("omegaconf.") whose objects become `Inert`."""
    persistent: Callable[[Any], Any]
    """What the pickle's persistent ids stand for."""

    def __contains__(self, name: str) -> bool:
        return all(map(str.isidentifier, name.split("."))) and (
            name in self.calls or name in self.names or self.is_inert(name)
        )

    def is_inert(self, name: str) -> bool:
        """Whether objects of this class become `Inert`."""
        return any(name == known or (known.endswith(".") and name.startswith(known)) for known in self.inert)


def read_pickle(file: BoundedReader | BytesIO, known: KnownNames, path: Path) -> Any:
    """The value of the pickle that begins at the file's position; the file is then left right behind it.

    Args:
        file: a file, or the bytes of an archive's member.
        known: what may be named.
        path: the file's name, for messages.

    Raises:
        HostileFile: it names something unknown, or breaks a bound.
        DamagedFile: it is cut off or makes no sense.

    """
    machine, name, position = _Machine(known, path), "", file.tell()
    try:
        for opcode, argument, at in pickletools.genops(file):
            name, position = opcode.name, at or 0
            machine.obey(name, argument)
    except (HostileFile, DamagedFile):
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise DamagedFile(
            f"{path}: its pickle makes no sense at or after opcode {name} at byte {position} ({error}); it was cut off "
            "or altered, fetch it again"
        ) from error
    return machine.result()


class _Machine:
    """Stack, marks and memo, as the standard library's `pickletools` describes them."""

    def __init__(self, known: KnownNames, path: Path) -> None:
        self.known, self.path = known, path
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        """The stacks below each mark."""
        self.memo: dict[int, Any] = {}
        self.num_opcodes = 0
        self.num_bytes = 0
        """Of all objects made so far, about."""
        self.most_bytes = _FREE_BYTES + _BYTES_PER_BYTE * path.stat().st_size

    def obey(self, name: str, argument: Any) -> None:
        self.num_opcodes += 1
        if self.num_opcodes > _MAX_OPCODES:
            raise HostileFile(f"{self.path}: more than {_MAX_OPCODES} pickle opcodes")
        if name not in _OPCODES:
            raise HostileFile(f"{self.path}: pickle opcode {name}, which torch.save never writes")
        _OPCODES[name](self, argument)
        self.count(_COSTS.get(name, 8) + (0 if argument is None else sys.getsizeof(argument)))

    def count(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        if self.num_bytes > self.most_bytes:
            raise HostileFile(f"{self.path}: its pickle would fill more than {self.most_bytes} bytes of memory")

    def result(self) -> Any:
        if len(self.stack) != 1 or self.below:
            raise DamagedFile(f"{self.path}: its pickle ends with {len(self.stack)} values, expected one")
        return self.stack[0]

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        return self.stack.pop()

    def mark(self) -> None:
        if len(self.below) >= _MAX_MARKS:
            raise HostileFile(f"{self.path}: containers nested more than {_MAX_MARKS} deep in the pickle")
        self.below.append(self.stack)
        self.stack = []

    def pop_to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def pop_tuple(self, count: int) -> tuple[Any, ...]:
        return tuple(reversed([self.pop() for _ in range(count)]))

    def new_dict(self) -> None:
        pairs = self.pop_to_mark()
        self.push({})
        self.set_items(pairs)

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        items = target.items if isinstance(target, Inert) else target
        if not isinstance(items, list):
            raise TypeError(f"a {type(items).__name__} takes no elements")
        items.extend(values)

    def set_items(self, pairs: Iterable[Any]) -> None:
        target, pairs = self.stack[-1], list(pairs)
        self.count(len(pairs) * _ENTRY_BYTES // 2)
        items = zip(pairs[::2], pairs[1::2], strict=True)
        if isinstance(target, Inert):
            target.items.extend(items)
        elif isinstance(target, dict):
            target.update((_as_key(key), value) for key, value in items)
        else:
            raise TypeError(f"a {type(target).__name__} takes no keys")

    def add_items(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], set):
            raise TypeError(f"a {type(self.stack[-1]).__name__} is no set")
        self.count(len(values) * _ENTRY_BYTES)
        self.stack[-1].update(map(_as_key, values))

    def push_name(self, module: Any, attribute: Any) -> None:
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise TypeError("a class is not named by two strings")
        name = f"{_PYTHON_2.get(module, module)}.{attribute}"
        name = _PYTHON_2_NAMES.get(name, name)
        if name not in self.known:
            raise HostileFile(
                f"{self.path}: asks for {name[:120]!r}, which is not among the few names that a checkpoint needs. "
                "Nothing was run. Where you trust the file, load it with torch and save its state dict alone"
            )
        self.push(Global(name))

    def call(self) -> None:
        """Pushes what the call of a name stands for. Making an object (`NEWOBJ`) is no different."""
        callee, arguments = self.pop_tuple(2)
        if not isinstance(callee, Global):
            raise HostileFile(f"{self.path}: calls a {type(callee).__name__}, which is data and not a known name")
        if not isinstance(arguments, tuple):
            raise TypeError(f"arguments of {callee.name} are a {type(arguments).__name__}")
        if callee.name in self.known.calls:
            self.push(self.known.calls[callee.name](*arguments))
        elif self.known.is_inert(callee.name):
            self.push(Inert(callee.name, arguments))
        else:
            raise HostileFile(f"{self.path}: calls {callee.name}, which may only be mentioned")

    def call_with_keywords(self) -> None:
        if self.pop():
            raise TypeError("an object made with keyword arguments")
        self.call()

    def set_state(self) -> None:
        state, target = self.pop(), self.stack[-1]
        if isinstance(target, Inert):
            target.state = state
        elif not isinstance(target, dict):  # a state dict's `_metadata` is bookkeeping of torch
            raise TypeError(f"a {type(target).__name__} has no state")


def _as_key(value: Any) -> Any:
    """`value`, if it is cheap to hash; tuples of tuples of tuples could take forever."""
    parts = value if isinstance(value, tuple) else (value,)
    if len(parts) > _MAX_KEY_PARTS or not all(part is None or isinstance(part, _SCALARS) for part in parts):
        raise TypeError(f"a {type(value).__name__} as a key of a dictionary")
    return value


_ENTRY_BYTES = 104
"""Of an entry in a growing dictionary or set, whose table is doubled while the old one is still there."""
_COSTS = {
    **dict.fromkeys(("EMPTY_SET", "FROZENSET"), 216),
    **dict.fromkeys(("EMPTY_DICT", "DICT", "EMPTY_LIST", "LIST", "MARK"), 72),
    **dict.fromkeys(("REDUCE", "NEWOBJ", "NEWOBJ_EX"), 208),
    **dict.fromkeys(("GLOBAL", "STACK_GLOBAL"), 160),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _ENTRY_BYTES),
    **dict.fromkeys(("TUPLE1", "TUPLE2", "TUPLE3", "TUPLE", "BINPERSID"), 80),
}
"""Bytes of what an opcode makes beside its argument; of all others a place on the stack."""
_SCALARS = (str, bytes, int, float, Global)
_LITERALS = (
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING", "NONE"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
)
"""Opcodes that push their argument. Without LONG4: no number of a checkpoint has more than LONG1's 255 bytes."""
_OPCODES: Mapping[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda *_: None),
    **dict.fromkeys(_LITERALS, _Machine.push),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_SET": lambda machine, _: machine.push(set()),
    "MARK": lambda machine, _: machine.mark(),
    "POP": lambda machine, _: machine.pop(),
    "POP_MARK": lambda machine, _: machine.pop_to_mark(),
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda machine, at: machine.memo.update({at: machine.stack[-1]})),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, at: machine.push(machine.memo[at])),
    "MEMOIZE": lambda machine, _: machine.memo.update({len(machine.memo): machine.stack[-1]}),
    "TUPLE1": lambda machine, _: machine.push(machine.pop_tuple(1)),
    "TUPLE2": lambda machine, _: machine.push(machine.pop_tuple(2)),
    "TUPLE3": lambda machine, _: machine.push(machine.pop_tuple(3)),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "LIST": lambda machine, _: machine.push(machine.pop_to_mark()),
    "DICT": lambda machine, _: machine.new_dict(),
    "FROZENSET": lambda machine, _: machine.push(frozenset(map(_as_key, machine.pop_to_mark()))),
    "APPEND": lambda machine, _: machine.extend([machine.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_to_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.pop_tuple(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    "ADDITEMS": lambda machine, _: machine.add_items(machine.pop_to_mark()),
    "GLOBAL": lambda machine, names: machine.push_name(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.push_name(*machine.pop_tuple(2)),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda machine, _: machine.call()),
    "NEWOBJ_EX": lambda machine, _: machine.call_with_keywords(),
    "BUILD": lambda machine, _: machine.set_state(),
    "BINPERSID": lambda machine, _: machine.push(machine.known.persistent(machine.pop())),
}
"""Name in `pickletools` -> what the machine does with the opcode's argument."""
