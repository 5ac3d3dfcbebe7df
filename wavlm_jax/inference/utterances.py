"""One answer per recording: speaker embeddings, classes. Those of long files are averaged over their pieces."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from wavlm_jax.audio.recordings import Recording
from wavlm_jax.inference.running import InferenceSettings, by_recording, labels_of
from wavlm_jax.model.heads import XVectorOutput
from wavlm_jax.weights import Model

Embedding = Float[np.ndarray, "embedding"]


class Answer(NamedTuple):
    """A class and its probability."""

    label: str
    probability: float
    """Of labels that do not exclude one another each has its own; of a regression it is the number itself."""


def embed(
    model: Model, recordings: Sequence[Recording], settings: InferenceSettings
) -> Iterator[tuple[Recording, Embedding]]:
    """The speaker embedding of each recording, of length 1: compare by dot product. Short recordings come first.

    Raises:
        AudioFault: a file that cannot be read to its end.

    """
    return _averaged(model, _embeddings, _unit, recordings, settings)


def classify(
    model: Model, recordings: Sequence[Recording], settings: InferenceSettings
) -> Iterator[tuple[Recording, list[Answer]]]:
    """The classes of each recording, the likeliest first (numbers of a regression: in the order of the labels).

    Short recordings come first. `head.function_to_apply` makes probabilities of scores.

    Raises:
        ValueError: another number of class names than the model has classes.
        AudioFault: a file that cannot be read to its end.

    """
    labels, apply = labels_of(model), model.module.head.function_to_apply
    if len(labels) != model.module.head.num_labels:
        raise ValueError(f"labels: found {len(labels)}, the model has {model.module.head.num_labels} classes")

    def named(values: np.ndarray) -> list[Answer]:
        order = range(len(values)) if apply == "none" else np.argsort(-values, kind="stable").tolist()
        return [Answer(labels[number], float(values[number])) for number in order]

    found = _averaged(model, lambda output: _APPLIED[apply](output.logits), lambda values: values, recordings, settings)
    return ((recording, named(values)) for recording, values in found)


def _embeddings(output: XVectorOutput) -> jax.Array:
    return output.embeddings


_APPLIED: dict[str, Callable[[jax.Array], jax.Array]] = {
    "softmax": jax.nn.softmax,
    "sigmoid": jax.nn.sigmoid,
    "none": lambda logits: logits,
}


def _averaged(
    model: Model,
    answer: Callable[[Any], jax.Array],
    scaled: Callable[[np.ndarray], np.ndarray],
    recordings: Sequence[Recording],
    settings: InferenceSettings,
) -> Iterator[tuple[Recording, np.ndarray]]:
    """Of each recording the mean over its pieces, each weighted by its frames; `scaled` before and after."""
    for recording, results in by_recording(model, answer, recordings, settings, framewise=False):
        weights = [result.job.piece.keep_to - result.job.piece.keep_from for result in results]
        yield recording, scaled(np.average([scaled(result.values) for result in results], axis=0, weights=weights))


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.maximum(np.linalg.norm(vector), np.float32(1e-12))
