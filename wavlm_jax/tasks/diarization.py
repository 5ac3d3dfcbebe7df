"""Turns as labels: who speaks in which frame of a row, for at most so many speakers (FACTS B3, E31).

Frame i stands for samples 320 i up to 320 (i + 1), as in every time stamp of this library; whoever speaks at its middle
speaks in it. So a boundary moves by half a frame at most, and turns that lie on the grid come out as they are.

Diarisation errors frame by frame, inside jit: sums, so they are exact over any number of devices and hosts.

Diarisation by frame classification: from turns to who speaks in which frame, in any order of speakers (FACTS B3).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Int64, UInt8

from wavlm_jax.config import WavLMConfig
from wavlm_jax.data.corpus import Corpora, Corpus, open_corpora, turns_of
from wavlm_jax.loading import load_weights
from wavlm_jax.model import heads
from wavlm_jax.settings import SettingsError
from wavlm_jax.shapes import SAMPLE_RATE, STANDARD, Batch, Params, StepKey, samples_for
from wavlm_jax.tasks.common import (
    MOST_SPEAKERS,
    Parts,
    Split,
    TaskSettings,
    arguments,
    assemble,
    head_config,
    in_best_order,
    one_speaker_a_frame,
    outlined,
    read_task,
    speakers_in_any_order,
)
from wavlm_jax.text.records import Turn
from wavlm_jax.training.task import LossSums, Task, Topology


class Recorded(NamedTuple):
    """The turns of a corpus in frames, those of one utterance after those of the one before."""

    offsets: Int64[np.ndarray, "bounds"]
    """Utterance i has the turns number offsets[i] up to offsets[i + 1]."""
    starts: Int32[np.ndarray, "turns"]
    ends: Int32[np.ndarray, "turns"]
    """Exclusive."""
    speakers: Int32[np.ndarray, "turns"]
    """Numbered within their recording, in the order of their first turns."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over all of it."""
        return sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in self)).hexdigest()

    @property
    def annotated(self) -> Int64[np.ndarray, "chosen"]:
        """The utterances that have turns."""
        return np.flatnonzero(np.diff(self.offsets))

    def describe(self, split: str) -> str:
        """One line for people."""
        chosen, total = self.annotated, len(self.offsets) - 1
        line = f"{split}: {len(chosen)} recordings with {len(self.starts)} turns"
        return line if len(chosen) == total else f"{line}; {total - len(chosen)} without turns, left out"


def recorded(corpus: Corpus) -> Recorded:
    """The turns of a corpus.

    Raises:
        FileNotFoundError: it has none (`data.turns.turns_of`).
        SettingsError: none of its recordings has any.

    """
    by_recording = turns_of(corpus)
    offsets, parts = np.zeros(len(corpus) + 1, np.int64), []
    for index, name in enumerate(corpus.ids):
        turns = sorted(by_recording[name]) if name in by_recording else []
        numbers = {speaker: number for number, speaker in enumerate(dict.fromkeys(turn.speaker for turn in turns))}
        parts += [(*frames_of(turn), numbers[turn.speaker]) for turn in turns]
        offsets[index + 1] = len(parts)
    if not parts:
        raise SettingsError(f"{corpus.path}: turns.rttm has no turn of any recording of this corpus; attach it again")
    starts, ends, speakers = np.array(parts, np.int32).T
    return Recorded(offsets, starts, ends, speakers)


