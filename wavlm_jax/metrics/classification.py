"""Accuracy and F1 of classifiers (scikit-learn)."""

from collections.abc import Sequence
from typing import NamedTuple


class ClassificationScore(NamedTuple):
    """How often a classifier is right."""

    accuracy: float
    macro_f1: float
    """Mean over the classes that the reference or the answers have."""
    weighted_f1: float
    """Mean over the classes, by how often the reference has them."""


def classification_score(reference: Sequence[str], answers: Sequence[str]) -> ClassificationScore:
    """The scores of `answers`.

    Raises:
        ValueError: nothing to score, or lists of different lengths.

    """
    if not reference or len(reference) != len(answers):
        raise ValueError(
            f"answers: found {len(answers)}, expected one for each of {len(reference)} utterances, and some"
        )
    from sklearn.metrics import accuracy_score, f1_score  # noqa: PLC0415 a second, for those who classify

    return ClassificationScore(
        float(accuracy_score(reference, answers)),
        *(float(f1_score(reference, answers, average=kind, zero_division=0.0)) for kind in ("macro", "weighted")),
    )
