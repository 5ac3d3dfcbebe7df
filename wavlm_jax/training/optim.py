"""Optimizers: parameter groups, freezing, the schedule, clipping, and fairseq's Adam or one of optax's (FACTS C6, D1).

*Groups* give learning rate and weight decay by parameter path, and a learning rate that falls from layer to layer.
Where there are any, every parameter is in exactly one.

*Frozen* parameters do not change until a given update, or ever: they are not updated, not decayed, and have no part in
the gradient norm. From its thaw on a parameter is treated like a new one: its moments are 0 and its bias correction
counts from there, as in fairseq (`freeze_finetune_updates`) and torch, where a parameter without a gradient has no
optimizer state.

How many updates are done, and when each entry of `optim.freeze` ends, is kept in the train state (`step.TrainState`).
An optimizer is told both, and keeps its own arrays only.
"""

import inspect
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from wavlm_jax.settings import nearest
from wavlm_jax.shapes import Params, Scalar
from wavlm_jax.training.sharding import path_name


def _check_pattern(pattern: str, what: str = "") -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{what}{pattern!r} is no regular expression: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Group:
    """One entry of the config section `optim.groups`, which is a dict of names to these."""

    pattern: str
    """Regular expression; parameters whose path contains it belong here ("^lm_head/")."""
    learning_rate: float
    """Factor of the scheduled learning rate."""
    layer_decay: float = 1.0
    """For stacked layers (first axis): the last layer has the full rate, each one before it this share of the next."""
    weight_decay: float = 1.0
    """Factor of the optimizer's weight decay."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected 0 or more")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay: found {self.layer_decay}, expected a share in (0, 1]")
        _check_pattern(self.pattern)

    def rate(self, shape: tuple[int, ...]) -> Any:
        """Factor of the learning rate: a number, or one per layer, to be multiplied with an array of `shape`."""
        if self.layer_decay == 1 or not shape:
            return self.learning_rate
        layers = np.float32(self.learning_rate * self.layer_decay ** np.arange(shape[0] - 1, -1, -1.0))
        return layers.reshape(-1, *[1] * (len(shape) - 1))


Groups = Mapping[str, Group]
"""Name, chosen by the user -> group."""

_EVERYTHING = Group(pattern="", learning_rate=1.0)


def check_groups(groups: Groups, names: Iterable[str]) -> None:
    """Checks that the groups divide the parameters.

    Raises:
        ValueError: naming a parameter in no group or in several, or a group without any.

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


def _group_name(groups: Groups, name: str) -> str:
    """The group of the parameter of this path; "" without groups."""
    return next((key for key, group in groups.items() if re.search(group.pattern, name)), "")


@dataclass(frozen=True, kw_only=True)
class Freeze:
    """One entry of the config section `optim.freeze`, which is a dict of names to these."""

    pattern: str
    """Regular expression; parameters whose path contains it are frozen ("^wavlm/feature_extractor/")."""
    updates: int | None
    """For the first so many updates; None: for the whole run. Skipped steps (not finite) do not count."""
    unless_given: str | None = None
    """Regular expression. Where parameters that match it came from `init.path`, this entry does not apply."""

    def __post_init__(self) -> None:
        if self.updates is not None and self.updates < 0:
            raise ValueError(f"updates: found {self.updates}, expected 0 or more, or None (for the whole run)")
        _check_pattern(self.pattern)
        _check_pattern(self.unless_given or "")

    def matches(self, name: str) -> bool:
        """Whether it freezes the parameter of this path."""
        return re.search(self.pattern, name) is not None


FreezeRules = Mapping[str, Freeze]
"""Name of an entry -> the entry. Where several match a parameter, the longest freeze counts."""
Thaws = Mapping[str, Any]
"""Name of an entry -> int32, the number of updates after which it ends; entries for the whole run have none."""


def check_freeze(rules: FreezeRules, names: Iterable[str]) -> None:
    """Checks that every entry freezes something, and that something is left to train.

    Raises:
        ValueError: naming an entry that matches no parameter, or if all parameters are frozen for the whole run.

    """
    names = list(names)
    for key, rule in rules.items():
        if not any(rule.matches(name) for name in names):
            raise ValueError(
                f"config.optim.freeze.{key}: no parameter's path contains {rule.pattern!r}; paths look like {names[0]}"
            )
    if all(_never_moves(rules, name) for name in names):
        raise ValueError("config.optim.freeze: every parameter is frozen for the whole run, nothing is left to train")


