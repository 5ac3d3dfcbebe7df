"""Parameter groups: learning rate and weight decay by path, and a learning rate that falls from layer to layer.

Groups are all or nothing: where there are any, every parameter is in exactly one, so that no parameter is forgotten.

Parameters that stand still until a given update, or for ever: not updated, not decayed, not in the gradient's norm.

A thawed parameter starts like a new one: its moments are 0 and its bias correction counts from the thaw, as in fairseq
and torch, where a parameter without a gradient has no optimizer state (`freeze_finetune_updates`, FACTS D1).

fairseq's Adam and its schedule, as optax transforms (FACTS C6), and clipping by the global norm.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from wavlm_jax.shapes import Params, Scalar
from wavlm_jax.training.sharding import path_name


@dataclass(frozen=True, kw_only=True)
class Group:
    """One entry of the config section `optim.groups`, which is a dict of names to these."""

    pattern: str
    """Regular expression; parameters whose path contains it belong here ("^lm_head/")."""
    learning_rate: float
    """Times that of the schedule."""
    layer_decay: float = 1.0
    """For stacked layers (first axis): the last one has the full rate, each one before it this share of the next."""
    weight_decay: float = 1.0
    """Times that of `optim.adam`."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected 0 or more")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay: found {self.layer_decay}, expected a share in (0, 1]")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"{self.pattern!r} is no regular expression: {error}") from error

    def rate(self, shape: tuple[int, ...]) -> Any:
        """Factor of the learning rate: a number, or one a layer, to be multiplied with an array of `shape`."""
        if self.layer_decay == 1 or not shape:
            return self.learning_rate
        layers = np.float32(self.learning_rate * self.layer_decay ** np.arange(shape[0] - 1, -1, -1.0))
        return layers.reshape(-1, *[1] * (len(shape) - 1))


Groups = Mapping[str, Group]
"""Name for people -> group."""

_EVERYTHING = Group(pattern="", learning_rate=1.0)


def check_groups(groups: Groups, names: Iterable[str]) -> None:
    """Whether the groups divide the parameters.

    Raises:
        ValueError: a parameter in no group or in several, or a group without any; named.

    """
    names = list(names)
    empty = [key for key, group in groups.items() if not any(re.search(group.pattern, name) for name in names)]
    if empty:
        raise ValueError(
            f"config.optim.groups.{empty[0]}: no parameter's path contains {groups[empty[0]].pattern!r}; paths look "
            f"like {names[0]}"
        )
    for name in names if groups else []:
        found = [key for key, group in groups.items() if re.search(group.pattern, name)]
        if len(found) != 1:
            raise ValueError(
                f"config.optim.groups: parameter {name} is in {len(found)} groups ({', '.join(found) or 'none'}), "
                "expected exactly one"
            )


def group_of(groups: Groups, name: str) -> Group:
    """The group of the parameter of this path; without groups the rates are those of the schedule."""
    return next((group for group in groups.values() if re.search(group.pattern, name)), _EVERYTHING)


@dataclass(frozen=True, kw_only=True)
class Freeze:
    """One entry of the config section `optim.freeze`, which is a dict of names to these."""

    pattern: str
    """Regular expression; parameters whose path contains it stand still ("^wavlm/feature_extractor/")."""
    updates: int | None
    """The first so many updates; None: for ever. Skipped steps (not finite) do not count."""
    unless_given: str | None = None
    """Regular expression. Where the parameters that it finds were given (`init.path`), the entry does not hold."""

    def __post_init__(self) -> None:
        if self.updates is not None and self.updates < 0:
            raise ValueError(f"updates: found {self.updates}, expected 0 or more, or None (for ever)")
        for pattern in (self.pattern, self.unless_given or ""):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error

    def holds(self, name: str) -> bool:
        """Whether the parameter of this path is meant."""
        return re.search(self.pattern, name) is not None


Rules = Mapping[str, Freeze]
"""Name of an entry -> the entry. Of several that hold for a parameter the longest counts."""
Thaws = Mapping[str, Any]
"""Name of an entry -> int32: updates done when it stops to hold. Part of the optimizer state, so a resume knows it."""


def joined(of_config: Rules, of_task: Rules) -> Rules:
    """All entries.

    Raises:
        ValueError: the config has an entry with the name of one of the task's.

    """
    if both := sorted({*of_config} & {*of_task}):
        raise ValueError(f"config.optim.freeze.{both[0]}: the task has an entry of this name; call it something else")
    return {**of_config, **of_task}


def check_rules(rules: Rules, names: Iterable[str]) -> None:
    """Whether every pattern means something.

    Raises:
        ValueError: an entry that holds for no parameter, or entries that together leave none to train.

    """
    names = list(names)
    for key, rule in rules.items():
        if not any(rule.holds(name) for name in names):
            raise ValueError(
                f"config.optim.freeze.{key}: no parameter's path contains {rule.pattern!r}; paths look like {names[0]}"
            )
    if all(_for_ever(rules, name) for name in names):
        raise ValueError("config.optim.freeze: every parameter stands still for ever, nothing is left to train")


