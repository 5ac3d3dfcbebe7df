"""From a config to the compiled and counted programs of its run on a target.

FLOPs are those of matrix products and convolutions, counted in the jaxpr before the compiler sees it: what the
mathematics asks for, recomputation included, loops as often as they run. A multiplication and an addition are two
FLOPs. Element-wise work does not run on the matrix units and is left out.
"""

import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.sharding import Mesh
from jax.stages import Traced

from wavlm_jax.plan.cost import Collective, Module, collectives, memory_traffic
from wavlm_jax.plan.targets import GIB, Target, replicated_arrays
from wavlm_jax.settings import read_sections
from wavlm_jax.training.sharding import RULES, make_mesh, row_shards
from wavlm_jax.training.start import RunSettings, make_builder
from wavlm_jax.training.task import Task, TaskKind, Topology


def matrix_flops(jaxpr: ClosedJaxpr | Jaxpr, platform: str | None = None) -> int:
    """FLOPs of one execution.

    Args:
        jaxpr: of `jax.jit(f).trace(...).jaxpr` or `jax.make_jaxpr`. Of a `cond` the costliest branch counts, of a
            `while` whose turns depend on the data one turn.
        platform: "tpu", "cuda", "cpu": of `jax.lax.platform_dependent` its branch counts; None: the costliest.

    """
    body = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return sum(_flops(equation, platform) for equation in body.eqns)


def loop_outputs(jaxpr: ClosedJaxpr | Jaxpr) -> int:
    """Bytes that forward loops (`scan`) stack up: what a scanned model keeps for its backward pass, at its largest.

    Loops that run backwards stack gradients and are left out.
    """
    body = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    total = 0
    for equation in body.eqns:
        inside = [loop_outputs(inner) for inner in _inner(equation)]
        if equation.primitive.name == "scan" and not equation.params["reverse"]:
            body_outvars = equation.params["jaxpr"].jaxpr.outvars  # what is carried has the shape of one turn
            pairs = zip(equation.outvars, body_outvars, strict=True)
            stacked: list[Any] = [var.aval for var, one in pairs if var.aval.shape != one.aval.shape]
            total += sum(math.prod(array.shape) * array.dtype.itemsize for array in stacked)
        total += max(inside, default=0) if equation.primitive.name == "cond" else sum(inside)
    return total


def _flops(equation: JaxprEqn, platform: str | None) -> int:
    name = equation.primitive.name
    if name in _COUNTED:
        return _COUNTED[name](equation)
    inner = [matrix_flops(part, platform) for part in _inner(equation)]
    if name == "cond":
        taken = _taken(equation, platform)
        return max(inner, default=0) if taken is None else inner[taken]
    return _times(equation) * sum(inner)


def _taken(equation: JaxprEqn, platform: str | None) -> int | None:
    """Which branch of a `cond` runs on the platform; None: the data decide."""
    platforms = equation.params.get("branches_platforms")
    if platform is None or platforms is None:
        return None
    return next(number for number, names in enumerate(platforms) if names is None or platform in names)


def _times(equation: JaxprEqn) -> int:
    """How often the inside of an equation runs."""
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return int(params["length"])
    if name == "pallas_call":
        return math.prod(int(size) for size in params["grid_mapping"].grid)
    if name == "shard_map":
        axes = next(params[key] for key in ("newly_manual_axes", "manual_axes") if key in params)  # by JAX's version
        return math.prod(params["mesh"].shape[axis] for axis in axes)
    return 1


def _inner(equation: JaxprEqn) -> Iterator[ClosedJaxpr | Jaxpr]:
    for value in equation.params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, (ClosedJaxpr, Jaxpr)):
                yield part


