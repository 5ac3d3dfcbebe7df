"""The plan for people and for programs, and the search for settings that fit where the config does not."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from wavlm_jax.plan.program import Counted, Memory, Plan
from wavlm_jax.plan.targets import GIB, Target

REMAT = ("none", "dots", "full")
"""Fastest first, least memory last."""
SHARES = (0.75, 0.5, 0.375, 0.25, 0.125, 0.0625)
"""Of the seconds of audio in a micro-batch, in the order in which they are tried."""
LEAST_ROWS = 16
"""A shard keeps at least so many rows of a kernel: with less than a tile XLA sends the whole kernel instead."""

Ladder = list[dict[str, Any]]
"""Changes of one setting, the smallest first."""
Attempt = Callable[[Mapping[str, Any]], Memory]
"""From a config to the memory of its largest program."""


@dataclass(frozen=True)
class Cure:
    """A change of the config that was compiled and fits."""

    changes: Mapping[str, Any]
    """Dotted key -> value, for --config.KEY=VALUE."""
    memory: Memory

    def flags(self) -> str:
        """The changes as flags of the command line."""
        return " ".join(f"--config.{key}={value}" for key, value in self.changes.items())


def find_cures(config: Mapping[str, Any], attempt: Attempt, devices_a_slice: int) -> list[Cure]:
    """The smallest change that fits of each: recomputation, rows per device, fsdp. If none fits, several at once.

    Args:
        config: the one that does not fit.
        attempt: compiles a changed config; a ValueError means that its batches or mesh are impossible.
        devices_a_slice: fsdp stays inside a slice.

    """
    ladders = [list(_remat(config)), list(_rows(config)), list(_fsdp(config, devices_a_slice))]
    found = [cure for ladder in ladders if (cure := _first(config, ladder, attempt)) is not None]
    if found:
        return found
    together = _first(config, _combined(*ladders), attempt)
    return [together] if together is not None else []


def _combined(remat: Ladder, rows: Ladder, fsdp: Ladder) -> Ladder:
    """The most recomputation with fewer and fewer rows, then the same with the most fsdp."""
    most, spread = (remat or [{}])[-1], (fsdp or [{}])[-1]
    bases = [most, *([most | spread] if spread else [])]
    return [base | fewer for base in bases for fewer in ({}, *rows) if len(base | fewer) > 1]


def _first(config: Mapping[str, Any], ladder: Ladder, attempt: Attempt) -> Cure | None:
    for changes in ladder:
        try:
            memory = attempt(changed(config, changes))
        except ValueError:
            continue
        if memory.fits:
            return Cure(changes, memory)
    return None


def changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The config with some values replaced, by dotted key."""
    result: dict[str, Any] = copy.deepcopy(dict(config))
    for key, value in changes.items():
        *sections, name = key.split(".")
        node = result
        for section in sections:
            node = node[section]
        node[name] = value
    return result


