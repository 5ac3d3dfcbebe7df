"""Speaker embeddings by a margin loss over the training speakers: x-vectors (FACTS B4) and ECAPA-TDNN (FACTS D4).

In this order: the task and its loss; trial lists, by which an evaluation says how well embeddings tell speakers apart.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int64

from wavlm_jax.data.augment import Augment
from wavlm_jax.data.corpus import Corpora, Corpus
from wavlm_jax.metrics import equal_error_rate, minimum_detection_cost
from wavlm_jax.model.ecapa import AVERAGES
from wavlm_jax.model.heads import Headed, XVectorOutput
from wavlm_jax.settings import SettingsError
from wavlm_jax.shapes import Batch, Params, StepKey
from wavlm_jax.tasks import common
from wavlm_jax.tasks.classification import ClassesBySpeed, ClassNumber, TargetSettings, describe, training_classes
from wavlm_jax.tasks.common import (
    ClassScores,
    Labels,
    Parts,
    Split,
    TaskSettings,
    class_sums,
    cross_entropy,
    forward,
    head_model,
)
from wavlm_jax.text.records import Trial, read_trials
from wavlm_jax.training.task import LossSums, Task, Topology

Margin: TypeAlias = Literal["additive", "angular"]

_NAMED = 5
"""Recordings that a message names."""
_LEAST_LENGTH = 1e-12
"""Of an embedding, before it is divided by its length."""


@dataclass(frozen=True, kw_only=True)
class MarginSettings:
    """The config section `margin`."""

    kind: Margin
    """"additive": AM-softmax. "angular": AAM-softmax, also called ArcFace."""
    scale: float
    """Of all cosines (30)."""
    margin: float
    """In cosine (0.4) or radians (0.2; 0.4 or 0.5 in the large-margin stage)."""

    def __post_init__(self) -> None:
        if self.scale <= 0 or not 0 <= self.margin < 1:
            raise ValueError(f"scale {self.scale}, margin {self.margin}: expected more than 0, and 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class SpeakerSettings(TaskSettings):
    """All sections that this task reads."""

    target: TargetSettings
    margin: MarginSettings
    trials: tuple[str, ...]
    """Trial lists (`1|0 path path` or Kaldi's); each is scored on the evaluation split that has all its recordings."""


def build(config: Mapping[str, Any], topology: Topology) -> Task:
    """The task of a speaker config, of x-vectors or ECAPA-TDNN by `config.task`. Speakers and trials are looked at.

    Raises:
        SettingsError: as `common.build`; trials of recordings that are not there.

    """
    return common.build(config, topology, SpeakerSettings, _parts)


def outline(config: Mapping[str, Any], topology: Topology) -> Task:
    """The same task without corpora and trials, with `PLANNED_CLASSES` speakers; see `common.outline`."""
    return common.outline(config, topology, SpeakerSettings, _parts)


def _parts(settings: SpeakerSettings, corpora: Corpora, _topology: Topology) -> Parts:
    classes = training_classes(settings.target, corpora.get("train"))
    speeds = _classes_by_speed(settings, len(classes.names))
    names = classes.names if speeds is None else speeds.names(classes.names)
    model = head_model(settings, num_labels=len(names))
    splits, lines = {}, []
    for name, corpus in corpora.items():
        numbers, train = classes.numbers(corpus), name == "train"
        chosen = (numbers >= 0).nonzero()[0] if train else None
        splits[name] = Split(corpus, chosen, ClassNumber(numbers, speeds if train else None))
        if train:
            lines.append(describe(corpus, classes, name))
    return Parts(
        model=model,
        loss=SpeakerLoss(model, settings.margin),
        splits=splits,
        label_shapes=ClassNumber.shapes,
        lines=lines,
        classes=names,
        fingerprints={"classes": classes.fingerprint},
        score=VerificationScores(place_trials(settings.trials, corpora) if corpora else {}),
        crop=settings.target.shown == "crops",
        speeds_are_classes=speeds is not None,
    )


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

    model: Headed
    margin: MarginSettings

    def __call__(self, params: Params, batch: Batch, key: StepKey | None) -> LossSums:
        """Sums over utterances of training speakers; in evaluation the embeddings of all.

        Args:
            params: of `model`.
            batch: as for `common.forward`, and `labels` (rows,), -1 for unknown speakers, `id`, `weight`.
            key: of the step; None: evaluation.

        """
        output: XVectorOutput
        output, state = forward(self.model, params, batch, key, mutable=[] if key is None else [AVERAGES])
        labels = batch["labels"]
        counts = (batch["weight"] > 0) & (labels >= 0)
        sums = class_sums(margin_loss(output.cosines, labels, self.margin), output.cosines, labels, counts)
        if key is None:
            return replace(sums, answers={"id": batch["id"], "embedding": output.embeddings})
        return replace(sums, averages=_by_path(state[AVERAGES]) if AVERAGES in state else {})


def margin_loss(cosines: ClassScores, labels: Labels, settings: MarginSettings) -> Float[jax.Array, "rows"]:
    """Cross entropy of scaled cosines, the one of the right speaker made smaller first (FACTS B4, D4).

    Args:
        cosines: of each row's embedding with every speaker's vector, in [-1, 1].
        labels: speakers.
        settings: "additive": cos - margin. "angular": cos(angle + margin); beyond pi, where that would rise again,
            cos - margin * sin(margin).

    """
    margin = settings.margin
    own = jax.nn.one_hot(labels, cosines.shape[1], dtype=jnp.bool_)
    if settings.kind == "additive":
        reduced = cosines - margin
    else:
        sines = jnp.sqrt(jnp.maximum(1 - jnp.square(cosines), 1e-9))  # the slope at 0 and pi is infinite
        turned = cosines * math.cos(margin) - sines * math.sin(margin)
        reduced = jnp.where(cosines > math.cos(math.pi - margin), turned, cosines - margin * math.sin(margin))
    return cross_entropy(settings.scale * jnp.where(own, reduced, cosines), labels)


def _by_path(averages: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Path of a parameter -> (sum, count)."""
    pairs = jax.tree_util.tree_leaves_with_path(averages, is_leaf=lambda value: isinstance(value, tuple))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): pair for path, pair in pairs}


class TrialPairs(NamedTuple):
    """A trial list with its recordings as numbers of utterances of one corpus."""

    name: str
    """The file's name, without ending."""
    left: Int64[np.ndarray, "trials"]
    right: Int64[np.ndarray, "trials"]
    same: Bool[np.ndarray, "trials"]


@dataclass(frozen=True)
class VerificationScores:
    """Scores of an evaluation's embeddings: how well their cosines tell one speaker from two."""

    trials: Mapping[str, Sequence[TrialPairs]]
    """Split -> its lists."""

    def __call__(self, split: str, answers: Mapping[str, np.ndarray]) -> Mapping[str, float]:
        """`eer` (a share), `min_dcf` (prior 0.01) and `trials`; with `_NAME` behind, where a split has several lists.

        Trials of an utterance that could not be decoded are left out, so `trials` is smaller.
        """
        lists = self.trials.get(split, ())
        scores: dict[str, float] = {}
        for pairs in lists:
            ending = f"_{pairs.name}" if len(lists) > 1 else ""
            scores |= {name + ending: value for name, value in _scores(pairs, answers).items()}
        return scores


def place_trials(paths: Sequence[str], corpora: Mapping[str, Corpus]) -> dict[str, list[TrialPairs]]:
    """Each list with the evaluation split that has all its recordings, by utterance id or by the path they came from.

    Args:
        paths: of the lists.
        corpora: by split; `train` takes no part.

    Raises:
        SettingsError: recordings that no split has, or trials of one kind alone.
        RecordError: a list that is none.

    """
    known = {split: _names(corpus) for split, corpus in corpora.items() if split != "train"}
    placed: dict[str, list[TrialPairs]] = {}
    for path in paths:
        trials = read_trials(Path(path))
        if len({trial.same for trial in trials}) == 1:
            kind = "one speaker" if trials[0].same else "two speakers"
            raise SettingsError(f"config.trials: every trial of {path} is of {kind}, expected some of both kinds")
        split = min(known, key=lambda split: len(_missing(trials, known[split])), default=None)
        if split is None or (missing := _missing(trials, known[split])):
            found = "there is no evaluation split"
            if split is not None:
                more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
                found = f"{split}, the nearest, lacks {', '.join(missing[:_NAMED])}{more}"
            raise SettingsError(
                f"config.trials: no folder of config.data.evaluation has all recordings of {path}: {found}; a "
                "recording is called by its utterance id or its path in the manifest, and is a whole utterance"
            )
        numbers = known[split]
        placed.setdefault(split, []).append(
            TrialPairs(
                Path(path).stem,
                np.array([numbers[trial.left] for trial in trials], np.int64),
                np.array([numbers[trial.right] for trial in trials], np.int64),
                np.array([trial.same for trial in trials]),
            )
        )
    return placed


def _scores(pairs: TrialPairs, answers: Mapping[str, np.ndarray]) -> dict[str, float]:
    vectors = answers["embedding"].astype(np.float64)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), _LEAST_LENGTH)
    place = {int(number): row for row, number in enumerate(answers["id"])}
    both = [
        (place[left], place[right], same)
        for left, right, same in zip(pairs.left.tolist(), pairs.right.tolist(), pairs.same.tolist(), strict=True)
        if left in place and right in place
    ]
    if len({same for _, _, same in both}) < 2:  # noqa: PLR2004
        return {"trials": float(len(both))}
    left, right, same = (np.array(column) for column in zip(*both, strict=True))
    cosines: Float[np.ndarray, "trials"] = (vectors[left] * vectors[right]).sum(axis=1)
    return {
        "eer": equal_error_rate(cosines, same).rate,
        "min_dcf": minimum_detection_cost(cosines, same),
        "trials": float(len(both)),
    }


def _names(corpus: Corpus) -> dict[str, int]:
    """Every name of an utterance -> its number: id, path, and the end of a path from a folder on (`wav/` in VoxCeleb).

    What several utterances or pieces share names none of them.
    """
    paths = list(corpus.paths)
    ends = [(path, number) for number, path in enumerate(paths)]
    for number, path in enumerate(paths):
        parts = path.split("/")
        ends += [("/".join(parts[first:]), number) for first in range(1, len(parts))]
    times = Counter(end for end, _ in ends)
    names = {end: number for end, number in ends if times[end] == 1}
    return names | {name: number for number, name in enumerate(corpus.ids)}


def _missing(trials: Sequence[Trial], names: Mapping[str, int]) -> list[str]:
    return sorted({name for trial in trials for name in (trial.left, trial.right) if name not in names})
