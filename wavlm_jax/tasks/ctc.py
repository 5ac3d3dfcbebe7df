"""Speech recognition by CTC: from transcripts to characters, frame by frame (FACTS B1, D1).

In this order: transcripts as labels; the task and its loss; the CTC loss itself; character and word errors of greedy
decoding. The last two run inside jit and are summed over rows, so they are exact over any number of devices and hosts.

The CTC loss is not optax.ctc_loss: that one can round below zero and give NaN (optax#1771), and answers a text that
does not fit into its frames with a huge number and its gradient. Here such a row gives 0 and no gradient, as torch's
`zero_infinity=True`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int64, UInt32

from wavlm_jax.data.batches import Lengths
from wavlm_jax.data.corpus import Corpora, Corpus
from wavlm_jax.model.heads import CTCOutput, Headed, head_num_frames
from wavlm_jax.settings import SettingsError
from wavlm_jax.shapes import Batch, Params, StepKey, samples_for
from wavlm_jax.tasks import common
from wavlm_jax.tasks.common import Parts, Split, TaskSettings, forward, head_model
from wavlm_jax.text.decoding import collapse_greedily, frames_needed
from wavlm_jax.text.vocabulary import UnknownCharactersError, Vocabulary, normal_form, read_vocabulary
from wavlm_jax.training.task import LossSums, Task, Topology

PLANNED_FRAMES_PER_CHARACTER = 2
"""Of a run that is planned without its corpus: 25 characters a second, more than people say (LibriSpeech: about 15)."""
PLANNED_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ'"
"""Of such a run too: with the special tokens 32 tokens, as the English models on the hub have."""
_SHOWN = 3
"""Utterances of each split whose decodings are printed after every evaluation."""
_SHOWN_CHARACTERS = 200


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


@dataclass(frozen=True, kw_only=True)
class CTCSettings(TaskSettings):
    """All sections that this task reads."""

    text: TextSettings


class Texts(NamedTuple):
    """What there is to learn from the transcripts of a corpus."""

    chosen: Int64[np.ndarray, "chosen"]
    """Utterances that take part."""
    num_labels: Int64[np.ndarray, "utterances"]
    """Labels of every utterance of the corpus."""
    without_text: int
    """Utterances without a transcript, left out."""
    infeasible: int
    """Utterances whose text does not fit into their frames; left out in training."""
    respelt: int
    """Utterances whose text is not in normal form C, or has invisible characters."""

    def describe(self, split: str) -> str:
        """One line for people."""
        line = f"{split}: {len(self.chosen)} utterances with {self.num_labels[self.chosen].sum()} characters"
        notes = {
            "without a transcript, left out": self.without_text,
            "with more text than frames": self.infeasible,
            "with text that is not in Unicode's form C or has invisible characters, read without": self.respelt,
        }
        return "; ".join([line, *(f"{count} {what}" for what, count in notes.items() if count)])


@dataclass(frozen=True)
class TextLabels:
    """Annotates a row with its text as labels. Is pickled to the loader's worker processes, where texts are encoded."""

    corpus: Corpus
    vocabulary: Vocabulary
    most: Mapping[int, int]
    """Bucket -> labels of its rows."""
    replace_unknown: bool

    def __call__(self, index: int, first_frame: int, frames: int, bits: int) -> Mapping[str, np.ndarray]:
        """`labels` int32 (most of the bucket,), zeros behind `num_labels` int32 ()."""
        del first_frame, bits  # always a whole utterance, and nothing is random
        labels = np.zeros(self.most[frames], np.int32)
        found = self.vocabulary.encode(self.corpus.texts[index], replace_unknown=self.replace_unknown)
        found = found[: len(labels)]  # shorter only where a filler row asks for the shape of another's labels
        labels[: len(found)] = found
        return {"labels": labels, "num_labels": np.asarray(len(found), np.int32)}

    @staticmethod
    def shapes(frames: int) -> Mapping[str, jax.ShapeDtypeStruct]:
        """The labels of a row of `frames`, before there is a corpus."""
        return {
            "labels": jax.ShapeDtypeStruct((max(frames // PLANNED_FRAMES_PER_CHARACTER, 1),), np.int32),
            "num_labels": jax.ShapeDtypeStruct((), np.int32),
        }


def make_vocabulary(settings: TextSettings, train: Corpus | None) -> Vocabulary:
    """The vocabulary that the config names, or that of the training text; without a corpus, English letters.

    Raises:
        SettingsError: the training corpus has no transcripts.

    """
    if settings.vocabulary is not None:
        return read_vocabulary(Path(settings.vocabulary))
    if train is None:
        return Vocabulary.from_texts([PLANNED_LETTERS])
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
        vocabulary: of the model.
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
    respelt = sum(normal_form(text) != text for text in corpus.texts)
    found = Texts(np.flatnonzero(keep), counts, int(np.sum(~has_text)), int(np.sum(has_text & ~fits)), respelt)
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


def build(config: Mapping[str, Any], topology: Topology) -> Task:
    """The task of a CTC config; every transcript is looked at. See `common.build`.

    Raises:
        FileNotFoundError: a corpus or vocabulary that is not there.

    """
    return common.build(config, topology, CTCSettings, _parts)


def outline(config: Mapping[str, Any], topology: Topology) -> Task:
    """The same task without corpora: English letters, as many as anybody can say. See `common.outline`."""
    return common.outline(config, topology, CTCSettings, _parts)


def _parts(settings: CTCSettings, corpora: Corpora, topology: Topology) -> Parts:
    text = settings.text
    vocabulary = make_vocabulary(text, corpora.get("train"))
    model = head_model(settings, vocab_size=len(vocabulary), pad_token_id=vocabulary.blank_id)
    splits, lines = {}, []
    for name, corpus in corpora.items():
        frames = np.asarray(head_num_frames(corpus.lengths, settings.model, model.head), np.int64)
        train = name == "train"
        found = survey(corpus, vocabulary, frames, replace_unknown=text.replace_unknown, drop_infeasible=train)
        lines.append(found.describe(name))
        buckets = settings.batch.buckets if train else settings.data.evaluation_buckets
        most = most_labels(corpus.lengths[found.chosen], found.num_labels[found.chosen], buckets)
        splits[name] = Split(corpus, found.chosen, TextLabels(corpus, vocabulary, most, text.replace_unknown))
    return Parts(
        model=model,
        loss=CTCLoss(model, vocabulary.delimiter_id),
        splits=splits,
        label_shapes=TextLabels.shapes,
        lines=lines,
        vocabulary=vocabulary,
        fingerprints={"vocabulary": vocabulary.fingerprint},
        score=PrintedDecodings(vocabulary, corpora, _SHOWN if topology.process_index == 0 else 0),
    )


@dataclass(frozen=True)
class PrintedDecodings:
    """Prints the first utterances of a split, the same ones after every evaluation: one watches them become words."""

    vocabulary: Vocabulary
    corpora: Corpora
    shown: int
    """How many; 0 on every process but the first."""

    def __call__(self, split: str, answers: Mapping[str, np.ndarray]) -> Mapping[str, float]:
        """No metric: those are sums already."""
        for row in np.argsort(answers["id"], kind="stable")[: self.shown].tolist():
            number = int(answers["id"][row])
            name, said = self.corpora[split].ids[number], self.corpora[split].texts[number]
            heard = self.vocabulary.spell(answers["found"][row, : answers["found_length"][row]])
            print(f"{split} {name}: said  {said}\n{split} {name}: heard {heard}", flush=True)
        return {}


@dataclass(frozen=True)
class CTCLoss:
    """The loss of a batch: a pure function of (params, batch, key), the same on any number of devices."""

    model: Headed
    delimiter_id: int | None

    def __call__(self, params: Params, batch: Batch, key: StepKey | None) -> LossSums:
        """Sums of loss and metrics over utterances; in evaluation of character and word errors too.

        Args:
            params: of `model`.
            batch: as for `common.forward`, and `labels` (rows, labels), `num_labels`, `id`, `weight`.
            key: of the step; None: evaluation.

        """
        head = self.model.head
        output: CTCOutput = forward(self.model, params, batch, key)
        labels, num_labels = batch["labels"], batch["num_labels"]
        loss = ctc_loss(output.logits, output.num_frames, labels, num_labels, head.pad_token_id)
        if head.ctc_loss_reduction == "mean":
            loss = loss / jnp.maximum(num_labels, 1)
        counts = batch["weight"] > 0
        rows = _sum(counts)
        fits = has_alignment(output.num_frames, labels, num_labels)
        metrics = {"infeasible": (_sum(counts & ~fits), rows), "blank_rate": self._blank_rate(output, counts)}
        answers = {}
        if key is None:
            found = single_delimiters(
                decode_greedily(output.logits, output.num_frames, head.pad_token_id), self.delimiter_id
            )
            metrics |= self._errors(found, Sequences(labels, num_labels), counts)
            short = found.values[:, :_SHOWN_CHARACTERS]  # one width, whatever the bucket
            answers = {
                "id": batch["id"],
                "found": jnp.pad(short, ((0, 0), (0, _SHOWN_CHARACTERS - short.shape[1]))),
                "found_length": jnp.minimum(found.length, _SHOWN_CHARACTERS),
            }
        return LossSums(jnp.sum(jnp.where(counts, loss, 0.0)), rows, metrics, answers=answers)

    def _blank_rate(self, output: CTCOutput, counts: Any) -> tuple[Any, Any]:
        """Share of the frames whose most likely character is the blank: near 1 where training collapses (USERS #23)."""
        inside = (jnp.arange(output.logits.shape[1])[None, :] < output.num_frames[:, None]) & counts[:, None]
        blank = jnp.argmax(output.logits, axis=-1) == self.model.head.pad_token_id
        return _sum(blank & inside), _sum(inside)

    def _errors(self, found: "Sequences", wanted: "Sequences", counts: Any) -> dict[str, tuple[Any, Any]]:
        """Greedy decoding against the transcript: `cer`, `wer`, and how many times as long the found texts are."""
        letters = _sum(jnp.where(counts, wanted.length, 0))
        result = {
            "cer": (_sum(jnp.where(counts, edit_distance(found, wanted), 0)), letters),
            "length_ratio": (_sum(jnp.where(counts, found.length, 0)), letters),
        }
        if self.delimiter_id is not None:
            words = word_hashes(wanted, self.delimiter_id)
            wrong = edit_distance(word_hashes(found, self.delimiter_id), words)
            result["wer"] = _sum(jnp.where(counts, wrong, 0)), _sum(jnp.where(counts, words.length, 0))
        return result


def _sum(values: Any) -> Any:
    return jnp.sum(values.astype(jnp.float32))


# The CTC loss: the log-probability of a text, summed over all its alignments

Logits = Float[Array, "rows frames vocabulary"]
Labels = Int[Array, "rows labels"]
Counts = Int[Array, "rows"]

_IMPOSSIBLE = -1e30
"""log 0: finite, so that differences and derivatives of impossible paths are numbers."""


class _Reached(NamedTuple):
    """Log-probability of all paths so far that end in each state."""

    on_blank: Float[Array, "rows states"]
    on_label: Float[Array, "rows labels"]
    offset: Float[Array, "rows one"]
    """What was subtracted from both to keep them near 0, where float32 is fine; it has no derivative."""


def ctc_loss(
    logits: Logits, num_frames: Counts, labels: Labels, num_labels: Counts, blank_id: int
) -> Float[Array, "rows"]:
    """-log p(labels | logits) of each row, at least 0; 0 without a gradient where no alignment exists.

    A path runs over states "after i labels, on a blank" (i = 0 ... labels) and "on label i"; one step of a scan per
    frame. Equal labels need a blank between them.

    Args:
        logits: float32, before the softmax.
        num_frames: frames of each row that count; they come first.
        labels: ids, none of them the blank; anything behind a row's end.
        num_labels: labels of each row.
        blank_id: of the vocabulary.

    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32)).swapaxes(0, 1)
    of_blank = log_probs[:, :, blank_id, None]
    # a product with 0 and 1 instead of a gather: its gradient is one too, and accelerators like them
    chosen = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32)
    of_label = jnp.einsum("trv,rlv->trl", log_probs, chosen, precision=jax.lax.Precision.HIGHEST)
    doubled = jnp.pad(labels[:, 1:] == labels[:, :-1], ((0, 0), (1, 0)), constant_values=True)[:, : labels.shape[1]]

    def step(reached: _Reached, frame: tuple[Array, Array, Array]) -> tuple[_Reached, None]:
        blank, label, number = frame
        before = jnp.pad(reached.on_label, ((0, 0), (1, 0)), constant_values=_IMPOSSIBLE)
        skipping = jnp.where(doubled, _IMPOSSIBLE, before[:, :-1])
        on_blank = blank + _log_sum(reached.on_blank, before)
        on_label = label + _log_sum(reached.on_label, reached.on_blank[:, :-1], skipping)
        largest = jnp.maximum(on_blank.max(axis=1), on_label.max(axis=1, initial=_IMPOSSIBLE))
        offset = jax.lax.stop_gradient(largest)[:, None]
        new = _Reached(on_blank - offset, on_label - offset, reached.offset + offset)
        counts = (number < num_frames)[:, None]
        return jax.tree.map(lambda a, b: jnp.where(counts, a, b), new, reached), None

    rows, most = labels.shape
    start = _Reached(
        jnp.full((rows, most + 1), _IMPOSSIBLE).at[:, 0].set(0.0),
        jnp.full((rows, most), _IMPOSSIBLE),
        jnp.zeros((rows, 1)),
    )
    end, _ = jax.lax.scan(step, start, (of_blank, of_label, jnp.arange(logits.shape[1])))
    last = num_labels[:, None]
    ends_on_blank = jnp.take_along_axis(end.on_blank, last, axis=1)[:, 0]
    labelled = jnp.pad(end.on_label, ((0, 0), (1, 0)), constant_values=_IMPOSSIBLE)
    ends_on_label = jnp.take_along_axis(labelled, last, axis=1)[:, 0]
    loss = -end.offset[:, 0] - _log_sum(ends_on_blank, ends_on_label)
    loss = loss - jax.lax.stop_gradient(jnp.minimum(loss, 0.0))  # rounding, when the text is all but certain
    return jnp.where(has_alignment(num_frames, labels, num_labels), loss, 0.0)


def has_alignment(num_frames: Counts, labels: Labels, num_labels: Counts) -> Bool[Array, "rows"]:
    """Whether the labels fit into the frames: one frame each, and one for the blank between two equal ones."""
    inside = jnp.arange(1, labels.shape[1])[None, :] < num_labels[:, None]
    repeats = jnp.sum((labels[:, 1:] == labels[:, :-1]) & inside, axis=1)
    return num_labels + repeats <= num_frames


def _log_sum(*terms: Array) -> Array:
    """log(sum(exp(terms))), element by element; the derivative is the softmax, whatever the terms."""
    largest = jax.lax.stop_gradient(jnp.stack(terms).max(axis=0))
    total = sum(jnp.exp(term - largest) for term in terms)
    return largest + jnp.log(total)


# Character and word errors of greedy decoding


class Sequences(NamedTuple):
    """Ragged rows: the first `length` values of each one."""

    values: Array
    """int32 or uint32 (rows, places)."""
    length: Counts


_HASH_BASE = np.uint32(1_000_003)


def decode_greedily(logits: Logits, num_frames: Counts, blank_id: int) -> Sequences:
    """The most likely character of each frame; runs collapsed first, then blanks dropped (FACTS E33)."""
    heard = collapse_greedily(logits, num_frames, blank_id)
    return Sequences(heard.ids, heard.num_tokens)


def single_delimiters(text: Sequences, delimiter_id: int | None) -> Sequences:
    """`text` with one delimiter between words and none at its ends, as `Vocabulary.encode` spells."""
    if delimiter_id is None:
        return text
    place = jnp.arange(text.values.shape[1])[None, :]
    delimits = text.values == delimiter_id
    repeated = jnp.pad(delimits[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    once = _packed(text.values, (place < text.length[:, None]) & ~(delimits & repeated))
    last = (place == once.length[:, None] - 1) & (once.values == delimiter_id)
    return _packed(once.values, (place < once.length[:, None]) & ~last)


def word_hashes(text: Sequences, delimiter_id: int) -> Sequences:
    """A 32-bit hash of each word of a text with single delimiters."""
    inside = jnp.arange(text.values.shape[1])[None, :] < text.length[:, None]
    spelling = inside & (text.values != delimiter_id)
    letters = text.values.astype(jnp.uint32) + 1

    def step(word: Array, place: tuple[Array, Array]) -> tuple[Array, UInt32[Array, "rows"]]:
        letter, spells = place
        word = jnp.where(spells, word * _HASH_BASE + letter, jnp.uint32(0))
        return word, word

    start = jnp.zeros(text.length.shape, jnp.uint32)
    _, hashes = jax.lax.scan(step, start, (letters.T, spelling.T))
    ends = spelling & ~jnp.pad(spelling[:, 1:], ((0, 0), (0, 1)))
    return _packed(hashes.T, ends)


def edit_distance(found: Sequences, wanted: Sequences) -> Counts:
    """The fewest insertions, deletions and substitutions that make `wanted` of `found` (Levenshtein)."""
    place = jnp.arange(wanted.values.shape[1] + 1)[None, :]
    start = jnp.broadcast_to(place, (wanted.values.shape[0], place.shape[1]))

    def step(before: Array, one: tuple[Array, Array]) -> tuple[Array, None]:
        value, number = one
        replaced = before[:, :-1] + (wanted.values != value[:, None])
        cheapest = jnp.minimum(before + 1, jnp.pad(replaced, ((0, 0), (1, 0)), constant_values=1 << 30))
        after = jax.lax.cummin(cheapest - place, axis=1) + place  # and then any number of insertions
        return jnp.where((number < found.length)[:, None], after, before), None

    numbers = jnp.arange(found.values.shape[1])
    end, _ = jax.lax.scan(step, start, (found.values.T, numbers))
    return jnp.take_along_axis(end, wanted.length[:, None], axis=1)[:, 0]


def _packed(values: Array, keep: Bool[Array, "rows places"]) -> Sequences:
    """The values to keep, moved to the front in order."""
    order = jnp.argsort(~keep, axis=1, stable=True)
    return Sequences(jnp.take_along_axis(values, order, axis=1), keep.sum(axis=1))
