"""Bytes that a compiled program moves to and from the memory of one device, loops counted as often as they run.

Every instruction outside a fusion reads its operands and writes its results; what lies on the chip (VMEM) costs
nothing, padding to tiles counts, and slices of a larger array count as what they really touch.
"""

from collections.abc import Iterator
from typing import NamedTuple

from wavlm_jax.plan.hlo import HBM, Computation, Instruction, Module, trip_count

FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
    *("after-all", "partition-id", "replica-id", "opt-barrier", "add-dependency"),
}
"""Opcodes that move nothing themselves."""
FREE_CALLS = ("AllocateBuffer", "ConcatBitcast")
SLICES = ("dynamic-slice", "slice", "gather")
_UPDATE_OPERANDS = 2


class Placed(NamedTuple):
    """An instruction, and how often it runs in one execution of the program."""

    line: Instruction
    computation: Computation
    times: int
    in_fusion: bool


def executed(module: Module) -> Iterator[Placed]:
    """Every instruction that runs; of the branches of a conditional all (at most one of them runs).

    Raises:
        ValueError: a loop of which nobody knows how often it runs.

    """
    yield from _walk(module, module.computations[module.entry], 1, in_fusion=False)


def _walk(module: Module, computation: Computation, times: int, *, in_fusion: bool) -> Iterator[Placed]:
    for line in computation.instructions.values():
        yield Placed(line, computation, times, in_fusion)
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
    """Bytes read from and written to HBM by one device in one execution.

    Raises:
        ValueError: a loop of which nobody knows how often it runs.

    """
    return sum(moved(module, placed) for placed in executed(module) if not placed.in_fusion)


def moved(module: Module, placed: Placed) -> int:
    """Bytes of `memory_traffic` that are those of one instruction outside fusions."""
    return placed.times * _bytes_of(module, placed.computation, placed.line)


def _bytes_of(module: Module, computation: Computation, line: Instruction) -> int:
    opcode = line.opcode
    if opcode in FREE or any(f'custom_call_target="{name}"' in line.text for name in FREE_CALLS):
        return 0
    if opcode.endswith(("-start", "-update", "async-done")):
        return 0  # counted where it ends
    if opcode.endswith("-done"):
        started = computation.instructions[line.operands[0]]
        return _finished(computation, started, line)
    return _read(module, computation, line) + _written(module, computation, line)


def _finished(computation: Computation, started: Instruction, done: Instruction) -> int:
    """An operation that ran beside others: a copy, a slice, a collective."""
    sources = [array for name in started.operands for array in computation.instructions[name].arrays]
    full = sum(array.num_bytes for array in sources if array.space == HBM)
    result = sum(array.num_bytes for array in done.arrays)
    return (min(full, result) if started.opcode == "slice-start" else full) + done.num_bytes


def _read(module: Module, computation: Computation, line: Instruction) -> int:
    total = 0
    for place, name in enumerate(line.operands):
        source = computation.instructions.get(name)
        if source is not None:
            read, passed_on = _touched(module, line, place, source)
            total += source.num_bytes if passed_on else min(source.num_bytes, read)
    return total


def _touched(module: Module, line: Instruction, place: int, source: Instruction) -> tuple[int, bool]:
    """(bytes of `source`, operand `place`, that `line` reads, whether the result is still the operand itself)."""
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
    """As `_touched`, for all that a fusion does with `source`, which it calls `name`."""
    total, escapes = 0, computation.root.name == name
    for user, place in computation.users(name):
        read, passed_on = _touched(module, user, place, source)
        if passed_on:
            more, out = _used(module, computation, user.name, source)
            read, escapes = read + more, escapes or out
        total += read
    return total, escapes


def _written(module: Module, computation: Computation, line: Instruction) -> int:
    """Bytes of the result that are really written: an update in place writes the update alone."""
    outputs = [array.num_bytes if array.space == HBM else 0 for array in line.arrays]
    changed = _updates(module, computation, line)
    return sum(min(size, change) if change is not None else size for size, change in zip(outputs, changed, strict=True))


def _updates(module: Module, computation: Computation, line: Instruction) -> list[int | None]:
    """For each result: bytes of the update, where it is an operand updated in place."""
    if line.opcode == "dynamic-update-slice":
        return [_size(computation, line.operands[1])]
    if line.opcode == "scatter":
        return [_size(computation, line.operands[-1])]
    if line.opcode == "bitcast" and line.operands[0] in computation.instructions:
        return _updates(module, computation, computation.instructions[line.operands[0]])
    if line.opcode == "tuple":
        parts = [_updates(module, computation, computation.instructions[name]) for name in line.operands]
        return [update for part in parts for update in part]
    if line.opcode == "fusion":
        inner = module.computations[line.called("calls") or ""]
        return _updates(module, inner, inner.root)
    return [None] * len(line.arrays)


def _size(computation: Computation, name: str) -> int:
    return sum(array.num_bytes for array in computation.instructions[name].arrays)