def _remat(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    now = config["compute"]["remat"]
    after = REMAT.index(now) + 1 if now in REMAT else len(REMAT) - 1
    for value in REMAT[after:]:
        yield {"compute.remat": value}


def _rows(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Less and less audio in a micro-batch, also with smaller groups of mixing partners."""
    now = config["batch"]["seconds_per_device"]
    group = config["mixing"]["group"] if "mixing" in config else 1
    for share in SHARES:
        yield {"batch.seconds_per_device": share * now}
        if group % 2 == 0 and group > 2:  # noqa: PLR2004 a mixture takes two
            yield {"batch.seconds_per_device": share * now, "mixing.group": group // 2}


def _fsdp(config: Mapping[str, Any], devices_a_slice: int) -> Iterator[dict[str, Any]]:
    size, width = 2 * config["mesh"]["fsdp"], config["model"]["hidden_size"]
    while devices_a_slice % size == 0 and width % size == 0 and width // size >= LEAST_ROWS:
        yield {"mesh.fsdp": size}
        size *= 2


_HEAD = (
    f"{'program':<28}{'fits':>5}{'peak':>8}{'of':>8}{'kept':>8}{'other':>8}{'TFLOP':>9}{'HBM GB':>8}{'sent MB':>9}"
    f"{'compute':>9}{'memory':>8}{'network':>9}{'audio/s':>11}"
)


def as_text(plan: Plan, target: Target, name: str, cures: Sequence[Cure]) -> str:
    """The table, the collectives, the cost of the run, and the cures if it does not fit."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    slices = f" in {target.slices} slices" if target.slices > 1 and target.platform == "tpu" else ""
    lines = [
        f"{name} on {target.topology}: {plan.devices} x {target.chip.name}{slices}, {plan.processes} hosts",
        f"mesh {mesh}",
        f"{plan.parameters:,} parameters; parameters and optimizer take {plan.state_bytes / GIB:.2f} GiB of a device",
        "",
        _HEAD,
        *(_row(program, found) for program, found in plan.programs.items()),
        "(a device: GiB, then one execution; ms at the peaks of the chip; audio/s: seconds of audio a second and chip.",
        " kept: activations for the backward pass; other: all other temporaries)",
    ]
    for program, found in plan.programs.items():
        if isinstance(found, Counted) and found.collectives:
            lines += ["", f"collectives of {program}:", *_collectives(found)]
        if isinstance(found, Counted) and found.replicated:
            lines += ["", f"{program}: the partitioner brings whole arrays to every device, {len(found.replicated)}:"]
            lines += [f"  {array}" for array in found.replicated]
    lines += ["", *_outcome(plan, cures)]
    return "\n".join(lines)


def as_json(plan: Plan, target: Target, name: str, cures: Sequence[Cure]) -> dict[str, Any]:
    """Everything in SI units and bytes, ready for `json.dump`."""
    return vars(plan) | {
        "config": name,
        "topology": target.topology,
        "slices": target.slices,
        "chip": asdict(target.chip),
        "fits": plan.fits,
        "step_seconds": plan.step_seconds,
        "audio_seconds_per_second_and_chip": plan.audio_rate,
        "hours": plan.hours,
        "chip_hours": plan.hours * plan.devices,
        "programs": {
            program: {"memory": asdict(plan.memory_of(program))}
            | (asdict(found) | {"bound": found.roofline.bound} if isinstance(found, Counted) else {})
            for program, found in plan.programs.items()
        },
        "cures": [{"changes": dict(cure.changes), "memory": asdict(cure.memory)} for cure in cures],
    }


def _row(name: str, found: Counted | Memory) -> str:
    memory = found if isinstance(found, Memory) else found.memory
    peak = f"{memory.peak / GIB:.2f}" if memory.peak else "?"
    start = f"{name:<28}{'yes' if memory.fits else 'NO':>5}{peak:>8}{memory.limit / GIB:>8.2f}"
    if isinstance(found, Memory):
        return start
    times = "".join(
        f"{getattr(found.roofline, part) * 1e3:>{width}.2f}"
        for part, width in (("compute", 9), ("memory", 8), ("network", 9))
    )
    other = max(memory.temporaries - memory.kept, 0)
    sent = sum(row.sent for row in found.collectives)
    return (
        f"{start}{memory.kept / GIB:>8.2f}{other / GIB:>8.2f}{found.flops / 1e12:>9.3f}{found.traffic / 1e9:>8.2f}"
        f"{sent / 1e6:>9.1f}{times}{found.audio_rate:>11.1f}"
    )


def _collectives(found: Counted) -> Iterator[str]:
    for row in found.collectives:
        axes = " x ".join(row.axes)
        yield (
            f"  {row.kind} {row.dtype} over {axes} ({row.group} devices, {row.links}): {row.count} of them, "
            f"{row.payload / 1e6:.2f} MB, {row.sent / 1e6:.2f} MB sent a device, {row.seconds * 1e3:.2f} ms; "
            f"largest from {row.origin or 'unknown'}"
        )


def _outcome(plan: Plan, cures: Sequence[Cure]) -> Iterator[str]:
    if plan.fits:
        slowest = max(plan.train, key=lambda found: found.roofline.seconds, default=None)
        if slowest is not None:
            yield (
                f"fits. {slowest.name} is bound by {slowest.roofline.bound}: {plan.audio_rate:.1f} s of audio a second "
                f"and chip; {plan.num_steps:,} updates of {plan.step_seconds * 1e3:.1f} ms take {plan.hours:.1f} h, "
                f"{plan.hours * plan.devices:,.0f} chip-hours: at the roofline, evaluations and saves not counted. "
                "Real steps take longer"
            )
        return
    yield "DOES NOT FIT. " + ("These changes do, each by itself:" if cures else "No change that was tried fits.")
    for cure in cures:
        yield f"  {cure.flags()}   (peak {cure.memory.peak / GIB:.2f} of {cure.memory.limit / GIB:.2f} GiB)"
