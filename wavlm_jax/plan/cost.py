"""What a compiled program moves, read from its optimized HLO text: bytes to and from HBM, and messages.

All figures are of one execution on one device, with loops counted as often as they run.

Memory: every instruction outside a fusion reads its operands and writes its results. What is on the chip (VMEM) costs
nothing, padding to tiles counts, and of a slice of a larger array only what is really read or written.

Messages: bytes, devices in a group, mesh axes, and the links that carry them.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from wavlm_jax.plan.targets import Target
from wavlm_jax.training.sharding import slice_of

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
"""Memory space of a layout that names none; S(1) is on the chip (VMEM), S(5) the host's."""

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+)(?: \(.*)? -> .*\{$")


@dataclass(frozen=True)
class Array:
    """Dtype, shape and layout of one array."""

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
        """Bytes with padding to whole tiles."""
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
    """The result: one, or the elements of a tuple, flattened."""
    operands: tuple[str, ...]
    text: str
    """The attributes: everything after the operands."""
    literal: str
    """The text between the parentheses."""
    is_root: bool

    @property
    def num_bytes(self) -> int:
        """Of all its results that are in HBM."""
        return sum(array.num_bytes for array in self.arrays if array.space == HBM)

    def called(self, attribute: str) -> str | None:
        """The computation in an attribute: body, condition, calls, to_apply."""
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
    """Instructions by name, in the order in which they run."""

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
        """(instruction, position of the operand) for every use of `name`."""
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
        """Reads what `jax.stages.Compiled.as_text()` prints.

        Raises:
            ValueError: it has no entry computation.

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

    XLA's compiler for CPUs notes it, libtpu 0.0.52 does not. Then the condition compares a counter with the program's
    only constant in it, as `jax.lax.scan` is compiled; either may be inside a fusion.

    Raises:
        ValueError: neither (a loop that ends when the data say so).

    """
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text):
        return int(noted.group(1))
    condition = module.computations[loop.called("condition") or ""]
    fused = [name for line in condition.instructions.values() if (name := line.called("calls"))]
    lines = [
        line
        for part in (condition, *(module.computations[name] for name in fused))
        for line in part.instructions.values()
    ]
    limits = {value for line in lines if (value := _constant(line)) is not None}
    compare = [found.group(1) for line in lines if (found := re.search(r"direction=(LT|LE|NE|GT|GE)", line.text))]
    if len(compare) != 1 or len(limits) != 1:
        raise ValueError(f"HLO: the number of turns of loop {loop.name} is not a constant of the program")
    counters = [found.group(1) for line in lines if (found := re.search(r"index=(\d+)", line.text))]
    start = _first_value(around, loop, int(counters[0])) if counters else 0
    return abs(limits.pop() - start) + (compare[0] in ("LE", "GE"))


def _constant(line: Instruction) -> int | None:
    return int(line.literal) if line.opcode == "constant" and re.fullmatch(r"-?\d+", line.literal) else None


def _first_value(around: Computation, loop: Instruction, counter: int) -> int:
    """The value with which element `counter` of a loop's state begins; 0 where that is no constant."""
    given = around.instructions[loop.operands[0]]
    if given.opcode != "tuple":
        return 0
    line = around.instructions[given.operands[counter]]
    while line.opcode in ("copy", "bitcast") and line.operands[0] in around.instructions:
        line = around.instructions[line.operands[0]]
    return _constant(line) or 0


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


FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
    *("after-all", "partition-id", "replica-id", "opt-barrier", "add-dependency"),
}
"""Opcodes that move nothing themselves."""
FREE_CALLS = ("AllocateBuffer", "ConcatBitcast")
SLICES = ("dynamic-slice", "slice", "gather")


class Executed(NamedTuple):
    """An instruction, and how often it runs in one execution of the program."""

    line: Instruction
    computation: Computation
    times: int
    in_fusion: bool


