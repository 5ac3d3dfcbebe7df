"""One program of a run, compiled for a target and counted."""

import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh
from jax.stages import Traced

from wavlm_jax.plan import partitioner
from wavlm_jax.plan.collectives import Collective, collectives
from wavlm_jax.plan.flops import loop_outputs, matrix_flops
from wavlm_jax.plan.hlo import Module
from wavlm_jax.plan.targets import GIB, Target
from wavlm_jax.plan.traffic import memory_traffic

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
    """What the program reserves, as the compiler has laid it out: arguments, results that are not updated in place,
    temporaries. Where it gave up, what it says it would need."""
    fits: bool
    arguments: int
    """State and batch; 0 where the compiler gave up."""
    aliased: int
    """Of those, what is updated in place."""
    temporaries: int
    """Everything else that lives while the program runs, activations included."""
    kept: int
    """Activations that the layer loop keeps for the backward pass: part of the temporaries, before padding to tiles."""


@dataclass(frozen=True)
class Roofline:
    """Seconds that one execution takes at least, whichever resource is the narrowest."""

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        """The largest of the three."""
        return max(self.compute, self.memory, self.network)

    @property
    def bound(self) -> str:
        """Which one it is."""
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))


@dataclass(frozen=True)
class Counted:
    """What one program costs on one device."""

    name: str
    audio_seconds: float
    """In its global batch."""
    microbatches: int
    memory: Memory
    flops: float
    """Of matrix products and convolutions, a device."""
    traffic: int
    """Bytes to and from HBM."""
    collectives: tuple[Collective, ...]
    roofline: Roofline
    audio_rate: float
    """Seconds of audio a second and chip, at the roofline."""
    replicated: tuple[str, ...]
    """Arrays that the partitioner brought whole to every device for want of another way; there should be none."""
    compile_seconds: float


def count(
    name: str, traced: Traced, target: Target, mesh: Mesh, *, audio_seconds: float, microbatches: int
) -> Counted | Memory:
    """Compiles a traced program for the target, and counts; only its memory where that is too small.

    Raises:
        jax.errors.JaxRuntimeError: the compiler gave up for another reason than memory.

    """
    started = time.monotonic()
    kept = loop_outputs(traced.jaxpr) // mesh.size
    flops = matrix_flops(traced.jaxpr, target.platform) / mesh.size
    with tempfile.TemporaryDirectory(prefix="wavlm-plan-") as folder:
        dump: dict[str, Any] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            with partitioner.replicated() as replicated:
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


@runtime_checkable
class Printable(Protocol):
    """What is asked of a `jax.stages.Compiled`."""

    def as_text(self) -> str | None:
        """The optimized HLO."""


def program_text(compiled: Printable, dumped: Path) -> str:
    """The optimized program.

    Args:
        compiled: says it itself, unless jaxlib cannot read what a newer libtpu wrote (so with v5p's `async-update`).
        dumped: where the compiler has put its own text then.

    """
    try:
        return compiled.as_text() or ""
    except jax.errors.JaxRuntimeError:
        (text,) = dumped.glob("*.after_optimizations.txt")
        return text.read_text()


def _memory(stats: Any, limit: int, kept: int) -> Memory:
    """Without `peak_memory_in_bytes`: what lives at the fullest moment, with what then lies on the chip and not in HBM.

    The temporaries are reserved as one block, which is larger than what lives in it at any moment.
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
    """Bytes that the compiler says the program would need; 0 where it does not say."""
    found = re.search(r"\((\d+(?:\.\d+)?)([KMGT])\) exceeds", message) or re.search(
        r"Used (\d+(?:\.\d+)?)([KMGT]) of", message
    )
    return int(float(found.group(1)) * _UNITS[found.group(2)]) if found else 0
