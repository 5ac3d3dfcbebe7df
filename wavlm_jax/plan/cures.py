"""What to change when a run does not fit: settings near the config's that do, found by compiling them."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from wavlm_jax.plan.program import Memory

REMAT = ("none", "dots", "full")
"""From the fastest to the smallest."""
HALVINGS = 4
LEAST_ROWS = 16
"""Rows of a kernel that a shard keeps: fewer are below a tile, and XLA sends the whole kernel instead."""

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
    """One change a knob, the smallest of it that fits: recomputation, rows a device, fsdp; all together if none does.

    Args:
        config: the one that does not fit.
        attempt: compiles; a ValueError means that the batches or the mesh cannot be cut so.
        devices_a_slice: fsdp stays inside a slice.

    """
    ladders = [list(_remat(config)), list(_rows(config)), list(_fsdp(config, devices_a_slice))]
    found = [cure for ladder in ladders if (cure := _first(config, ladder, attempt)) is not None]
    if found:
        return found
    everything = {key: value for ladder in ladders if ladder for key, value in ladder[-1].items()}
    together = _first(config, [everything], attempt) if everything else None
    return [together] if together is not None else []


def _first(config: Mapping[str, Any], ladder: list[dict[str, Any]], attempt: Attempt) -> Cure | None:
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
    for halving in range(1, HALVINGS + 1):
        yield {"batch.seconds_per_device": config["batch"]["seconds_per_device"] / 2**halving}


def _fsdp(config: Mapping[str, Any], devices_a_slice: int) -> Iterator[dict[str, Any]]:
    size, width = 2 * config["mesh"]["fsdp"], config["model"]["hidden_size"]
    while devices_a_slice % size == 0 and width % size == 0 and width // size >= LEAST_ROWS:
        yield {"mesh.fsdp": size}
        size *= 2