def executed(module: Module) -> Iterator[Executed]:
    """Every instruction that runs, and those of all branches of a conditional, though at most one of them runs.

    Raises:
        ValueError: as `trip_count` does.

    """
    yield from _walk(module, module.computations[module.entry], 1, in_fusion=False)


def _walk(module: Module, computation: Computation, times: int, *, in_fusion: bool) -> Iterator[Executed]:
    for line in computation.instructions.values():
        yield Executed(line, computation, times, in_fusion)
        if line.opcode == "while":
            turns = trip_count(module, line, computation)
            inner = module.computations[line.called("body") or ""]
            yield from _walk(module, inner, times * turns, in_fusion=in_fusion)
        elif line.opcode == "conditional":
            for name in line.branches():
                yield from _walk(module, module.computations[name], times, in_fusion=in_fusion)
        elif line.opcode in ("call", "fusion", "async-start") and (called := line.called("(?:calls|to_apply)")):
            inside = in_fusion or line.opcode == "fusion"
            yield from _walk(module, module.computations[called], times, in_fusion=inside)


def memory_traffic(module: Module) -> int:
    """Bytes read from and written to HBM; raises as `trip_count` does."""
    return sum(moved(module, placed) for placed in executed(module) if not placed.in_fusion)


def moved(module: Module, placed: Executed) -> int:
    """The bytes of `memory_traffic` that belong to one instruction outside fusions."""
    computation, line = placed.computation, placed.line
    if line.opcode in FREE or any(f'custom_call_target="{name}"' in line.text for name in FREE_CALLS):
        return 0
    if line.opcode.endswith(("-start", "-update", "async-done")):
        return 0  # counted where it ends
    if line.opcode.endswith("-done"):  # of a copy, slice or collective that ran beside other instructions
        started = computation.instructions[line.operands[0]]
        full = sum(computation.instructions[name].num_bytes for name in started.operands)
        result = sum(array.num_bytes for array in line.arrays)
        read = min(full, result) if started.opcode == "slice-start" else full
        return placed.times * (read + line.num_bytes)
    return placed.times * (_read(module, computation, line) + _written(module, computation, line))


def _read(module: Module, computation: Computation, line: Instruction) -> int:
    total = 0
    for place, name in enumerate(line.operands):
        source = computation.instructions.get(name)
        if source is not None:
            read, passed_on = _touched(module, line, place, source)
            total += source.num_bytes if passed_on else min(source.num_bytes, read)
    return total


def _touched(module: Module, line: Instruction, place: int, source: Instruction) -> tuple[int, bool]:
    """(bytes of `source`, operand number `place`, that `line` reads; whether the result is the operand itself)."""
    if line.opcode in SLICES and place == 0:
        return sum(array.num_bytes for array in line.arrays), False
    if line.opcode in ("dynamic-update-slice", "scatter") and place == 0:
        return 0, False
    if line.opcode == "bitcast":
        return 0, True
    if line.opcode == "fusion":
        inner = module.computations[line.called("calls") or ""]
        return _used(module, inner, inner.parameters[place].name, source)
    return source.num_bytes, False


def _used(module: Module, computation: Computation, name: str, source: Instruction) -> tuple[int, bool]:
    """As `_touched`, for all uses of `source` in a fusion, where its name is `name`."""
    total, escapes = 0, computation.root.name == name
    for user, place in computation.users(name):
        read, passed_on = _touched(module, user, place, source)
        if passed_on:
            more, out = _used(module, computation, user.name, source)
            read, escapes = read + more, escapes or out
        total += read
    return total, escapes


def _written(module: Module, computation: Computation, line: Instruction) -> int:
    """Bytes of the result that are really written: an update in place writes only the update."""
    outputs = [array.num_bytes if array.space == HBM else 0 for array in line.arrays]
    changed = _updates(module, computation, line)
    return sum(min(size, change) if change is not None else size for size, change in zip(outputs, changed, strict=True))


