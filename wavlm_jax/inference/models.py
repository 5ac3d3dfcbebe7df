"""From a folder to a model that does what a command asks for, or a message that says what it does instead."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax

from wavlm_jax.inference.running import UsageError
from wavlm_jax.model.heads import module_of
from wavlm_jax.shapes import Params
from wavlm_jax.text.vocabulary import Vocabulary
from wavlm_jax.text.vocabulary_files import VOCABULARY, parse_vocabulary
from wavlm_jax.weights import Weights

SPEAKERS = ("WavLMForXVector", "WavLMForECAPA")
"""Models whose answer is a speaker embedding."""
_DOES = {
    "WavLMForCTC": "transcribe, align",
    "WavLMForXVector": "embed, verify",
    "WavLMForECAPA": "embed, verify",
    "WavLMForSequenceClassification": "classify",
    "WavLMForAudioFrameClassification": "diarize",
}


class Opened(NamedTuple):
    """A model with a head, on the device."""

    module: Any
    params: Params
    weights: Weights


def open_model(options: argparse.Namespace, *kinds: str) -> Opened:
    """The model of `--model`.

    Raises:
        UsageError: see `opened`.
        ValueError: see `loading.load_weights`, which the command line hands down (`options.load`).

    """
    return opened(options.load(options.model, options.step), *kinds)


def opened(weights: Weights, *kinds: str) -> Opened:
    """The model of these weights; padding never changes its answers.

    Raises:
        UsageError: it has another head, or none.

    """
    task, where = weights.task, weights.origin.path
    expected = " or a ".join(kinds)
    if task is None:
        raise UsageError(f"{where}: an encoder without a head, which does `features`; expected a {expected}")
    if task.kind not in kinds:
        raise UsageError(f"{where}: a {task.kind}, which does {_DOES[task.kind]}; expected a {expected}")
    config = dataclasses.replace(weights.config, padding="exact")
    params = jax.tree.map(jax.device_put, dict(weights.tree))
    return Opened(module_of(config, task.kind, task.config), params, weights)


def labels_of(model: Opened) -> tuple[str, ...]:
    """The names of a classifier's classes; numbers where nobody named them."""
    task = model.weights.task
    if task is None or task.labels is None:
        return tuple(str(number) for number in range(model.module.head.num_labels))
    return task.labels


def vocabulary_of(model: Opened) -> Vocabulary:
    """What a CTC model speaks.

    Raises:
        UsageError: there is none.

    """
    origin = model.weights.origin
    if VOCABULARY not in origin.files:
        raise UsageError(f"{origin.path}: has no {VOCABULARY}; a CTC model needs its vocabulary to spell")
    return parse_vocabulary(origin.files, Path(origin.path))