def first_thaws(rules: FreezeRules, given: Iterable[str] = ()) -> dict[str, int]:
    """The thaws of a new train state: 0 for entries that do not apply.

    Args:
        rules: all entries.
        given: paths of the parameters that were loaded and are not as they were initialised.

    """
    given = list(given)

    def applies(rule: Freeze) -> bool:
        return rule.unless_given is None or not any(re.search(rule.unless_given, name) for name in given)

    return {key: rule.updates * applies(rule) for key, rule in rules.items() if rule.updates is not None}


def thaw_of(rules: FreezeRules, thaws: Thaws, name: str) -> Any:
    """Number of updates after which a parameter begins to move: int32; 0 if nothing freezes it, None for never."""
    if _never_moves(rules, name):
        return None
    found = [thaws[key] for key, rule in rules.items() if rule.matches(name)]
    return jnp.max(jnp.stack(found)) if found else 0


def zero_frozen(grads: Params, rules: FreezeRules, thaws: Thaws, updates: Any) -> Params:
    """Gradients with 0 for frozen parameters, which so have no part in the norm or in the optimizer's moments."""

    def of(path: Any, grad: Any) -> Any:
        thaw = thaw_of(rules, thaws, path_name(path))
        if thaw is None:
            return jnp.zeros_like(grad)
        return grad if isinstance(thaw, int) else jnp.where(updates >= thaw, grad, 0)

    return jax.tree_util.tree_map_with_path(of, grads)


def stop_gradients(params: Params, rules: FreezeRules) -> Params:
    """`params`, with `stop_gradient` on those that never move: no backward pass is computed for them."""

    def of(path: Any, leaf: Any) -> Any:
        return jax.lax.stop_gradient(leaf) if _never_moves(rules, path_name(path)) else leaf

    return jax.tree_util.tree_map_with_path(of, params)


def _never_moves(rules: FreezeRules, name: str) -> bool:
    return any(rule.updates is None and rule.matches(name) for rule in rules.values())


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
        _check_pattern(self.no_decay or "", "no_decay: ")


@dataclass(frozen=True, kw_only=True)
class TriStageSettings:
    """The three stages of fairseq's schedule for fine-tuning (FACTS D1); the first lasts `warmup_steps`."""

    initial: float
    """Share of the peak learning rate at the first update (.01)."""
    hold_steps: int
    decay_steps: int
    """Updates of the exponential decay; after them the rate stays at `final`."""
    final: float
    """Share of the peak learning rate at the end (.05)."""

    def __post_init__(self) -> None:
        if self.hold_steps < 0 or self.decay_steps < 0:
            raise ValueError(
                f"hold_steps {self.hold_steps}, decay_steps {self.decay_steps}: expected numbers of updates, 0 or more"
            )
        if not 0 <= self.initial <= 1 or not 0 < self.final <= 1:
            raise ValueError(f"initial {self.initial}, final {self.final}: expected shares of the highest rate")


OPTAX = (
    *("adabelief", "adadelta", "adafactor", "adagrad", "adamax", "adamaxw", "adamw", "adan", "amsgrad", "lamb", "lars"),
    *("lion", "nadam", "nadamw", "novograd", "radam", "rmsprop", "sgd", "sign_sgd", "signum", "yogi"),
)
"""Optimizers of optax that need nothing but gradients and parameters, and whose state follows the parameters."""


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """Which optimizer, the learning rate over time, clipping, freezing and groups."""

    name: str
    """"adam": fairseq's, with the section `adam`; else a function of optax (`OPTAX`), with `arguments`."""
    arguments: Mapping[str, Any]
    """Arguments of the optax function besides the learning rate; its own defaults for the others."""
    learning_rate: float
    """The peak."""
    schedule: Literal["linear", "constant", "tri_stage"]
    """After the warm-up: down to 0 at the last update, or constant, or as the section `tri_stage` says."""
    warmup_steps: int
    """Updates from 0 up to the peak."""
    max_grad_norm: float | None
    """Gradients with a larger global norm are scaled down to it; None: never."""
    freeze: Mapping[str, Freeze]
    """What is frozen, until when; the keys are names chosen by the user."""
    adam: AdamSettings
    """Not used with another `name`."""
    tri_stage: TriStageSettings | None
    groups: Mapping[str, Group]
    """Learning rates and decays by path; the keys are names chosen by the user. Empty: the same for all."""

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
        if self.name != "adam":
            self._check_optax()
        elif self.arguments:
            raise ValueError(f"arguments: found {dict(self.arguments)} with name 'adam', whose section is `adam`")

    def _check_optax(self) -> None:
        if self.name not in OPTAX:
            raise ValueError(f"name: found {self.name!r}; {nearest(self.name, dict.fromkeys(('adam', *OPTAX)))}")
        known = _arguments(self.name)
        for key, value in self.arguments.items():
            if key not in known:
                raise ValueError(f"arguments.{key}: optax.{self.name} has no such argument; {nearest(key, known)}")
            if not isinstance(value, bool | int | float | str | None):
                raise ValueError(f"arguments.{key}: found {value!r}, expected a number, a string, True, False or None")
        for key, group in self.groups.items():
            if group.weight_decay != 1 and "weight_decay" not in known:
                raise ValueError(f"groups.{key}: weight_decay {group.weight_decay}, but optax.{self.name} has none")
        try:
            getattr(optax, self.name)(learning_rate=0.0, **self.arguments)
        except (TypeError, ValueError) as error:
            raise ValueError(f"arguments: optax.{self.name} refuses {dict(self.arguments)}: {error}") from error


