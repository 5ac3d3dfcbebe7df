"""Memory that one layer's attention needs beside its arguments on a TPU v5e, forward and backward, by the TPU compiler.

    python -m bench.attention [--rows 8] [--frames 768 1536 3072] [--implementations ...]

Base's heads, bfloat16, ragged rows, attention dropout on. No TPU is needed: the compiler's own account of temporaries.
"""

import argparse
import json
import os

HEADS, HEAD_DIM = 12, 64
IMPLEMENTATIONS = ("pallas_tpu", "chunked", "dense")
DROP_THRESHOLD = 6554


def main() -> None:
    """Print one JSON line a figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--frames", type=int, nargs="+", default=(768, 1536, 3072))
    parser.add_argument("--implementations", nargs="+", default=IMPLEMENTATIONS, choices=IMPLEMENTATIONS)
    arguments = parser.parse_args()
    os.environ |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
    for frames in arguments.frames:
        logits = arguments.rows * HEADS * frames**2 * 4 / 2**20
        for implementation in arguments.implementations:
            found = temporaries(implementation, arguments.rows, frames)
            figure = {
                "name": f"attention_temp_mib_{implementation}_{frames}",
                "value": round(found, 1),
                "unit": "MiB",
                "runs": 1,
                "against": f"one float32 array of all logits, {arguments.rows} rows, v5e, bfloat16, dropout on",
                "ratio": round(logits / max(found, 0.1), 2),
            }
            print(json.dumps(figure), flush=True)


def temporaries(implementation: str, rows: int, frames: int) -> float:
    """MiB of temporaries of one layer's attention and its gradients for v5e."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from wavlm_jax.model.attention import attend
    from wavlm_jax.model.fused_attention import AttentionDropout
    from wavlm_jax.model.position import Bias

    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    mesh = Mesh(np.array([device]).reshape(1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    place = NamedSharding(mesh, PartitionSpec())

    def like(shape: tuple[int, ...], dtype: object) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def step(states: list, profile: jax.Array, gates: jax.Array, mask: jax.Array, seeds: jax.Array) -> tuple:
        def mixed(
            query: jax.Array, key: jax.Array, value: jax.Array, profile: jax.Array, gates: jax.Array
        ) -> jax.Array:
            heads = [x.reshape(rows, frames, HEADS, HEAD_DIM) for x in (query, key, value)]
            drop = AttentionDropout(DROP_THRESHOLD, seeds)
            output = attend(*heads, Bias(profile, gates), mask, drop, implementation)
            return output.reshape(rows, frames, HEADS * HEAD_DIM)

        output, pull = jax.vjp(mixed, *states[:3], profile, gates)
        return output, pull(states[3])

    states = [like((rows, frames, HEADS * HEAD_DIM), jnp.bfloat16)] * 4
    profile, gates = like((HEADS, 2 * frames - 1), jnp.float32), like((rows, frames, HEADS), jnp.float32)
    mask, seeds = like((rows, frames), bool), like((rows, HEADS, 2), jnp.uint32)
    with jax.set_mesh(mesh):
        compiled = jax.jit(step).lower(states, profile, gates, mask, seeds).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


if __name__ == "__main__":
    main()
