"""fairseq's Adam, schedule and clipping against the formula in float64 and torch's AdamW; optax's own optimizers."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import toy_task
from wavlm_jax.settings import SettingsError, read
from wavlm_jax.training import checkpoint, loop
from wavlm_jax.training.optim import (
    OPTAX,
    AdamSettings,
    Freeze,
    Group,
    Optimizer,
    OptimSettings,
    TriStageSettings,
    clip,
    first_thaws,
    make_optimizer,
    make_schedule,
)
from wavlm_jax.training.sharding import make_mesh
from wavlm_jax.training.step import init_key
from wavlm_jax.training.workdir import Workdir

BASE = AdamSettings(b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.01, eps_added_to="uncorrected", no_decay=None)


def constant(rate: float, **changes) -> Optimizer:
    """An optimizer with the same learning rate at each update."""
    return make_optimizer(optim(learning_rate=rate, schedule="constant", warmup_steps=0, **changes), 100)


def first_update(optimizer: Optimizer, grads, params):
    thaws = jax.tree.map(jnp.int32, first_thaws(optimizer.freeze))
    return optimizer.update(grads, optimizer.init(params), params, jnp.int32(0), thaws)[0]


def gradients(steps: int, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(0).standard_normal((steps, 5))).astype(np.float32)


def run(settings: AdamSettings, grads: np.ndarray, rate: float) -> list[np.ndarray]:
    optimizer = constant(rate, adam=settings)
    params = {"w": jnp.linspace(-1, 1, 5, dtype=jnp.float32)}
    state, history = optimizer.init(params), []
    for done, g in enumerate(grads):
        updates, state = optimizer.update({"w": jnp.asarray(g)}, state, params, jnp.int32(done), {})
        params = optax.apply_updates(params, updates)
        history.append(np.asarray(params["w"]))
    return history


@pytest.mark.parametrize("scale", [1.0, 1e-6])  # the second: eps is as large as sqrt(v), so its place matters
def test_follows_the_formula_in_float64(scale: float) -> None:
    w, m, v = np.linspace(-1, 1, 5), np.zeros(5), np.zeros(5)
    grads = gradients(50, scale)
    for t, (g, found) in enumerate(zip(grads.astype(np.float64), run(BASE, grads, 1e-2), strict=True), start=1):
        m = 0.9 * m + 0.1 * g
        v = 0.98 * v + 0.02 * g**2
        w = w - 1e-2 * 0.01 * w
        w = w - 1e-2 * np.sqrt(1 - 0.98**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-6)
        np.testing.assert_allclose(found, w, atol=2e-6)


def against_torch(settings: AdamSettings, scale: float) -> float:
    grads = gradients(50, scale)
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 5))
    reference = torch.optim.AdamW([weight], lr=1e-2, betas=(0.9, 0.98), eps=settings.eps, weight_decay=0.01)
    worst = 0.0
    for g, found in zip(grads, run(settings, grads, 1e-2), strict=True):
        weight.grad = torch.from_numpy(g)
        reference.step()
        worst = max(worst, float(np.abs(weight.detach().numpy() - found).max()))
    return worst


def test_corrected_eps_is_torch_adamw() -> None:
    settings = AdamSettings(**(BASE.__dict__ | {"eps_added_to": "corrected"}))
    assert against_torch(settings, 1e-6) < 2e-6


def test_without_eps_the_conventions_agree_and_with_a_large_one_they_do_not() -> None:
    assert against_torch(AdamSettings(**(BASE.__dict__ | {"eps": 1e-30})), 1.0) < 2e-6
    assert against_torch(BASE, 1e-6) > 1e-2


def test_no_decay_leaves_matching_parameters_alone() -> None:
    params = {"norm": {"scale": jnp.ones(2)}, "dense": {"kernel": jnp.ones(2)}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    optimizer = constant(0.5, adam=AdamSettings(**(BASE.__dict__ | {"no_decay": "norm|bias$"})))
    updates = first_update(optimizer, zeros, params)
    np.testing.assert_array_equal(updates["norm"]["scale"], 0)
    np.testing.assert_allclose(updates["dense"]["kernel"], -0.5 * 0.01)


def test_a_bad_pattern_or_beta_is_named() -> None:
    with pytest.raises(ValueError, match=r"no_decay.*regular expression"):
        AdamSettings(**(BASE.__dict__ | {"no_decay": "("}))
    with pytest.raises(ValueError, match=r"b2: found 1\.0"):
        AdamSettings(**(BASE.__dict__ | {"b2": 1.0}))


def optim(**changes) -> OptimSettings:
    values = {
        "name": "adam",
        "arguments": {},
        "learning_rate": 5e-4,
        "schedule": "linear",
        "warmup_steps": 32,
        "max_grad_norm": 10.0,
        "freeze": {},
        "adam": BASE,
        "tri_stage": None,
        "groups": {},
    }
    return OptimSettings(**(values | changes))


@given(st.integers(0, 399))
@settings(max_examples=50, deadline=None)
def test_linear_schedule(updates: int) -> None:
    expected = 5e-4 * updates / 32 if updates <= 32 else 5e-4 * (1 - (updates - 32) / (400 - 32))
    np.testing.assert_allclose(make_schedule(optim(), 400)(updates), expected, rtol=1e-5)


def test_schedule_ends_at_zero_and_constant_stays_level() -> None:
    assert float(make_schedule(optim(), 400)(400)) == 0
    assert float(make_schedule(optim(schedule="constant"), 400)(399)) == pytest.approx(5e-4)
    assert float(make_schedule(optim(warmup_steps=0), 10)(0)) == pytest.approx(5e-4)


def test_warmup_must_be_shorter_than_the_training() -> None:
    with pytest.raises(ValueError, match=r"optim\.warmup_steps: found 32, expected fewer than train\.num_steps \(32\)"):
        make_schedule(optim(), 32)


@pytest.mark.parametrize("max_norm", [0.1, 100.0])
def test_clipping_is_torch_clip_grad_norm(max_norm: float) -> None:
    values = [np.random.default_rng(i).standard_normal((3, 4)).astype(np.float32) for i in range(2)]
    tensors = [torch.nn.Parameter(torch.zeros(3, 4)) for _ in values]
    for tensor, value in zip(tensors, values, strict=True):
        tensor.grad = torch.from_numpy(value.copy())
    norm = torch.nn.utils.clip_grad_norm_(tensors, max_norm)
    ours = optax.tree.norm([jnp.asarray(value) for value in values])
    np.testing.assert_allclose(ours, norm, rtol=1e-6)
    for tensor, value in zip(tensors, clip({"a": values[0], "b": values[1]}, ours, max_norm).values(), strict=True):
        np.testing.assert_allclose(value, tensor.grad, rtol=2e-6)


@given(st.integers(0, 399))
@settings(max_examples=50, deadline=None)
def test_tri_stage_schedule_is_fairseq_s(updates: int) -> None:
    """FACTS D1: straight up from a hundredth, level, exponentially down to a twentieth, level."""
    stages = TriStageSettings(initial=0.01, hold_steps=100, decay_steps=200, final=0.05)
    schedule = make_schedule(optim(schedule="tri_stage", tri_stage=stages), 400)
    if updates < 32:
        expected = 5e-4 * (0.01 + 0.99 * updates / 32)
    elif updates < 132:
        expected = 5e-4
    elif updates < 332:
        expected = 5e-4 * np.exp(np.log(0.05) * (updates - 132) / 200)
    else:
        expected = 5e-4 * 0.05
    np.testing.assert_allclose(schedule(updates), expected, rtol=1e-5)


def test_schedule_and_section_go_together() -> None:
    with pytest.raises(ValueError, match="tri_stage: found no section"):
        optim(schedule="tri_stage")
    with pytest.raises(ValueError, match="expected shares"):
        TriStageSettings(initial=0.01, hold_steps=0, decay_steps=1, final=0.0)


PARAMETERS = {
    "body": {"layers": {"kernel": jnp.ones((3, 2, 2))}, "below": jnp.ones(2)},
    "head": {"kernel": jnp.ones(2)},
}
GROUPS = {
    "layers": Group(pattern="^body/layers/", learning_rate=1.0, layer_decay=0.5),
    "below": Group(pattern="^body/below", learning_rate=0.125, weight_decay=0.0),
    "head": Group(pattern="^head/", learning_rate=10.0),
}


def test_groups_scale_the_rate_layer_by_layer_and_the_decay() -> None:
    """The same gradient everywhere: plain Adam's update, times each group's factors."""
    plain = AdamSettings(**(BASE.__dict__ | {"weight_decay": 0.0}))
    grads = jax.tree.map(jnp.ones_like, PARAMETERS)

    def updates(settings, groups):
        return first_update(constant(0.5, adam=settings, groups=groups), grads, PARAMETERS)

    one = updates(plain, {})["head"]["kernel"][0]
    found = updates(plain, GROUPS)
    for layer, factor in enumerate((0.25, 0.5, 1.0)):
        np.testing.assert_allclose(found["body"]["layers"]["kernel"][layer], one * factor, rtol=1e-6)
    np.testing.assert_allclose(found["body"]["below"], one * 0.125, rtol=1e-6)
    np.testing.assert_allclose(found["head"]["kernel"], one * 10, rtol=1e-6)
    decayed = updates(BASE, GROUPS)
    np.testing.assert_allclose(decayed["body"]["below"], found["body"]["below"], rtol=1e-6)
    np.testing.assert_allclose(decayed["head"]["kernel"], found["head"]["kernel"] - 0.5 * 10 * 0.01, rtol=1e-5)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"head": GROUPS["head"]}, r"body/below is in 0 groups \(none\)"),
        (GROUPS | {"kernels": Group(pattern="kernel$", learning_rate=1.0)}, r"is in 2 groups \(layers, kernels\)"),
        (GROUPS | {"tail": Group(pattern="tail", learning_rate=1.0)}, r"groups\.tail: no parameter's path contains"),
    ],
)
@pytest.mark.parametrize("name", ["adam", "lion"])
def test_groups_divide_the_parameters(groups, message, name) -> None:
    with pytest.raises(ValueError, match=message):
        constant(0.5, name=name, groups=groups).init(PARAMETERS)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"pattern": "("}, "regular"), ({"layer_decay": 0.0}, "share"), ({"learning_rate": -1.0}, "0 or more")],
)
def test_bad_groups_are_named(values, message) -> None:
    with pytest.raises(ValueError, match=message):
        Group(**({"pattern": "x", "learning_rate": 1.0} | values))


@pytest.mark.parametrize("name", OPTAX)
def test_an_optimizer_of_optax_is_optax_s_own_at_the_learning_rate_of_each_update(name) -> None:
    """Six updates by hand with the rate of the schedule, and by ours; without groups and freezing not a bit differs."""
    settings = optim(name=name, warmup_steps=3)
    ours, schedule = make_optimizer(settings, 8), make_schedule(settings, 8)
    params = theirs = jax.tree.map(lambda leaf: leaf * jnp.linspace(0.5, 1, leaf.size).reshape(leaf.shape), PARAMETERS)
    state, state_of_optax = ours.init(params), getattr(optax, name)(0.0).init(params)
    for done in range(6):
        grads = jax.tree.map(lambda leaf, done=done: jnp.sin(leaf * (done + 3)), PARAMETERS)
        changes, state = ours.update(grads, state, params, jnp.int32(done), {})
        params = optax.apply_updates(params, changes)
        optimizer = getattr(optax, name)(schedule(jnp.int32(done)))
        changes, state_of_optax = optimizer.update(grads, state_of_optax, theirs)
        theirs = optax.apply_updates(theirs, changes)
    assert toy_task.digest(params) == toy_task.digest(theirs)
    assert toy_task.digest(params) != toy_task.digest(PARAMETERS)


def test_groups_and_freezing_of_an_optimizer_of_optax() -> None:
    """Lion moves by the learning rate exactly: so each factor is seen, and the moment that starts at the thaw."""
    freeze = {"below": Freeze(pattern="below", updates=2), "head": Freeze(pattern="^head/", updates=None)}
    groups = {
        "layers": Group(pattern="^body/layers/", learning_rate=2.0, layer_decay=0.5),
        "rest": Group(pattern="below|^head/", learning_rate=1.0, weight_decay=0.0),
    }
    arguments = {"b1": 0.5, "weight_decay": 0.125}
    optimizer = constant(0.5, name="lion", arguments=arguments, freeze=freeze, groups=groups)
    params, state, thaws = PARAMETERS, optimizer.init(PARAMETERS), {"below": jnp.int32(2)}
    for done, sign in enumerate((1.0, 1.0, -1.0)):
        grads = jax.tree.map(lambda leaf, sign=sign: sign * jnp.ones_like(leaf), params)
        changes, state = optimizer.update(grads, state, params, jnp.int32(done), thaws)
        if done == 0:
            for layer, factor in enumerate((0.25, 0.5, 1.0)):
                np.testing.assert_array_equal(changes["body"]["layers"]["kernel"][layer], -factor * (1 + 0.125))
        for name in ("below", "head") if done < 2 else ("head",):
            frozen = changes["body"]["below"] if name == "below" else changes["head"]["kernel"]
            assert np.signbit(frozen).all()
            assert not frozen.any()
        params = optax.apply_updates(params, changes)
    np.testing.assert_array_equal(changes["body"]["below"], 0.5)  # no decay, and no moment of the first two updates
    np.testing.assert_array_equal(params["head"]["kernel"], PARAMETERS["head"]["kernel"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adamv"}, "name: found 'adamv'; did you mean adamw?"),
        ({"name": "lbfgs"}, "name: found 'lbfgs'"),
        ({"name": "adamw", "arguments": {"beta1": 0.9}}, "arguments.beta1: optax.adamw has no such argument; known"),
        ({"name": "adamw", "arguments": {"weight_decy": 0.9}}, "did you mean weight_decay?"),
        ({"name": "sgd", "arguments": {"learning_rate": 1.0}}, "arguments.learning_rate: optax.sgd has no such"),
        ({"name": "sgd", "arguments": {"momentum": [0.9]}}, r"arguments.momentum: found \[0.9\], expected a number"),
        ({"name": "adamw", "arguments": {"mu_dtype": "float31"}}, "arguments: optax.adamw refuses"),
        ({"arguments": {"b1": 0.9}}, r"arguments: found \{'b1': 0.9\} with name 'adam'"),
        (
            {"name": "sgd", "groups": {"all": {"pattern": "", "learning_rate": 1.0, "weight_decay": 0.5}}},
            "groups.all: weight_decay 0.5, but optax.sgd has none",
        ),
    ],
)
def test_unknown_optimizers_and_arguments_are_named(changes, message) -> None:
    section = {field.name: getattr(optim(), field.name) for field in dataclasses.fields(OptimSettings)}
    section |= {"adam": dataclasses.asdict(BASE)} | changes
    with pytest.raises(SettingsError, match=message):
        read(section, OptimSettings, "optim")


def trained(workdir: Path, num_steps: int, **changes) -> dict:
    """Parameters after `num_steps` of 12 of the toy task, with freezing and groups."""
    settings = toy_task.make_settings()
    freeze = {"front": Freeze(pattern="^front/", updates=6), "down": Freeze(pattern="layers/down", updates=None)}
    groups = {
        "layers": Group(pattern="^layers/", learning_rate=1.0, layer_decay=0.5),
        "rest": Group(pattern="^(front/|head)", learning_rate=2.0),
    }
    section = dataclasses.replace(settings.optim, schedule="constant", freeze=freeze, groups=groups, **changes)
    train = dataclasses.replace(settings.train, num_steps=num_steps, eval_splits=())
    settings = dataclasses.replace(settings, optim=section, train=train)
    mesh = make_mesh(settings.mesh, jax.devices()[:1])
    loop.run(toy_task.make_task(), settings, mesh, Workdir(workdir), config={}, table=toy_task.TABLE)
    return checkpoint.load_params(workdir)[1]


@pytest.mark.parametrize(("name", "arguments"), [("lion", {"b1": 0.8}), ("adafactor", {"min_dim_size_to_factor": 4})])
def test_another_optimizer_trains_resumes_to_the_same_bits_and_freezes(tmp_path, name, arguments) -> None:
    whole = trained(tmp_path / "whole", 12, name=name, arguments=arguments)
    early = trained(tmp_path / "parts", 4, name=name, arguments=arguments)
    assert toy_task.digest(trained(tmp_path / "parts", 12, name=name, arguments=arguments)) == toy_task.digest(whole)
    first = jax.device_get(jax.jit(toy_task.init)(init_key(3)))
    assert toy_task.digest(early["front"]) == toy_task.digest(first["front"]) != toy_task.digest(whole["front"])
    np.testing.assert_array_equal(whole["layers"]["down"], first["layers"]["down"])
    assert (early["head"] != first["head"]).any()
    with pytest.raises(checkpoint.CheckpointError, match="is not a checkpoint of this config"):
        trained(tmp_path / "parts", 12)
