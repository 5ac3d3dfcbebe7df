"""The commands as functions of a model from `wavlm_jax.load`: `wavlm_jax.transcribe(model, ["a.flac"])[0].text`.

Answers come in the order of the files, each the same whatever it was batched with; files of any length are cut into
overlapping pieces. Every function raises `UsageError` for a model that does something else, and `RecordingError` for
files that cannot be used, all of them listed, before anything is computed.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Float32

from wavlm_jax.audio.recordings import Recording, open_recordings
from wavlm_jax.inference import diarization, recognition, utterances
from wavlm_jax.inference.diarization import TurnSettings, pieces_of
from wavlm_jax.inference.recognition import TranscribedRecording
from wavlm_jax.inference.running import InferenceSettings, model_for
from wavlm_jax.inference.utterances import Answer
from wavlm_jax.text.beam import BeamSearch
from wavlm_jax.text.decoding import Transcript
from wavlm_jax.text.records import Turn
from wavlm_jax.weights import Model

File = Path | str
T = TypeVar("T")
_DEFAULT = InferenceSettings()


def transcribe(
    model: Model, files: Sequence[File], search: BeamSearch | None = None, running: InferenceSettings = _DEFAULT
) -> list[Transcript]:
    """What is said in each file: `.text`, and `.words` and `.characters` with frames.

    Args:
        model: a `WavLMForCTC` with its vocabulary.
        files: audio at 16 kHz; at other rates with `InferenceSettings(resampling=True)`.
        search: beam search with a language model (`wavlm_jax.text.beam`); None: greedily.
        running: pieces and batches.

    """
    model = model_for(model, "transcribe")
    recordings = _recordings(model, files, running)
    found = recognition.transcribe(model, recordings, running, search)
    return [one.transcript for one in _in_order(recordings, found)]


def align(model: Model, texts: Mapping[File, str], running: InferenceSettings = _DEFAULT) -> list[TranscribedRecording]:
    """When the words of a given text are said, file by file, and how sure the model is of each character.

    Args:
        model: a `WavLMForCTC` with its vocabulary.
        texts: file -> what is said in it.
        running: pieces and batches.

    Raises:
        AlignmentError: characters that the vocabulary does not have, or more text than fits into the file.

    """
    model = model_for(model, "align")
    recordings = _recordings(model, list(texts), running)
    given = dict(zip(recordings, texts.values(), strict=True))
    return _in_order(recordings, recognition.align_texts(model, given, running))


def embed(
    model: Model, files: Sequence[File], running: InferenceSettings = _DEFAULT
) -> Float32[np.ndarray, "files embedding"]:
    """The speaker embedding of each file, of length 1; `model` is a `WavLMForXVector` or a `WavLMForECAPA`."""
    model = model_for(model, "embed")
    recordings = _recordings(model, files, running)
    return np.stack(_in_order(recordings, utterances.embed(model, recordings, running))).astype(np.float32)


def verify(model: Model, left: File, right: File, running: InferenceSettings = _DEFAULT) -> float:
    """How alike two voices are: the cosine of their embeddings, 1 for the same recording."""
    one, other = embed(model, [left, right], running) if left != right else embed(model, [left], running)[[0, 0]]
    return float(one @ other)


def diarize(
    model: Model,
    files: Sequence[File],
    settings: TurnSettings | None = None,
    running: InferenceSettings | None = None,
) -> list[list[Turn]]:
    """Who spoke when in each file, by start.

    Args:
        model: a `WavLMForAudioFrameClassification`.
        files: audio at 16 kHz; at other rates with `InferenceSettings(resampling=True)`.
        settings: from probabilities to turns.
        running: pieces and batches; None: pieces as long as the rows that the model was trained on (`pieces_of`).

    """
    model = model_for(model, "diarize")
    running = running or InferenceSettings(chunks=pieces_of(model.weights.origin.trained_seconds))
    recordings = _recordings(model, files, running)
    return _in_order(recordings, diarization.diarize(model, recordings, running, settings or TurnSettings()))


def classify(model: Model, files: Sequence[File], running: InferenceSettings = _DEFAULT) -> list[list[Answer]]:
    """The classes of each file with their probabilities, the likeliest first; for `WavLMForSequenceClassification`.

    Labels that do not exclude one another have a probability each; a regression gives its numbers, in the order of the
    labels (`head.problem_type`, as transformers' pipeline).
    """
    model = model_for(model, "classify")
    recordings = _recordings(model, files, running)
    return _in_order(recordings, utterances.classify(model, recordings, running))


def _recordings(model: Model, files: Sequence[File], settings: InferenceSettings) -> list[Recording]:
    paths = [Path(file) for file in files]
    return open_recordings(
        paths,
        resampling=settings.resampling,
        geometry=model.config.geometry,
        max_seconds=settings.max_seconds,
    )


def _in_order(recordings: Sequence[Recording], answers: Iterator[tuple[Recording, T]]) -> list[T]:
    found = dict(answers)
    return [found[recording] for recording in recordings]
