"""Which implementation of attention a device, a length and a dropout get, and why."""

from typing import NamedTuple

import jax

from wavlm_jax.config import Attention, Compute, WavLMConfig

DENSE_FRAMES = 800
"""Up to 16 s the logits of one row and head fit in 2.5 MB, and recomputing them costs more than it saves."""
KERNEL_FRAMES = 5120
"""The longest row that the TPU kernel is compiled for in the slow tests (102 s): its blocks stay in fast memory."""
SMALL_MEMORY_FRAMES = 1024
"""The same where a core has 16 MB of fast memory."""
KERNEL_KINDS = {
    "TPU v4": SMALL_MEMORY_FRAMES,
    "TPU v5 lite": KERNEL_FRAMES,
    "TPU v5": KERNEL_FRAMES,
    "TPU v6 lite": KERNEL_FRAMES,
}
"""Device kinds that the kernel is compiled for in the tests, and the most frames of a row there."""
GPUS = ("gpu", "cuda")
GPU_HEAD_DIMS = (16, 32, 64, 128)
"""Widths of heads that the GPU kernels' tiles can have."""
GPU_FRAMES = KERNEL_FRAMES
"""The longest row for them: the gradient of the bias of all pairs is 1.3 GB there."""
OLD_GPUS = ("GTX", "RTX 20", "TITAN", "Quadro")
"""In the names of NVIDIA GPUs before Ampere, which Triton does not compile for; others of that age are called Tesla."""
CUDNN_HEAD_DIM = 128


class Device(NamedTuple):
    """What the choice depends on of a device."""

    platform: str
    """"cpu", "gpu", "tpu"."""
    kind: str
    """As JAX names it: "TPU v5 lite"."""


class Choice(NamedTuple):
    """An implementation, never "auto", and for people why it is that one."""

    implementation: Attention
    reason: str


def current_device() -> Device:
    """Of the mesh that is set, also one that is only compiled for, else the one that JAX takes by default."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return Device(abstract.platform, abstract.device_kind)
    device = jax.devices()[0]
    return Device(device.platform, device.device_kind)


def choose(config: WavLMConfig, compute: Compute, num_frames: int, device: Device, *, dropping: bool) -> Choice:
    """What `compute.attention` comes to for rows of `num_frames` frames.

    Args:
        config: head width.
        compute: what is wanted, and the dtype.
        num_frames: frames of a row.
        device: where it is to run.
        dropping: whether dropouts are on, as in training.

    """
    if compute.attention == "auto":
        return _automatic(config, compute, num_frames, device)
    hindrance = None
    if compute.attention == "pallas_gpu" and (found := _gpu_hindrance(config, num_frames, device.kind)):
        hindrance = f"the GPU kernels {found}"
    if compute.attention == "cudnn":
        dropping = dropping and config.attention_dropout > 0
        found = _cudnn_hindrance(config, compute, num_frames, dropping=dropping)
        hindrance = f"cuDNN {found}" if found else None
    return Choice("chunked", hindrance) if hindrance else Choice(compute.attention, "as configured")


def _automatic(config: WavLMConfig, compute: Compute, num_frames: int, device: Device) -> Choice:
    if device.kind in KERNEL_KINDS:
        if num_frames <= KERNEL_KINDS[device.kind]:
            return Choice("pallas_tpu", f"{device.kind}, a fused kernel")
        return Choice("chunked", f"{device.kind}, above {KERNEL_KINDS[device.kind]} frames")
    measured = device.platform in GPUS and compute.dtype == "bfloat16"  # float32 was never timed
    if measured and _gpu_hindrance(config, num_frames, device.kind) is None:
        return Choice("pallas_gpu", f"{device.kind}, fused kernels")
    if num_frames <= DENSE_FRAMES:
        return Choice("dense", f"{device.kind}, up to {DENSE_FRAMES} frames")
    return Choice("chunked", f"{device.kind}, above {DENSE_FRAMES} frames")


def _gpu_hindrance(config: WavLMConfig, num_frames: int, kind: str) -> str | None:
    if config.head_dim not in GPU_HEAD_DIMS:
        return f"have tiles of {', '.join(map(str, GPU_HEAD_DIMS))}, heads are {config.head_dim} wide"
    if not kind.startswith("NVIDIA") or any(name in kind for name in OLD_GPUS):
        return f"need an NVIDIA GPU from Ampere on, this is {kind}"
    return f"take up to {GPU_FRAMES} frames, these are {num_frames}" if num_frames > GPU_FRAMES else None


def _cudnn_hindrance(config: WavLMConfig, compute: Compute, num_frames: int, *, dropping: bool) -> str | None:
    if dropping:
        return "cannot drop attention probabilities reproducibly"
    if compute.dtype != "bfloat16":
        return f"takes bfloat16, compute.dtype is {compute.dtype}"
    if config.head_dim % 8 or config.head_dim > CUDNN_HEAD_DIM:
        return f"takes heads of a multiple of 8 up to {CUDNN_HEAD_DIM}, these have {config.head_dim}"
    return f"takes an even number of frames, these are {num_frames}" if num_frames % 2 else None


def check_platform(compute: Compute, device: Device) -> None:
    """Whether what is asked for by name can run at all.

    Raises:
        ValueError: a TPU kernel without a TPU, a GPU kernel or cuDNN without a GPU.

    """
    needed = {"pallas_tpu": ("tpu",), "pallas_gpu": GPUS, "cudnn": GPUS}.get(compute.attention)
    if needed is not None and device.platform not in needed:
        raise ValueError(
            f"config.compute.attention: {compute.attention!r} needs a {needed[0].upper()}, found {device.kind}; "
            "'auto' takes what suits the device"
        )


def describe(config: WavLMConfig, compute: Compute, frames: tuple[int, ...], device: Device) -> list[str]:
    """For the start of a training run: one line for each implementation that its buckets get.

    Raises:
        ValueError: as `check_platform`.

    """
    check_platform(compute, device)
    found: dict[Choice, list[int]] = {}
    for bucket in frames:
        found.setdefault(choose(config, compute, bucket, device, dropping=True), []).append(bucket)
    return [
        f"attention for {', '.join(map(str, buckets))} frames: {choice.implementation} ({choice.reason})"
        for choice, buckets in found.items()
    ]
