"""What the loop trains: the one contract between a model and the training tower.

A task is four pure functions. The loop knows neither speech nor Flax; a task knows neither devices nor files.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from wavlm_jax.shapes import Batch, Params, StepKey
from wavlm_jax.training.freeze import Freeze
from wavlm_jax.training.loss_sums import LossSums
from wavlm_jax.training.stream import BatchStream

Score: TypeAlias = Callable[[str, Mapping[str, np.ndarray]], Mapping[str, float]]
"""(split, `LossSums.answers` of all its utterances, `id` their numbers, each once) -> name -> metric."""


def no_score(split: str, answers: Mapping[str, np.ndarray]) -> Mapping[str, float]:
    """Nothing: all there is to say are sums."""
    del split, answers
    return {}


@dataclass(frozen=True)
class Task:
    """Four pure functions, two facts about the data, and what is frozen."""

    init: Callable[[StepKey], Params]
    """Fresh parameters; only ever traced, so that they are born sharded."""
    loss: Callable[[Params, Batch, StepKey | None], LossSums]
    """Sums over the batch, whose `row` is the row's number in the global batch; key None = evaluation."""
    stream: Callable[[str], BatchStream]
    """"train", or the name of an evaluation split."""
    initial_params: Callable[[Params], Params]
    """From fresh parameters to those that training starts from: the same, or converted weights, or an earlier run."""
    row_group: int = 1
    """Consecutive rows that stay together on one device and in one micro-batch (mixing partners)."""
    freeze: Mapping[str, Freeze] = field(default_factory=dict)
    """What stands still at first besides `optim.freeze` of the config: a body that waits for its fresh head."""
    score: Score = no_score
    """What an evaluation says besides its sums."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Name -> fingerprint of what training depends on besides the config (corpus, labels); a resume insists on them."""
    resolved: Mapping[str, Any] = field(default_factory=dict)
    """Sections that the data completed (the head with its number of outputs, the vocabulary), as JSON values. They
    take their place in the config that every checkpoint keeps, so that a run says all about its model."""
