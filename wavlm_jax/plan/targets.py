"""The accelerators that a run can be planned for: their figures, their network, and their compilers without the chips.

Also `replicated_arrays`: what XLA's partitioner warns about while it compiles for them.
"""

import importlib.util
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.experimental import topologies

from wavlm_jax.extras import MissingExtraError, missing

GIB = 2**30
TPU_CHIPS_A_HOST = 4
GPUS_A_HOST = 8


class PlanTargetError(ValueError):
    """An unknown topology, or one whose compiler is not installed."""


@dataclass(frozen=True)
class Chip:
    """Figures of one accelerator.

    Peaks and bandwidths of the TPUs: the tables of "How to Scale Your Model" (jax-ml.github.io/scaling-book) and Google
    Cloud's pages; usable memory is what libtpu's compiler itself allows (its out-of-memory message names it).
    """

    name: str
    peak_flops: float
    """bfloat16, per second."""
    memory: int
    """Bytes that a program may use."""
    bandwidth: float
    """Bytes per second to and from that memory."""
    link: float
    """Bytes per second in one direction over one link of the inner network (ICI, NVLink)."""
    outer: float
    """Bytes per second in one direction over one chip's share of the network between slices or hosts."""
    full_axis: int | None = None
    """A physical axis of a multiple of so many chips is a ring; None: not a torus."""
    cores: str = "default"
    """libtpu's name for the use of a chip's cores."""
    axes: int = 0
    """Physical axes of the torus; 0: a switch."""


CHIPS = {
    "v4": Chip("TPU v4", 275e12, int(30.75 * GIB), 1.2e12, 4.5e10, 6.25e9, full_axis=4, cores="megacore", axes=3),
    "v5e": Chip("TPU v5e", 197e12, int(15.75 * GIB), 8.1e11, 4.5e10, 3.125e9, full_axis=16, axes=2),
    "v5p": Chip("TPU v5p", 459e12, int(95.73 * GIB), 2.8e12, 9e10, 6.25e9, full_axis=4, cores="megacore", axes=3),
    "v6e": Chip("TPU v6e", 918e12, int(31.24 * GIB), 1.6e12, 9e10, 1.25e10, full_axis=16, axes=2),
    "h100": Chip("H100 SXM", 989e12, int(0.92 * 84_942_979_072), 3.35e12, 4.5e11, 5e10),
}
"""H100: 0.92 of the memory, which is what launch/slurm.sh reserves; NVLink 4 inside a host, 400 Gb/s a GPU outside."""


@dataclass(frozen=True)
class Target:
    """A machine that a run is planned for."""

    topology: str
    """As given: v5e:16x16."""
    chip: Chip
    slices: int
    """Number of TPU slices, or of GPU hosts: the outer network connects them."""
    platform: str
    """tpu or cuda."""
    devices: tuple[jax.Device, ...]
    """Descriptions only: programs can be compiled for them, but not run."""

    @property
    def num_processes(self) -> int:
        """Number of hosts."""
        return len({device.process_index for device in self.devices})


