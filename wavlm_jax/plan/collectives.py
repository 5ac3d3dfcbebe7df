"""What devices say to each other: bytes, groups, mesh axes, and the links that carry it."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from wavlm_jax.plan.hlo import BITS, Instruction, Module
from wavlm_jax.plan.targets import Target
from wavlm_jax.plan.traffic import Placed, executed

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*(?:\([^)]*\))?[^)]*)\))? ?\{([^}]*)\}")
"""mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'b'}"""


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind, dtype and group, added up over a step."""

    kind: str
    dtype: str
    axes: tuple[str, ...]
    """Mesh axes along which the devices of a group differ."""
    group: int
    """Devices in a group."""
    links: str
    """What carries it: "ICI x, y", "NVLink", "outer network"."""
    count: int
    payload: int
    """Bytes of the whole (gathered or reduced) arrays, on one device."""
    sent: float
    """Bytes that one device sends, as a ring does it."""
    seconds: float
    """At the bandwidth of the links, nothing else running."""
    origin: str
    """Where in the program the largest of them comes from."""


def collectives(module: Module, mesh: Mesh, target: Target) -> list[Collective]:
    """All collectives of one execution, largest first.

    Raises:
        ValueError: groups in a notation that is not known.

    """
    found: dict[tuple[str, str, tuple[str, ...], int, str], list[_Part]] = {}
    for placed in _each_once(module):
        kind = placed.line.opcode.removesuffix("-start")
        groups = _groups(placed.line, mesh.size)
        if len(groups[0]) == 1:
            continue
        axes, links, speed = _carried_by(groups, mesh, target)
        origin = re.search(r'op_name="([^"]*)"', placed.line.text)
        for dtype, payload in _payload(kind, placed.line):
            part = _Part(placed.times, payload, _share(kind, len(groups[0])) * payload, speed)
            part = part._replace(origin=origin.group(1) if origin else "")
            found.setdefault((kind, dtype, axes, len(groups[0]), links), []).append(part)
    rows = [
        Collective(
            *key,
            count=sum(part.times for part in parts),
            payload=sum(part.times * part.payload for part in parts),
            sent=sum(part.times * part.sent for part in parts),
            seconds=sum(part.times * part.sent / part.speed for part in parts),
            origin=max(parts, key=lambda part: part.times * part.payload).origin,
        )
        for key, parts in found.items()
    ]
    return sorted(rows, key=lambda row: -row.sent)


def _each_once(module: Module) -> Iterator[Placed]:
    """The collectives of a module. For v5e libtpu spreads one over several fusions of products; each names it whole."""
    spread: set[str] = set()
    for placed in executed(module):
        text = placed.line.text
        if placed.line.opcode.removesuffix("-start") not in KINDS:
            continue
        if "async_collective_fusion_config" in text and (channel := re.search(r"channel_id=(\d+)", text)):
            if channel.group(1) in spread:
                continue
            spread.add(channel.group(1))
        yield placed


class _Part(NamedTuple):
    """One instruction."""

    times: int
    payload: int
    sent: float
    speed: float
    origin: str = ""


def _payload(kind: str, line: Instruction) -> list[tuple[str, int]]:
    """(dtype, bytes) of the larger side: what is gathered, what is reduced."""
    arrays = line.arrays
    if line.opcode.endswith("-start") and len(arrays) > 1 and kind != "all-reduce":
        arrays = arrays[1:2]  # (operand, result, and what the runtime needs)
    scale = _group_size_of_scatter(line) if kind == "reduce-scatter" else 1
    return [(array.dtype, math.prod(array.dims) * BITS[array.dtype] // 8 * scale) for array in arrays]


def _group_size_of_scatter(line: Instruction) -> int:
    return len(_groups(line, 0)[0])


def _share(kind: str, group: int) -> float:
    """Bytes sent by one device for each byte of payload, on a ring."""
    if kind == "collective-permute":
        return 1.0
    once = (group - 1) / group
    return 2 * once if kind == "all-reduce" else once


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


def _carried_by(groups: Sequence[Sequence[int]], mesh: Mesh, target: Target) -> tuple[tuple[str, ...], str, float]:
    """(mesh axes, links, bytes a second that a device can send over them) of the first, largest group."""
    members = max(groups, key=len)
    places = np.array(np.unravel_index(np.asarray(members), mesh.devices.shape))
    axes = tuple(name for name, row in zip(mesh.axis_names, places, strict=True) if len(set(row.tolist())) > 1)
    devices = [mesh.devices.flat[place] for place in members]
    links, speed = _links(devices, target)
    return axes, links, speed


def _links(devices: Sequence[jax.Device], target: Target) -> tuple[str, float]:
    chip = target.chip
    if target.platform == "cuda":
        hosts = {device.process_index for device in devices}
        return ("NVLink", chip.link) if len(hosts) == 1 else ("network between hosts", chip.outer)
    if len({getattr(device, "slice_index", 0) for device in devices}) > 1:
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
