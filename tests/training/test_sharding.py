"""The mesh and the strict tables, on eight CPU devices and on the real models' parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.support import toy_task
from wavlm_jax.config import WavLMConfig
from wavlm_jax.model.wavlm import WavLM
from wavlm_jax.training import sharding
from wavlm_jax.training.optim import make_optimizer
from wavlm_jax.training.sharding import ENCODER_AXES, WAVLM_AXES, AxesTable, MeshSettings, make_mesh, path_name
from wavlm_jax.training.step import abstract_state, init_key
from wavlm_jax.training.task import Topology


def mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    return make_mesh(MeshSettings.anywhere(data=data, fsdp=fsdp, tensor=tensor))


def test_minus_one_is_the_rest() -> None:
    assert dict(mesh(fsdp=2, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert Topology.of(mesh(fsdp=2, tensor=2)) == Topology(4, 0, 1)


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, -1, 1), (-1, 3, 1), (0, 1, 1), (2, 2, 1), (-1, 1, 0)])
def test_sizes_that_do_not_fit_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"config\.mesh: .* on 8 devices; expected sizes that multiply to 8"):
        mesh(*sizes)


@pytest.mark.parametrize(
    "config",
    [WavLMConfig.base(), WavLMConfig.large(), WavLMConfig.tiny(position_bias=False), WavLMConfig.tiny(conv_bias=True)],
    ids=["base", "large", "hubert", "conv bias"],
)
def test_every_parameter_of_every_model_has_its_row(config: WavLMConfig) -> None:
    params = jax.eval_shape(lambda key: WavLM(config).init(key, jnp.zeros((1, 800)))["params"], jax.random.key(0))
    axes = sharding.parameter_axes({"wavlm": params}, WAVLM_AXES)
    assert axes["wavlm/encoder/layers/attention/q_proj/kernel"] == ("layers", "embed", "heads")
    assert axes == {f"wavlm/{name}": row for name, row in sharding.parameter_axes(params, ENCODER_AXES).items()}


def test_base_is_split_evenly_where_it_is_large() -> None:
    config = WavLMConfig.base()
    params = jax.eval_shape(lambda key: WavLM(config).init(key, jnp.zeros((1, 800)))["params"], jax.random.key(0))
    shardings = sharding.parameter_shardings(params, WAVLM_AXES, mesh(fsdp=8))
    text = sharding.describe(params, shardings)
    assert "94,381,936 parameters" in text
    held = sum(np.prod(shardings[path_name(p)].shard_shape(x.shape)) for p, x in _leaves(params))
    assert held < 94_381_936 / 8 + 9_000_000  # what stays whole: conv encoder, positional conv, norms, biases


def _leaves(tree: object) -> list:
    return jax.tree_util.tree_leaves_with_path(tree)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (((r"a", ("embed",)),), r"parameter b \(4, 2\) matches no row"),
        (((r"a", (None,)), (r"b|c", (None, None)), (r"b", (None, None))), r"parameter b \(4, 2\) matches 2 rows"),
        (((r"a", (None,)), (r"b", (None,))), r"parameter b has shape \(4, 2\), but row 'b' names 1 axes"),
        (((r"a", ("embd",)), (r"b", (None, None))), r"a names axis 'embd'; known: "),
    ],
)
def test_the_table_is_strict(table: AxesTable, message: str) -> None:
    params = {"a": jax.ShapeDtypeStruct((4,), jnp.float32), "b": jax.ShapeDtypeStruct((4, 2), jnp.float32)}
    with pytest.raises(ValueError, match=message):
        sharding.parameter_shardings(params, table, mesh())


def test_an_axis_that_does_not_divide_stays_whole_and_the_table_says_so() -> None:
    params = {"a": jax.ShapeDtypeStruct((6,), jnp.float32)}
    shardings = sharding.parameter_shardings(params, ((r"a", ("embed",)),), mesh(fsdp=4))
    assert shardings["a"].spec == PartitionSpec(None)
    assert "whole" in sharding.describe(params, shardings)


def test_shards_thinner_than_a_tile_are_said_to_be() -> None:
    """STACK 1: 768 rows over 256 devices are rebuilt by all-reduce."""
    params = {"a": jax.ShapeDtypeStruct((3, 128), jnp.float32), "b": jax.ShapeDtypeStruct((96,), jnp.float32)}
    table = ((r"a", ("layers", "embed")), (r"b", ("embed",)))
    enough = sharding.parameter_shardings(params, table, mesh(fsdp=4))
    assert sharding.thin_shards(params, enough) is None
    thin = sharding.thin_shards(params, sharding.parameter_shardings(params, table, mesh(fsdp=8)))
    assert thin.startswith("config.mesh.fsdp: leaves 12 rows of b on a device (1 parameters have less than 16)")


def test_optimizer_state_follows_its_parameter() -> None:
    params = jax.eval_shape(toy_task.init, init_key(0))
    shardings = sharding.parameter_shardings(params, toy_task.TABLE, mesh(fsdp=2, tensor=2))
    optimizer = make_optimizer(toy_task.make_settings().optim, 12)
    state = abstract_state(params, optimizer, shardings, mesh(fsdp=2, tensor=2))
    assert state.params["layers"]["up"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    for moments in (state.opt_state["mu"], state.opt_state["nu"]):
        assert jax.tree.map(lambda x: x.sharding, moments) == jax.tree.map(lambda x: x.sharding, state.params)
    with pytest.raises(ValueError, match="follows no parameter and is no scalar"):
        sharding.state_shardings({"stray": jnp.zeros(3)}, params, shardings, mesh())
    factored = sharding.state_shardings({"row": {"head": jnp.zeros(8)}}, params, shardings, mesh())
    assert factored["row"]["head"].spec == PartitionSpec()


def test_the_rules_move_activations_too() -> None:
    with jax.set_mesh(mesh(fsdp=2)), nn.logical_axis_rules(sharding.RULES):
        placed = jax.jit(lambda x: nn.with_logical_constraint(x * 2, ("rows", "frames", "width")))(jnp.ones((8, 3, 4)))
    assert placed.sharding.is_equivalent_to(NamedSharding(mesh(fsdp=2), PartitionSpec(("data", "fsdp"))), 3)


def test_batches_are_checked_and_placed_by_rows() -> None:
    shapes = {"x": jax.ShapeDtypeStruct((16, 3), np.float32)}
    values = np.arange(48, dtype=np.float32).reshape(16, 3)
    placed = sharding.place({"x": values}, shapes, mesh(data=4, tensor=2), "long")["x"]
    np.testing.assert_array_equal(placed, values)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(4, 3)}
    with pytest.raises(ValueError, match=r"batch long: x is float64\(16, 3\), expected float32\(16, 3\)"):
        sharding.place({"x": values.astype(np.float64)}, shapes, mesh(), "long")
    with pytest.raises(ValueError, match=r"batch long: found arrays \['x', 'y'\], expected \['x'\]"):
        sharding.place({"x": values, "y": values}, shapes, mesh(), "long")
