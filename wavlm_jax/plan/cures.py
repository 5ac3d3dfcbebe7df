"""What to change when a run does not fit: settings near the config's that do, found by compiling them."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from wavlm_jax.plan.program import Memory

REMAT = ("none", "dots", "full")
"""From the fastest to the smallest."""
SHARES = (0.75, 0.5, 0.375, 0.25, 0.125, 0.0625)
"""Of the audio in a micro-batch."""
LEAST_ROWS = 16
"""Rows of a kernel that a shard keeps: fewer are below a tile, and XLA sends the whole kernel instead."""

Ladder = list[dict[str, Any]]
"""Changes of one knob, the smallest first."""
Attempt = Callable[[Mapping[str, Any]], Memory]
"""From a config to the memory of its largest program."""


@dataclass(frozen=True)
class Cure:
    """A change of the config that was tried."""

    changes: Mapping[str, Any]
    """Dotted key -> value: what to give as --config.KEY=VALUE."""
    memory: Memory

    def flags(self) -> str:
        """For the command line."""
        return " ".join(f"--config.{key}={value}" for key, value in self.changes.items())


def find_cures(config: Mapping[str, Any], attempt: Attempt, devices_a_slice: int) -> list[Cure]:
    """One change a knob, the smallest of it that fits: recomputation, rows a device, fsdp; where none does, several.

    Args:
        config: the one that does not fit.
        attempt: compiles; a ValueError means that the batches or the mesh cannot be cut so.
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
    """Less and less audio in a micro-batch; groups of mixing partners shrink with it where they have to fit in."""
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
