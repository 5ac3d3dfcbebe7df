"""What an utterance is an example of: classes from a column of the corpus, or from a table that says more about it.

Sequence classification: one class for a whole utterance (FACTS B2).
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32, Int64

from wavlm_jax.data.augment import Augment
from wavlm_jax.data.corpus import Corpora, Corpus, open_corpora
from wavlm_jax.loading import load_weights
from wavlm_jax.metrics import classification_score
from wavlm_jax.model import heads
from wavlm_jax.settings import SettingsError
from wavlm_jax.shapes import Batch, Params, StepKey
from wavlm_jax.tasks.common import (
    Parts,
    Split,
    TaskSettings,
    arguments,
    assemble,
    class_sums,
    cross_entropy,
    head_config,
    outlined,
    read_task,
)
from wavlm_jax.text.records import RecordError, read_lines
from wavlm_jax.training.task import LossSums, Task, Topology

UNKNOWN = -1
"""Number of a class that training does not have."""
PLANNED_CLASSES = 5994
"""Of a run that is planned without its corpus: the speakers of VoxCeleb 2, which is more than most have."""
_NAMED = 8


@dataclass(frozen=True, kw_only=True)
class TargetSettings:
    """The config section `target`."""

    column: Literal["speaker", "text", "id"]
    """Of the corpus: the class of an utterance, or what `table` says a class of."""
    table: str | None
    """A file of lines `value TAB class` that turns the column's values into classes (gender by speaker, emotion by id,
    command by text); None: the values are the classes."""
    shown: Literal["utterances", "crops"]
    """What training shows: whole utterances, padded, or random crops without padding, of the largest bucket that the
    utterance fills, where any part of it tells the class (speaker, language)."""

    def __post_init__(self) -> None:
        if self.column == "id" and self.table is None:
            raise ValueError("column, table: found 'id' without a table, expected one: every id would be its own class")


class Classes(NamedTuple):
    """Classes of a training corpus."""

    names: tuple[str, ...]
    """In order of their numbers: sorted."""
    settings: TargetSettings
    table: Mapping[str, str] | None

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the names in order."""
        return hashlib.sha256("\0".join(self.names).encode()).hexdigest()

    def of(self, corpus: Corpus) -> list[str]:
        """The class of every utterance by name, "" where there is none."""
        return _values(corpus, self.settings, self.table)

    def numbers(self, corpus: Corpus) -> Int32[np.ndarray, "utterances"]:
        """The class of every utterance by number, `UNKNOWN` where training has no such class."""
        known = {name: number for number, name in enumerate(self.names)}
        return np.array([known.get(name, UNKNOWN) for name in self.of(corpus)], np.int32)


@dataclass(frozen=True)
class ClassNumber:
    """The class of a row. Travels to worker processes."""

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
        """What a row gets, of classes that are not there yet."""
        return {"labels": jax.ShapeDtypeStruct((), np.int32)}


@dataclass(frozen=True)
class ClassesBySpeed:
    """A speaker at another speed as another class: the classes themselves first, then those of each other speed."""

    augment: Augment
    num_classes: int

    @property
    def others(self) -> tuple[float, ...]:
        """Speeds that make new classes."""
        return tuple(speed for speed in self.augment.settings.speeds if speed != 1)

    def number(self, number: int, bits: int) -> int:
        """The class of a row."""
        speed = self.augment.speed(bits)
        return number if speed == 1 else number + (1 + self.others.index(speed)) * self.num_classes

    def names(self, names: Sequence[str]) -> tuple[str, ...]:
        """All classes: `speaker`, and `speaker @0.9`."""
        return (*names, *(f"{name} @{speed:g}" for speed in self.others for name in names))


def training_classes(settings: TargetSettings, train: Corpus | None) -> Classes:
    """The classes that the training corpus has; where that is not there yet, `PLANNED_CLASSES` that stand in.

    Raises:
        SettingsError: fewer than two, or a table that is none.

    """
    if train is None:
        return Classes(tuple(f"class {number}" for number in range(PLANNED_CLASSES)), settings, None)
    table = None if settings.table is None else _read_table(Path(settings.table))
    names = tuple(sorted({*_values(train, settings, table)} - {""}))
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
    strange = sorted({*names} - {*classes.names} - {""})
    if strange:
        first = names.index(strange[0])
        raise SettingsError(
            f"{corpus.path}: utterance {corpus.ids[first]} is of class {strange[0]!r}, which training does not have "
            f"({len(strange)} such classes); expected one of {_some(classes.names)}. Evaluate on classes that are "
            "trained, or train on these too"
        )
    found = np.flatnonzero([name != "" for name in names])
    if not len(found):
        raise SettingsError(f"{corpus.path}: no utterance has a class; {_cure(classes.settings, corpus)}")
    return found


def describe(corpus: Corpus, classes: Classes, split: str) -> str:
    """One line for people: how many classes, how evenly."""
    counts = Counter(name for name in classes.of(corpus) if name)
    without = len(corpus) - counts.total()
    most, fewest = max(counts.values()), min(counts.values())
    line = f"{split}: {counts.total()} utterances of {len(counts)} classes, {fewest} to {most} a class"
    return line + (f"; {without} without a class, left out" if without else "")


def _values(corpus: Corpus, settings: TargetSettings, table: Mapping[str, str] | None) -> list[str]:
    columns: dict[str, Sequence[str]] = {"speaker": corpus.speakers, "text": corpus.texts, "id": corpus.ids}
    values = list(columns[settings.column])
    return values if table is None else [table.get(value, "") for value in values]


def _read_table(path: Path) -> dict[str, str]:
    table: dict[str, str] = {}
    for number, line in read_lines(path):
        cells = line.rstrip("\r\n").split("\t")
        if len(cells) != 2 or not all(cell.strip() for cell in cells):  # noqa: PLR2004
            raise RecordError(f"{path}, line {number}: found {line.strip()[:60]!r}, expected value TAB class")
        if cells[0] in table:
            raise RecordError(f"{path}, line {number}: {cells[0]!r} for the second time, expected each value once")
        table[cells[0]] = cells[1]
    return table


def _cure(settings: TargetSettings, corpus: Corpus) -> str:
    if settings.table is not None:
        return f"{settings.table} has no values of it, such as {corpus.ids[0] if settings.column == 'id' else '...'!r}"
    return f"prepare the corpus from a source with a column {settings.column!r} (python -m wavlm_jax.data --help)"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


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