def _arguments(name: str) -> dict[str, inspect.Parameter]:
    """What an optimizer of optax takes besides the learning rate."""
    parameters = dict(inspect.signature(getattr(optax, name)).parameters)
    del parameters["learning_rate"]
    return parameters


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


OptState = dict[str, Any]
"""An optimizer's own arrays: name -> tree whose leaves follow the parameters by path, or are scalars."""


@dataclass(frozen=True)
class Optimizer(ABC):
    """From gradients to changes of the parameters, without state of its own."""

    settings: OptimSettings
    schedule: optax.Schedule
    freeze: FreezeRules

    @abstractmethod
    def init(self, params: Params) -> OptState:
        """The state before the first update; raises ValueError as `check_groups` does."""

    @abstractmethod
    def update(
        self, grads: Params, state: OptState, params: Params, updates: Int[Array, ""], thaws: Thaws
    ) -> tuple[Params, OptState]:
        """(what is to be added to the parameters, the next state).

        Args:
            grads: of the mean loss, clipped; 0 for frozen parameters (`zero_frozen`).
            state: as the update before left it.
            params: frozen ones get -0.0 added, which changes no bit.
            updates: done before this one.
            thaws: of the train state.

        """

    def group(self, name: str) -> Group:
        """The group of the parameter of this path; without groups one that changes nothing."""
        return self.settings.groups.get(_group_name(self.settings.groups, name), _EVERYTHING)


_NOTHING = -0.0
"""Added to any number, -0 included, leaves its bits alone."""


class FairseqAdam(Optimizer):
    """w -= lr * (decay * w + sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps)), t = number of this update from 1.

    For a parameter that was frozen, t counts from its thaw. With `eps_added_to="corrected"` eps is multiplied by
    sqrt(1 - b2^t) first, which is torch's AdamW. Groups scale lr and decay. The moments are float32.
    """

    def init(self, params: Params) -> OptState:
        """The moments "mu" and "nu"."""
        check_groups(self.settings.groups, _names(params))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        return {"mu": zeros, "nu": jax.tree.map(jnp.copy, zeros)}

    def update(
        self, grads: Params, state: OptState, params: Params, updates: Int[Array, ""], thaws: Thaws
    ) -> tuple[Params, OptState]:
        """See `Optimizer.update`."""
        adam = self.settings.adam
        b1, b2 = adam.b1, adam.b2
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state["mu"], grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state["nu"], grads)
        rate = self.schedule(updates)

        def change(path: Any, w: Array, m: Array, v: Array) -> Array:
            name = path_name(path)
            thaw = thaw_of(self.freeze, thaws, name)
            if thaw is None:
                return jnp.full_like(w, _NOTHING)
            done = jnp.maximum(updates - thaw, 0)
            root = jnp.sqrt(_one_minus_power(b2, done + 1))
            scale = root / _one_minus_power(b1, done + 1)
            eps = adam.eps * (root if adam.eps_added_to == "corrected" else 1.0)
            no_decay = adam.no_decay is not None and re.search(adam.no_decay, name)
            decay = 0.0 if no_decay else adam.weight_decay * self.group(name).weight_decay
            moved = -rate * self.group(name).rate(w.shape) * (decay * w + scale * m / (jnp.sqrt(v) + eps))
            return jnp.where(updates >= thaw, moved, _NOTHING)

        return jax.tree_util.tree_map_with_path(change, params, mu, nu), {"mu": mu, "nu": nu}


