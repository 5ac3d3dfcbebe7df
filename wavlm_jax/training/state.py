"""What training changes, and what a step says about itself. Everything else is a function of (config, step)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int

from wavlm_jax.shapes import Params, StepKey
from wavlm_jax.training.sharding import replicated, tree_shardings
from wavlm_jax.training.trees import path_name


@struct.dataclass
class TrainState:
    """The whole state of training: float32 arrays and int32 scalars, or their shapes, or their shardings."""

    step: Any
    """Steps done; the position of data and randomness."""
    params: Params
    opt_state: Any
    skipped: Any
    """Steps whose loss or gradient was not finite, in all."""
    skipped_in_a_row: Any
    """Of those, the ones since the last good step."""


@struct.dataclass
class Report:
    """What a step says about itself: scalars, the same on every device; numpy once fetched."""

    sums: Any
    """LossSums of the global batch."""
    values: dict[str, Any]
    """Gradient norm before clipping, learning rate."""
    finite: Any
    """bool: whether the step changed anything."""
    skipped: Any
    skipped_in_a_row: Any


def root_key(seed: int) -> StepKey:
    """The typed key that every draw of a run descends from."""
    return jax.random.key(seed)


def init_key(seed: int) -> StepKey:
    """The key of fresh parameters: the one fold that no step takes."""
    return jax.random.fold_in(root_key(seed), 2**32 - 1)


def fresh_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before step 1, traced or real."""

    def zero() -> Int[Array, ""]:
        return jnp.zeros((), jnp.int32)

    return TrainState(
        step=zero(),
        params=params,
        opt_state=optimizer.init(params),
        skipped=zero(),
        skipped_in_a_row=zero(),
    )


def shard_state(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A fresh state around parameters that are already on their devices; the optimizer state is born beside them."""
    shardings = {path_name(path): leaf.sharding for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    abstract = abstract_state(params, optimizer, shardings, mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    opt_state = jax.jit(optimizer.init, out_shardings=places.opt_state)(params)
    zeros = [jax.device_put(jnp.zeros((), jnp.int32), replicated(mesh)) for _ in range(3)]
    return TrainState(zeros[0], params, opt_state, zeros[1], zeros[2])


def abstract_state(
    params: Params, optimizer: optax.GradientTransformation, shardings: Mapping[str, NamedSharding], mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of the state: what is compiled for, and what a checkpoint is restored into."""
    abstract = jax.eval_shape(lambda tree: fresh_state(tree, optimizer), params)
    places = tree_shardings(abstract, shardings, mesh)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), abstract, places
    )