def _updates(module: Module, computation: Computation, line: Instruction) -> list[int | None]:
    """For each result: bytes of the update where it is an operand that is updated in place, else None."""
    if line.opcode in ("dynamic-update-slice", "scatter"):
        update = computation.instructions[line.operands[1 if line.opcode == "dynamic-update-slice" else -1]]
        return [sum(array.num_bytes for array in update.arrays)]
    if line.opcode == "bitcast" and line.operands[0] in computation.instructions:
        return _updates(module, computation, computation.instructions[line.operands[0]])
    if line.opcode == "tuple":
        parts = [_updates(module, computation, computation.instructions[name]) for name in line.operands]
        return [update for part in parts for update in part]
    if line.opcode == "fusion":
        inner = module.computations[line.called("calls") or ""]
        return _updates(module, inner, inner.root)
    return [None] * len(line.arrays)


KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*(?:\([^)]*\))?[^)]*)\))? ?\{([^}]*)\}")
"""mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'b'}"""


@dataclass(frozen=True)
class Collective:
    """Sum over the collectives of one kind, dtype and group in one execution."""

    kind: str
    dtype: str
    axes: tuple[str, ...]
    """Mesh axes along which the devices of a group differ."""
    group: int
    """Devices in a group."""
    links: str
    """What carries them: "ICI x, y", "NVLink", "network between hosts"."""
    count: int
    payload: int
    """Bytes of the whole (gathered or reduced) arrays, on one device."""
    sent: float
    """Bytes that one device sends, by the ring algorithm."""
    seconds: float
    """At the bandwidth of the links, with nothing else running."""
    origin: str
    """Where in the program the largest of them comes from."""


def collectives(module: Module, mesh: Mesh, target: Target) -> list[Collective]:
    """All collectives of one execution, those that send most first.

    Raises:
        ValueError: groups in an unknown notation.

    """
    found: dict[tuple[str, str, tuple[str, ...], int, str], list[tuple[int, int, float, float, str]]] = {}
    for line, times in _each_once(module):
        kind = line.opcode.removesuffix("-start")
        groups = _groups(line, mesh.size)
        size = len(groups[0])
        if size == 1:
            continue
        axes, links, speed = _carried_by(groups, mesh, target)
        origin = re.search(r'op_name="([^"]*)"', line.text)
        share = {"collective-permute": 1.0, "all-reduce": 2 * (size - 1) / size}.get(kind, (size - 1) / size)
        arrays = line.arrays
        if line.opcode.endswith("-start") and len(arrays) > 1 and kind != "all-reduce":
            arrays = arrays[1:2]  # (operand, result, and what the runtime needs)
        for array in arrays:
            payload = math.prod(array.dims) * BITS[array.dtype] // 8 * (size if kind == "reduce-scatter" else 1)
            sent = times * (share * payload)
            part = times, times * payload, sent, sent / speed, origin.group(1) if origin else ""
            found.setdefault((kind, array.dtype, axes, size, links), []).append(part)
    rows = []
    for key, parts in found.items():
        counts, payloads, sent_bytes, seconds, origins = zip(*parts, strict=True)
        origin_of_largest = origins[payloads.index(max(payloads))]
        rows.append(Collective(*key, sum(counts), sum(payloads), sum(sent_bytes), sum(seconds), origin_of_largest))
    return sorted(rows, key=lambda row: -row.sent)


def _each_once(module: Module) -> Iterator[tuple[Instruction, int]]:
    """(collective, how often it runs). libtpu may spread one over several fusions, each of which names it whole."""
    spread: set[str] = set()
    for line, _, times, _ in executed(module):
        if line.opcode.removesuffix("-start") not in KINDS:
            continue
        channel = re.search(r"channel_id=(\d+)", line.text)
        if "async_collective_fusion_config" in line.text and channel:
            if channel.group(1) in spread:
                continue
            spread.add(channel.group(1))
        yield line, times