def first_thaws(rules: Rules) -> dict[str, jax.Array]:
    """Of a new optimizer state; an entry for ever needs no number."""
    return {key: jnp.int32(rule.updates) for key, rule in rules.items() if rule.updates is not None}


def without_given(rules: Rules, thaws: Thaws, given: Iterable[str]) -> dict[str, Any]:
    """`thaws` with 0 for the entries that do not hold, because what they wait for was given.

    Args:
        rules: all entries.
        thaws: of a new state.
        given: paths of the parameters that did not stay as they were initialised.

    """
    given = list(given)

    def held(key: str) -> bool:
        pattern = rules[key].unless_given
        return pattern is None or not any(re.search(pattern, name) for name in given)

    return {key: thaw if held(key) else thaw * 0 for key, thaw in thaws.items()}


def start_of(rules: Rules, thaws: Thaws, name: str) -> Any:
    """Updates done when the parameter begins to move: int32, a plain 0 where nothing holds it, None for never."""
    if _for_ever(rules, name):
        return None
    starts = [thaws[key] for key, rule in rules.items() if rule.holds(name)]
    return jnp.max(jnp.stack(starts)) if starts else 0


def without_frozen(grads: Params, rules: Rules, thaws: Thaws, updates: Any) -> Params:
    """Gradients with 0 for what stands still: it has no part in the norm, nor in Adam's moments."""

    def of(path: Any, grad: Any) -> Any:
        start = start_of(rules, thaws, path_name(path))
        if start is None:
            return jnp.zeros_like(grad)
        return grad if isinstance(start, int) else jnp.where(updates >= start, grad, 0)

    return jax.tree_util.tree_map_with_path(of, grads)


def hold_for_ever(params: Params, rules: Rules) -> Params:
    """`params`, those that never move cut off from differentiation: no backward pass runs through them for nothing."""

    def of(path: Any, leaf: Any) -> Any:
        return jax.lax.stop_gradient(leaf) if _for_ever(rules, path_name(path)) else leaf

    return jax.tree_util.tree_map_with_path(of, params)


def _for_ever(rules: Rules, name: str) -> bool:
    return any(rule.updates is None and rule.holds(name) for rule in rules.values())


@dataclass(frozen=True, kw_only=True)
class AdamSettings:
    """Adam with decoupled weight decay; the values of WavLM and HuBERT are .9, .98, 1e-6, .01, "uncorrected"."""

    b1: float
    b2: float
    eps: float
    weight_decay: float
    """Multiplied by the learning rate, as in AdamW."""
    eps_added_to: Literal["uncorrected", "corrected"]
    """"uncorrected": sqrt(v) + eps, then bias correction (fairseq). "corrected": the other way round (torch, optax)."""
    no_decay: str | None
    """Regular expression; parameters whose path contains it are not decayed. None: all are (fairseq)."""

    def __post_init__(self) -> None:
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected a decay in [0, 1)")
        if self.no_decay is not None:
            try:
                re.compile(self.no_decay)
            except re.error as error:
                raise ValueError(f"no_decay: {self.no_decay!r} is no regular expression: {error}") from error


@dataclass(frozen=True, kw_only=True)
class TriStageSettings:
    """The three stages of fairseq's schedule for fine-tuning (FACTS D1); the first lasts `warmup_steps`."""

    initial: float
    """Share of the highest rate that the rise starts from (.01)."""
    hold_steps: int
    decay_steps: int
    """Updates of the exponential fall; behind them the rate stays at `final`."""
    final: float
    """Share of the highest rate that is left in the end (.05)."""

    def __post_init__(self) -> None:
        if self.hold_steps < 0 or self.decay_steps < 0:
            raise ValueError(
                f"hold_steps {self.hold_steps}, decay_steps {self.decay_steps}: expected numbers of updates, 0 or more"
            )
        if not 0 <= self.initial <= 1 or not 0 < self.final <= 1:
            raise ValueError(f"initial {self.initial}, final {self.final}: expected shares of the highest rate")


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """Learning rate over time, clipping, and Adam's own section, which goes to `adam` whole."""

    learning_rate: float
    """The highest one."""
    schedule: Literal["linear", "constant", "tri_stage"]
    """After the warm-up: down to 0 at the last update, or level, or as the section `tri_stage` says."""
    warmup_steps: int
    """Updates from 0 up to the peak."""
    max_grad_norm: float | None
    """Gradients with a larger global norm are scaled down to it; None: never."""
    freeze: Mapping[str, Freeze]
    """What stands still, until when; the keys are names for people."""
    adam: AdamSettings
    tri_stage: TriStageSettings | None
    groups: Mapping[str, Group]
    """Learning rates and decays by path; the keys are names for people. Empty: the same for all."""

    def __post_init__(self) -> None:
        if (self.schedule == "tri_stage") != (self.tri_stage is not None):
            found = "a section" if self.tri_stage is not None else "no section"
            raise ValueError(f"tri_stage: found {found} with schedule {self.schedule!r}; they go together")
        if self.learning_rate < 0 or self.warmup_steps < 0:
            raise ValueError(
                f"learning_rate {self.learning_rate}, warmup_steps {self.warmup_steps}: expected 0 or more"
            )
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm: found {self.max_grad_norm}, expected a positive number or None")


