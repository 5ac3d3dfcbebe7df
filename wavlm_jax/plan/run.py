"""From a config to its counted programs on a target, and to the cost of the whole run."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh
from jax.stages import Traced

from wavlm_jax.plan.program import Counted, Memory, count
from wavlm_jax.plan.targets import Target
from wavlm_jax.settings import read_sections
from wavlm_jax.training.axes import WAVLM_AXES, AxesTable
from wavlm_jax.training.mesh import make_mesh, row_shards
from wavlm_jax.training.run_settings import RunSettings
from wavlm_jax.training.sharding import RULES
from wavlm_jax.training.start import lay_out, make_builder
from wavlm_jax.training.state import root_key
from wavlm_jax.training.stream import BatchSpec
from wavlm_jax.training.task import Task
from wavlm_jax.training.topology import Topology

Outline = Callable[[Mapping[str, Any], Topology], Task]
"""A task that knows its shapes without its data."""
LabelStep = Callable[[Mapping[str, Any], Sequence[jax.Device]], tuple[str, Traced, float, Mesh]]
"""From a config and the devices to (name, program, seconds of audio, mesh) of the step that makes labels."""


@dataclass(frozen=True)
class Plan:
    """A config on a target."""

    mesh: Mapping[str, int]
    devices: int
    processes: int
    parameters: int
    state_bytes: int
    """Of parameters and optimizer, on one device."""
    num_steps: int
    programs: Mapping[str, Counted | Memory]
    """"train 192x768", "valid 128x1792", "labels 4x5000" -> figures."""

    @property
    def fits(self) -> bool:
        """Whether every program does."""
        return all(self.memory_of(name).fits for name in self.programs)

    @property
    def train(self) -> list[Counted]:
        """The steps of training that fit."""
        return [
            found for name, found in self.programs.items() if name.startswith("train ") and isinstance(found, Counted)
        ]

    @property
    def step_seconds(self) -> float:
        """Of the slowest step at its roofline."""
        return max((found.roofline.seconds for found in self.train), default=0.0)

    @property
    def audio_rate(self) -> float:
        """Seconds of audio a second and chip, of the slowest step at its roofline."""
        return min((found.audio_rate for found in self.train), default=0.0)

    @property
    def hours(self) -> float:
        """Of the whole run at the roofline; evaluations and saves not counted."""
        return self.num_steps * self.step_seconds / 3600

    def memory_of(self, name: str) -> Memory:
        """Of one program."""
        found = self.programs[name]
        return found if isinstance(found, Memory) else found.memory


def plan_run(
    config: Mapping[str, Any],
    outline: Outline,
    target: Target,
    *,
    every_bucket: bool = False,
    splits: tuple[str, ...] | None = None,
    label_step: LabelStep | None = None,
    table: AxesTable = WAVLM_AXES,
    on_program: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Compiles the steps of a run for a target, and counts.

    Args:
        config: resolved, as JSON values.
        outline: its task without data.
        target: where it is to run.
        every_bucket: compile every static shape; else the longest of each split, which asks for the most memory.
        splits: which ones; None: "train" and the evaluation splits.
        label_step: of tasks that make labels first.
        table: logical axes of the parameters.
        on_program: is told the name of what is compiled next.

    Raises:
        ValueError: a config that cannot run on so many devices and hosts.

    """
    settings = read_sections(dict(config), RunSettings)
    mesh = make_mesh(settings.mesh, target.devices)
    task = outline(config, Topology(row_shards(mesh), 0, target.num_processes))
    key = root_key(settings.seed)  # here: on devices that are not there programs can be traced, and nothing computed
    programs: dict[str, Counted | Memory] = {}
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        builder = make_builder(task, settings, lay_out(task, settings, mesh, table), key)
        for split in ("train", *settings.train.eval_splits) if splits is None else splits:
            trace = builder.update if split == "train" else builder.evaluation
            for spec in _chosen(task.stream(split).specs, every_bucket):
                name = f"{split} {spec.name}"
                on_program(name)
                programs[name] = count(
                    name, trace(spec), target, mesh, audio_seconds=spec.seconds, microbatches=spec.microbatches
                )
    if label_step is not None:
        on_program("labels")
        name, traced, seconds, rows = label_step(config, target.devices)
        programs[name] = count(name, traced, target, rows, audio_seconds=seconds, microbatches=1)
    return Plan(
        mesh=dict(mesh.shape),
        devices=mesh.size,
        processes=target.num_processes,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(builder.state.params)),
        state_bytes=held(builder.state),
        num_steps=settings.train.num_steps,
        programs=programs,
    )


def same_programs(config: Mapping[str, Any], outline: Outline, target: Target, splits: tuple[str, ...]) -> str:
    """A key that two configs share if their steps are the same programs, however their batches come about.

    Raises:
        ValueError: as `plan_run`.

    """
    settings = read_sections(dict(config), RunSettings)
    mesh = make_mesh(settings.mesh, target.devices)
    task = outline(config, Topology(row_shards(mesh), 0, target.num_processes))
    shapes = [[(spec.name, spec.microbatches) for spec in task.stream(split).specs] for split in splits]
    batch = {name: value for name, value in config["batch"].items() if name != "seconds_per_device"}
    return json.dumps([{**config, "batch": batch}, shapes])


def _chosen(specs: tuple[BatchSpec, ...], every_bucket: bool) -> tuple[BatchSpec, ...]:
    return specs if every_bucket else (max(specs, key=lambda spec: spec.arrays["waveform"].shape[1]),)


def held(state: Any) -> int:
    """Bytes of a sharded tree on one device."""
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(state)
    )
