"""The parameters that pre-training starts from: fresh ones, or those of an earlier run or an imported model."""

from dataclasses import dataclass
from pathlib import Path

import jax

from wavlm_jax.settings import SettingsError
from wavlm_jax.shapes import Params
from wavlm_jax.weights import Load


@dataclass(frozen=True, kw_only=True)
class InitSettings:
    """The config section `init`."""

    path: str | None
    """Workdir of an earlier run, or a Hugging Face folder; None: from scratch."""
    step: int | None
    """Checkpoint of the run; None: its newest."""


def initial_params(settings: InitSettings, fresh: Params, load: Load) -> Params:
    """`fresh` itself, or the same tree with what `init.path` holds.

    The body has to fit in every shape. The head is taken where it is there and fits (same number of clusters), else it
    stays fresh: the labels of another k-means mean something else anyway.

    Raises:
        SettingsError: the body does not fit; the first shapes that differ are named.

    """
    if settings.path is None:
        return fresh
    weights = load(Path(settings.path), settings.step)
    _check_fit(settings.path, fresh["wavlm"], weights.params)
    fits = weights.head is not None and _shapes(weights.head) == _shapes(fresh["head"])
    return {"wavlm": weights.params, "head": weights.head if fits else fresh["head"]}


def _shapes(tree: Params) -> dict[str, tuple[int, ...]]:
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _check_fit(path: str, wanted: Params, found: Params) -> None:
    expected, given = _shapes(wanted), _shapes(found)
    differing = [name for name in sorted({*expected, *given}) if expected.get(name) != given.get(name)]
    if differing:
        lines = [f"{name}: found {given.get(name)}, expected {expected.get(name)}" for name in differing[:8]]
        raise SettingsError(
            f"config.init.path: {path} is no model of config.model; {len(differing)} parameters differ:\n  "
            + "\n  ".join(lines)
        )
