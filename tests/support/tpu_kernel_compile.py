"""Programme of its own: compiles the attention kernels, forward and backward, for real TPUs; prints what they take.

python tests/support/tpu_kernel_compile.py TOPOLOGY:ROWS:FRAMES:DTYPE ...   one JSON line each
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from wavlm_jax.config import Compute, WavLMConfig
from wavlm_jax.model.attention import attend, choose, current_device
from wavlm_jax.model.fused_attention import AttentionDropout
from wavlm_jax.model.position import Bias

HEADS, HEAD_DIM = 2, 64
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def gradients(query, key, value, profile, gates, mask, seeds, direction):
    def mixed(query, key, value, profile, gates):
        return attend(query, key, value, Bias(profile, gates), mask, AttentionDropout(6554, seeds), "pallas_tpu")

    output, pull = jax.vjp(mixed, query, key, value, profile, gates)
    return output, *pull(direction)


def compile_for(name, rows, frames, dtype):
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[name]).devices[0]
    mesh = Mesh(np.array([device]).reshape(1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    place = NamedSharding(mesh, PartitionSpec())

    def like(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    heads = like((rows, frames, HEADS, HEAD_DIM), dtype)
    profile, gates = like((HEADS, 2 * frames - 1), jnp.float32), like((rows, frames, HEADS), jnp.float32)
    mask, seeds = like((rows, frames), bool), like((rows, HEADS, 2), jnp.uint32)
    with jax.set_mesh(mesh):
        chosen = choose(WavLMConfig.base(), Compute(), frames, current_device())
        compiled = jax.jit(gradients).lower(heads, heads, heads, profile, gates, mask, seeds, heads).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    return {
        "device": name,
        "chosen": chosen.implementation,
        "calls": compiled.as_text().count("tpu_custom_call"),
        "temp": memory,
    }


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    for argument in sys.argv[1:]:
        name, rows, frames, dtype = argument.split(":")
        print(json.dumps(compile_for(name, int(rows), int(frames), jnp.dtype(dtype))), flush=True)
