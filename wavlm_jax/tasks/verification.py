"""Trial lists at evaluation time: which utterances a list compares, and how well embeddings tell speakers apart."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int64

from wavlm_jax.data.corpus import Corpus
from wavlm_jax.metrics.verification import equal_error_rate, minimum_detection_cost
from wavlm_jax.settings import SettingsError
from wavlm_jax.text.trials import Trial, read_trials

_NAMED = 5
_LEAST_LENGTH = 1e-12


class TrialPairs(NamedTuple):
    """A list, its recordings as numbers of utterances of one corpus."""

    name: str
    """The file's, without ending."""
    left: Int64[np.ndarray, "trials"]
    right: Int64[np.ndarray, "trials"]
    same: Bool[np.ndarray, "trials"]


@dataclass(frozen=True)
class VerificationScores:
    """What an evaluation says about trials."""

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
            found = "there is no evaluation split" if split is None else f"{split}, the nearest, lacks {_some(missing)}"
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
    """Every name of an utterance -> its number; a path that several pieces share names none of them."""
    paths = list(corpus.paths)
    times = Counter(paths)
    names = {path: number for number, path in enumerate(paths) if times[path] == 1}
    return names | {name: number for number, name in enumerate(corpus.ids)}


def _missing(trials: Sequence[Trial], names: Mapping[str, int]) -> list[str]:
    return sorted({name for trial in trials for name in (trial.left, trial.right) if name not in names})


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
