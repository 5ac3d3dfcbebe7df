"""Diarisation by frame classification: which speaker speaks in which frame, speakers in any order (FACTS B3, E31).

In this order: turns as labels; the task and its loss; losses in the best order of speakers; diarisation errors. The
last two run inside jit and are summed over rows, so they are exact over any number of devices and hosts.

Frame i stands for samples 320 i up to 320 (i + 1), as in every time stamp of this library. A speaker speaks in a
frame if they speak at its middle, so a boundary moves by half a frame at most.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32, Int64, UInt8

from wavlm_jax.config import WavLMConfig
from wavlm_jax.data.corpus import Corpora, Corpus, turns_of
from wavlm_jax.model.heads import FrameOutput, Headed
from wavlm_jax.settings import SettingsError
from wavlm_jax.shapes import SAMPLE_RATE, STANDARD, Batch, Params, StepKey, samples_for
from wavlm_jax.tasks import common
from wavlm_jax.tasks.common import Parts, Split, TaskSettings, cross_entropy, forward, head_model
from wavlm_jax.text.records import Turn
from wavlm_jax.training.task import LossSums, Task, Topology

MOST_SPEAKERS = 6
"""720 orders; beyond that trying them all is no longer cheap."""


@dataclass(frozen=True, kw_only=True)
class FrameObjectiveSettings:
    """The config section `objective` of frame classification."""

    compat: Literal["exact", "huggingface"]
    """"exact": binary cross entropy per speaker, in the order of speakers that suits a row best, over the frames of the
    recording in which no speaker speaks for whom the row has no room. "huggingface": transformers' own loss
    (docs/parity.md)."""


@dataclass(frozen=True, kw_only=True)
class FrameClassificationSettings(TaskSettings):
    """All sections that this task reads; `head.num_labels` is the most speakers of a row."""

    objective: FrameObjectiveSettings


class CorpusTurns(NamedTuple):
    """The turns of all recordings of a corpus in frames, one recording after the other."""

    offsets: Int64[np.ndarray, "bounds"]
    """Recording i has the turns number offsets[i] up to offsets[i + 1]."""
    starts: Int32[np.ndarray, "turns"]
    ends: Int32[np.ndarray, "turns"]
    """Exclusive."""
    speakers: Int32[np.ndarray, "turns"]
    """Numbered within their recording, in the order in which they first speak."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over all turns."""
        return sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in self)).hexdigest()

    @property
    def annotated(self) -> Int64[np.ndarray, "chosen"]:
        """Numbers of the recordings that have turns."""
        return np.flatnonzero(np.diff(self.offsets))

    def describe(self, split: str) -> str:
        """One line for people."""
        chosen, total = self.annotated, len(self.offsets) - 1
        line = f"{split}: {len(chosen)} recordings with {len(self.starts)} turns"
        return line if len(chosen) == total else f"{line}; {total - len(chosen)} without turns, left out"


