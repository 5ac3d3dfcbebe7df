"""Speech recognition by CTC: from transcripts to characters, frame by frame (FACTS B1, D1)."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from wavlm_jax.loading import load_weights
from wavlm_jax.model.adapter import head_num_frames
from wavlm_jax.shapes import Batch, Params, StepKey
from wavlm_jax.tasks.building import (
    Corpora,
    LossSums,
    Parts,
    Split,
    Task,
    TaskSettings,
    assemble,
    head_config,
    heads,
    open_corpora,
    outlined,
    read_task,
)
from wavlm_jax.tasks.ctc_loss import ctc_loss, has_alignment
from wavlm_jax.tasks.decodings import Decodings, listed
from wavlm_jax.tasks.edits import Sequences, edit_distance, greedy, tidy, words
from wavlm_jax.tasks.forward import arguments
from wavlm_jax.tasks.texts import SameVocabulary, TextLabels, TextSettings, make_vocabulary, most_labels, survey
from wavlm_jax.training.topology import Topology

_SHOWN = 3
"""Utterances of each split whose decodings are printed after every evaluation."""


@dataclass(frozen=True, kw_only=True)
class CTCSettings(TaskSettings):
    """The sections of the config that belong to this task."""

    text: TextSettings


def build(config: Mapping[str, Any], topology: Topology) -> Task:
    """The task of a CTC config. Every transcript is looked at before anything is compiled.

    Args:
        config: resolved, as JSON values.
        topology: the devices that share the rows of a batch.

    Raises:
        SettingsError: a section or key that is missing, unknown or mistyped; transcripts that cannot be learned from.
        FileNotFoundError: a corpus or vocabulary that is not there.

    """
    settings = read_task(config, CTCSettings)
    return _assembled(settings, open_corpora(settings.data), topology)


def outline(config: Mapping[str, Any], topology: Topology) -> Task:
    """The same task without corpora, for `wavlm_jax.plan`: English letters, as many as anybody can say.

    Raises:
        SettingsError: as `build`.
        ValueError: batches that cannot be cut.

    """
    settings = read_task(config, CTCSettings)
    return outlined(_assembled(settings, {}, topology), settings, TextLabels.shapes, topology)


def _assembled(settings: CTCSettings, corpora: Corpora, topology: Topology) -> Task:
    vocabulary = make_vocabulary(settings.text, corpora["train"] if corpora else None)
    head = head_config(settings.head, vocab_size=len(vocabulary), pad_token_id=vocabulary.blank_id)
    model = heads.WavLMForCTC(settings.model, head, settings.compute)
    replace_unknown, splits = settings.text.replace_unknown, {}
    for name, corpus in corpora.items():
        frames = np.asarray(head_num_frames(corpus.lengths, settings.model, head), np.int64)
        training = name == "train"
        found = survey(corpus, vocabulary, frames, replace_unknown=replace_unknown, drop_infeasible=training)
        if topology.process_index == 0:
            print(found.describe(name), flush=True)
        buckets = settings.batch.buckets if training else settings.data.evaluation_buckets
        most = most_labels(corpus.lengths[found.chosen], found.num_labels[found.chosen], buckets)
        splits[name] = Split(corpus, found.chosen, TextLabels(corpus, vocabulary, most, replace_unknown))

    def spoken(split: str, number: int) -> tuple[str, str]:
        return corpora[split].ids[number], corpora[split].texts[number]

    parts = Parts(
        model=model,
        head=head,
        loss=CTCLoss(model, vocabulary.delimiter_id),
        splits=splits,
        resolved={"vocabulary": dataclasses.asdict(vocabulary)},
        fingerprints={"vocabulary": vocabulary.fingerprint},
        check_head=SameVocabulary(vocabulary),
        score=Decodings(vocabulary.spell, spoken, _SHOWN if topology.process_index == 0 else 0),
    )
    return assemble(settings, parts, topology, load_weights)


@dataclass(frozen=True)
class CTCLoss:
    """The loss of a batch: a pure function of (params, batch, key), the same on any number of devices."""

    model: heads.WavLMForCTC
    delimiter_id: int | None

    def __call__(self, params: Params, batch: Batch, key: StepKey | None) -> LossSums:
        """Sums of loss and metrics over utterances; in evaluation of character and word errors too.

        Args:
            params: of `model`.
            batch: as for `forward.arguments`, and `labels` (rows, labels), `num_labels`, `weight`.
            key: of the step; None: evaluation.

        """
        head = self.model.head
        output: heads.CTCOutput
        applied: Any = self.model.apply({"params": params}, *arguments(self.model.config, batch, key))
        output = applied
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
            found = tidy(greedy(output.logits, output.num_frames, head.pad_token_id), self.delimiter_id)
            metrics |= self._errors(found, Sequences(labels, num_labels), counts)
            answers = listed(found, batch["id"])
        return LossSums(jnp.sum(jnp.where(counts, loss, 0.0)), rows, metrics, answers=answers)

    def _blank_rate(self, output: heads.CTCOutput, counts: Any) -> tuple[Any, Any]:
        """Share of the frames whose most likely character is the blank: near 1 where training collapses (USERS #23)."""
        inside = (jnp.arange(output.logits.shape[1])[None, :] < output.num_frames[:, None]) & counts[:, None]
        blank = jnp.argmax(output.logits, axis=-1) == self.model.head.pad_token_id
        return _sum(blank & inside), _sum(inside)

    def _errors(self, found: Sequences, wanted: Sequences, counts: Any) -> dict[str, tuple[Any, Any]]:
        """Greedy decoding against the transcript: `cer`, `wer`, and how many times as long the found texts are."""
        letters = _sum(jnp.where(counts, wanted.length, 0))
        result = {
            "cer": (_sum(jnp.where(counts, edit_distance(found, wanted), 0)), letters),
            "length_ratio": (_sum(jnp.where(counts, found.length, 0)), letters),
        }
        if self.delimiter_id is not None:
            right = words(wanted, self.delimiter_id)
            wrong = edit_distance(words(found, self.delimiter_id), right)
            result["wer"] = _sum(jnp.where(counts, wrong, 0)), _sum(jnp.where(counts, right.length, 0))
        return result


def _sum(values: Any) -> Any:
    return jnp.sum(values.astype(jnp.float32))
