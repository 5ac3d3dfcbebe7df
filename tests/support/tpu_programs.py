"""Small programs of known cost, compiled for 4 TPU v5e chips and counted; prints JSON. A process of its own: libtpu."""

import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from wavlm_jax.plan.program import count
from wavlm_jax.plan.targets import open_target
from wavlm_jax.training.sharding import MeshSettings, make_mesh

SIDE, LAYERS = 4096, 12


def programs(array):
    """name -> (function, arguments)"""
    square, stack = array((SIDE, SIDE), "float32"), array((LAYERS, SIDE, SIDE), "bfloat16")
    narrow = array((256, SIDE), "bfloat16")
    spread = array((4 * 1024, SIDE), "bfloat16", "data")
    sharded = array((LAYERS, SIDE, SIDE), "bfloat16", None, None, "data")

    def layer(x, w):
        return jnp.tanh(x @ w), None

    def gradient(w, x):
        return jax.grad(lambda w: jnp.square((x @ w).astype(jnp.float32)).sum())(w)

    def gathered(x, *stacks):
        """Weights that no device has whole: their gathering is spread over the products of the layer before."""

        def block(x, pair):
            return layer(layer(x, pair[0])[0], pair[1])

        return jax.lax.scan(block, x, stacks)[0].astype(jnp.float32).sum()

    def stacked(x):
        return jax.lax.scan(lambda c, _: (c + 1, c), x, None, length=LAYERS)[1]

    return {
        "add": (jnp.add, (square, square)),
        "product": (jnp.matmul, (array((SIDE, SIDE), "bfloat16"), array((SIDE, SIDE), "bfloat16"))),
        "scan": (lambda x, ws: jax.lax.scan(layer, x, ws)[0], (narrow, stack)),
        "stacked": (stacked, (square,)),
        "gathered": (gathered, (spread, sharded, sharded)),
        "gradient": (gradient, (array((SIDE, SIDE), "bfloat16"), spread)),
        "too_large": (lambda x: jnp.sort(x, axis=0), (array((2**16, 2**17), "float32"),)),
    }


def main() -> None:
    target = open_target("v5e:2x2")
    mesh = make_mesh(MeshSettings.anywhere(data=4, fsdp=1, tensor=1), target.devices)

    def array(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    whole = NamedSharding(mesh, PartitionSpec())
    counted = {}
    for name, (function, arguments) in programs(array).items():
        traced = jax.jit(function, out_shardings=whole).trace(*arguments)
        counted[name] = dataclasses.asdict(count(name, traced, target, mesh, audio_seconds=1.0, microbatches=1))
    traced, crossed = conflict(target.devices)
    found = count("conflict", traced, target, crossed, audio_seconds=1.0, microbatches=1)
    print(json.dumps(counted | {"conflict": dataclasses.asdict(found)}))


def conflict(devices):
    """(program, mesh): an array that is to lie in another way, which the partitioner can only do by way of all of it"""
    mesh = Mesh(np.array(devices).reshape(2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    given, wanted = PartitionSpec("y", None, "x"), NamedSharding(mesh, PartitionSpec(None, ("x", "y"), None))
    cube = jax.ShapeDtypeStruct((16, 16, 16), "float32", sharding=NamedSharding(mesh, given))
    return jax.jit(lambda x: 1 + jax.lax.with_sharding_constraint(jnp.sin(x), wanted)).trace(cube), mesh


if __name__ == "__main__":
    main()
