"""Sequence classification: one class for a whole utterance (FACTS B2).

The class of an utterance is a column of the corpus, or what a table says of a column's value. The speaker tasks
(`tasks.speaker`) take their classes from here too.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32, Int64

from wavlm_jax.data.augment import Augment
from wavlm_jax.data.corpus import Corpora, Corpus
from wavlm_jax.metrics import classification_score
from wavlm_jax.model.heads import ClassOutput, Headed
from wavlm_jax.settings import SettingsError
from wavlm_jax.shapes import Batch, Params, StepKey
from wavlm_jax.tasks import common
from wavlm_jax.tasks.common import Parts, Split, TaskSettings, class_sums, cross_entropy, forward, head_model
from wavlm_jax.text.records import RecordError, read_lines
from wavlm_jax.text.vocabulary import normal_form
from wavlm_jax.training.task import LossSums, Task, Topology

UNKNOWN = -1
"""Number of a class that training does not have."""
PLANNED_CLASSES = 5994
"""Of a run that is planned without its corpus: the speakers of VoxCeleb 2, more than most corpora have."""
_NAMED = 8
"""Classes that a message names."""


@dataclass(frozen=True, kw_only=True)
class TargetSettings:
    """The config section `target`."""

    column: Literal["speaker", "text", "id"]
    """Of the corpus: the class of an utterance, or the value whose class `table` gives."""
    table: str | None
    """A file with lines `value TAB class` that turns the column's values into classes (gender by speaker, emotion by
    id, command by text); None: the values are the classes."""
    shown: Literal["utterances", "crops"]
    """What training shows: whole padded utterances, or random crops without padding, of the largest bucket that the
    utterance fills, where any part of it tells the class (speaker, language)."""

    def __post_init__(self) -> None:
        if self.column == "id" and self.table is None:
            raise ValueError("column, table: found 'id' without a table, expected one: every id would be its own class")


class Classes(NamedTuple):
    """The classes of a training corpus."""

    names: tuple[str, ...]
    """In the order of their numbers: sorted."""
    settings: TargetSettings
    table: Mapping[str, str] | None

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the names in order."""
        return hashlib.sha256("\0".join(self.names).encode()).hexdigest()

    def of(self, corpus: Corpus) -> list[str]:
        """The class name of every utterance, "" where there is none."""
        return _class_names(corpus, self.settings, self.table)

    def numbers(self, corpus: Corpus) -> Int32[np.ndarray, "utterances"]:
        """The class number of every utterance, `UNKNOWN` where training has no such class."""
        known = {name: number for number, name in enumerate(self.names)}
        return np.array([known.get(name, UNKNOWN) for name in self.of(corpus)], np.int32)


@dataclass(frozen=True)
class ClassNumber:
    """Annotates a row with its class. Is pickled to the loader's worker processes."""

    numbers: Int32[np.ndarray, "utterances"]
    speeds: "ClassesBySpeed | None" = None

    def __call__(self, index: int, first_frame: int, frames: int, bits: int) -> Mapping[str, np.ndarray]:
        """`labels` int32 ()."""
        del first_frame, frames  # a class is one of the whole utterance
        number = int(self.numbers[index])
        if self.speeds is not None:
            number = self.speeds.number(number, bits)
        return {"labels": np.asarray(number, np.int32)}

    @staticmethod
    def shapes(_frames: int) -> Mapping[str, jax.ShapeDtypeStruct]:
        """The labels of a row, before there is a corpus."""
        return {"labels": jax.ShapeDtypeStruct((), np.int32)}


@dataclass(frozen=True)
class ClassesBySpeed:
    """A speaker at another speed is another class: first the classes themselves, then those of each other speed."""

    augment: Augment
    num_classes: int

    @property
    def others(self) -> tuple[float, ...]:
        """Speeds that make new classes."""
        return tuple(speed for speed in self.augment.settings.speeds if speed != 1)

    def number(self, number: int, bits: int) -> int:
        """The class of a row whose random bits choose its speed."""
        speed = self.augment.speed(bits)
        return number if speed == 1 else number + (1 + self.others.index(speed)) * self.num_classes

    def names(self, names: Sequence[str]) -> tuple[str, ...]:
        """All classes: `speaker`, and `speaker @0.9`."""
        return (*names, *(f"{name} @{speed:g}" for speed in self.others for name in names))


def training_classes(settings: TargetSettings, train: Corpus | None) -> Classes:
    """The classes that the training corpus has; without a corpus, `PLANNED_CLASSES` that stand in.

    Raises:
        SettingsError: fewer than two classes.
        RecordError: a malformed table.

    """
    if train is None:
        return Classes(tuple(f"class {number}" for number in range(PLANNED_CLASSES)), settings, None)
    table = None if settings.table is None else _read_table(Path(settings.table))
    names = tuple(sorted({*_class_names(train, settings, table)} - {""}))
    if len(names) < 2:  # noqa: PLR2004
        found = f"the one class {names[0]!r}" if names else "no class"
        raise SettingsError(
            f"config.target: {settings.column} of {train.path} gives {found}, expected two or more; "
            f"{_cure(settings, train)}"
        )
    return Classes(names, settings, table)