def _one_minus_power(base: float, exponent: Int[Array, ""]) -> Float[Array, ""]:
    """1 - base ** exponent without cancellation in float32."""
    return jnp.float32(1) if base == 0 else -jnp.expm1(exponent.astype(jnp.float32) * math.log(base))


class OptaxOptimizer(Optimizer):
    """An optimizer of optax, in one instance for each set of parameters that share group and entries of `freeze`.

    While a set is frozen its state stays as it was initialised, whatever the optimizer keeps in it; so it starts like
    new. optax is given the learning rate of this update as a number; layer decay multiplies what optax answers.
    """

    def init(self, params: Params) -> OptState:
        """Under "optax", each set's state by its label."""
        check_groups(self.settings.groups, _names(params))
        return {"optax": dict(self._partition(params, jnp.float32(0)).init(params).inner_states)}

    def update(
        self, grads: Params, state: OptState, params: Params, updates: Int[Array, ""], thaws: Thaws
    ) -> tuple[Params, OptState]:
        """See `Optimizer.update`."""
        optimizer = self._partition(params, self.schedule(updates))
        before = state["optax"]
        changes, partition = optimizer.update(grads, optax.transforms.PartitionState(before), params)
        after = dict(partition.inner_states)
        for label, name in {self._label(name): name for name in _names(params)}.items():
            thaw = thaw_of(self.freeze, thaws, name)
            if thaw is not None and not isinstance(thaw, int):
                after[label] = jax.tree.map(partial(jnp.where, updates >= thaw), after[label], before[label])

        def change(path: Any, difference: Array) -> Array:
            thaw = thaw_of(self.freeze, thaws, path_name(path))
            if thaw is None:
                return jnp.full_like(difference, _NOTHING)
            layers = replace(self.group(path_name(path)), learning_rate=1.0).rate(difference.shape)
            return jnp.where(updates >= thaw, layers * difference, _NOTHING)

        return jax.tree_util.tree_map_with_path(change, changes), {"optax": after}

    def _label(self, name: str) -> str:
        """Of the set of the parameter of this path: its group and the entries of `freeze` that match it."""
        frozen = [key for key, rule in self.freeze.items() if rule.matches(name)]
        return "+".join([_group_name(self.settings.groups, name) or "all", *frozen])

    def _partition(self, params: Params, rate: Float[Array, ""]) -> optax.GradientTransformationExtraArgs:
        """All sets' optimizers in one."""
        labels = jax.tree_util.tree_map_with_path(lambda path, _: self._label(path_name(path)), params)
        return optax.partition({self._label(name): self._one(name, rate) for name in _names(params)}, labels)

    def _one(self, name: str, rate: Float[Array, ""]) -> optax.GradientTransformation:
        """The optimizer of the parameter of this path."""
        if _never_moves(self.freeze, name):
            return optax.set_to_zero()
        group, arguments = self.group(name), dict(self.settings.arguments)
        if group.weight_decay != 1:
            default = _arguments(self.settings.name)["weight_decay"].default
            arguments["weight_decay"] = group.weight_decay * arguments.get("weight_decay", default)
        return getattr(optax, self.settings.name)(learning_rate=group.learning_rate * rate, **arguments)


def _names(params: Params) -> list[str]:
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def make_optimizer(settings: OptimSettings, num_steps: int, task_freeze: FreezeRules | None = None) -> Optimizer:
    """The optimizer that the config names.

    Args:
        settings: the section `optim`.
        num_steps: of the whole run.
        task_freeze: entries besides `settings.freeze`.

    Raises:
        ValueError: a warm-up as long as the run, or two entries of `freeze` with one name.

    """
    if both := sorted({*settings.freeze} & {*(task_freeze or {})}):
        raise ValueError(f"config.optim.freeze.{both[0]}: the task has an entry of this name; call it something else")
    kind = FairseqAdam if settings.name == "adam" else OptaxOptimizer
    return kind(settings, make_schedule(settings, num_steps), {**settings.freeze, **(task_freeze or {})})


def clip(grads: Params, norm: Scalar, max_norm: float | None) -> Params:
    """Gradients times min(1, max_norm / (norm + 1e-6)), as fairseq and torch clip."""
    if max_norm is None:
        return grads
    factor = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: g * factor, grads)
