"""A model at rest: what every reader of weights gives."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from wavlm_jax.config import WavLMConfig
from wavlm_jax.shapes import Params


@dataclass(frozen=True)
class Weights:
    """A model without what computes it; arrays are numpy, on the host."""

    config: WavLMConfig
    params: Params
    """Of `wavlm_jax.model.wavlm.WavLM`."""
    head: Params | None
    """Of the pre-training head (`final_proj`, `label_embeddings`), where the source has one."""


Load: TypeAlias = Callable[[Path, int | None], Weights]
"""(where, checkpoint step or None) -> what is there. `wavlm_jax.loading.load_weights` is the one that knows every kind;
who needs weights is given it, and knows no file format."""
