"""The body and the head that training starts from: an earlier run or a converted model, if it is that of the config."""

from collections.abc import Callable, Mapping
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


CheckFiles: TypeAlias = Callable[[Mapping[str, bytes], str], None]
"""(name -> content of the files that came with a head, where it was) -> raises where it is not what the task wants."""


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


def fitting_head(path: str, weights: Weights, head: Params, names: tuple[str, ...] | None, check: CheckFiles) -> Params:
    """The parameters of the head that `config.init.path` brings along.

    Args:
        path: where it was, for messages.
        weights: what was there.
        head: fresh parameters of the config's head, or their shapes.
        names: of the classes of the training data, if any.
        check: raises where the files that came with it say that its outputs mean something else than the task's.

    Raises:
        SettingsError: no head, another kind of head or other sizes, or one whose outputs mean something else.

    """
    task, fresh_head = weights.task, "a fresh head is config.init.head = False"
    found, wanted = sorted(task.params) if task is not None else [], sorted(head)
    if task is None or found != wanted:
        raise SettingsError(
            f"config.init.head: {path} has a head of {', '.join(found) or 'no parts'}, expected one of "
            f"{', '.join(wanted)}; {fresh_head}"
        )
    if names is not None and task.labels is not None and task.labels != names:
        raise SettingsError(
            f"config.init.head: the classes of {path} are not those of config.data.train "
            f"({len(task.labels)} there, {len(names)} here); train on the same, or with config.init.head = False"
        )
    check(weights.origin.files, path)
    expected, given = shapes_of(head), shapes_of(task.params)
    if differing := [name for name in sorted({*expected, *given}) if expected.get(name) != given.get(name)]:
        first = differing[0]
        raise SettingsError(
            f"config.init.head: {path} has other sizes: {first}: found {given.get(first)}, expected "
            f"{expected.get(first)}; {fresh_head}"
        )
    return task.params


def shapes_of(tree: Params) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every array."""
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
