"""How good labels are: how they are used, and what they say about phones where a corpus has alignments.

The measures of HuBERT's authors (arXiv 2106.07447; FACTS C9) over the joint distribution p(y, z) of phone y and label z
of the same frame:

    phone purity     sum over z of max over y of p(y, z): accuracy of guessing the phone from the label
    cluster purity   sum over y of max over z of p(y, z): the other way round
    PNMI             I(y; z) / H(y): share of the phones' entropy that the label takes away

Label i stands for the time at the centre of its frame's window, sample i * 16000 / rate + 200 for MFCC and conv encoder
alike. Frames whose centre no phone covers count for usage, not for phones. Stress marks are removed.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from pretrain.labels import LabelStore
from wavlm_jax.data.corpus import Corpus
from wavlm_jax.shapes import SAMPLE_RATE

HALF_WINDOW = 200
"""Samples from the first one of a frame to the centre of its window of 25 ms."""
_ARPABET_STRESS = re.compile(r"(?<=^[A-Z]{2})[0-2]$")
_STRESS_MARKS = "\u02c8\u02cc',"
"""IPA's two marks, and espeak's names for them."""

Counts = Int64[np.ndarray, " clusters"]
Joint = Int64[np.ndarray, "phones clusters"]


class Usage(NamedTuple):
    """What `usage` counts."""

    counts: Counts
    """Frames of each label."""
    runs: int
    """Stretches of equal labels within utterances."""


def measure(store: LabelStore, corpus: Corpus) -> dict[str, float | None]:
    """All measures of one split; those that need phones are None where the corpus has none.

    `aligned_share` is the share of frames that a phone covers.
    """
    used = usage(store)
    joint = phone_joint(store, corpus)
    return _usage_measures(used) | _phone_measures(joint, int(used.counts.sum()))


def usage(store: LabelStore) -> Usage:
    """Counts of labels and of runs, a slice of the memory map at a time."""
    counts, changes, size = np.zeros(store.header.num_clusters, np.int64), 0, 2**22
    for start in range(0, len(store.flat), size):
        labels = np.asarray(store.flat[start : start + size + 1])
        counts += np.bincount(labels[:size], minlength=len(counts))
        changes += int(np.count_nonzero(labels[1:] != labels[:-1]))
    starts = store.offsets[:-1][np.diff(store.offsets) > 0]
    inner = starts[starts > 0]
    changes_at_starts = int(np.count_nonzero(store.flat[inner] != store.flat[inner - 1]))
    return Usage(counts, changes - changes_at_starts + len(starts))


def phone_joint(store: LabelStore, corpus: Corpus) -> Joint:
    """Frames of each (phone, label) pair over all utterances that have an alignment."""
    clusters = store.header.num_clusters
    numbers: dict[str, int] = {}
    joint = np.zeros((64, clusters), np.int64)
    for utterance in range(len(store)):
        phones = corpus.phones(utterance)
        if phones is None:
            continue
        symbols = np.array([numbers.setdefault(without_stress(symbol), len(numbers)) for symbol in phones.symbols])
        if len(numbers) > len(joint):
            joint = np.concatenate([joint, np.zeros((max(len(joint), len(numbers)), clusters), np.int64)])
        labels = np.asarray(store.labels(utterance))
        covered, at = phone_of_frames(len(labels), store.header.rate_hz, phones.starts, phones.ends)
        pairs = symbols[at] * clusters + labels[covered] if len(at) else np.zeros(0, np.int64)
        joint += np.bincount(pairs, minlength=joint.size).reshape(joint.shape)
    return joint[: len(numbers)]


def phone_of_frames(
    num_labels: int, rate_hz: int, starts: np.ndarray, ends: np.ndarray
) -> tuple[Int64[np.ndarray, " covered"], Int64[np.ndarray, " covered"]]:
    """(labels that lie in a phone, number of that phone); phones are ascending and last [start, end) samples."""
    if not len(starts):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    centres = np.arange(num_labels) * (SAMPLE_RATE // rate_hz) + HALF_WINDOW
    phone = np.searchsorted(starts, centres, side="right") - 1
    covered = np.flatnonzero((phone >= 0) & (centres < np.asarray(ends)[np.maximum(phone, 0)]))
    return covered, phone[covered]


def without_stress(symbol: str) -> str:
    """A phone's name without stress: "AH0" and "AH1" are "AH", "\u02c8a" is "a"."""
    return _ARPABET_STRESS.sub("", symbol).lstrip(_STRESS_MARKS) or symbol


def entropy(counts: Int64[np.ndarray, "..."]) -> float:
    """Entropy of a table of counts, in nats; 0 of an empty one."""
    shares: Float64[np.ndarray, " some"] = counts[counts > 0] / max(int(counts.sum()), 1)
    return float(-(shares * np.log(shares)).sum())


def pnmi(joint: Joint) -> float:
    """I(phone; label) / H(phone); 0 where there is but one phone."""
    phones = entropy(joint.sum(1))
    information = phones + entropy(joint.sum(0)) - entropy(joint)
    return max(0.0, information / phones) if phones > 0 else 0.0


def phone_purity(joint: Joint) -> float:
    """Accuracy of guessing the phone from the label."""
    return float(joint.max(0).sum() / joint.sum())


def cluster_purity(joint: Joint) -> float:
    """Accuracy of guessing the label from the phone."""
    return float(joint.max(1).sum() / joint.sum())


def report(split: str, quality: Mapping[str, float | None]) -> str:
    """The measures of a split as a line for people."""
    shown = (f"{name} {round(value, 4):,}".removesuffix(".0") for name, value in quality.items() if value is not None)
    return f"labels of {split}: " + ", ".join(shown)


def _usage_measures(used: Usage) -> dict[str, float | None]:
    frames = int(used.counts.sum())
    most = int(used.counts.max()) if frames else 0
    return {
        "frames": float(frames),
        "used_clusters": float(np.count_nonzero(used.counts)),
        "usage_entropy": entropy(used.counts),
        "usage_entropy_share": entropy(used.counts) / float(np.log(len(used.counts))),
        "unigram_accuracy": most / max(frames, 1),
        "mean_run_length": frames / max(used.runs, 1),
    }


def _phone_measures(joint: Joint, frames: int) -> dict[str, float | None]:
    aligned = int(joint.sum())
    if not aligned:
        return dict.fromkeys(("aligned_share", "phone_purity", "cluster_purity", "pnmi"))
    return {
        "aligned_share": aligned / frames,
        "phone_purity": phone_purity(joint),
        "cluster_purity": cluster_purity(joint),
        "pnmi": pnmi(joint),
    }
