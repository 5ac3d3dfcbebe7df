"""Parameters that stand still until a given update, or for ever: not updated, not decayed, not in the gradient's norm.

A thawed parameter starts like a new one: its moments are 0 and its bias correction counts from the thaw, as in fairseq
and torch, where a parameter without a gradient has no optimizer state (`freeze_finetune_updates`, FACTS D1).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from wavlm_jax.shapes import Params
from wavlm_jax.training.trees import path_name


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