def frames_of(turn: Turn) -> tuple[int, int]:
    """First frame, and the one behind the last, whose middles lie in a turn."""
    start, end = (-((STANDARD.hop // 2 - round(time * SAMPLE_RATE)) // STANDARD.hop) for time in (turn.start, turn.end))
    return start, end


def crops_an_epoch(lengths: Int64[np.ndarray, "recordings"], bucket: int) -> Int64[np.ndarray, "recordings"]:
    """How often an epoch shows each recording: as many crops as fit into it, so that long ones are heard in full."""
    return np.maximum(lengths // samples_for(bucket), 1)


@dataclass(frozen=True)
class ActivityLabels:
    """The labels of a row. Travels to worker processes."""

    turns: Recorded
    num_speakers: int
    """Most of a row."""

    def __call__(self, index: int, first_frame: int, frames: int, bits: int) -> Mapping[str, np.ndarray]:
        """`activity` uint8 (frames, speakers) and `others` uint8 (frames,).

        Of more speakers than there is room for, those who speak longest in the row are taken; `others` says how many
        of the rest speak in a frame. Speakers stand in the order in which they are first heard in the row.
        """
        del bits  # nothing is random
        active = self._active(index, first_frame, frames)
        spoken = active.sum(axis=0)
        longest = np.argsort(-spoken, kind="stable")
        kept, rest = longest[: self.num_speakers], longest[self.num_speakers :]
        kept = kept[spoken[kept] > 0]
        kept = kept[np.argsort(active[:, kept].argmax(axis=0), kind="stable")] if len(kept) else kept
        activity = np.zeros((frames, self.num_speakers), np.uint8)
        activity[:, : len(kept)] = active[:, kept]
        return {"activity": activity, "others": active[:, rest].sum(axis=1, dtype=np.uint8)}

    @staticmethod
    def shapes(num_speakers: int, frames: int) -> Mapping[str, jax.ShapeDtypeStruct]:
        """What a row of `frames` gets, of turns that are not there yet."""
        return {
            "activity": jax.ShapeDtypeStruct((frames, num_speakers), np.uint8),
            "others": jax.ShapeDtypeStruct((frames,), np.uint8),
        }

    def _active(self, index: int, first_frame: int, frames: int) -> Bool[np.ndarray, "frames everyone"]:
        """Each speaker of the recording in each frame of the row."""
        held = slice(self.turns.offsets[index], self.turns.offsets[index + 1])
        starts, ends = (times[held] - first_frame for times in (self.turns.starts, self.turns.ends))
        speakers = self.turns.speakers[held]
        active = np.zeros((frames, speakers.max(initial=-1) + 1), bool)
        for turn in np.flatnonzero((starts < frames) & (ends > 0)):
            active[max(starts[turn], 0) : ends[turn], speakers[turn]] = True
        return active


Speaking = Bool[Array, "rows frames speakers"]
Total = Float[Array, "rows"]


class ActivityErrors(NamedTuple):
    """Frames times speakers of each row: what pyannote.metrics counts in seconds."""

    missed: Total
    false_alarm: Total
    confusion: Total
    """Speech that is given to another speaker."""
    speech: Total
    """Of the reference; the diarisation error rate is the sum of the three others over it."""


def activity_errors(
    found: Speaking, wanted: Speaking, others: UInt8[Array, "rows frames"], mask: Bool[Array, "rows frames"]
) -> ActivityErrors:
    """Errors under the order of speakers with the most frames in common.

    Args:
        found: who is heard.
        wanted: who speaks.
        others: speakers of a frame for whom `wanted` has no place; they are missed or confused. Where there are any,
            the best order of a scorer that knows them could be better, so the error here is an upper bound.
        mask: frames that count.

    """
    found, wanted = found & mask[:, :, None], wanted & mask[:, :, None]
    heard = found.sum(axis=2)
    spoken = wanted.sum(axis=2) + jnp.where(mask, others, 0)
    common = jnp.einsum(
        "rfi,rfj->rij",
        found.astype(jnp.float32),
        wanted.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    right = -in_best_order(-common).loss

    def total(frames: Array) -> Total:
        return frames.sum(axis=1).astype(jnp.float32)

    return ActivityErrors(
        missed=total(jnp.maximum(spoken - heard, 0)),
        false_alarm=total(jnp.maximum(heard - spoken, 0)),
        confusion=total(jnp.minimum(spoken, heard)) - right,
        speech=total(spoken),
    )


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
