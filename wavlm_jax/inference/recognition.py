"""Recognition and forced alignment of recordings with a CTC model, files of any length."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wavlm_jax.audio.recordings import Inputs, Recording, first_of
from wavlm_jax.inference.running import RunSettings, by_recording, frames_of, in_order
from wavlm_jax.model.heads import CTCOutput, WavLMForCTC
from wavlm_jax.shapes import Params
from wavlm_jax.text.beam import BeamSearch
from wavlm_jax.text.decoding import Alignment, AlignmentError, Span, Transcript, align, check_fit, decode, seconds
from wavlm_jax.text.records import TimedWord, write_ctm
from wavlm_jax.text.vocabulary import UnknownCharactersError, Vocabulary, VocabularyError


class Recognizer(NamedTuple):
    """A CTC model and what it speaks."""

    module: WavLMForCTC
    params: Params
    vocabulary: Vocabulary


class Heard(NamedTuple):
    """A recording and its text; confidence of each character where the text was given and aligned."""

    recording: Recording
    transcript: Transcript
    confidence: tuple[float, ...] | None = None


def transcribe(
    recognizer: Recognizer,
    recordings: Sequence[Recording],
    running: RunSettings,
    search: BeamSearch | None = None,
    progress: Callable[[int], Any] = lambda _: None,
    done: dict[Recording, Heard] | None = None,
) -> list[Heard]:
    """What is said in each recording, in their order.

    Args:
        recognizer: the model.
        recordings: of any length.
        running: batches and chunks.
        search: beam search; None: greedily, and only the best token of each frame leaves the device.
        progress: told how many samples were just done.
        done: gets each answer as it comes, so that whoever interrupts this has those.

    Raises:
        VocabularyError: vocabulary and model do not fit.
        AudioFault: a file that cannot be read to its end.

    """

    def heard(recording: Recording, frames: np.ndarray) -> Heard:
        found = decode(frames, recognizer.vocabulary) if search is None else search(frames)[0].transcript
        return Heard(recording, found)

    frames = _frames(recognizer, recordings, running, progress, best_only=search is None)
    answers = ((recording, heard(recording, values)) for recording, values in frames)
    return list(in_order(recordings, answers, done).values())


def align_texts(
    recognizer: Recognizer,
    texts: Mapping[Recording, str],
    running: RunSettings,
    progress: Callable[[int], Any] = lambda _: None,
    done: dict[Recording, Heard] | None = None,
) -> list[Heard]:
    """When the words of each recording's text were said, in their order; texts are checked before anything is computed.

    Raises:
        AlignmentError: texts that cannot be aligned, each with its recording: unknown characters, nothing at all, or
            more than fits.

    """
    faults = []
    for recording, text in texts.items():
        try:
            labels = recognizer.vocabulary.encode(text)
            check_fit(labels, frames_of(recording, recognizer.module.config))
        except (UnknownCharactersError, AlignmentError) as error:
            faults.append(f"{recording.path}: {error}")
    if faults:
        raise AlignmentError(first_of(faults))

    def heard(recording: Recording, log_probs: np.ndarray) -> Heard:
        aligned: Alignment = align(log_probs, texts[recording], recognizer.vocabulary)
        return Heard(recording, aligned.transcript, aligned.confidence)

    frames = _frames(recognizer, list(texts), running, progress, best_only=False)
    answers = ((recording, heard(recording, values)) for recording, values in frames)
    return list(in_order(texts, answers, done).values())


def as_json(heard: Iterable[Heard]) -> str:
    """One JSON object a line: name, path, text, words and characters with start and end in seconds."""
    return "".join(json.dumps(_record(one), ensure_ascii=False) + "\n" for one in heard)


def as_ctm(heard: Iterable[Heard]) -> str:
    """Words with start and duration."""
    return write_ctm(
        TimedWord(one.recording.name, seconds(word.start), seconds(word.end - word.start), word.text)
        for one in heard
        for word in one.transcript.words
    )


def as_tsv(heard: Iterable[Heard]) -> str:
    """Name, tab, text."""
    return "".join(f"{one.recording.name}\t{one.transcript.text}\n" for one in heard)


def _record(heard: Heard) -> dict[str, Any]:
    characters = [_times(span) for span in heard.transcript.characters]
    if heard.confidence is not None:
        for character, confidence in zip(characters, heard.confidence, strict=True):
            character["confidence"] = round(confidence, 4)
    return {
        "name": heard.recording.name,
        "path": str(heard.recording.path),
        "seconds": heard.recording.seconds,
        "text": heard.transcript.text,
        "words": [_times(span) for span in heard.transcript.words],
        "characters": characters,
    }


def _times(span: Span) -> dict[str, Any]:
    return {"text": span.text, "start": round(seconds(span.start), 3), "end": round(seconds(span.end), 3)}


def _frames(
    recognizer: Recognizer,
    recordings: Sequence[Recording],
    running: RunSettings,
    progress: Callable[[int], Any],
    *,
    best_only: bool,
) -> Iterator[tuple[Recording, np.ndarray]]:
    """The best token, or the log probabilities, of every frame of each recording."""
    module, vocabulary = recognizer.module, recognizer.vocabulary
    if module.head.vocab_size != len(vocabulary):
        raise VocabularyError(
            f"vocabulary: has {len(vocabulary)} tokens, the model {module.head.vocab_size} outputs; it belongs to "
            "another model"
        )
    if module.head.add_adapter:
        raise VocabularyError("head.add_adapter: found True; frames of an adapter are not those of the file")

    @jax.jit
    def compute(inputs: Inputs) -> jax.Array:
        output: CTCOutput
        applied: Any = module.apply({"params": recognizer.params}, *inputs)
        output = applied
        return output.logits.argmax(axis=2) if best_only else jax.nn.log_softmax(output.logits.astype(jnp.float32))

    for recording, results in by_recording(recordings, compute, module.config, running, progress, framewise=True):
        yield recording, np.concatenate([result.values for result in results])
