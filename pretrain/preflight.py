"""Checks every label before anything is compiled, so that a label bug costs seconds and not weeks (USERS #6).

Everything is vectorised over slices of the memory maps: a million utterances take seconds. The first utterance that is
wrong is named, with what was found, what was expected and the likely cause.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt16

from pretrain.labels import LabelError, LabelHeader, LabelSettings, LabelStore, array_digest, file_of, utterance_keys
from pretrain.quality import entropy
from wavlm_jax.data.corpus import Corpus
from wavlm_jax.shapes import SAMPLE_RATE, expected_labels, num_frames

TOLERANCE = 1
"""Labels that an utterance may have more or fewer than its frames ask for."""
USUAL_RATES = (25, 50, 100)
_SLICE = 2**14


def check_labels(settings: LabelSettings, corpora: Mapping[str, Corpus]) -> dict[str, LabelStore]:
    """The label store of each split, after all of the checks.

    Args:
        settings: the config section `labels`.
        corpora: split -> the corpus that will be trained or evaluated on.

    Raises:
        LabelError: for the first thing that is wrong.

    """
    folder = Path(settings.path)
    header = LabelHeader.load(folder)
    stores = {name: LabelStore.open(folder, header.named(name, corpora[name].fingerprint)) for name in corpora}
    for split, store in stores.items():
        _check_header(settings, store.split, store)
        _check_corpus(split, store, corpora[split])
        _check_counts(settings, store, corpora[split])
        _check_values(settings, store, corpora[split])
    return stores


def _check_header(settings: LabelSettings, split: str, store: LabelStore) -> None:
    """Number of clusters, and one clustering for all splits."""
    header, described = store.header, store.header.splits[split]
    if header.num_clusters != settings.num_clusters:
        raise LabelError(
            f"labels: {store.path} has {header.num_clusters} clusters, config.labels.num_clusters says "
            f"{settings.num_clusters}; make labels for that number, or change the config"
        )
    if described.kmeans != header.kmeans:
        raise LabelError(
            f"labels: {split} was labelled by the k-means {described.kmeans}, the store's is {header.kmeans}; label 7 "
            f"of one is not label 7 of the other; label {split} with the k-means of the training split"
        )


def _check_corpus(split: str, store: LabelStore, corpus: Corpus) -> None:
    """The same utterances in the same order, and the very array that was written."""
    described = store.header.splits[store.split]
    if len(store) != len(corpus.ids):
        raise LabelError(
            f"labels: {store.path} has {len(store)} utterances for {split}, the corpus has {len(corpus.ids)}; "
            "they were made for another corpus; make them anew"
        )
    wrong = np.flatnonzero(store.keys != utterance_keys(corpus.ids))
    if len(wrong):
        raise LabelError(
            f"labels: utt {corpus.ids[int(wrong[0])]} is number {wrong[0]} of the corpus of {split}, but the labels of "
            f"that number are of another utterance ({len(wrong)} such); lines were swapped, or the corpus was shuffled"
        )
    if described.corpus != corpus.fingerprint:
        raise LabelError(
            f"labels: {store.path} was made for {split} from the corpus {described.corpus}, config.data names the "
            f"corpus {corpus.fingerprint} with the same utterance ids; its audio changed; make the labels anew"
        )
    found = array_digest(store.flat)
    if found != described.sha256:
        raise LabelError(
            f"{file_of(store.path, store.split, 'labels')}: SHA-256 is {found}, the header says {described.sha256}; it "
            "is damaged, or of another store; copy it again or make the labels anew"
        )


def _check_counts(settings: LabelSettings, store: LabelStore, corpus: Corpus) -> None:
    """As many labels as the audio has frames."""
    found, lengths = np.diff(store.offsets), np.asarray(corpus.lengths)
    wrong = np.flatnonzero(np.abs(found - expected_labels(lengths, settings.rate_hz)) > TOLERANCE)
    if len(wrong):
        first = int(wrong[0])
        raise LabelError(
            f"labels: utt {corpus.ids[first]} has {found[first]} labels but its audio gives "
            f"{expected_labels(int(lengths[first]), settings.rate_hz)} at {settings.rate_hz} Hz "
            f"({num_frames(int(lengths[first]))} frames, {lengths[first] / SAMPLE_RATE:.2f} s); "
            f"{len(wrong)} of {len(found)} utterances are wrong; {_cause(found, lengths, settings.rate_hz)}"
        )
    if store.header.rate_hz != settings.rate_hz:
        raise LabelError(
            f"labels: {store.path} has {store.header.rate_hz} labels a second, config.labels.rate_hz says "
            f"{settings.rate_hz}; set it to {store.header.rate_hz}"
        )


def _cause(found: Int64[np.ndarray, " utterances"], lengths: Int64[np.ndarray, " utterances"], rate_hz: int) -> str:
    """The likely reason for wrong counts: another rate, or single utterances."""
    for rate in USUAL_RATES:
        close = np.abs(found - expected_labels(lengths, rate)) <= TOLERANCE
        if rate != rate_hz and close.mean() > 0.9:  # noqa: PLR2004 (nearly all)
            return f"labels look like {rate} Hz, config.labels.rate_hz says {rate_hz}"
    return "these utterances were cut, padded or swapped after labelling; make the labels anew"


def _check_values(settings: LabelSettings, store: LabelStore, corpus: Corpus) -> None:
    """Numbers below K, more than one in an utterance, and a histogram that is not collapsed."""
    clusters = store.header.num_clusters
    histogram = np.zeros(clusters, np.int64)
    constant: list[int] = []
    for first, labels, starts in _slices(store):
        if not len(labels):
            continue
        if int(labels.max()) >= clusters:
            place = int(np.flatnonzero(labels >= clusters)[0])
            utterance = corpus.ids[first + int(np.searchsorted(starts, place, side="right")) - 1]
            raise LabelError(
                f"labels: utt {utterance} has the label {labels[place]}, expected less than {clusters}; "
                "the labels are of a k-means with more clusters, or have special tokens in front"
            )
        histogram += np.bincount(labels, minlength=clusters)
        constant += (first + _constant_rows(labels, starts, settings.rate_hz)).tolist()
    _check_constant(settings, store, corpus, constant)
    _check_entropy(settings, store, histogram)


def _check_constant(settings: LabelSettings, store: LabelStore, corpus: Corpus, constant: list[int]) -> None:
    if len(constant) > settings.max_constant_share * len(store):
        first = constant[0]
        labels = store.labels(first)
        raise LabelError(
            f"labels: utt {corpus.ids[first]} has {len(labels)} labels, all of them {labels[0]}; {len(constant)} of "
            f"{len(store)} utterances of a second or more are like that, config.labels.max_constant_share allows "
            f"{settings.max_constant_share}; are they silent, or were they labelled by a broken teacher?"
        )


def _check_entropy(settings: LabelSettings, store: LabelStore, histogram: Int64[np.ndarray, " clusters"]) -> None:
    share = entropy(histogram) / float(np.log(len(histogram)))
    if share < settings.min_entropy:
        most = int(histogram.argmax())
        raise LabelError(
            f"labels: {store.split} uses {np.count_nonzero(histogram)} of {len(histogram)} clusters, with entropy "
            f"{share:.3f} log({len(histogram)}); config.labels.min_entropy says {settings.min_entropy}; label {most} "
            f"alone is {histogram[most] / max(int(histogram.sum()), 1):.0%}; collapsed features, or an empty dictionary"
        )


def _slices(
    store: LabelStore,
) -> Iterator[tuple[int, UInt16[np.ndarray, " labels"], Int64[np.ndarray, " slice"]]]:
    """(first utterance, its and the following utterances' labels, where each starts among them)."""
    for first in range(0, len(store), _SLICE):
        offsets = np.asarray(store.offsets[first : first + _SLICE + 1])
        yield first, np.array(store.flat[offsets[0] : offsets[-1]]), offsets[:-1] - offsets[0]


def _constant_rows(
    labels: UInt16[np.ndarray, " labels"], starts: Int64[np.ndarray, " slice"], rate_hz: int
) -> Int64[np.ndarray, " constant"]:
    """Utterances of the slice that last a second or more and have one label only."""
    counts = np.diff(np.append(starts, len(labels)))
    some = np.flatnonzero(counts > 0)
    same = np.maximum.reduceat(labels, starts[some]) == np.minimum.reduceat(labels, starts[some])
    rows: Int64[np.ndarray, " constant"] = some[same & (counts[some] >= rate_hz)]
    return rows
