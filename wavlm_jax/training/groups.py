"""Parameter groups: learning rate and weight decay by path, and a learning rate that falls from layer to layer.

Groups are all or nothing: where there are any, every parameter is in exactly one, so that no parameter is forgotten.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


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
