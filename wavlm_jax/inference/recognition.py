"""Recognition and forced alignment of recordings with a CTC model; transcripts as JSON, CTM or TSV."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wavlm_jax.audio.recordings import Recording, first_of
from wavlm_jax.files import printable
from wavlm_jax.inference.running import InferenceSettings, by_recording, frames_of, vocabulary_of
from wavlm_jax.model.heads import CTCOutput
from wavlm_jax.shapes import Geometry
from wavlm_jax.text.beam import BeamSearch
from wavlm_jax.text.decoding import AlignmentError, Span, Transcript, align, check_fit, decode, seconds
from wavlm_jax.text.records import TimedWord, write_ctm
from wavlm_jax.text.vocabulary import UnknownCharactersError, Vocabulary, VocabularyError
from wavlm_jax.weights import Model


class TranscribedRecording(NamedTuple):
    """A recording and its text; confidence of each character where the text was given and aligned."""

    recording: Recording
    transcript: Transcript
    geometry: Geometry
    """Of the model, whose frames the transcript counts."""
    confidence: tuple[float, ...] | None = None


def transcribe(
    model: Model, recordings: Sequence[Recording], settings: InferenceSettings, search: BeamSearch | None = None
) -> Iterator[tuple[Recording, TranscribedRecording]]:
    """What is said in each recording; short recordings come first.

    Args:
        model: a `WavLMForCTC` with its vocabulary.
        recordings: of any length.
        settings: of pieces and batches.
        search: beam search; None: greedily, and only the best token of each frame leaves the device.

    Raises:
        VocabularyError: vocabulary and model do not fit.
        AudioFault: a file that cannot be read to its end.

    """
    vocabulary = _fitting_vocabulary(model)
    answer = _best_tokens if search is None else _log_probs
    for recording, frames in _frames(model, answer, recordings, settings):
        transcript = decode(frames, vocabulary) if search is None else search(frames)[0].transcript
        yield recording, TranscribedRecording(recording, transcript, model.config.geometry)


def align_texts(
    model: Model, texts: Mapping[Recording, str], settings: InferenceSettings
) -> Iterator[tuple[Recording, TranscribedRecording]]:
    """When the words of each recording's text were said; short recordings come first.

    Raises:
        AlignmentError: texts that cannot be aligned, all of them listed before anything is computed: unknown
            characters, nothing at all, or more than fits into the recording. `settings.on_fault` takes each of them.
        VocabularyError: vocabulary and model do not fit.
        AudioFault: a file that cannot be read to its end.

    """
    vocabulary, faults = _fitting_vocabulary(model), dict[Recording, str]()
    for recording, text in texts.items():
        try:
            check_fit(vocabulary.encode(text), frames_of(recording, model.config))
        except (UnknownCharactersError, AlignmentError) as error:
            faults[recording] = f"{printable(recording.path)}: {error}"
            if settings.on_fault is not None:
                settings.on_fault(recording.name, recording.path, AlignmentError(faults[recording]))
    if faults and settings.on_fault is None:
        raise AlignmentError(first_of(list(faults.values())))
    fitting = [recording for recording in texts if recording not in faults]
    for recording, log_probs in _frames(model, _log_probs, fitting, settings):
        aligned = align(log_probs, texts[recording], vocabulary)
        yield recording, TranscribedRecording(recording, aligned.transcript, model.config.geometry, aligned.confidence)


def as_json(found: Iterable[TranscribedRecording]) -> str:
    """One JSON object per line: name, path, text, words and characters with start and end in seconds."""
    return "".join(json.dumps(_as_record(one), ensure_ascii=False) + "\n" for one in found)


def as_ctm(found: Iterable[TranscribedRecording]) -> str:
    """Words with start and duration."""
    return write_ctm(
        TimedWord(
            one.recording.name,
            seconds(word.start, one.geometry),
            seconds(word.end - word.start, one.geometry),
            word.text,
        )
        for one in found
        for word in one.transcript.words
    )


def as_tsv(found: Iterable[TranscribedRecording]) -> str:
    """Name, tab, text."""
    return "".join(f"{one.recording.name}\t{one.transcript.text}\n" for one in found)


def _as_record(found: TranscribedRecording) -> dict[str, Any]:
    recording, transcript = found.recording, found.transcript
    characters = [_times(span, found.geometry) for span in transcript.characters]
    if found.confidence is not None:
        for character, confidence in zip(characters, found.confidence, strict=True):
            character["confidence"] = round(confidence, 4)
    return {
        "name": recording.name,
        "path": printable(recording.path),
        "seconds": recording.seconds,
        "text": transcript.text,
        "words": [_times(span, found.geometry) for span in transcript.words],
        "characters": characters,
    }


def _times(span: Span, geometry: Geometry) -> dict[str, Any]:
    start, end = (round(seconds(frame, geometry), 3) for frame in (span.start, span.end))
    return {"text": span.text, "start": start, "end": end}


def _fitting_vocabulary(model: Model) -> Vocabulary:
    vocabulary = vocabulary_of(model)
    if model.module.head.add_adapter:
        raise VocabularyError("head.add_adapter: found True; frames of an adapter are not those of the file")
    return vocabulary


def _frames(
    model: Model,
    answer: Callable[[CTCOutput], jax.Array],
    recordings: Sequence[Recording],
    settings: InferenceSettings,
) -> Iterator[tuple[Recording, np.ndarray]]:
    """The answer for every frame of each recording."""
    for recording, results in by_recording(model, answer, recordings, settings, framewise=True):
        yield recording, np.concatenate([result.values for result in results])


def _best_tokens(output: CTCOutput) -> jax.Array:
    return output.logits.argmax(axis=2)


def _log_probs(output: CTCOutput) -> jax.Array:
    return jax.nn.log_softmax(output.logits.astype(jnp.float32))