def _dot(equation: JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left: Any = equation.invars[0].aval
    result: Any = equation.outvars[0].aval
    return 2 * math.prod(result.shape) * math.prod(left.shape[axis] for axis in contracted)


def _convolution(equation: JaxprEqn) -> int:
    """Each output element takes one product for each kernel element; zeros that dilation puts in are not computed."""
    params = equation.params
    kernel: Any = equation.invars[1].aval
    result: Any = equation.outvars[0].aval
    out_channels = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
    products = math.prod(result.shape) * (math.prod(kernel.shape) // out_channels)
    return 2 * products // math.prod(params["lhs_dilation"])


_COUNTED: dict[str, Callable[[JaxprEqn], int]] = {"dot_general": _dot, "conv_general_dilated": _convolution}


_UNITS = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}

_UNTUNED = {"xla_gpu_enable_triton_gemm": False}
"""Triton's matrix products take tile sizes that were measured, and there is no GPU to measure on: without this the
compiler ends in "Couldn't find output tile sizes". cuBLAS stands in for them."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    limit: int
    """What a program may use."""
    peak: int
    """What the program reserves: arguments, results that are not updated in place, temporaries. If the compiler gave
    up, what it says the program would need."""
    fits: bool
    arguments: int
    """State and batch; 0 if the compiler gave up."""
    aliased: int
    """Of the arguments, what is updated in place."""
    temporaries: int
    """Everything else, activations included."""
    kept: int
    """Activations that the layer loop keeps for the backward pass: part of the temporaries, without padding."""


@dataclass(frozen=True)
class Roofline:
    """Lower bounds of the seconds of one execution, by the peak of each resource of the chip."""

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        """The largest of the three."""
        return max(self.compute, self.memory, self.network)

    @property
    def bound(self) -> str:
        """Name of the largest: the bottleneck."""
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))


@dataclass(frozen=True)
class Counted:
    """The cost of one execution of a program on one device."""

    name: str
    audio_seconds: float
    """Of the global batch."""
    microbatches: int
    memory: Memory
    flops: float
    """Of matrix products and convolutions, per device."""
    traffic: int
    """Bytes to and from HBM."""
    collectives: tuple[Collective, ...]
    roofline: Roofline
    audio_rate: float
    """Seconds of audio per second and chip, at the roofline."""
    replicated: tuple[str, ...]
    """Arrays that XLA's partitioner copied whole to every device because it knew no better; there should be none."""
    compile_seconds: float


def count(
    name: str, traced: Traced, target: Target, mesh: Mesh, *, audio_seconds: float, microbatches: int
) -> Counted | Memory:
    """Compiles a traced program for the target and counts it; if it does not fit, returns its memory only.

    Raises:
        jax.errors.JaxRuntimeError: the compiler failed for another reason than memory.

    """
    started = time.monotonic()
    kept = loop_outputs(traced.jaxpr) // mesh.size
    flops = matrix_flops(traced.jaxpr, target.platform) / mesh.size
    with tempfile.TemporaryDirectory(prefix="wavlm-plan-") as folder:
        dump: dict[str, Any] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            with replicated_arrays() as replicated:
                compiled = traced.lower().compile(compiler_options=dump if target.platform == "tpu" else _UNTUNED)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return Memory(target.chip.memory, _needed(str(error)), False, 0, 0, 0, kept)
        memory = _memory(compiled.memory_analysis(), target.chip.memory, kept)
        if not memory.fits:
            return memory
        module = Module.parse(program_text(compiled, Path(folder)))
    found = tuple(collectives(module, mesh, target))
    traffic = memory_traffic(module)
    roofline = Roofline(
        flops / target.chip.peak_flops, traffic / target.chip.bandwidth, sum((row.seconds for row in found), 0.0)
    )
    seconds = time.monotonic() - started
    rate = audio_seconds / roofline.seconds / mesh.size
    return Counted(
        name=name,
        audio_seconds=audio_seconds,
        microbatches=microbatches,
        memory=memory,
        flops=flops,
        traffic=traffic,
        collectives=found,
        roofline=roofline,
        audio_rate=rate,
        replicated=tuple(replicated),
        compile_seconds=seconds,
    )


def program_text(compiled: Any, dumped: Path) -> str:
    """The optimized HLO.

    Args:
        compiled: a `jax.stages.Compiled`. jaxlib may fail to print what a newer libtpu wrote (v5p's `async-update`);
        dumped: then the text is taken from here, where the compiler has dumped it.

    """
    try:
        return compiled.as_text() or ""
    except jax.errors.JaxRuntimeError:
        (text,) = dumped.glob("*.after_optimizations.txt")
        return text.read_text()


def _memory(stats: Any, limit: int, kept: int) -> Memory:
    """Not by `peak_memory_in_bytes`, which is what is alive at the fullest moment, and counts VMEM too.

    The temporaries are reserved as one block, which is larger than what is alive in it at any moment.
    """
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    peak = int(stats.argument_size_in_bytes + results + stats.temp_size_in_bytes)
    return Memory(
        limit=limit,
        peak=peak,
        fits=peak <= limit,
        arguments=int(stats.argument_size_in_bytes),
        aliased=int(stats.alias_size_in_bytes),
        temporaries=int(stats.temp_size_in_bytes),
        kept=kept,
    )


def _needed(message: str) -> int:
    """Bytes that the program would need, from the compiler's message; 0 if it does not say."""
    found = re.search(r"\((\d+(?:\.\d+)?)([KMGT])\) exceeds", message) or re.search(
        r"Used (\d+(?:\.\d+)?)([KMGT]) of", message
    )
    return int(float(found.group(1)) * _UNITS[found.group(2)]) if found else 0


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
    kind: TaskKind,
    target: Target,
    *,
    every_bucket: bool = False,
    splits: tuple[str, ...] | None = None,
) -> Plan:
    """Compiles the programs of a run for a target, and counts them; says on stderr which one it is at.

    Args:
        config: resolved, as JSON values.
        kind: of `config["task"]`.
        target: where it is to run.
        every_bucket: compile every static shape; else the longest of each split, which needs the most memory.
        splits: of "train", the evaluation splits and "labels"; None: all that there are.

    Raises:
        ValueError: a config that cannot run on so many devices and hosts.

    """
    settings, mesh, task = _set_up(config, kind, target)
    builder = make_builder(task, settings, mesh)
    if splits is None:
        splits = ("train", *settings.train.eval_splits, *(["labels"] if kind.label_step else []))
    programs: dict[str, Counted | Memory] = {}
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        for split in (split for split in splits if split != "labels"):
            specs = task.stream(split).specs
            for spec in specs if every_bucket else [max(specs, key=lambda spec: spec.arrays["waveform"].shape[1])]:
                name = f"{split} {spec.name}"
                _say_compiling(name, target)
                traced = builder.trace(split, spec)
                programs[name] = count(
                    name, traced, target, mesh, audio_seconds=spec.seconds, microbatches=spec.microbatches
                )
    if kind.label_step and "labels" in splits:
        _say_compiling("labels", target)
        name, traced, seconds, rows = kind.label_step(config, target.devices)
        programs[name] = count(name, traced, target, rows, audio_seconds=seconds, microbatches=1)
    return Plan(
        mesh=dict(mesh.shape),
        devices=mesh.size,
        processes=target.num_processes,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(builder.state.params)),
        state_bytes=bytes_per_device(builder.state),
        num_steps=settings.train.num_steps,
        programs=programs,
    )


def same_programs(config: Mapping[str, Any], kind: TaskKind, target: Target, splits: tuple[str, ...]) -> str:
    """A key that two configs share if their programs are the same, though `batch.seconds_per_device` differs.

    Raises:
        ValueError: as `plan_run` does.

    """
    _, _, task = _set_up(config, kind, target)
    streams = [task.stream(split).specs for split in splits if split != "labels"]
    shapes = [[(spec.name, spec.microbatches) for spec in specs] for specs in streams]
    batch = {name: value for name, value in config["batch"].items() if name != "seconds_per_device"}
    return json.dumps([{**config, "batch": batch}, shapes])


def _set_up(config: Mapping[str, Any], kind: TaskKind, target: Target) -> tuple[RunSettings, Mesh, Task]:
    settings = read_sections(config, RunSettings)
    mesh = make_mesh(settings.mesh, target.devices)
    return settings, mesh, kind.outline(config, Topology(row_shards(mesh), 0, target.num_processes))


def _say_compiling(name: str, target: Target) -> None:
    print(f"compiling {name} for {target.topology} ...", file=sys.stderr, flush=True)


def bytes_per_device(state: Any) -> int:
    """Bytes of a sharded tree, arrays or shapes, on one device."""
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(state)
    )
