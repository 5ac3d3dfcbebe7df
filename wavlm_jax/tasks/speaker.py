"""Speaker embeddings by a margin loss over the training speakers: x-vectors (FACTS B4) and ECAPA-TDNN (FACTS D4)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from wavlm_jax.data.augment import Augment
from wavlm_jax.loading import load_weights
from wavlm_jax.model.ecapa import AVERAGES
from wavlm_jax.settings import SettingsError
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
from wavlm_jax.tasks.forward import arguments
from wavlm_jax.tasks.losses import Margin, class_sums, margin_loss
from wavlm_jax.tasks.targets import ClassesBySpeed, ClassNumber, TargetSettings, describe, training_classes
from wavlm_jax.tasks.verification import VerificationScores, place_trials
from wavlm_jax.training.freeze import Freeze
from wavlm_jax.training.topology import Topology


@dataclass(frozen=True, kw_only=True)
class MarginSettings:
    """The config section `margin`."""

    kind: Margin
    """"additive": AM-softmax. "angular": AAM-softmax, or ArcFace."""
    scale: float
    """Of all cosines (30)."""
    margin: float
    """In cosine (0.4) or radians (0.2; 0.4 or 0.5 in the large-margin stage)."""

    def __post_init__(self) -> None:
        if self.scale <= 0 or not 0 <= self.margin < 1:
            raise ValueError(f"scale {self.scale}, margin {self.margin}: expected more than 0, and 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class SpeakerSettings(TaskSettings):
    """The sections of the config that belong to this task."""

    target: TargetSettings
    margin: MarginSettings
    trials: tuple[str, ...]
    """Trial lists (`1|0 path path` or Kaldi's); each is scored on the evaluation split that has all its recordings."""


def build_xvector(config: Mapping[str, Any], topology: Topology) -> Task:
    """The task of an x-vector config; see `build`."""
    return build(config, topology, heads.WavLMForXVector)


def build_ecapa(config: Mapping[str, Any], topology: Topology) -> Task:
    """The task of an ECAPA-TDNN config; see `build`."""
    return build(config, topology, heads.WavLMForECAPA)


def outline_xvector(config: Mapping[str, Any], topology: Topology) -> Task:
    """An x-vector task without data; see `outline`."""
    return outline(config, topology, heads.WavLMForXVector)


def outline_ecapa(config: Mapping[str, Any], topology: Topology) -> Task:
    """An ECAPA-TDNN task without data; see `outline`."""
    return outline(config, topology, heads.WavLMForECAPA)


def build(config: Mapping[str, Any], topology: Topology, kind: type[heads.Headed]) -> Task:
    """The task of a speaker config. Speakers and trials are looked at before anything is compiled.

    Args:
        config: resolved, as JSON values.
        topology: the devices that share the rows of a batch.
        kind: of the head.

    Raises:
        SettingsError: a section or key that is missing, unknown or mistyped; trials of recordings that are not there.
        FileNotFoundError: a corpus that is not there.

    """
    settings = read_task(config, SpeakerSettings)
    return _assembled(settings, open_corpora(settings.data), topology, kind)


def outline(config: Mapping[str, Any], topology: Topology, kind: type[heads.Headed]) -> Task:
    """The same task without corpora and trials, for `wavlm_jax.plan`, with `targets.PLANNED_CLASSES` speakers.

    Raises:
        SettingsError: as `build`.
        ValueError: batches that cannot be cut.

    """
    settings = read_task(config, SpeakerSettings)
    return outlined(_assembled(settings, {}, topology, kind), settings, ClassNumber.shapes, topology)


def _assembled(settings: SpeakerSettings, corpora: Corpora, topology: Topology, kind: type[heads.Headed]) -> Task:
    classes = training_classes(settings.target, corpora.get("train"))
    speeds = _classes_by_speed(settings, len(classes.names))
    names = classes.names if speeds is None else speeds.names(classes.names)
    head = head_config(settings.head, num_labels=len(names))
    model = kind(settings.model, head, settings.compute)
    numbers = {name: classes.numbers(corpus) for name, corpus in corpora.items()}
    splits = {name: Split(corpus, None, ClassNumber(numbers[name])) for name, corpus in corpora.items()}
    if corpora:
        taken = (numbers["train"] >= 0).nonzero()[0]
        splits["train"] = Split(corpora["train"], taken, ClassNumber(numbers["train"], speeds))
        if topology.process_index == 0:
            print(describe(corpora["train"], classes, "train"), flush=True)
    parts = Parts(
        model=model,
        head=head,
        loss=SpeakerLoss(model, settings.margin),
        splits=splits,
        resolved={"classes": list(names)},
        fingerprints={"classes": classes.fingerprint},
        crop=settings.target.shown == "crops",
        names=names,
        speeds_are_classes=speeds is not None,
        score=VerificationScores(place_trials(settings.trials, corpora) if corpora else {}),
        freeze=_RUNNING_STATISTICS if kind is heads.WavLMForECAPA else {},
    )
    return assemble(settings, parts, topology, load_weights)


_RUNNING_STATISTICS = {"running statistics": Freeze(pattern="^ecapa/.*bn/(mean|variance)$", updates=None)}


def _classes_by_speed(settings: SpeakerSettings, num_classes: int) -> ClassesBySpeed | None:
    if not settings.augmentation.speed_makes_speakers:
        return None
    if settings.target.shown != "crops":
        raise SettingsError(
            "config.augmentation.speed_makes_speakers: found True with target.shown 'utterances', expected 'crops': a "
            "whole utterance keeps its speed where its bucket is too small for a slower one"
        )
    return ClassesBySpeed(Augment(settings.augmentation), num_classes)


@dataclass(frozen=True)
class SpeakerLoss:
    """The loss of a batch: a pure function of (params, batch, key), the same on any number of devices.

    Batch norms of an ECAPA-TDNN normalise over a micro-batch, all its devices together.
    """

    model: heads.Headed
    margin: MarginSettings

    def __call__(self, params: Params, batch: Batch, key: StepKey | None) -> LossSums:
        """Sums over utterances of training speakers; in evaluation the embeddings of all.

        Args:
            params: of `model`.
            batch: as for `forward.arguments`, and `labels` (rows,), -1 for strangers, `id`, `weight`.
            key: of the step; None: evaluation.

        """
        output: heads.XVectorOutput
        given = arguments(self.model.config, batch, key)
        applied: Any = self.model.apply({"params": params}, *given, mutable=[] if key is None else [AVERAGES])
        output, state = applied
        labels = batch["labels"]
        counts = (batch["weight"] > 0) & (labels >= 0)
        margin = self.margin
        losses = margin_loss(output.cosines, labels, margin.kind, scale=margin.scale, margin=margin.margin)
        sums = class_sums(losses, output.cosines, labels, counts)
        answers = {} if key is not None else {"id": batch["id"], "embedding": output.embeddings}
        averages = _by_path(state[AVERAGES]) if AVERAGES in state else {}
        metrics = {"accuracy": (sums.right, sums.rows)}
        return LossSums(sums.loss, sums.rows, metrics, averages=averages, answers=answers)


def _by_path(averages: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Path of a parameter -> (sum, count)."""
    pairs = jax.tree_util.tree_leaves_with_path(averages, is_leaf=lambda value: isinstance(value, tuple))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): pair for path, pair in pairs}
