"""The label store, its reader on hostile files, and the preflight on every label bug that cost somebody weeks."""

import dataclasses
import itertools
import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from pretrain.kmeans import KMeansSettings
from pretrain.labels import LabelError, LabelSettings, SplitWriter, utterance_keys
from pretrain.preflight import check_labels
from tests.support.fake_corpus import FakeCorpus, ragged, write_store
from wavlm_jax.settings import SettingsError, read
from wavlm_jax.shapes import num_frames

KMEANS = KMeansSettings(sample_frames=10**5, batch_frames=256, passes=2, tolerance=0.0, initialisations=1)
SETTINGS = LabelSettings(
    path="labels",
    make=False,
    num_clusters=10,
    rate_hz=50,
    teacher="mfcc",
    run=None,
    step=None,
    layer=None,
    seed=0,
    sample_seconds=None,
    kmeans=KMEANS,
    piece_seconds=30.0,
    batch_seconds=20.0,
    num_threads=2,
    min_entropy=0.5,
    max_constant_share=0.01,
)


def good_labels(corpus, seed=0, rate=1):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 10, size=rate * num_frames(int(n))) for n in corpus.lengths]


@pytest.fixture(scope="module")
def corpora():
    return {"train": FakeCorpus(ragged(12)), "valid": FakeCorpus(ragged(5, seed=1), seed=1)}


@pytest.fixture
def labels(corpora):
    return {split: good_labels(corpus) for split, corpus in corpora.items()}


def settings_for(folder, **changes):
    return dataclasses.replace(SETTINGS, path=str(folder), **changes)


def test_labels_are_read_back(tmp_path, corpora, labels):
    write_store(tmp_path, corpora, labels, 10)
    stores = check_labels(settings_for(tmp_path), corpora)
    for split in corpora:
        store = pickle.loads(pickle.dumps(stores[split]))  # noqa: S301 (made on this line)
        assert len(pickle.dumps(store)) < 4000
        for index, expected in enumerate(labels[split]):
            found = store.labels(index)
            assert found.dtype == np.uint16
            assert found.tolist() == expected.tolist()
    with pytest.raises(IndexError, match="train has no utterance 12"):
        stores["train"].labels(12)
    labelled = {split: header.corpus for split, header in stores["train"].header.splits.items()}
    assert labelled == {split: corpus.fingerprint for split, corpus in corpora.items()}


@given(counts=st.lists(st.integers(0, 30), min_size=1, max_size=12), cuts=st.sets(st.integers(1, 11)), data=st.data())
@examples(max_examples=25, deadline=None)
def test_parts_in_any_division_give_the_same_file(tmp_path_factory, counts, cuts, data):
    """Parts of any size, and a new writer before any of them, as after a kill."""
    folder = tmp_path_factory.mktemp("labels")
    counts = np.array(counts, np.int64)
    flat = np.arange(counts.sum()).astype(np.uint16)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    keys = utterance_keys([str(i) for i in range(len(counts))])
    edges = [0, *sorted(cut for cut in cuts if cut < len(counts)), len(counts)]
    writer = SplitWriter(folder, "train", counts, keys, "same")
    for first, end in itertools.pairwise(edges):
        if data.draw(st.booleans()):
            writer = SplitWriter(folder, "train", counts, keys, "same")
        assert writer.done == first
        writer.write(first, end, flat[offsets[first] : offsets[end]])
    writer.finish()
    assert np.array_equal(np.load(folder / "train.labels.npy"), flat)
    assert SplitWriter(folder, "train", counts, keys, "other").done == 0


def test_writer_refuses_what_is_not_next(tmp_path):
    writer = SplitWriter(tmp_path, "train", np.array([3, 4]), utterance_keys("ab"), "x")
    with pytest.raises(ValueError, match="4 labels of the utterances 1 to 2"):
        writer.write(1, 2, np.zeros(4, np.uint16))
    with pytest.raises(ValueError, match="expected 3"):
        writer.write(0, 1, np.zeros(4, np.uint16))


