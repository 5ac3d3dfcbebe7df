"""Labels made by several hosts: each its share, one store at the end, the same as one host makes."""

import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.kmeans import KMeans
from pretrain.label_arrays import utterance_keys
from pretrain.label_writer import SplitWriter
from pretrain.labels import LabelStore
from pretrain.shares import Share
from tests.pods import Run, finish, joined, spawn
from tests.speech import make_corpora, tiny_config


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("label-hosts")
    return tiny_config(root, make_corpora(root, train=12, valid=3))


def make(folder: Path, config: dict, processes: int, devices: int, **flags: str) -> list:
    """The commands of `python -m pretrain.make_labels`, started."""
    run = Run.of(folder, config)
    command = [sys.executable, "-m", "pretrain.make_labels", f"--config={run.config}", f"--out={folder / 'labels'}"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    return spawn([[*command, *more] for more in joined(processes)], devices)


def test_two_hosts_make_the_store_of_one(config: dict, tmp_path: Path) -> None:
    finish(make(tmp_path / "one", config, 1, 4))
    outputs = finish(make(tmp_path / "two", config, 2, 2))
    one, two = (tmp_path / name / "labels" for name in ("one", "two"))
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
    ours, theirs = (KMeans.load(folder / "kmeans.safetensors") for folder in (two, one))
    np.testing.assert_allclose(ours.centroids, theirs.centroids, rtol=1e-4, atol=1e-4)
    for split in ("train", "valid"):
        ours, theirs = (LabelStore.open(folder, split) for folder in (two, one))
        assert np.array_equal(ours.flat, theirs.flat)
    assert "labels of train: frames" in outputs[0]
    assert "k-means" not in outputs[1]  # the first host speaks for all


def test_what_fails_on_one_host_ends_all_and_names_it(config: dict, tmp_path: Path) -> None:
    """Process 1's config names another number of clusters than the labels that are there."""
    run = Run.of(tmp_path / "run", config)
    out = tmp_path / "labels"
    command = [sys.executable, "-m", "pretrain.make_labels", f"--config={run.config}", f"--out={out}"]
    out.mkdir()
    (out / "request.json").write_text(json.dumps({"num_clusters": 9}))
    flags = [["--clusters=9"], ["--clusters=8"]]
    processes = spawn([[*command, *more, *own] for more, own in zip(joined(2), flags, strict=True)], 1)
    outputs = finish(processes, 2)
    for output in outputs:
        assert re.search(
            r"what is there of the labels: process 0 \(\S+\): .*process 1 \(\S+\): .*num_clusters: 9", output
        )


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(1, 7))
@settings(deadline=None)
def test_shares_are_consecutive_whole_and_even(weights: list[int], count: int) -> None:
    edges = [Share(index, count).of(np.array(weights, np.int64)) for index in range(count)]
    assert edges[0][0] == 0
    assert edges[-1][1] == len(weights)
    assert all(before[1] == after[0] for before, after in itertools.pairwise(edges))
    fair = sum(weights) / count
    assert all(sum(weights[start:end]) <= fair + 2 * max(weights) for start, end in edges)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_files_of_several_hosts_become_the_file_of_one(tmp_path: Path, count: int) -> None:
    """Written utterance by utterance, each host interrupted once and gone on."""
    random = np.random.default_rng(0)
    counts = random.integers(0, 30, 11)
    labels = random.integers(0, 500, counts.sum()).astype(np.uint16)
    keys = utterance_keys(str(index) for index in range(11))
    for index in range(count):
        share = Share(index, count)
        for _ in range(2):
            writer = SplitWriter(tmp_path, "train", counts, keys, "made", share)
            stop = writer.end if writer.done > writer.start else min(writer.start + 1, writer.end)
            for one in range(writer.done, stop):
                writer.write(one, one + 1, labels[writer.offsets[one] : writer.offsets[one + 1]])
        assert writer.done == writer.end
        writer.finish()
    SplitWriter(tmp_path, "train", counts, keys, "made", Share(0, count)).join()
    assert np.array_equal(np.load(tmp_path / "train.labels.npy"), labels)
