"""What is frozen stays to the bit and starts like new, as torch's parameters without a gradient do; a resume knows."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax.sharding import AxisType, Mesh

from tests.support import toy_task
from wavlm_jax.settings import SettingsError, read
from wavlm_jax.training import checkpoint, loop
from wavlm_jax.training.optim import (
    AdamSettings,
    Freeze,
    Optimizer,
    check_freeze,
    clip,
    first_thaws,
    make_optimizer,
    stop_gradients,
    zero_frozen,
)
from wavlm_jax.training.sharding import MESH_AXES
from wavlm_jax.training.step import init_key
from wavlm_jax.training.workdir import Workdir

TORCHS = AdamSettings(b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.01, eps_added_to="corrected", no_decay=None)


def optimizer_of(rules: dict[str, Freeze]) -> Optimizer:
    changes = {"schedule": "constant", "warmup_steps": 0, "learning_rate": 1e-2, "freeze": rules, "adam": TORCHS}
    return make_optimizer(dataclasses.replace(toy_task.make_settings().optim, **changes), 12)


NAMES = ("body/kernel", "body/bias", "head/kernel")


@pytest.mark.parametrize("until", [0, 3, None])
def test_training_is_that_of_torch_where_the_body_has_no_gradient_at_first(until) -> None:
    rules = {"body": Freeze(pattern="^body/", updates=until)}
    start = {"body": np.linspace(-1, 1, 5, dtype=np.float32), "head": np.linspace(2, 1, 4, dtype=np.float32)}
    weights = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    reference = torch.optim.AdamW(weights.values(), lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)
    optimizer, thaws = optimizer_of(rules), jax.tree.map(jnp.int32, first_thaws(rules))
    params = {name: {"w": jnp.asarray(value)} for name, value in start.items()}
    state = optimizer.init(params)
    random = np.random.default_rng(0)
    for step in range(12):
        grads = {name: random.standard_normal(value.shape).astype(np.float32) for name, value in start.items()}
        moving = [name for name in weights if name == "head" or (until is not None and step >= until)]
        for name, weight in weights.items():
            weight.grad = torch.tensor(grads[name]) if name in moving else None
        norm = torch.nn.utils.clip_grad_norm_([weights[name] for name in moving], 1.0)
        reference.step()
        done = jnp.int32(step)
        ours = zero_frozen({n: {"w": jnp.asarray(g)} for n, g in grads.items()}, rules, thaws, done)
        np.testing.assert_allclose(optax.tree.norm(ours), norm, rtol=1e-6)
        updates, state = optimizer.update(clip(ours, optax.tree.norm(ours), 1.0), state, params, done, thaws)
        params = optax.apply_updates(params, updates)
        for name, weight in weights.items():
            np.testing.assert_allclose(params[name]["w"], weight.detach().numpy(), atol=2e-6)
        if "body" not in moving:
            assert np.asarray(params["body"]["w"]).tobytes() == start["body"].tobytes()
            assert not np.asarray(state["mu"]["body"]["w"]).any()


def test_a_frozen_negative_zero_keeps_its_sign() -> None:
    rules = {"w": Freeze(pattern="w", updates=9), "never": Freeze(pattern="v", updates=None)}
    params = {"w": jnp.full(2, -0.0), "v": jnp.full(2, -0.0), "u": jnp.ones(2)}
    optimizer, zeros = optimizer_of(rules), jax.tree.map(jnp.zeros_like, params)

    def update():
        changes, _ = optimizer.update(zeros, optimizer.init(params), params, jnp.int32(0), {"w": jnp.int32(9)})
        return optax.apply_updates(params, changes)

    moved = jax.jit(update)()
    assert np.signbit(moved["w"]).all()
    assert np.signbit(moved["v"]).all()


def test_nothing_is_differentiated_for_what_never_moves() -> None:
    params = {"body": jnp.ones(3), "head": jnp.ones(3)}

    def gradient_program(rules):
        def loss(params):
            held = stop_gradients(params, rules)
            return jnp.sum(jnp.tanh(held["body"]) * held["head"])

        return [equation.primitive.name for equation in jax.make_jaxpr(jax.grad(loss))(params).eqns]

    whole, without_body = gradient_program({}), gradient_program({"b": Freeze(pattern="^body", updates=None)})
    assert len(without_body) < len(whole) - 2  # the slope of tanh, and what it is multiplied by


def run(workdir: Path, rules: dict[str, Freeze], num_steps: int, task=None, table=toy_task.TABLE):
    """`num_steps` of 12, a checkpoint every 4."""
    settings = toy_task.make_settings(12)
    optim = dataclasses.replace(settings.optim, freeze=rules, schedule="constant")
    train = dataclasses.replace(settings.train, num_steps=num_steps, eval_splits=())
    settings = dataclasses.replace(settings, optim=optim, train=train)
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    loop.run(task or toy_task.make_task(), settings, mesh, Workdir(workdir), config={}, table=table)
    return {step: checkpoint.load_params(workdir, step)[1] for step in checkpoint.steps(workdir)}


RULES = {"front": Freeze(pattern="^front/", updates=6), "down": Freeze(pattern="layers/down", updates=None)}


@pytest.fixture(scope="module")
def start() -> dict:
    return jax.device_get(jax.jit(toy_task.init)(init_key(3)))


def same(one, other) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


def test_frozen_until_its_update_and_a_resume_in_between_changes_nothing(tmp_path, start) -> None:
    whole = run(tmp_path / "whole", RULES, 12)
    early = run(tmp_path / "parts", RULES, 4)
    assert same(early[4]["front"], start["front"])
    assert not same(early[4]["head"], start["head"])
    assert not same(early[4]["layers"]["up"], start["layers"]["up"])
    parts = run(tmp_path / "parts", RULES, 12)
    assert same(parts[12], whole[12])
    assert same(whole[12]["layers"]["down"], start["layers"]["down"])
    assert not same(whole[12]["front"], start["front"])


@pytest.mark.parametrize("given", ["front", "head"])
def test_the_body_waits_for_a_fresh_head_only(tmp_path, start, given) -> None:
    rule = Freeze(pattern="^front/|^layers/", updates=6, unless_given="^head$")
    task = toy_task.make_task(
        initial_params=lambda fresh: {**fresh, given: jax.tree.map(lambda leaf: leaf * 2, fresh[given])},
        freeze={"warmup": rule},
    )
    found = run(tmp_path, {}, 4, task)[4]
    before = {**start, given: jax.tree.map(lambda leaf: leaf * 2, start[given])}
    assert same(found["front"], before["front"]) == (given == "front")
    assert same(found["layers"], before["layers"]) == (given == "front")
    assert not same(found["head"], before["head"])


def test_entries_that_mean_nothing_are_refused() -> None:
    check_freeze({"a": Freeze(pattern="bias$", updates=None)}, NAMES)
    with pytest.raises(ValueError, match=r"optim\.freeze\.a: no parameter's path contains 'embed'.*body/kernel"):
        check_freeze({"a": Freeze(pattern="embed", updates=1)}, NAMES)
    with pytest.raises(ValueError, match="nothing is left to train"):
        check_freeze({"a": Freeze(pattern="body", updates=None), "b": Freeze(pattern="head", updates=None)}, NAMES)
    settings = dataclasses.replace(toy_task.make_settings().optim, freeze={"a": Freeze(pattern="x", updates=1)})
    with pytest.raises(ValueError, match=r"optim\.freeze\.a: the task has an entry of this name"):
        make_optimizer(settings, 12, {"a": Freeze(pattern="y", updates=1)})
    with pytest.raises(SettingsError, match=r"config\.optim\.freeze: updates: found -1"):
        read({"pattern": "x", "updates": -1}, Freeze, "optim.freeze")
    with pytest.raises(SettingsError, match="no regular expression"):
        read({"pattern": "(", "updates": 1}, Freeze, "optim.freeze")
