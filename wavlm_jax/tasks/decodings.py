"""What a recogniser hears in some utterances of every evaluation, beside what was said (USERS #23)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from wavlm_jax.tasks.edits import Sequences

_MOST = 200
"""Characters shown of an utterance."""


def listed(found: Sequences, ids: Any) -> dict[str, Any]:
    """What was found, as answers of an evaluation (`LossSums.answers`): of one width, whatever the bucket."""
    short = found.values[:, :_MOST]
    padded = jnp.pad(short, ((0, 0), (0, _MOST - short.shape[1])))
    return {"id": ids, "found": padded, "found_length": jnp.minimum(found.length, _MOST)}


@dataclass(frozen=True)
class Decodings:
    """Prints the first utterances of a split, the same ones each time, so that one can watch them become words."""

    spell: Callable[[np.ndarray], str]
    """Of the vocabulary: labels to text."""
    spoken: Callable[[str, int], tuple[str, str]]
    """(split, number of an utterance in its corpus) -> its id and text."""
    shown: int
    """How many; 0 on every process but the first."""

    def __call__(self, split: str, answers: Mapping[str, np.ndarray]) -> Mapping[str, float]:
        """No metric: those are sums already."""
        for row in np.argsort(answers["id"], kind="stable")[: self.shown].tolist():
            number = int(answers["id"][row])
            heard = self.spell(answers["found"][row, : answers["found_length"][row]])
            name, said = self.spoken(split, number)
            print(f"{split} {name}: said  {said}\n{split} {name}: heard {heard}", flush=True)
        return {}
