"""`wavlm_jax.load`: from a path or a name to a model that can be called."""

import dataclasses
from pathlib import Path

from wavlm_jax.config import Padding
from wavlm_jax.loading import load_weights
from wavlm_jax.model.ready import Model, ready


def load(path: Path | str, padding: Padding | None = None, *, step: int | None = None) -> Model:
    """The model in `path`, on the default device and ready to be called.

    Args:
        path: see `loading.load_weights`.
        padding: overrides the source's convention: "exact", "huggingface" or "microsoft" (docs/parity.md).
        step: checkpoint of a run; None: the newest that verifies.

    Raises:
        ValueError: see `loading.load_weights`; a padding that there is not.

    """
    weights = load_weights(Path(path), step)
    if padding is not None:
        weights = dataclasses.replace(weights, config=dataclasses.replace(weights.config, padding=padding))
    return ready(weights)
