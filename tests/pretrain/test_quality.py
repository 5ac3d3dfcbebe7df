"""Measures of labels against scikit-learn's, and against cases that can be counted by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy as scipy_entropy
from sklearn.metrics import mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from pretrain.labels import LabelStore
from pretrain.quality import (
    cluster_purity,
    entropy,
    measure,
    phone_joint,
    phone_of_frames,
    phone_purity,
    pnmi,
    report,
    usage,
    without_stress,
)
from tests.support.fake_corpus import FakeCorpus, write_store
from wavlm_jax.data.corpus import Phones

pairs = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), min_size=1, max_size=300)


@given(pairs)
@settings(deadline=None)
def test_measures_are_those_of_sklearn(found):
    phones, labels = (np.array(column) for column in zip(*found, strict=True))
    joint = contingency_matrix(phones, labels).astype(np.int64)
    expected = mutual_info_score(phones, labels) / scipy_entropy(joint.sum(1)) if len(np.unique(phones)) > 1 else 0.0
    assert pnmi(joint) == pytest.approx(expected, abs=1e-9)
    assert entropy(joint.sum(0)) == pytest.approx(scipy_entropy(joint.sum(0)), abs=1e-12)
    best_phone = sum(np.bincount(phones[labels == label]).max() for label in np.unique(labels))
    assert phone_purity(joint) == pytest.approx(best_phone / len(found))
    best_label = sum(np.bincount(labels[phones == phone]).max() for phone in np.unique(phones))
    assert cluster_purity(joint) == pytest.approx(best_label / len(found))


def test_measures_counted_by_hand():
    """Phones a a a b, labels 0 0 1 1: label 0 knows its phone, label 1 does not."""
    joint = np.array([[2, 1], [0, 1]])
    assert phone_purity(joint) == 3 / 4
    assert cluster_purity(joint) == 3 / 4
    phone_entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert pnmi(joint) == pytest.approx((phone_entropy - 0.5 * np.log(2)) / phone_entropy)


@given(st.lists(st.lists(st.integers(0, 3), max_size=20), min_size=1, max_size=20))
@settings(max_examples=25, deadline=None)
def test_usage_and_runs_are_those_of_groupby(tmp_path_factory, utterances):
    if not any(utterances):
        utterances = [*utterances, [1]]
    folder = tmp_path_factory.mktemp("labels")
    corpus = FakeCorpus([1] * len(utterances))
    store = LabelStore(folder, "train", write_store(folder, {"train": corpus}, {"train": utterances}, 5))
    found = usage(store)
    assert found.runs == sum(len(list(itertools.groupby(labels))) for labels in utterances)
    assert found.counts.tolist() == np.bincount(np.concatenate(utterances).astype(int), minlength=5).tolist()


class OneUtterance(FakeCorpus):
    """0.2 s, of which 0.05 to 0.15 s are aligned, with a hole."""

    def phones(self, index):  # noqa: ARG002 (there is but one utterance)
        return Phones(["AH0", "B", "AH1"], np.array([800, 1440, 2000]), np.array([1440, 1760, 2400]))


def test_labels_meet_phones_at_the_centre_of_their_window(tmp_path):
    """Label i at 50 Hz stands at sample 320 i + 200: 200 520 840 1160 1480 1800 2120 2440 2760."""
    header = write_store(tmp_path, {"train": OneUtterance([3200])}, {"train": [[0, 0, 1, 1, 2, 0, 3, 0, 0]]}, 4)
    joint = phone_joint(LabelStore(tmp_path, "train", header), OneUtterance([3200]))
    assert joint.tolist() == [[0, 2, 0, 1], [0, 0, 1, 0]]


@pytest.mark.parametrize(("rate_hz", "hop"), [(50, 320), (100, 160)])
@given(cuts=st.lists(st.integers(0, 12000), min_size=2, max_size=10, unique=True), num_labels=st.integers(0, 80))
@settings(deadline=None)
def test_phone_of_a_frame_is_the_one_that_covers_its_centre(rate_hz, hop, cuts, num_labels):
    edges = sorted(cuts)
    starts, ends = np.array(edges[:-1]), np.array(edges[1:])
    covered, phone = phone_of_frames(num_labels, rate_hz, starts, ends)
    expected = []
    for label in range(num_labels):
        centre = label * hop + 200
        expected += [(label, i) for i in range(len(starts)) if starts[i] <= centre < ends[i]]
    assert list(zip(covered.tolist(), phone.tolist(), strict=True)) == expected


def test_no_alignment_gives_usage_only(tmp_path):
    corpus = FakeCorpus([8000, 8000], aligned=False)
    labels = {"train": [[0, 0, 1, 1], [2, 2, 2, 2]]}
    found = measure(LabelStore(tmp_path, "train", write_store(tmp_path, {"train": corpus}, labels, 4)), corpus)
    assert found["pnmi"] is None
    assert (found["frames"], found["used_clusters"], found["mean_run_length"]) == (8, 3, 8 / 3)
    assert found["unigram_accuracy"] == 0.5
    assert found["usage_entropy"] == pytest.approx(scipy_entropy([2, 2, 4]))
    assert "pnmi" not in report("train", found)
    assert "mean_run_length 2.6667" in report("train", found)


@pytest.mark.parametrize(
    ("symbol", "bare"),
    [("AH0", "AH"), ("SIL", "SIL"), ("\u02c8a\u02d0", "a\u02d0"), ("'a", "a"), ("0", "0"), ("I2", "I2"), ("'", "'")],
)
def test_stress_is_removed_and_nothing_else(symbol, bare):
    assert without_stress(symbol) == bare