class AdamState(NamedTuple):
    """Adam's memory, float32."""

    updates: Any
    """int32: done so far; skipped steps do not count."""
    mu: Params
    nu: Params
    thaws: Any
    """Of `freeze`: name of an entry -> int32, updates done when it stops to hold."""


def make_schedule(settings: OptimSettings, num_steps: int) -> optax.Schedule:
    """Learning rate as a function of u, the updates done before this one.

    peak * u / warmup up to u = warmup, then (linear) peak * (num_steps - u) / (num_steps - warmup), or (tri_stage) the
    formula of FACTS D1.

    Raises:
        ValueError: where the warm-up is not shorter than the training.

    """
    peak, warmup = settings.learning_rate, settings.warmup_steps
    if warmup >= num_steps:
        raise ValueError(
            f"config.optim.warmup_steps: found {warmup}, expected fewer than train.num_steps ({num_steps})"
        )

    if settings.tri_stage is not None:
        return _tri_stage(peak, warmup, settings.tri_stage)

    def schedule(updates: Any) -> Any:
        done = jnp.asarray(updates, jnp.float32)
        rising = done / max(warmup, 1)
        falling = jnp.maximum(num_steps - done, 0) / (num_steps - warmup) if settings.schedule == "linear" else 1.0
        return peak * jnp.where(done < warmup, rising, falling)

    return schedule


def _tri_stage(peak: float, warmup: int, stages: TriStageSettings) -> optax.Schedule:
    """Straight up from a share of the peak, level, exponentially down to another share, level."""

    def schedule(updates: Any) -> Any:
        done = jnp.asarray(updates, jnp.float32)
        rising = stages.initial + (1 - stages.initial) * done / max(warmup, 1)
        fallen = jnp.clip((done - warmup - stages.hold_steps) / max(stages.decay_steps, 1), 0, 1)
        return peak * jnp.where(done < warmup, rising, jnp.exp(math.log(stages.final) * fallen))

    return schedule


def adam(
    schedule: optax.Schedule, settings: AdamSettings, freeze: Rules, groups: Groups | None = None
) -> optax.GradientTransformation:
    """Adam: w -= lr * (decay * w + sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps)), t = this update's number from 1.

    With `eps_added_to="corrected"` eps is multiplied by sqrt(1 - b2^t) first, which is torch's AdamW. What `freeze`
    holds stays as it is, to the bit, and counts t from its thaw; its gradients have to be 0 until then
    (`freeze.without_frozen`). `groups` scale lr and decay.
    """
    b1, b2 = settings.b1, settings.b2
    groups = groups or {}

    def init(params: Params) -> AdamState:
        check_groups(groups, [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)])
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        return AdamState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros), first_thaws(freeze))

    def update(grads: Params, state: AdamState, params: Params | None = None) -> tuple[Params, AdamState]:
        if params is None:
            raise ValueError("adam needs the parameters for weight decay")
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
        rate = schedule(state.updates)

        def change(path: Any, w: Array, m: Array, v: Array) -> Array:
            start = start_of(freeze, state.thaws, path_name(path))
            if start is None:
                return jnp.full_like(w, _NOTHING)
            done = jnp.maximum(state.updates - start, 0)
            root = jnp.sqrt(_one_minus_power(b2, done + 1))
            scale = root / _one_minus_power(b1, done + 1)
            eps = settings.eps * (root if settings.eps_added_to == "corrected" else 1.0)
            group = group_of(groups, path_name(path))
            decay = 0.0 if _matches(settings.no_decay, path_name(path)) else settings.weight_decay * group.weight_decay
            moved = -rate * group.rate(w.shape) * (decay * w + scale * m / (jnp.sqrt(v) + eps))
            return jnp.where(state.updates >= start, moved, _NOTHING)

        updates = jax.tree_util.tree_map_with_path(change, params, mu, nu)
        return updates, AdamState(state.updates + 1, mu, nu, state.thaws)

    return optax.GradientTransformation(init, update)


_NOTHING = -0.0
"""Added to any number, -0 included, leaves its bits alone."""


def clip(grads: Params, norm: Scalar, max_norm: float | None) -> Params:
    """Gradients times min(1, max_norm / (norm + 1e-6)), as fairseq and torch clip."""
    if max_norm is None:
        return grads
    factor = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: g * factor, grads)


def _one_minus_power(base: float, exponent: Int[Array, ""]) -> Float[Array, ""]:
    """1 - base ** exponent without cancellation in float32."""
    return jnp.float32(1) if base == 0 else -jnp.expm1(exponent.astype(jnp.float32) * math.log(base))


def _matches(pattern: str | None, name: str) -> bool:
    return pattern is not None and re.search(pattern, name) is not None
