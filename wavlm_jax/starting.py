"""The body that training starts from: an earlier run or a converted model, if it is the model of the config."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import jax

from wavlm_jax.config import WavLMConfig
from wavlm_jax.settings import SettingsError
from wavlm_jax.shapes import Params
from wavlm_jax.weights import Weights

Load: TypeAlias = Callable[[Path, int | None], Weights]
"""(where, checkpoint step or None) -> what is there; `wavlm_jax.loading.load_weights` knows every kind of source.

How whoever needs weights is given them, without knowing a file format."""


def fitting_weights(path: str, step: int | None, model: WavLMConfig, body: Params, load: Load) -> Weights:
    """What `config.init.path` holds.

    Args:
        path: workdir of an earlier run, or a checkpoint of any kind that `load` reads.
        step: checkpoint of the run; None: its newest.
        model: `config.model`.
        body: fresh parameters of it, or their shapes.
        load: `wavlm_jax.loading.load_weights`.

    Raises:
        SettingsError: it computes another function, or has other parameters; the first that differ are named.

    """
    weights = load(Path(path), step)
    if lines := model.another_function(weights.config):
        raise SettingsError(f"config.init.path: {path} is another model: {'; '.join(lines)}")
    expected, given = shapes_of(body), shapes_of(weights.params)
    differing = [name for name in sorted({*expected, *given}) if expected.get(name) != given.get(name)]
    if differing:
        found = [f"{name}: found {given.get(name)}, expected {expected.get(name)}" for name in differing[:8]]
        raise SettingsError(
            f"config.init.path: {path} is no model of config.model; {len(differing)} parameters differ:\n  "
            + "\n  ".join(found)
        )
    return weights


def shapes_of(tree: Params) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every array."""
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
