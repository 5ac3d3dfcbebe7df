"""One answer a recording: speaker embeddings and their scores, classes. Long files are averaged over their pieces."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from wavlm_jax.audio.recordings import Inputs, Recording
from wavlm_jax.inference.running import Compute, RunSettings, by_recording, in_order
from wavlm_jax.model.heads import ClassOutput, Headed, WavLMForSequenceClassification
from wavlm_jax.shapes import Params
from wavlm_jax.text.records import Trial

Embedding = Float[np.ndarray, "embedding"]


class Answer(NamedTuple):
    """A class and its probability."""

    label: str
    probability: float


def embed(
    module: Headed,
    params: Params,
    recordings: Sequence[Recording],
    running: RunSettings,
    progress: Callable[[int], Any] = lambda _: None,
    done: dict[Recording, Embedding] | None = None,
) -> dict[Recording, Embedding]:
    """The speaker embedding of each recording, of length 1: compare by dot product; `done` gets each as it comes.

    Raises:
        AudioFault: a file that cannot be read to its end.

    """

    @jax.jit
    def compute(inputs: Inputs) -> jax.Array:
        output: Any = module.apply({"params": params}, *inputs)
        return output.embeddings

    return in_order(recordings, _averaged(module, compute, _unit, recordings, running, progress), done)


def scores(trials: Sequence[Trial], embeddings: Mapping[str, Embedding]) -> Float[np.ndarray, "trials"]:
    """Cosine of each trial's two recordings, by their names in the list."""
    return np.array([float(embeddings[trial.left] @ embeddings[trial.right]) for trial in trials])


def classify(
    module: WavLMForSequenceClassification,
    params: Params,
    recordings: Sequence[Recording],
    labels: Sequence[str],
    running: RunSettings,
    progress: Callable[[int], Any] = lambda _: None,
    done: dict[Recording, list[Answer]] | None = None,
) -> dict[Recording, list[Answer]]:
    """The classes of each recording, the likeliest first.

    Args:
        module: of the model.
        params: of the module.
        recordings: of any length.
        labels: the names of the classes.
        running: batches and chunks.
        progress: told how many samples were just done.
        done: gets each answer as it comes, so that whoever interrupts this has those.

    Raises:
        ValueError: another number of labels than the model has classes.
        AudioFault: a file that cannot be read to its end.

    """
    if len(labels) != module.head.num_labels:
        raise ValueError(f"labels: found {len(labels)}, the model has {module.head.num_labels} classes")

    @jax.jit
    def compute(inputs: Inputs) -> jax.Array:
        output: ClassOutput
        applied: Any = module.apply({"params": params}, *inputs)
        output = applied
        return jax.nn.softmax(output.logits, axis=-1)

    def named(values: np.ndarray) -> list[Answer]:
        return [Answer(labels[number], float(values[number])) for number in np.argsort(-values, kind="stable")]

    found = _averaged(module, compute, lambda values: values, recordings, running, progress)
    return in_order(recordings, ((recording, named(values)) for recording, values in found), done)


def _averaged(
    module: Any,
    compute: Compute,
    shape: Callable[[np.ndarray], np.ndarray],
    recordings: Sequence[Recording],
    running: RunSettings,
    progress: Callable[[int], Any],
) -> Iterator[tuple[Recording, np.ndarray]]:
    """Of each recording, the mean over its pieces, each weighted by the frames that it stands for."""
    for recording, results in by_recording(recordings, compute, module.config, running, progress, framewise=False):
        weights = [result.job.piece.keep_to - result.job.piece.keep_from for result in results]
        yield recording, shape(np.average([shape(result.values) for result in results], axis=0, weights=weights))


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.maximum(np.linalg.norm(vector), np.float32(1e-12))