def chosen(corpus: Corpus, classes: Classes) -> Int64[np.ndarray, "chosen"]:
    """Utterances that have a class; all of them are of classes that training has.

    Raises:
        SettingsError: an utterance of another class (named), or none with a class.

    """
    names = classes.of(corpus)
    unknown = sorted({*names} - {*classes.names} - {""})
    if unknown:
        known = ", ".join(classes.names[:_NAMED])
        more = f" and {len(classes.names) - _NAMED} more" if len(classes.names) > _NAMED else ""
        raise SettingsError(
            f"{corpus.path}: utterance {corpus.ids[names.index(unknown[0])]} is of class {unknown[0]!r}, which "
            f"training does not have ({len(unknown)} such classes); expected one of {known}{more}. Evaluate on "
            "classes that are trained, or train on these too"
        )
    found = np.flatnonzero([name != "" for name in names])
    if not len(found):
        raise SettingsError(f"{corpus.path}: no utterance has a class; {_cure(classes.settings, corpus)}")
    return found


def describe(corpus: Corpus, classes: Classes, split: str) -> str:
    """One line for people: how many classes a split has, and how many utterances each."""
    counts = Counter(name for name in classes.of(corpus) if name)
    without = len(corpus) - counts.total()
    fewest, most = min(counts.values()), max(counts.values())
    line = f"{split}: {counts.total()} utterances of {len(counts)} classes, {fewest} to {most} a class"
    return line + (f"; {without} without a class, left out" if without else "")


def _class_names(corpus: Corpus, settings: TargetSettings, table: Mapping[str, str] | None) -> list[str]:
    columns: dict[str, Sequence[str]] = {"speaker": corpus.speakers, "text": corpus.texts, "id": corpus.ids}
    values = list(map(normal_form, columns[settings.column]))
    return values if table is None else [table.get(value, "") for value in values]


def _read_table(path: Path) -> dict[str, str]:
    table: dict[str, str] = {}
    for number, line in read_lines(path):
        cells = normal_form(line).rstrip("\r\n").split("\t")
        if len(cells) != 2 or not all(cell.strip() for cell in cells):  # noqa: PLR2004
            raise RecordError(f"{path}, line {number}: found {line.strip()[:60]!r}, expected value TAB class")
        if cells[0] in table:
            raise RecordError(f"{path}, line {number}: {cells[0]!r} for the second time, expected each value once")
        table[cells[0]] = cells[1]
    return table


def _cure(settings: TargetSettings, corpus: Corpus) -> str:
    if settings.table is not None:
        value = _class_names(corpus, settings, None)[0]
        return f"{settings.table} has no class of its values, such as {value!r}"
    return f"prepare the corpus from a source with a column {settings.column!r} (python -m wavlm_jax.data --help)"


@dataclass(frozen=True, kw_only=True)
class ClassificationSettings(TaskSettings):
    """All sections that this task reads."""

    target: TargetSettings


def build(config: Mapping[str, Any], topology: Topology) -> Task:
    """The task of a classification config; see `common.build`."""
    return common.build(config, topology, ClassificationSettings, _parts)


def outline(config: Mapping[str, Any], topology: Topology) -> Task:
    """The same task without corpora, with `PLANNED_CLASSES` classes; see `common.outline`."""
    return common.outline(config, topology, ClassificationSettings, _parts)


def _parts(settings: ClassificationSettings, corpora: Corpora, _topology: Topology) -> Parts:
    classes = training_classes(settings.target, corpora.get("train"))
    model = head_model(settings, num_labels=len(classes.names))
    return Parts(
        model=model,
        loss=ClassificationLoss(model),
        splits={
            name: Split(corpus, chosen(corpus, classes), ClassNumber(classes.numbers(corpus)))
            for name, corpus in corpora.items()
        },
        label_shapes=ClassNumber.shapes,
        lines=[describe(corpus, classes, name) for name, corpus in corpora.items()],
        classes=classes.names,
        fingerprints={"classes": classes.fingerprint},
        crop=settings.target.shown == "crops",
        score=MacroF1(classes.names),
    )


@dataclass(frozen=True)
class ClassificationLoss:
    """Cross entropy of a batch: a pure function of (params, batch, key), the same on any number of devices."""

    model: Headed

    def __call__(self, params: Params, batch: Batch, key: StepKey | None) -> LossSums:
        """Sums of loss and accuracy over utterances; in evaluation the answers too.

        Args:
            params: of `model`.
            batch: as for `common.forward`, and `labels` (rows,), `id`, `weight`.
            key: of the step; None: evaluation.

        """
        output: ClassOutput = forward(self.model, params, batch, key)
        logits, labels = output.logits, batch["labels"]
        sums = class_sums(cross_entropy(logits, labels), logits, labels, batch["weight"] > 0)
        if key is not None:
            return sums
        answers = {"id": batch["id"], "answer": jnp.argmax(logits, axis=-1).astype(jnp.int32), "label": labels}
        return replace(sums, answers=answers)


@dataclass(frozen=True)
class MacroF1:
    """F1 of each class, averaged over the classes that the evaluation asks for or gets as an answer."""

    names: tuple[str, ...]

    def __call__(self, split: str, answers: Mapping[str, np.ndarray]) -> Mapping[str, float]:
        """`macro_f1`."""
        del split
        reference, found = ([self.names[number] for number in answers[key]] for key in ("label", "answer"))
        return {"macro_f1": classification_score(reference, found).macro_f1}
