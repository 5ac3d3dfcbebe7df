"""Labels made by several hosts: each its share, one store at the end, the same as one host makes."""

import itertools
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.distributed import Share
from pretrain.kmeans import KMeans
from pretrain.labels import LabelStore, SplitWriter, utterance_keys
from tests.support.pods import Run, finish, joined, spawn
from tests.support.speech import make_corpora, tiny_config
from wavlm_jax.config import WavLMConfig
from wavlm_jax.convert.huggingface import export_huggingface
from wavlm_jax.model.wavlm import WavLM
from wavlm_jax.weights import Weights

MAKE = ("-m", "pretrain.make_labels")
SHORT = ("--config.labels.piece_seconds=0.64", "--config.labels.batch_seconds=3.0")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("label-hosts")
    return tiny_config(root, make_corpora(root, train=12, valid=3))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A small WavLM with random weights."""
    folder, model = tmp_path_factory.mktemp("teacher"), WavLMConfig.tiny()
    params = jax.jit(WavLM(model).init)(jax.random.key(0), jnp.zeros((1, 8000)))["params"]
    export_huggingface(Weights(model, jax.device_get(params), None), folder)
    return folder


def make(folder: Path, config: dict, processes: int, devices: int, *flags: str, program: tuple = MAKE) -> list:
    """The commands of `python -m pretrain.make_labels`, started."""
    run = Run(folder, folder / "config.py") if folder.exists() else Run.of(folder, config)
    command = [sys.executable, *program, f"--config={run.config}", f"--out={folder / 'labels'}", *flags]
    return spawn([[*command, *more] for more in joined(processes)], devices)


@pytest.fixture(scope="module")
def undisturbed(config: dict, tmp_path_factory) -> Path:
    """Labels of MFCC that one process made."""
    folder = tmp_path_factory.mktemp("one") / "mfcc"
    finish(make(folder, config, 1, 4))
    return folder / "labels"


@pytest.mark.parametrize("kind", ["mfcc", "layer"])
def test_two_hosts_make_the_store_of_one(
    config: dict, teacher: Path, undisturbed: Path, tmp_path: Path, kind: str
) -> None:
    """Of a layer, in short pieces of one shape and a few rows at a time: one of the two goes on with filler."""
    flags = () if kind == "mfcc" else (f"--teacher={teacher}", "--layer=1", *SHORT)
    one, two = undisturbed, tmp_path / "two" / "labels"
    if kind == "layer":
        one = tmp_path / "one" / "labels"
        finish(make(one.parent, config, 1, 4, *flags))
    outputs = finish(make(two.parent, config, 2, 2, *flags))
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
    ours, theirs = (KMeans.load(folder / "kmeans.safetensors") for folder in (two, one))
    np.testing.assert_allclose(ours.centroids, theirs.centroids, rtol=1e-4, atol=1e-4)
    for split in ("train", "valid"):
        ours, theirs = (LabelStore.open(folder, split) for folder in (two, one))
        assert np.array_equal(ours.flat, theirs.flat)
    assert "labels of train: frames" in outputs[0]
    assert "k-means" not in outputs[1]  # the first host speaks for all


BREAKING = """
import sys
from pathlib import Path
import pretrain.label_step
import wavlm_jax.data.corpus
from pretrain import make_labels
pretrain.label_step.PART_LABELS = 250
clusters, broken = Path(sys.argv.pop(1)), int(sys.argv.pop(1))
wave = wavlm_jax.data.corpus.Corpus.wave
def breaking(self, index, *args):
    if index == broken and clusters.exists():
        raise OSError("the disk is gone")
    return wave(self, index, *args)
wavlm_jax.data.corpus.Corpus.wave = breaking
make_labels.wavlm_jax.command_line.run(make_labels.main, required=["config"])
"""
"""Labels in small parts, and an utterance that cannot be read once the clusters are there."""


def test_a_disk_that_breaks_on_one_host_ends_all_and_they_go_on_from_there(
    config: dict, undisturbed: Path, tmp_path: Path
) -> None:
    """The other host's parts that were done are kept, and the store is that of an undisturbed run."""
    two = tmp_path / "two"
    for broken, code in ((9, 2), (-1, 0)):
        program = ("-c", BREAKING, str(two / "labels" / "kmeans.safetensors"), str(broken))
        outputs = finish(make(two, config, 2, 2, program=program), code)
        if code:
            for output in outputs:
                assert re.search(r"labels of train: process 1 \(\S+\): the disk is gone", output)
            done = [json.loads((two / f"labels/train.progress.{host}-of-2.json").read_text()) for host in (0, 1)]
            assert 0 < done[0]["utterances"] < 6 < done[1]["utterances"] <= 9
    for split in ("train", "valid"):
        ours, theirs = (LabelStore.open(folder, split) for folder in (two / "labels", undisturbed))
        assert np.array_equal(ours.flat, theirs.flat)


def test_what_fails_on_one_host_ends_all_and_names_it(config: dict, tmp_path: Path) -> None:
    """Process 1's config names another number of clusters than process 0's."""
    run = Run.of(tmp_path / "run", config)
    out = tmp_path / "labels"
    command = [sys.executable, "-m", "pretrain.make_labels", f"--config={run.config}", f"--out={out}"]
    flags = [["--clusters=9"], ["--clusters=8"]]
    processes = spawn([[*command, *more, *own] for more, own in zip(joined(2), flags, strict=True)], 1)
    outputs = finish(processes, 2)
    for output in outputs:
        assert re.search(r"the request of the labels: process 1 \(\S+\): .*num_clusters: 9, asked for 8", output)


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
