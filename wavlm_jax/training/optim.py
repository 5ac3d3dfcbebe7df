"""fairseq's Adam and its schedule, as optax transforms (FACTS C6), and clipping by the global norm."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from wavlm_jax.shapes import Params, Scalar
from wavlm_jax.training.freeze import Freeze, Rules, first_thaws, start_of
from wavlm_jax.training.groups import Group, Groups, check_groups, group_of
from wavlm_jax.training.trees import path_name


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