# The seven label bugs of USERS #6, and their sisters: each must name the utterance or the split, and the cause.


def refused(tmp_path, corpora, match, **changes):
    with pytest.raises(LabelError, match=match):
        check_labels(settings_for(tmp_path, **changes), corpora)


def test_wrong_rate(tmp_path, corpora, labels):
    labels = {split: good_labels(corpus, rate=2) for split, corpus in corpora.items()}
    write_store(tmp_path, corpora, labels, 10, rate_hz=100)
    frames = num_frames(int(corpora["train"].lengths[0]))
    match = (
        rf"utt speaker0-0000 has {2 * frames} labels but its audio gives {frames} at 50 Hz .*12 of 12 utterances are "
        r"wrong; labels look like 100 Hz, config.labels.rate_hz says 50"
    )
    refused(tmp_path, corpora, match)
    check_labels(settings_for(tmp_path, rate_hz=100), corpora)


def test_swapped_lines(tmp_path, corpora, labels):
    write_store(tmp_path, corpora, labels, 10)
    keys = np.load(tmp_path / "train.keys.npy")
    keys[[3, 7]] = keys[[7, 3]]
    np.save(tmp_path / "train.keys.npy", keys)
    refused(tmp_path, corpora, r"utt speaker0-0003 is number 3 .* of another utterance \(2 such\); lines were swapped")


def test_empty_dictionary(tmp_path, corpora, labels):
    write_store(tmp_path, corpora, labels, 10)
    header = json.loads((tmp_path / "header.json").read_text())
    (tmp_path / "header.json").write_text(json.dumps(header | {"num_clusters": 0}))
    refused(tmp_path, corpora, r"header.json: not a label header .*found 0 and 50, expected 2 to 65536")


def test_all_labels_the_same(tmp_path, corpora, labels):
    labels["train"][4] = np.full_like(labels["train"][4], 3)
    write_store(tmp_path, corpora, labels, 10)
    refused(tmp_path, corpora, r"utt speaker1-0004 has \d+ labels, all of them 3; 1 of 12 utterances of a second")


def test_label_beyond_the_clusters(tmp_path, corpora, labels):
    labels["train"][5][-1] = 10
    write_store(tmp_path, corpora, labels, 10)
    refused(tmp_path, corpora, r"utt speaker2-0005 has the label 10, expected less than 10")


def test_one_utterance_short_by_two(tmp_path, corpora, labels):
    frames = len(labels["valid"][2])
    labels["valid"][2] = labels["valid"][2][:-2]
    write_store(tmp_path, corpora, labels, 10)
    match = rf"utt speaker2-0002 has {frames - 2} labels but its audio gives {frames} .*1 of 5 .*cut, padded or swapped"
    refused(tmp_path, corpora, match)


def test_valid_from_another_kmeans(tmp_path, corpora, labels):
    header = write_store(tmp_path, corpora, labels, 10)
    other = dataclasses.replace(header.splits["valid"], kmeans="k2")
    dataclasses.replace(header, splits={**header.splits, "valid": other}).write(tmp_path)
    refused(tmp_path, corpora, r"valid was labelled by the k-means k2, the store's is k1")


def test_one_frame_more_or_less_passes(tmp_path, corpora, labels):
    labels["train"][0] = labels["train"][0][:-1]
    labels["train"][1] = np.append(labels["train"][1], 5)
    write_store(tmp_path, corpora, labels, 10)
    check_labels(settings_for(tmp_path), corpora)


def test_collapsed_histogram(tmp_path, corpora, labels):
    labels["train"] = [np.where(np.arange(len(u)) == 0, 4, 3) for u in labels["train"]]
    write_store(tmp_path, corpora, labels, 10)
    refused(tmp_path, corpora, r"train uses 2 of 10 clusters, with entropy 0\.\d+ log\(10\).*label 3 alone is 9\d%")


def test_another_corpus(tmp_path, corpora, labels):
    write_store(tmp_path, corpora, labels, 10)
    changed = FakeCorpus(corpora["train"].lengths, seed=5)
    refused(tmp_path, {"train": changed}, r"from the corpus \w+, config.data names the corpus \w+ .*its audio changed")
    refused(tmp_path, {"train": FakeCorpus(ragged(3))}, r"has 12 utterances for train, the corpus has 3")


