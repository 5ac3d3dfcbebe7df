"""The mesh (data, fsdp, tensor): which devices there are, and who sees which rows."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

MESH_AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
"""Mesh axes over which the rows of a batch are spread."""


@dataclass(frozen=True, kw_only=True)
class MeshSettings:
    """Sizes of the mesh; at most one is -1: whatever devices the others leave."""

    data: int
    """Copies of the parameters; each sees its own rows."""
    fsdp: int
    """Devices over which parameters and optimizer state are split; each sees its own rows. 8 or 16, not all."""
    tensor: int
    """Devices that share the same rows and split heads and feed-forward units."""
    platform: str | None
    """cpu, gpu or tpu: a run that finds another is refused (`hosts.check_machine`); None: whatever there is."""
    hosts: int | None
    """So many processes; None: as many as there are."""
    devices: int | None
    """So many devices in all; None: as many as there are."""

    @classmethod
    def anywhere(cls, *, data: int, fsdp: int, tensor: int) -> "MeshSettings":
        """Of whatever machine there is."""
        return cls(data=data, fsdp=fsdp, tensor=tensor, platform=None, hosts=None, devices=None)

    def sizes(self, num_devices: int) -> tuple[int, int, int]:
        """(data, fsdp, tensor) with -1 resolved.

        Raises:
            ValueError: where they do not multiply to `num_devices`.

        """
        sizes = [self.data, self.fsdp, self.tensor]
        known = math.prod(size for size in sizes if size != -1)
        if sizes.count(-1) == 1 and known > 0 and num_devices % known == 0:
            sizes[sizes.index(-1)] = num_devices // known
        if min(sizes) < 1 or math.prod(sizes) != num_devices:
            raise ValueError(
                f"config.mesh: data {self.data}, fsdp {self.fsdp}, tensor {self.tensor} on {num_devices} devices; "
                f"expected sizes that multiply to {num_devices}, one of them may be -1 (the rest)"
            )
        return sizes[0], sizes[1], sizes[2]


def make_mesh(settings: MeshSettings, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor), rows in the order of the processes.

    `jax.make_mesh` knows the physical network but may interleave processes (and refuses several slices); a loader hands
    out rows by process, so then the plain order is taken: slice by slice, so that only `data` crosses the data centre's
    network.

    Args:
        settings: the sizes.
        devices: of this machine (None), or of one that is planned for.

    Raises:
        ValueError: sizes that do not fit the devices, the hosts or the slices.

    """
    found = sorted(jax.devices() if devices is None else devices, key=lambda d: (slice_of(d), d.process_index, d.id))
    sizes = settings.sizes(len(found))
    _check_borders(sizes, found)
    plain = Mesh(np.array(found).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    if slice_of(found[-1]) != slice_of(found[0]):
        return plain
    try:
        mesh = jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=found)
    except NotImplementedError:  # fsdp 8 on 4 x 4 x 4 chips: no product of whole physical axes
        return plain
    owners = [device.process_index for device in mesh.devices.flat]
    return mesh if owners == sorted(owners) else plain


def slice_of(device: jax.Device) -> int:
    """Number of the TPU slice that a device is in; 0 where there are none."""
    return int(getattr(device, "slice_index", 0) or 0)


def _check_borders(sizes: tuple[int, int, int], devices: Sequence[jax.Device]) -> None:
    """`tensor` stays within a host, `fsdp` and `tensor` within a slice."""
    a_host = min(Counter(device.process_index for device in devices).values())
    if a_host % sizes[2]:
        raise ValueError(f"config.mesh.tensor: {sizes[2]} does not divide the {a_host} devices a host")
    a_slice = min(Counter(slice_of(device) for device in devices).values())
    if a_slice % (sizes[1] * sizes[2]):
        raise ValueError(
            f"config.mesh: fsdp {sizes[1]} x tensor {sizes[2]} does not divide the {a_slice} devices a slice; only "
            "data may cross the network between slices"
        )


def row_shards(mesh: Mesh) -> int:
    """Devices that see different rows."""
    return math.prod(mesh.shape[axis] for axis in ROWS)