def open_target(topology: str, slices: int = 1) -> Target:
    """The devices of a topology, as the compiler knows them.

    Args:
        topology: v5e:16x16, v4:2x2x4, ... (chips along each physical axis), or h100:8 (GPUs, eight a host).
        slices: so many TPU slices of that shape.

    Raises:
        PlanTargetError: not such a name, or its compiler is not installed.

    """
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise PlanTargetError(
            f"--topology: found {topology!r}, expected one of {', '.join(CHIPS)} with a shape, such as v5e:16x16, "
            "v4:2x2x4, v5p:4x4x4, v6e:16x16 or h100:8"
        )
    if slices < 1:
        raise PlanTargetError(f"--slices: found {slices}, expected 1 or more")
    chip, sizes = CHIPS[kind], tuple(map(int, shape.split("x")))
    if chip.axes:
        return Target(topology, chip, slices, "tpu", tuple(_tpu_devices(topology, chip, sizes, slices)))
    if slices != 1 or len(sizes) != 1:
        raise PlanTargetError(f"--topology: found {topology!r} and --slices {slices}; expected for GPUs just {kind}:N")
    return Target(topology, chip, -(-sizes[0] // GPUS_A_HOST), "cuda", tuple(_gpu_devices(sizes[0])))


def with_memory(target: Target, gib: float) -> Target:
    """The same machine with `gib` GiB for a program: to leave room for something else, or a margin.

    Raises:
        PlanTargetError: none, or more than there is.

    """
    limit = target.chip.memory / GIB
    if not 0 < gib <= limit:
        raise PlanTargetError(f"--memory_gib: found {gib:g}, expected more than 0 and up to {limit:.2f}")
    return replace(target, chip=replace(target.chip, memory=int(gib * GIB)))


def installed(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def has_cuda() -> bool:
    """Whether JAX's CUDA plugin is installed, for either version of CUDA."""
    return any(installed(f"jax_plugins.xla_cuda{version}") for version in (12, 13))


def _tpu_devices(topology: str, chip: Chip, sizes: tuple[int, ...], slices: int) -> Sequence[jax.Device]:
    if not installed("libtpu"):
        raise MissingExtraError(missing("plan", "planning for a TPU", "libtpu: its compiler, not a TPU"))
    if len(sizes) != chip.axes:
        raise PlanTargetError(f"--topology: {topology} has {len(sizes)} axes, {chip.name} has {chip.axes}")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU in this machine to ask about
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # and nobody else to share it with
    for name, level in _LOG_WARNINGS.items():
        os.environ.setdefault(name, level)
    options: dict[str, Any] = {"chip_config_name": chip.cores}
    if math.prod(sizes) < TPU_CHIPS_A_HOST:
        options["chips_per_host_bounds"] = (*sizes, 1)[:3]
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=topology, num_slices=slices, **options
        ).devices
    except jax.errors.JaxRuntimeError as error:
        raise PlanTargetError(f"--topology: libtpu knows no {topology}: {str(error).splitlines()[0]}") from error


def _gpu_devices(count: int) -> Sequence[jax.Device]:
    if not has_cuda():
        raise PlanTargetError(
            "planning for GPUs needs JAX's CUDA plugin, not a GPU: pip install --no-deps "
            f"jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__} (or cuda13)"
        )
    hosts, rest = divmod(count, GPUS_A_HOST)
    if hosts and rest:
        raise PlanTargetError(f"--topology: {count} GPUs; expected up to {GPUS_A_HOST}, or a multiple of it")
    shape = f"1x{hosts}x{GPUS_A_HOST}" if hosts else f"1x1x{count}"
    described: Sequence[jax.Device] = topologies.get_topology_desc(
        platform="cuda", target_config=_H100, topology=shape
    ).devices
    return described


_LOG_WARNINGS = {"TPU_MIN_LOG_LEVEL": "1", "TPU_STDERR_LOG_LEVEL": "1"}
"""Environment in which libtpu prints warnings; it is read when libtpu is loaded."""
_MARK = "nvoluntary full rematerialization"
_SHARDINGS = re.compile(
    r"from sharding (\{.*?\}) to (\{.*?\}) (?:efficiently|without).*? HLO operation:? %?\S+ = (\S+)"
)
_NAME = re.compile(r'op_name="([^"]*)"')
_WARNING = re.compile(r"W\d{4} \d\d:\d\d:\d\d")
_STDERR = 2


@contextmanager
def replicated_arrays() -> Iterator[list[str]]:
    """Collects each array that a compilation copies whole to every device ("involuntary full rematerialization").

    XLA's partitioner does so where it knows no other way between two shardings, and only says so on the process's
    standard error. The list is filled when the block is left. Other text on standard error is printed then; other
    warnings of the compiler are dropped.
    """
    found: list[str] = []
    sys.stderr.flush()
    before = os.dup(_STDERR)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), _STDERR)
        try:
            yield found
        finally:
            sys.stderr.flush()
            os.dup2(before, _STDERR)
            os.close(before)
            said.seek(0)
            lines = said.read().decode(errors="replace").splitlines(keepends=True)
            found += dict.fromkeys(_described(line) for line in lines if _MARK in line)
            rest = "".join(line for line in lines if _MARK not in line and not _WARNING.match(line))
            os.write(_STDERR, rest.encode())


def _described(line: str) -> str:
    """Shape, place in the program and shardings of the array in a warning; the whole line if it is in another form."""
    place, name = _SHARDINGS.search(line), _NAME.search(line)
    if place is None:
        return line.strip()
    return f"{place.group(3)} of {name.group(1) if name else 'unknown'} from {place.group(1)} to {place.group(2)}"


_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  device_vendor: "NVIDIA Corporation"
  name: "NVIDIA H100 80GB HBM3"
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""The fields of XLA's GpuTargetConfigProto that the compiler asks for, from NVIDIA's data sheet."""
