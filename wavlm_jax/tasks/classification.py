"""Sequence classification: one class for a whole utterance (FACTS B2)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from wavlm_jax.loading import load_weights
from wavlm_jax.metrics.classification import classification_score
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
from wavlm_jax.tasks.losses import class_sums, cross_entropy
from wavlm_jax.tasks.targets import ClassNumber, TargetSettings, chosen, describe, training_classes
from wavlm_jax.training.topology import Topology


@dataclass(frozen=True, kw_only=True)
class ClassificationSettings(TaskSettings):
    """The sections of the config that belong to this task."""

    target: TargetSettings


def build(config: Mapping[str, Any], topology: Topology) -> Task:
    """The task of a classification config. Every class is looked at before anything is compiled.

    Args:
        config: resolved, as JSON values.
        topology: the devices that share the rows of a batch.

    Raises:
        SettingsError: a section or key that is missing, unknown or mistyped; classes that training lacks.
        FileNotFoundError: a corpus that is not there.

    """
    settings = read_task(config, ClassificationSettings)
    return _assembled(settings, open_corpora(settings.data), topology)


def outline(config: Mapping[str, Any], topology: Topology) -> Task:
    """The same task without corpora, for `wavlm_jax.plan`, with `targets.PLANNED_CLASSES` classes.

    Raises:
        SettingsError: as `build`.
        ValueError: batches that cannot be cut.

    """
    settings = read_task(config, ClassificationSettings)
    return outlined(_assembled(settings, {}, topology), settings, ClassNumber.shapes, topology)


def _assembled(settings: ClassificationSettings, corpora: Corpora, topology: Topology) -> Task:
    classes = training_classes(settings.target, corpora.get("train"))
    head = head_config(settings.head, num_labels=len(classes.names))
    model = heads.WavLMForSequenceClassification(settings.model, head, settings.compute)
    splits = {
        name: Split(corpus, chosen(corpus, classes), ClassNumber(classes.numbers(corpus)))
        for name, corpus in corpora.items()
    }
    if topology.process_index == 0 and corpora:
        print("\n".join(describe(corpus, classes, name) for name, corpus in corpora.items()), flush=True)
    parts = Parts(
        model=model,
        head=head,
        loss=ClassificationLoss(model),
        splits=splits,
        resolved={"classes": list(classes.names)},
        fingerprints={"classes": classes.fingerprint},
        crop=settings.target.shown == "crops",
        names=classes.names,
        score=MacroF1(classes.names),
    )
    return assemble(settings, parts, topology, load_weights)


@dataclass(frozen=True)
class ClassificationLoss:
    """The loss of a batch: a pure function of (params, batch, key), the same on any number of devices."""

    model: heads.WavLMForSequenceClassification

    def __call__(self, params: Params, batch: Batch, key: StepKey | None) -> LossSums:
        """Sums of cross entropy and right answers over utterances; in evaluation the answers too.

        Args:
            params: of `model`.
            batch: as for `forward.arguments`, and `labels` (rows,), `id`, `weight`.
            key: of the step; None: evaluation.

        """
        output: heads.ClassOutput
        applied: Any = self.model.apply({"params": params}, *arguments(self.model.config, batch, key))
        output = applied
        labels = batch["labels"]
        sums = class_sums(cross_entropy(output.logits, labels), output.logits, labels, batch["weight"] > 0)
        answers = {}
        if key is None:
            found = jnp.argmax(output.logits, axis=-1).astype(jnp.int32)
            answers = {"id": batch["id"], "answer": found, "label": labels}
        return LossSums(sums.loss, sums.rows, {"accuracy": (sums.right, sums.rows)}, answers=answers)


@dataclass(frozen=True)
class MacroF1:
    """What is no sum: F1 of each class, averaged over the classes that the evaluation asks for or gets as an answer."""

    names: tuple[str, ...]

    def __call__(self, split: str, answers: Mapping[str, np.ndarray]) -> Mapping[str, float]:
        """`macro_f1`."""
        del split
        reference, found = ([self.names[number] for number in answers[key]] for key in ("label", "answer"))
        return {"macro_f1": classification_score(reference, found).macro_f1}
