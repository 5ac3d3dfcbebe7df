"""Word and character error rates over a corpus (jiwer, extra `evaluate`)."""

from collections.abc import Sequence
from typing import NamedTuple


class ErrorRate(NamedTuple):
    """Errors over the words (or characters) of all references together, not the mean over utterances."""

    substitutions: int
    deletions: int
    insertions: int
    reference: int
    """Words (characters) of the references."""

    @property
    def rate(self) -> float:
        """Errors per word of the reference; 0 where nothing was said and nothing heard, infinite where only heard."""
        errors = self.substitutions + self.deletions + self.insertions
        return errors / self.reference if self.reference else (float("inf") if errors else 0.0)


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRate:
    """Word errors; nothing is normalised, white space separates words.

    Raises:
        ValueError: lists of different lengths.

    """
    import jiwer  # noqa: PLC0415 an extra

    return _counted(jiwer.process_words(*_paired(references, hypotheses)))


def character_errors(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRate:
    """Character errors; one space between words counts as a character.

    Raises:
        ValueError: lists of different lengths.

    """
    import jiwer  # noqa: PLC0415 an extra

    return _counted(jiwer.process_characters(*_paired(references, hypotheses)))


def _paired(references: Sequence[str], hypotheses: Sequence[str]) -> tuple[list[str], list[str]]:
    if len(references) != len(hypotheses):
        raise ValueError(f"references: found {len(references)}, expected one for each of {len(hypotheses)} hypotheses")
    return [" ".join(text.split()) for text in references], [" ".join(text.split()) for text in hypotheses]


def _counted(output: "object") -> ErrorRate:
    counts = {name: int(getattr(output, name)) for name in ("substitutions", "deletions", "insertions", "hits")}
    total = counts["hits"] + counts["substitutions"] + counts["deletions"]
    return ErrorRate(counts["substitutions"], counts["deletions"], counts["insertions"], total)
