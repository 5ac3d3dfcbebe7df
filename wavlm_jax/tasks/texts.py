"""Transcripts as CTC labels: which utterances can be learned from, and their labels row by row."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int64

from wavlm_jax.data.corpora import Corpus
from wavlm_jax.data.plan import Lengths
from wavlm_jax.settings import SettingsError
from wavlm_jax.shapes import samples_for
from wavlm_jax.text.ctc import frames_needed
from wavlm_jax.text.vocabulary import UnknownCharactersError, Vocabulary
from wavlm_jax.text.vocabulary_files import VOCABULARY, parse_vocabulary, read_vocabulary

FRAMES_A_CHARACTER = 2
"""Of texts that nobody has seen yet: 25 characters a second are more than people say (LibriSpeech has about 15)."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ'"
"""Of them too: with the special tokens 32 tokens, as the English models on the hub have."""


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """The config section `text`."""

    vocabulary: str | None
    """A Hugging Face folder (vocab.json ...); None: made from the training text."""
    min_count: int
    """Of a vocabulary that is made here: characters seen less often are left out."""
    do_lower_case: bool
    """Of a vocabulary that is made here: upper and lower case are the same letter."""
    replace_unknown: bool
    """Whether characters that the vocabulary does not have become the unknown token; else they are an error."""


class Texts(NamedTuple):
    """What there is to learn from a corpus."""

    chosen: Int64[np.ndarray, "chosen"]
    """Utterances that take part."""
    num_labels: Int64[np.ndarray, "utterances"]
    """Labels of every utterance of the corpus."""
    without_text: int
    """Utterances without a transcript, left out."""
    infeasible: int
    """Utterances whose text does not fit into their frames; left out in training."""

    def describe(self, split: str) -> str:
        """One line for people."""
        line = f"{split}: {len(self.chosen)} utterances with {self.num_labels[self.chosen].sum()} characters"
        notes = {"without a transcript, left out": self.without_text, "with more text than frames": self.infeasible}
        return "; ".join([line, *(f"{count} {what}" for what, count in notes.items() if count)])


@dataclass(frozen=True)
class TextLabels:
    """The labels of a row. Travels to worker processes; texts are encoded where they are read."""

    corpus: Corpus
    vocabulary: Vocabulary
    most: Mapping[int, int]
    """Bucket -> labels of its rows."""
    replace_unknown: bool

    def __call__(self, index: int, first_frame: int, frames: int, bits: int) -> Mapping[str, np.ndarray]:
        """`labels` int32 (most of the bucket,), zeros behind `num_labels`."""
        del first_frame, bits  # always a whole utterance, and nothing is random
        labels = np.zeros(self.most[frames], np.int32)
        found = self.vocabulary.encode(self.corpus.texts[index], replace_unknown=self.replace_unknown)
        found = found[: len(labels)]  # shorter only where a filler row asks for the shape of another's labels
        labels[: len(found)] = found
        return {"labels": labels, "num_labels": np.asarray(len(found), np.int32)}

    @staticmethod
    def shapes(frames: int) -> Mapping[str, jax.ShapeDtypeStruct]:
        """What a row of `frames` gets at most, of texts that are not there yet."""
        return {
            "labels": jax.ShapeDtypeStruct((max(frames // FRAMES_A_CHARACTER, 1),), np.int32),
            "num_labels": jax.ShapeDtypeStruct((), np.int32),
        }


@dataclass(frozen=True)
class SameVocabulary:
    """Whether a head that `config.init.path` brings along has learned this vocabulary.

    An output is a token by its number alone, and texts with the same letters can number them in another order.
    """

    here: Vocabulary

    def __call__(self, files: Mapping[str, bytes], path: str) -> None:
        """Compare with the vocabulary among the files that came with the head, if there is one.

        Raises:
            SettingsError: it is another one.

        """
        if VOCABULARY not in files:
            return
        there = parse_vocabulary(files, Path(path))
        if (there.tokens, there.blank, there.delimiter) != (self.here.tokens, self.here.blank, self.here.delimiter):
            raise SettingsError(
                f"config.init.head: the vocabulary of {path} ({' '.join(there.tokens)}) is not the one "
                f"here ({' '.join(self.here.tokens)}). Export that run (python -m wavlm_jax.convert export) and name "
                "the folder in config.text.vocabulary, or take config.init.head = False"
            )


def make_vocabulary(settings: TextSettings, train: Corpus | None) -> Vocabulary:
    """The vocabulary that the config names, or that of the training text; where that is not there yet, English letters.

    Raises:
        SettingsError: the training corpus has no transcripts.

    """
    if settings.vocabulary is not None:
        return read_vocabulary(Path(settings.vocabulary))
    if train is None:
        return Vocabulary.from_texts([LETTERS])
    if not any(text.strip() for text in train.texts):
        raise SettingsError(
            f"config.data.train: {train.path} has {len(train)} utterances and no transcript, expected a `text` column; "
            "prepare it from a source that has one (python -m wavlm_jax.data --help)"
        )
    return Vocabulary.from_texts(train.texts, min_count=settings.min_count, do_lower_case=settings.do_lower_case)


def survey(
    corpus: Corpus, vocabulary: Vocabulary, frames: Lengths, *, replace_unknown: bool, drop_infeasible: bool
) -> Texts:
    """Looks at every transcript of a corpus.

    Args:
        corpus: with texts.
        vocabulary: that spells them.
        frames: of each utterance, behind the head.
        replace_unknown: see `TextSettings`.
        drop_infeasible: whether utterances whose text does not fit are left out (training) or kept (evaluation).

    Raises:
        SettingsError: a character that the vocabulary does not have (the utterance is named), or nothing is left.

    """
    counts, needed = np.zeros(len(corpus), np.int64), np.zeros(len(corpus), np.int64)
    for index, text in enumerate(corpus.texts):
        try:
            labels = vocabulary.encode(text, replace_unknown=replace_unknown)
        except UnknownCharactersError as error:
            raise SettingsError(
                f"{corpus.path}: utterance {corpus.ids[index]}: {error} (config.text.replace_unknown = True)"
            ) from error
        counts[index], needed[index] = len(labels), frames_needed(labels)
    has_text, fits = counts > 0, needed <= frames
    keep = has_text & fits if drop_infeasible else has_text
    found = Texts(np.flatnonzero(keep), counts, int(np.sum(~has_text)), int(np.sum(has_text & ~fits)))
    if not len(found.chosen):
        raise SettingsError(f"{corpus.path}: no utterance is left to learn from; {found.describe('found')}")
    return found


def most_labels(lengths: Lengths, num_labels: Lengths, buckets: tuple[int, ...]) -> dict[int, int]:
    """Bucket -> labels of its longest text: of the utterances that fit in, and of all where it is the largest."""
    result = {}
    for bucket in buckets:
        held = (lengths <= samples_for(bucket)) | (bucket == buckets[-1])
        result[bucket] = max(int(num_labels[held].max(initial=0)), 1)
    return result
