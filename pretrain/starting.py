"""The parameters that pre-training starts from: fresh ones, or those of an earlier run or an imported model."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from wavlm_jax.config import WavLMConfig
from wavlm_jax.shapes import Params
from wavlm_jax.starting import Load, fitting_weights, shapes_of
from wavlm_jax.training.freeze import Freeze

_SPECIAL_ROWS = 4
"""Label embeddings that fairseq's dictionary has before those of the clusters (FACTS E20)."""


@dataclass(frozen=True, kw_only=True)
class InitSettings:
    """The config section `init`."""

    path: str | None
    """Workdir of an earlier run, or a checkpoint of any kind that `wavlm_jax.loading` reads; None: from scratch."""
    step: int | None
    """Checkpoint of the run; None: its newest."""
    head_warmup_steps: int
    """Updates of the head alone, the body bit-equal meanwhile, where `path` has no head that fits and it is fresh."""

    def __post_init__(self) -> None:
        if self.head_warmup_steps < 0:
            raise ValueError(f"head_warmup_steps: found {self.head_warmup_steps}, expected 0 or more")
        if self.head_warmup_steps and self.path is None:
            raise ValueError(
                f"head_warmup_steps: found {self.head_warmup_steps} without init.path; from scratch there is no body "
                "to protect, expected 0"
            )


def head_warmup(settings: InitSettings) -> dict[str, Freeze]:
    """What stands still while a fresh head learns: the whole body; nothing where the head was given."""
    if settings.head_warmup_steps == 0:
        return {}
    return {"head_warmup": Freeze(pattern="^wavlm/", updates=settings.head_warmup_steps, unless_given="^head/")}


def initial_params(settings: InitSettings, model: WavLMConfig, fresh: Params, load: Load) -> Params:
    """`fresh` itself, or the same tree with what `init.path` holds.

    The body has to fit in every shape and compute the same function. The head is taken where it is there and has as
    many clusters; fairseq's four rows before them are dropped or kept as the objective wants. Else it stays fresh: the
    labels of another k-means mean something else anyway.

    Raises:
        SettingsError: the body does not fit; the first fields or shapes that differ are named.

    """
    if settings.path is None:
        return fresh
    weights = fitting_weights(settings.path, settings.step, model, fresh["wavlm"], load)
    return {"wavlm": weights.params, "head": _fitting_head(weights.head, fresh["head"])}


def _fitting_head(found: Params | None, fresh: Params) -> Params:
    """The head that was found, with as many special rows as `fresh` has, or `fresh`, the very same arrays.

    Special rows that the source does not have are drawn as fresh ones are, from [0, 1); none is ever a target.
    """
    if found is None:
        return fresh
    rows, wanted = found["label_embeddings"], fresh["label_embeddings"]
    missing = wanted.shape[0] - rows.shape[0]
    if missing == -_SPECIAL_ROWS:
        rows = rows[_SPECIAL_ROWS:]
    elif missing == _SPECIAL_ROWS:
        special = np.random.default_rng(0).random((_SPECIAL_ROWS, *rows.shape[1:]), np.float32)
        rows = np.concatenate([special, rows])
    head: dict[str, Any] = {**found, "label_embeddings": rows}
    return head if shapes_of(head) == shapes_of(fresh) else fresh
