"""The commands as functions of a model from `wavlm_jax.load`: `wavlm_jax.transcribe(model, ["a.flac"])[0].text`.

Answers come in the order of the files, each the same whatever it was batched with; files of any length are cut into
overlapping pieces. Every function raises `UsageError` for a model that does something else, and `RecordingError` for
files that cannot be used, all of them listed, before anything is computed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from wavlm_jax.audio.recordings import Recording, open_recordings
from wavlm_jax.inference import recognition, utterances
from wavlm_jax.inference.diarization import TurnSettings, pieces_of
from wavlm_jax.inference.diarization import diarize as turns_of
from wavlm_jax.inference.recognition import Heard, Recognizer
from wavlm_jax.inference.running import Opened, RunSettings, geometry_of, labels_of, opened, vocabulary_of
from wavlm_jax.inference.utterances import Answer
from wavlm_jax.text.beam import BeamSearch
from wavlm_jax.text.decoding import Transcript
from wavlm_jax.text.records import Turn
from wavlm_jax.weights import Model

File = Path | str
_DEFAULT = RunSettings()


def transcribe(
    model: Model, files: Sequence[File], search: BeamSearch | None = None, running: RunSettings = _DEFAULT
) -> list[Transcript]:
    """What is said in each file: `.text`, and `.words` and `.characters` with frames.

    Args:
        model: a `WavLMForCTC` with its vocabulary.
        files: audio at 16 kHz; at other rates with `RunSettings(resampling=True)`.
        search: beam search with a language model (`wavlm_jax.text.beam`); None: greedily.
        running: batches and pieces.

    """
    recognizer, recordings = _recognizer(model), _recordings(model, files, running)
    return [heard.transcript for heard in recognition.transcribe(recognizer, recordings, running, search)]


def align(model: Model, texts: Mapping[File, str], running: RunSettings = _DEFAULT) -> list[Heard]:
    """When the words of a given text are said, file by file, and how sure the model is of each character.

    Args:
        model: a `WavLMForCTC` with its vocabulary.
        texts: file -> what is said in it.
        running: batches and pieces.

    Raises:
        AlignmentError: characters that the vocabulary does not have, or more text than fits into the file.

    """
    recognizer, recordings = _recognizer(model), _recordings(model, list(texts), running)
    return recognition.align_texts(recognizer, dict(zip(recordings, texts.values(), strict=True)), running)


def embed(
    model: Model, files: Sequence[File], running: RunSettings = _DEFAULT
) -> Float32[np.ndarray, "files embedding"]:
    """The speaker embedding of each file, of length 1; `model` is a `WavLMForXVector` or a `WavLMForECAPA`."""
    ready, recordings = _opened(model, "embed"), _recordings(model, files, running)
    found = utterances.embed(ready.module, ready.params, recordings, running)
    return np.stack(list(found.values())).astype(np.float32)


def verify(model: Model, left: File, right: File, running: RunSettings = _DEFAULT) -> float:
    """How alike two voices are: the cosine of their embeddings, 1 for the same recording."""
    one, other = embed(model, [left, right], running) if left != right else embed(model, [left], running)[[0, 0]]
    return float(one @ other)


def diarize(
    model: Model, files: Sequence[File], settings: TurnSettings | None = None, running: RunSettings | None = None
) -> list[list[Turn]]:
    """Who spoke when in each file, by start.

    Args:
        model: a `WavLMForAudioFrameClassification`.
        files: audio at 16 kHz; at other rates with `RunSettings(resampling=True)`.
        settings: from probabilities to turns.
        running: batches and pieces; None: pieces as long as the rows that the model was trained on (`pieces_of`).

    """
    ready = _opened(model, "diarize")
    running = RunSettings(chunks=pieces_of(ready.weights.origin.trained_seconds)) if running is None else running
    recordings = _recordings(model, files, running)
    return list(turns_of(ready.module, ready.params, recordings, running, settings or TurnSettings()).values())


def classify(model: Model, files: Sequence[File], running: RunSettings = _DEFAULT) -> list[list[Answer]]:
    """The classes of each file with their probabilities, the likeliest first; for `WavLMForSequenceClassification`."""
    ready, recordings = _opened(model, "classify"), _recordings(model, files, running)
    return list(utterances.classify(ready.module, ready.params, recordings, labels_of(ready), running).values())


def _recognizer(model: Model) -> Recognizer:
    ready = _opened(model, "transcribe")
    return Recognizer(ready.module, ready.params, vocabulary_of(ready))


def _opened(model: Model, command: str) -> Opened:
    return opened(model.current, command)


def _recordings(model: Model, files: Sequence[File], running: RunSettings) -> list[Recording]:
    paths = [Path(file) for file in files]
    return open_recordings(paths, resampling=running.resampling, geometry=geometry_of(model.config))