def _groups(line: Instruction, num_devices: int) -> list[list[int]]:
    """Positions in the mesh, group by group, from any of the notations of HLO."""
    text = line.text
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text):
        return [[int(one), int(other)] for one, other in re.findall(r"\{(\d+),(\d+)\}", pairs.group(1))] or [[0]]
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text):
        groups = [[int(i) for i in part.split(",") if i] for part in re.findall(r"\{([\d,]*)\}", listed.group(1))]
        return groups or [list(range(num_devices))]
    if tiled := re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _iota(tiled.group(1)).tolist()
    if named := _MESH.search(text):
        return _named_groups(named.group(1), named.group(2), named.group(3))
    raise ValueError(f"HLO: groups of {line.name} are in an unknown notation: {text[:160]}")


def _iota(text: str) -> np.ndarray:
    """[2,4]<=[4,2]T(1,0): numbers in order, reshaped, transposed, reshaped. [8,2]T(1,0): reshaped and transposed."""
    found = re.fullmatch(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?", text.strip())
    if found is None:
        raise ValueError(f"HLO: device order {text!r} is in an unknown notation")
    final, source, order = ([int(size) for size in part.split(",")] if part else None for part in found.groups())
    first = source or final or []
    numbers = np.arange(math.prod(first)).reshape(first)
    numbers = numbers.transpose(order) if order else numbers
    return numbers.reshape(final) if source and final else numbers


def _named_groups(sizes: str, order: str | None, axes: str) -> list[list[int]]:
    """mesh['a'=2,'b'=4] {'b'}, perhaps a part of an axis: 'b':(2)2."""
    names = re.findall(r"'([^']+)'=(\d+)", sizes)
    shape = {name: int(size) for name, size in names}
    ids = np.arange(math.prod(shape.values())) if order is None else _iota(order).reshape(-1)
    wanted = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    dims: list[tuple[bool, int]] = []
    for name, size in shape.items():
        part = next((found for found in wanted if found[0] == name), None)
        if part is None:
            dims.append((False, size))
        elif not part[1]:
            dims.append((True, size))
        else:
            before, inside = int(part[1]), int(part[2])
            dims += [(False, before), (True, inside), (False, size // (before * inside))]
    cube = ids.reshape([size for _, size in dims])
    kept = [place for place, (chosen, _) in enumerate(dims) if not chosen]
    group = [place for place, (chosen, _) in enumerate(dims) if chosen]
    length = math.prod(dims[place][1] for place in group)
    groups: list[list[int]] = cube.transpose([*kept, *group]).reshape(-1, length).tolist()
    return groups


def _carried_by(groups: list[list[int]], mesh: Mesh, target: Target) -> tuple[tuple[str, ...], str, float]:
    """(mesh axes, links, bytes a second that a device can send over them) of the first of the largest groups."""
    members = max(groups, key=len)
    places = np.array(np.unravel_index(np.asarray(members), mesh.devices.shape))
    axes = tuple(name for name, row in zip(mesh.axis_names, places, strict=True) if len(set(row.tolist())) > 1)
    links, speed = _links([mesh.devices.flat[place] for place in members], target)
    return axes, links, speed


def _links(devices: Sequence[jax.Device], target: Target) -> tuple[str, float]:
    chip = target.chip
    if target.platform == "cuda":
        hosts = {device.process_index for device in devices}
        return ("NVLink", chip.link) if len(hosts) == 1 else ("network between hosts", chip.outer)
    if len({slice_of(device) for device in devices}) > 1:
        return "network between slices", chip.outer
    coords = np.array([device.coords for device in devices])
    everywhere = np.array([device.coords for device in target.devices])
    lengths = [len(set(row.tolist())) for row in coords.T]
    if math.prod(lengths) != len(devices):
        return "ICI, some of the links", chip.link
    names, speed = [], 0.0
    for place, name in enumerate("xyz"):
        if lengths[place] > 1:
            ring = chip.full_axis is not None and len(set(everywhere[:, place].tolist())) % chip.full_axis == 0
            names.append(f"{name}{'' if ring else ' (no ring)'}")
            speed += chip.link * (2 if ring else 1)
    return f"ICI {', '.join(names)}", speed