def test_other_number_of_clusters(tmp_path, corpora, labels):
    write_store(tmp_path, corpora, labels, 10)
    refused(tmp_path, corpora, r"has 10 clusters, config.labels.num_clusters says 20", num_clusters=20)


# Files from outside are hostile.


def damaged(path, change):
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("file", "change", "match"),
    [
        ("train.labels.npy", lambda data: data[:-50], r"train.labels.npy: not a whole .npy file"),
        ("train.labels.npy", lambda data: data.replace(b",), }", b",(, }"), r"train.labels.npy: not a whole .npy file"),
        ("train.labels.npy", lambda _: b"", r"train.labels.npy: not a whole .npy file"),
        ("train.labels.npy", lambda _: b"\x80\x04K\x01.", r"train.labels.npy: not a whole .npy file"),
        ("train.labels.npy", lambda data: data[:-1] + bytes([data[-1] ^ 1]), r"train.labels.npy: SHA-256 is"),
        ("train.labels.npy", lambda data: data.replace(b"<u2", b"<i2"), r"found 1-D int16, expected 1-D uint16"),
        ("train.offsets.npy", lambda data: data.replace(b"<i8", b"<u8"), r"found 1-D uint64, expected 1-D int64"),
        ("train.offsets.npy", lambda data: data[:-8] + b"\xff" * 8, r"train.offsets.npy: not ascending"),
        ("header.json", lambda data: data[:200], r"header.json: not a label header .*not readable as JSON"),
        ("header.json", lambda _: b"[1]", r"header.json: not a label header .*found a list"),
        (
            "header.json",
            lambda data: data.replace(b'"format": 1', b'"format": 9'),
            r"label format 9, this version reads",
        ),
        ("header.json", lambda data: data.replace(b'"seed"', b'"sede"'), r"did you mean seed\?"),
    ],
)
def test_damaged_files(tmp_path, corpora, labels, file, change, match):
    write_store(tmp_path, corpora, labels, 10)
    damaged(tmp_path / file, change)
    refused(tmp_path, corpora, match)


def test_no_store_and_no_split(tmp_path, corpora, labels):
    refused(tmp_path, corpora, r"no header.json, so no whole label store; make it: python -m pretrain.make_labels")
    write_store(tmp_path, {"train": corpora["train"]}, labels, 10)
    refused(tmp_path, corpora, r"no labels for the split 'valid'; it has train")


def test_pickles_in_arrays_are_not_read(tmp_path, corpora, labels):
    write_store(tmp_path, corpora, labels, 10)
    np.save(tmp_path / "train.labels.npy", np.array([{"a": 1}], object), allow_pickle=True)
    refused(tmp_path, corpora, r"train.labels.npy: not a whole .npy file")


# The config section.


def section(**changes):
    return dataclasses.asdict(SETTINGS) | changes


def test_settings_are_read_from_a_section():
    assert read(section(), LabelSettings, "labels") == SETTINGS


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_clusters": 70000}, r"config.labels: num_clusters: found 70000, expected 2 to 65536"),
        ({"teacher": "layers"}, r"config.labels.teacher: found 'layers'.*did you mean 'layer'\?"),
        ({"teacher": "layer"}, r"run, layer: found None and None, expected a run and a layer"),
        ({"clusters": 3}, r"config.labels.clusters: no such key; did you mean num_clusters\?"),
        ({"sample_seconds": 0.0}, r"sample_seconds: found 0.0, expected more than 0"),
        ({"num_threads": 0}, r"num_threads: found 0, expected more than 0"),
        ({"kmeans": dataclasses.asdict(KMEANS) | {"passes": 0}}, r"config.labels.kmeans: passes: found 0"),
    ],
)
def test_wrong_settings(changes, match):
    with pytest.raises(SettingsError, match=match):
        read(section(**changes), LabelSettings, "labels")
