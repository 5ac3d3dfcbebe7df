"""What a task needs to know about the devices in order to cut its batches."""

from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from wavlm_jax.training.mesh import row_shards


@dataclass(frozen=True)
class Topology:
    """How many see different rows, and which of them this process is."""

    num_devices: int
    """Devices that see different rows (data * fsdp)."""
    process_index: int
    process_count: int

    @classmethod
    def of(cls, mesh: Mesh) -> "Topology":
        """The topology of a mesh, seen from this process."""
        return cls(row_shards(mesh), jax.process_index(), jax.process_count())
