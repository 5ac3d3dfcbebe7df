"""The ECAPA-TDNN against a torch module of our own writing: outputs, gradients, running statistics, padding."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.support.torch_ecapa import TorchECAPA, our_tree, torch_ecapa
from wavlm_jax.config import HeadConfig, WavLMConfig
from wavlm_jax.model.ecapa import AVERAGES, ECAPA
from wavlm_jax.model.heads import WavLMForECAPA
from wavlm_jax.training.sharding import WAVLM_AXES, parameter_axes
from wavlm_jax.training.step import _follow

FEATURES, WIDTH, EMBEDDING, FRAMES = 12, 16, 6, 23


@pytest.fixture(scope="module")
def twins():
    """torch's module, ours, and its parameters."""
    theirs = torch_ecapa(FEATURES, WIDTH, EMBEDDING)
    tensors = [*theirs.named_parameters(), *theirs.named_buffers()]
    return theirs, ECAPA(WIDTH, EMBEDDING), our_tree(tensors)


def frames(rows=4, seed=0):
    return np.random.default_rng(seed).normal(1.0, 2.0, (rows, FRAMES, FEATURES)).astype(np.float32)


@partial(jax.jit, static_argnums=0)
def evaluate(module, params, x, mask):
    return module.apply({"params": params}, x, mask, False)


def test_equals_torch_in_evaluation(twins):
    theirs, ours, params = twins
    x, everywhere = frames(), jnp.ones((4, FRAMES), bool)
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(x)).numpy()
    found = evaluate(ours, params, jnp.asarray(x), everywhere)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


def test_padding_changes_nothing(twins):
    """A row in company and padded with anything gives what it gives alone."""
    _, ours, params = twins
    x, lengths = frames(seed=1), (23, 9, 1, 9)
    mask = jnp.arange(FRAMES)[None, :] < jnp.array(lengths)[:, None]
    together = evaluate(ours, params, jnp.asarray(x), mask)
    for row, length in enumerate(lengths):
        one = jnp.asarray(x[row : row + 1, :length])
        alone = evaluate(ours, params, one, jnp.ones((1, length), bool))
        np.testing.assert_allclose(together[row], alone[0], atol=2e-5, rtol=1e-5)


def test_equals_torch_in_training(twins):
    """Outputs, the gradient of every parameter, and where the running statistics are after the step."""
    theirs, ours, params = twins
    x, everywhere = frames(seed=2), jnp.ones((4, FRAMES), bool)
    weights = np.random.default_rng(3).normal(size=(4, EMBEDDING)).astype(np.float32)
    theirs.train().zero_grad()
    output = theirs(torch.tensor(x))
    (output * torch.tensor(weights)).sum().backward()

    def loss(params):
        found, state = ours.apply({"params": params}, jnp.asarray(x), everywhere, True, mutable=[AVERAGES])
        return jnp.sum(found * weights), (found, state)

    (_, (found, state)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(found, output.detach().numpy(), atol=1e-4, rtol=1e-4)
    wanted = our_tree((name, parameter.grad) for name, parameter in theirs.named_parameters())
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    for path, leaf in jax.tree_util.tree_leaves_with_path(wanted):
        ours_at = grads
        for part in path:
            ours_at = ours_at[part.key]
        np.testing.assert_allclose(ours_at, leaf, atol=2e-5 * scale, rtol=0, err_msg=jax.tree_util.keystr(path))
    pairs = jax.tree_util.tree_leaves_with_path(state[AVERAGES], is_leaf=lambda value: isinstance(value, tuple))
    averages = {jax.tree_util.keystr(path, simple=True, separator="/"): pair for path, pair in pairs}
    assert len(averages) == 2 * (1 + 3 * 9 + 1)
    moved = _follow(params, averages)
    expected = our_tree(theirs.named_buffers())
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        ours_at = moved
        for part in path:
            ours_at = ours_at[part.key]
        np.testing.assert_allclose(ours_at, leaf, atol=1e-5, rtol=1e-5, err_msg=jax.tree_util.keystr(path))


def test_every_parameter_of_the_full_model_has_a_place():
    config, head = WavLMConfig.large(), HeadConfig(num_labels=5994, use_weighted_layer_sum=True)
    model = WavLMForECAPA(config, head)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 48000))))["params"]
    assert len(parameter_axes(shapes, WAVLM_AXES)) == len(jax.tree.leaves(shapes))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes["ecapa"]))
    with torch.device("meta"):
        theirs = TorchECAPA(1024, 512, 256)
    assert count == sum(tensor.numel() for name, tensor in theirs.state_dict().items() if "tracked" not in name)
    assert shapes["ecapa"]["linear"]["kernel"].shape == (3072, 256)
    assert shapes["objective"]["weight"].shape == (256, 5994)
