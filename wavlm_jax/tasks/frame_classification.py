"""Diarisation by frame classification: from turns to who speaks in which frame, in any order of speakers (FACTS B3)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from wavlm_jax.config import WavLMConfig
from wavlm_jax.loading import load_weights
from wavlm_jax.settings import SettingsError
from wavlm_jax.shapes import STANDARD, Batch, Params, StepKey
from wavlm_jax.tasks.activity import ActivityLabels, crops_an_epoch, recorded
from wavlm_jax.tasks.activity_errors import activity_errors
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
from wavlm_jax.tasks.forward import arguments
from wavlm_jax.tasks.losses import MOST_SPEAKERS, one_speaker_a_frame, speakers_in_any_order
from wavlm_jax.training.topology import Topology


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """The config section `objective`."""

    compat: Literal["exact", "huggingface"]
    """"exact": binary cross entropy a speaker, in the order of speakers that suits a row best, over frames of the
    recording in which nobody speaks whom the row has no room for. "huggingface": transformers' own (docs/parity.md)."""


@dataclass(frozen=True, kw_only=True)
class FrameClassificationSettings(TaskSettings):
    """The sections of the config that belong to this task; `head.num_labels` is the most speakers of a row."""

    objective: ObjectiveSettings


def build(config: Mapping[str, Any], topology: Topology) -> Task:
    """The task of a frame classification config: crops of recordings in training, whole ones in evaluation.

    Args:
        config: resolved, as JSON values.
        topology: the devices that share the rows of a batch.

    Raises:
        SettingsError: a section or key that is missing, unknown or mistyped; more speakers than orders can be tried.
        FileNotFoundError: a corpus that is not there, or has no turns.

    """
    settings = read_task(config, FrameClassificationSettings)
    return _assembled(settings, open_corpora(settings.data), topology)


def outline(config: Mapping[str, Any], topology: Topology) -> Task:
    """The same task without corpora, for `wavlm_jax.plan`.

    Raises:
        SettingsError: as `build`.
        ValueError: batches that cannot be cut.

    """
    settings = read_task(config, FrameClassificationSettings)
    shapes = partial(ActivityLabels.shapes, head_config(settings.head).num_labels)
    return outlined(_assembled(settings, {}, topology), settings, shapes, topology)


def _assembled(settings: FrameClassificationSettings, corpora: Corpora, topology: Topology) -> Task:
    head = head_config(settings.head)
    _check(settings.model, head.num_labels)
    model = heads.WavLMForAudioFrameClassification(settings.model, head, settings.compute)
    splits, fingerprints = {}, {}
    for name, corpus in corpora.items():
        turns = recorded(corpus)
        if topology.process_index == 0:
            print(turns.describe(name), flush=True)
        chosen = turns.annotated
        if name == "train":
            chosen = np.repeat(chosen, crops_an_epoch(corpus.lengths[chosen], settings.batch.buckets[-1]))
        splits[name] = Split(corpus, chosen, ActivityLabels(turns, head.num_labels))
        fingerprints[f"turns.{name}"] = turns.fingerprint
    parts = Parts(
        model=model,
        head=head,
        loss=FrameLoss(model, settings.objective.compat),
        splits=splits,
        resolved={},
        fingerprints=fingerprints,
        crop=True,
        by_frame=True,
    )
    return assemble(settings, parts, topology, load_weights)


def _check(model: WavLMConfig, num_speakers: int) -> None:
    if num_speakers > MOST_SPEAKERS:
        raise SettingsError(
            f"config.head.num_labels: found {num_speakers} speakers, expected {MOST_SPEAKERS} or fewer in a row; "
            "all their orders are tried. Shorter rows (batch.buckets) have fewer speakers"
        )
    if (model.conv_kernel, model.conv_stride) != STANDARD:
        raise SettingsError(
            f"config.model.conv_kernel, conv_stride: found {model.conv_kernel}, {model.conv_stride}; turns are cut "
            f"into the frames of {STANDARD.kernels}, {STANDARD.strides}"
        )


@dataclass(frozen=True)
class FrameLoss:
    """The loss of a batch: a pure function of (params, batch, key), the same on any number of devices."""

    model: heads.WavLMForAudioFrameClassification
    compat: Literal["exact", "huggingface"]

    def __call__(self, params: Params, batch: Batch, key: StepKey | None) -> LossSums:
        """Sums of loss and of diarisation errors over frames.

        Args:
            params: of `model`.
            batch: as for `forward.arguments`, and `activity` (rows, frames, speakers), `others` (rows, frames),
                `weight`.
            key: of the step; None: evaluation.

        """
        output: heads.FrameOutput
        applied: Any = self.model.apply({"params": params}, *arguments(self.model.config, batch, key))
        output = applied
        inside = output.frame_mask & (batch["weight"] > 0)[:, None]
        loss, count = self._loss(output, batch, inside)
        found = activity_errors(output.logits > 0, batch["activity"] > 0, batch["others"], inside)
        missed, false_alarm, confusion, speech = (jnp.sum(part) for part in found)
        metrics = {
            "der": (missed + false_alarm + confusion, speech),
            "missed": (missed, speech),
            "false_alarm": (false_alarm, speech),
            "confusion": (confusion, speech),
        }
        return LossSums(loss, count, metrics)

    def _loss(self, output: heads.FrameOutput, batch: Batch, inside: Any) -> tuple[Any, Any]:
        """Sum of the loss, and what it is divided by."""
        targets = batch["activity"].astype(jnp.float32)
        if self.compat == "huggingface":
            rows = batch["weight"] > 0
            loss = jnp.where(rows, one_speaker_a_frame(output.logits, targets), 0.0)
            return jnp.sum(loss), jnp.sum(rows.astype(jnp.float32)) * targets.shape[1]
        counted = inside & (batch["others"] == 0)
        loss = speakers_in_any_order(output.logits, targets, counted).loss
        return jnp.sum(loss), jnp.sum(counted.astype(jnp.float32)) * targets.shape[2]