def read_turns(corpus: Corpus) -> CorpusTurns:
    """The turns of a corpus.

    Raises:
        FileNotFoundError: it has none (`data.corpus.turns_of`).
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
    return CorpusTurns(offsets, starts, ends, speakers)


def frames_of(turn: Turn) -> tuple[int, int]:
    """First frame whose middle lies in a turn, and one past the last."""
    start, end = (-((STANDARD.hop // 2 - round(time * SAMPLE_RATE)) // STANDARD.hop) for time in (turn.start, turn.end))
    return start, end


def crops_per_epoch(lengths: Int64[np.ndarray, "recordings"], bucket: int) -> Int64[np.ndarray, "recordings"]:
    """How often an epoch shows each recording: as many crops as fit into it, so that long ones are seen in full."""
    return np.maximum(lengths // samples_for(bucket), 1)


@dataclass(frozen=True)
class ActivityLabels:
    """Annotates a row with who speaks when. Is pickled to the loader's worker processes."""

    turns: CorpusTurns
    num_speakers: int
    """Most speakers of a row."""

    def __call__(self, index: int, first_frame: int, frames: int, bits: int) -> Mapping[str, np.ndarray]:
        """`activity` uint8 (frames, speakers) and `others` uint8 (frames,).

        Of more speakers than there is room for, those who speak longest in the row are taken; `others` counts how many
        of the rest speak in a frame. Speakers stand in the order in which they first speak in the row.
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
        """The labels of a row of `frames`, before there is a corpus."""
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


def build(config: Mapping[str, Any], topology: Topology) -> Task:
    """The task of a frame classification config: crops of recordings in training, whole ones in evaluation.

    Raises:
        SettingsError: as `common.build`; more speakers than orders can be tried.
        FileNotFoundError: a corpus that is not there, or has no turns.

    """
    return common.build(config, topology, FrameClassificationSettings, _parts)


def outline(config: Mapping[str, Any], topology: Topology) -> Task:
    """The same task without corpora; see `common.outline`."""
    return common.outline(config, topology, FrameClassificationSettings, _parts)


def _parts(settings: FrameClassificationSettings, corpora: Corpora, _topology: Topology) -> Parts:
    model = head_model(settings)
    num_speakers = model.head.num_labels
    _check(settings.model, num_speakers)
    turns = {name: read_turns(corpus) for name, corpus in corpora.items()}
    splits = {}
    for name, corpus in corpora.items():
        chosen = turns[name].annotated
        if name == "train":
            chosen = np.repeat(chosen, crops_per_epoch(corpus.lengths[chosen], settings.batch.buckets[-1]))
        splits[name] = Split(corpus, chosen, ActivityLabels(turns[name], num_speakers))
    return Parts(
        model=model,
        loss=FrameLoss(model, settings.objective.compat),
        splits=splits,
        label_shapes=partial(ActivityLabels.shapes, num_speakers),
        lines=[found.describe(name) for name, found in turns.items()],
        fingerprints={"turns.train": turns["train"].fingerprint} if turns else {},
        crop=True,
        by_frame=True,
    )


def _check(model: WavLMConfig, num_speakers: int) -> None:
    if num_speakers > MOST_SPEAKERS:
        raise SettingsError(
            f"config.head.num_labels: found {num_speakers} speakers, expected {MOST_SPEAKERS} or fewer in a row; "
            "all their orders are tried. Shorter rows (batch.buckets) have fewer speakers"
        )
    model.require_standard_frames("turns are cut into these frames")


@dataclass(frozen=True)
class FrameLoss:
    """The loss of a batch: a pure function of (params, batch, key), the same on any number of devices."""

    model: Headed
    compat: Literal["exact", "huggingface"]

    def __call__(self, params: Params, batch: Batch, key: StepKey | None) -> LossSums:
        """Sums of loss and of diarisation errors over frames.

        Args:
            params: of `model`.
            batch: as for `common.forward`, and `activity` (rows, frames, speakers), `others` (rows, frames), `weight`.
            key: of the step; None: evaluation.

        """
        output: FrameOutput = forward(self.model, params, batch, key)
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

    def _loss(self, output: FrameOutput, batch: Batch, inside: Any) -> tuple[Any, Any]:
        """Sum of the loss, and what it is divided by."""
        targets = batch["activity"].astype(jnp.float32)
        if self.compat == "huggingface":
            rows = batch["weight"] > 0
            loss = jnp.where(rows, first_speaker_cross_entropy(output.logits, targets), 0.0)
            return jnp.sum(loss), jnp.sum(rows.astype(jnp.float32)) * targets.shape[1]
        counted = inside & (batch["others"] == 0)
        loss = permutation_invariant_loss(output.logits, targets, counted).loss
        return jnp.sum(loss), jnp.sum(counted.astype(jnp.float32)) * targets.shape[2]


Activity = Float[Array, "rows frames speakers"]


class Matched(NamedTuple):
    """The loss of each row in the order of speakers that suits it best."""

    loss: Float[Array, "rows"]
    """Sum over the frames that count and over speakers."""
    order: Int[Array, "rows speakers"]
    """order[i]: which target output i is compared with."""


def permutation_invariant_loss(logits: Activity, targets: Activity, mask: Bool[Array, "rows frames"]) -> Matched:
    """Binary cross entropy of who speaks when, in the order of speakers with the smallest loss (PIT, FACTS E31).

    Args:
        logits: of each output in each frame, before the logistic function.
        targets: 1 where a speaker speaks, 0 elsewhere.
        mask: frames that count.

    Raises:
        ValueError: more than six speakers.

    """
    logits, keep = logits.astype(jnp.float32), mask[:, :, None].astype(jnp.float32)
    # -log sigma(x) where on, -log sigma(-x) = x - log sigma(x) where off: softplus(x) - target * x
    silent = (keep * jax.nn.softplus(logits)).sum(axis=1)
    agreement = jnp.einsum("rfi,rfj->rij", keep * logits, targets, precision=jax.lax.Precision.HIGHEST)
    matched = in_best_order(silent[:, :, None] - agreement)
    return Matched(jnp.maximum(matched.loss, 0.0), matched.order)


def in_best_order(costs: Float[Array, "rows speakers speakers"]) -> Matched:
    """The cheapest way to compare outputs with targets one by one, `costs[i, j]` being output i's with target j.

    Raises:
        ValueError: more than six speakers.

    """
    num_speakers = costs.shape[-1]
    if num_speakers > MOST_SPEAKERS:
        raise ValueError(f"speakers: found {num_speakers}, expected {MOST_SPEAKERS} or fewer: all orders are tried")
    orders = np.array(list(itertools.permutations(range(num_speakers))))
    totals = costs[:, np.arange(num_speakers)[None, :], orders].sum(axis=-1)
    best = jnp.argmin(totals, axis=1)
    return Matched(jnp.take_along_axis(totals, best[:, None], axis=1)[:, 0], jnp.asarray(orders)[best])


def first_speaker_cross_entropy(logits: Activity, targets: Activity) -> Float[Array, "rows"]:
    """Transformers' loss: cross entropy of each frame against the first active speaker, padding included (FACTS B3).

    The sum over frames; a frame in which nobody speaks counts as the first speaker's.
    """
    rows, frames, speakers = logits.shape
    labels = jnp.argmax(targets, axis=-1).reshape(-1)
    return cross_entropy(logits.reshape(-1, speakers), labels).reshape(rows, frames).sum(axis=1)


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
    """Errors of each row under the order of speakers with the most frames in common.

    Args:
        found: the model's answer.
        wanted: the reference.
        others: speakers of a frame for whom `wanted` has no place; they are missed or confused. Where there are any,
            the best order of a scorer that knows them could be better, so the error here is an upper bound.
        mask: frames that count.

    """
    found, wanted = found & mask[:, :, None], wanted & mask[:, :, None]
    num_found = found.sum(axis=2)
    num_wanted = wanted.sum(axis=2) + jnp.where(mask, others, 0)
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
        missed=total(jnp.maximum(num_wanted - num_found, 0)),
        false_alarm=total(jnp.maximum(num_found - num_wanted, 0)),
        confusion=total(jnp.minimum(num_wanted, num_found)) - right,
        speech=total(num_wanted),
    )
