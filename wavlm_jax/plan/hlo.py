"""Optimized HLO as text, read into instructions: what the compiler really made of a step, for one device."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

BITS = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2", "f8e4m3b11fnuz"), 8),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 16),
    **dict.fromkeys(("s32", "u32", "f32"), 32),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 64),
    **dict.fromkeys(("s4", "u4"), 4),
    "c128": 128,
    "token": 0,
    "opaque": 0,
}
HBM = 0
"""Memory space of the layouts that say none; S(1) is on the chip (VMEM), S(5) the host's."""

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+)(?: \(.*)? -> .*\{$")


@dataclass(frozen=True)
class Array:
    """One array: what it holds and where it lies."""

    dtype: str
    dims: tuple[int, ...]
    layout: str
    """As printed: minor-to-major order, tiles, memory space."""

    @property
    def space(self) -> int:
        """Memory space."""
        found = re.search(r"S\((\d+)\)", self.layout)
        return int(found.group(1)) if found else HBM

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes where it lies, padding to whole tiles included."""
        sizes = list(self.dims)
        order, _, rest = self.layout.partition(":")
        tile = re.search(r"T\(([\d,]+)\)", rest)
        if tile and sizes and order:
            minor_last = [sizes[int(index)] for index in reversed(order.split(","))]
            tiles = [int(size) for size in tile.group(1).split(",")][-len(minor_last) :]
            for place, size in enumerate(reversed(tiles), start=1):
                minor_last[-place] = -(-minor_last[-place] // size) * size
            sizes = minor_last
        return math.prod(sizes) * BITS[self.dtype] // 8


@dataclass
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    """What it gives: one, or the elements of a tuple, flattened."""
    operands: tuple[str, ...]
    text: str
    """Everything behind the operands."""
    literal: str
    """What stands between the parentheses."""
    is_root: bool

    @property
    def num_bytes(self) -> int:
        """Of all its results that lie in HBM."""
        return sum(array.num_bytes for array in self.arrays if array.space == HBM)

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute names: body, condition, calls, to_apply."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.text)
        return found.group(1) if found else None

    def branches(self) -> list[str]:
        """The computations of a conditional."""
        found = re.search(r"branch_computations=\{([^}]*)\}", self.text)
        if found:
            return _NAME.findall(found.group(1))
        return [name for part in ("true_computation", "false_computation") if (name := self.called(part))]


@dataclass
class Computation:
    """Instructions in the order in which they run."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        """The result."""
        return next(line for line in reversed(self.instructions.values()) if line.is_root)

    @property
    def parameters(self) -> list[Instruction]:
        """By number."""
        found = [line for line in self.instructions.values() if line.opcode == "parameter"]
        return sorted(found, key=lambda line: int(line.literal))

    def users(self, name: str) -> Iterator[tuple[Instruction, int]]:
        """Instructions that read `name`, with the place of the operand."""
        for line in self.instructions.values():
            for place, operand in enumerate(line.operands):
                if operand == name:
                    yield line, place


@dataclass
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str

    @classmethod
    def parse(cls, text: str) -> "Module":
        """The module that `jax.stages.Compiled.as_text()` prints.

        Raises:
            ValueError: there is no entry computation in it.

        """
        computations: dict[str, Computation] = {}
        current, entry = Computation(""), ""
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                current = computations[found.group(2)] = Computation(found.group(2))
                entry = found.group(2) if found.group(1) else entry
            elif (parts := _INSTRUCTION.match(line)) and current.name:
                read = _instruction(parts.group(2), parts.group(3), parts.group(1) is not None)
                current.instructions[read.name] = read
        if not entry:
            raise ValueError("HLO text without an ENTRY computation")
        return cls(computations, entry)


def trip_count(module: Module, loop: Instruction, around: Computation) -> int:
    """How often the body of a `while` runs.

    The compiler may have noted it; else the condition compares a counter with a constant, as `jax.lax.scan` writes it.

    Raises:
        ValueError: neither (a loop that ends when the data say so).

    """
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text)
    if noted:
        return int(noted.group(1))
    condition = module.computations[loop.called("condition") or ""]
    compare, compared = _comparison(module, condition)
    direction = re.search(r"direction=(LT|LE|NE|GT|GE)", compare.text)
    limits = [value for line in compared if (value := _constant(line)) is not None]
    if compare.opcode != "compare" or direction is None or len(limits) != 1:
        raise ValueError(f"HLO: the number of turns of loop {loop.name} is not a constant of the program")
    counter = next((line for line in compared if line.opcode == "get-tuple-element"), None)
    start = 0 if counter is None else _first_value(around, loop, counter)
    return abs(limits[0] - start) + (direction.group(1) in ("LE", "GE"))


def _comparison(module: Module, condition: Computation) -> tuple[Instruction, list[Instruction]]:
    """The comparison that ends a loop, and what it compares, as instructions of the condition."""
    root = _behind_copies(condition, condition.root)
    called = root.called("calls") if root.opcode == "fusion" else None
    if called is None:
        return root, [_behind_copies(condition, condition.instructions[name]) for name in root.operands]
    inner = module.computations[called]
    compare = inner.root
    given = [inner.instructions[name] for name in compare.operands]
    outer = [
        condition.instructions[root.operands[int(line.literal)]] if line.opcode == "parameter" else line
        for line in given
    ]
    return compare, [_behind_copies(condition, line) for line in outer]


def _behind_copies(computation: Computation, line: Instruction) -> Instruction:
    while line.opcode in ("copy", "bitcast") and line.operands[0] in computation.instructions:
        line = computation.instructions[line.operands[0]]
    return line


def _constant(line: Instruction) -> int | None:
    return int(line.literal) if line.opcode == "constant" and re.fullmatch(r"-?\d+", line.literal) else None


def _first_value(around: Computation, loop: Instruction, counter: Instruction) -> int:
    """What a loop's counter starts with; 0 where that cannot be seen."""
    index = re.search(r"index=(\d+)", counter.text)
    given = around.instructions[loop.operands[0]]
    if index is None or given.opcode != "tuple":
        return 0
    return _constant(_behind_copies(around, around.instructions[given.operands[int(index.group(1))]])) or 0


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    text = re.sub(r"/\*.*?\*/", "", text)
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    close = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1 : close]
    arrays = tuple(
        Array(dtype, tuple(int(size) for size in dims.split(",") if size), layout or "")
        for dtype, dims, layout in _ARRAY.findall(shape)
        if dtype in BITS
    )
    operands = tuple(_NAME.findall(inside))
    return Instruction(name, opcode, arrays, operands, rest[close + 1 :], inside, is_root)


def _closing(text: str, start: int) -> int:
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    raise ValueError(f"HLO: no closing parenthesis in {text[:80]!r}")
