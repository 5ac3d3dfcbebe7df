"""From a folder to a model that does what a command asks for, or a message that says what it does instead."""

import argparse
import dataclasses
from typing import Any, NamedTuple

import jax

from wavlm_jax.inference.options import UsageError
from wavlm_jax.model.heads import module_of
from wavlm_jax.shapes import Params
from wavlm_jax.text.vocabulary import Vocabulary
from wavlm_jax.text.vocabulary_files import VOCABULARY, parse_vocabulary
from wavlm_jax.weights import Weights

_DOES = {
    "WavLMForCTC": "transcribe, align",
    "WavLMForXVector": "embed, verify",
    "WavLMForSequenceClassification": "classify",
    "WavLMForAudioFrameClassification": "diarize",
}


class Opened(NamedTuple):
    """A model with a head, on the device."""

    module: Any
    params: Params
    weights: Weights


def open_model(options: argparse.Namespace, kind: str) -> Opened:
    """The model of `--model`; padding never changes its answers.

    Raises:
        UsageError: it has another head, or none.
        ValueError: see `loading.load_weights`, which the command line hands down (`options.load`).

    """
    weights = options.load(options.model, options.step)
    task = weights.task
    if task is None:
        raise UsageError(f"{options.model}: an encoder without a head, which does `features`; expected a {kind}")
    if task.kind != kind:
        raise UsageError(f"{options.model}: a {task.kind}, which does {_DOES[task.kind]}; expected a {kind}")
    config = dataclasses.replace(weights.config, padding="exact")
    params = jax.tree.map(jax.device_put, dict(weights.tree))
    return Opened(module_of(config, task.kind, task.config), params, weights)


def labels_of(opened: Opened) -> tuple[str, ...]:
    """The names of a classifier's classes; numbers where nobody named them."""
    task = opened.weights.task
    if task is None or task.labels is None:
        return tuple(str(number) for number in range(opened.module.head.num_labels))
    return task.labels


def vocabulary_of(options: argparse.Namespace, opened: Opened) -> Vocabulary:
    """What a CTC model speaks.

    Raises:
        UsageError: there is none.

    """
    files = opened.weights.origin.files
    if VOCABULARY not in files:
        raise UsageError(f"{options.model}: has no {VOCABULARY}; a CTC model needs its vocabulary to spell")
    return parse_vocabulary(files, options.model)
