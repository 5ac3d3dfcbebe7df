"""Streams of batches: a function of the batch number alone, whoever reads them; damage never kills a run."""

import itertools
import logging
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.audio_files import encoded, save
from wavlm_jax.data.batches import BatchSettings, seconds_of
from wavlm_jax.data.corpus import Corpus
from wavlm_jax.data.loader import CropStream, Host, LoaderError, LoaderSettings, PaddedStream
from wavlm_jax.data.prepare import Preparation, prepare
from wavlm_jax.data.sources import from_folder
from wavlm_jax.shapes import samples_for

BATCH = BatchSettings(buckets=(10, 20, 40), seconds_per_update=4.0, seconds_per_device=2.0, row_multiple=4)
NOW = LoaderSettings(threads=0)
"""Nothing read ahead: what is tested does not depend on it."""


def ramp(length: int, seed: int) -> np.ndarray:
    """Samples that tell where they stand: sample i of utterance `seed` is i + 7 * seed."""
    return (np.arange(length) + 7 * seed).astype(np.int16)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    root = tmp_path_factory.mktemp("speech")
    for number, length in enumerate(np.random.default_rng(0).integers(2500, 20_000, 70)):
        save(root / f"in/{number:02d}.flac", ramp(int(length), number))
    prepare(from_folder(root / "in"), root / "corpus", Preparation(name="ramps"))
    return Corpus.open(root / "corpus")


def labels(index: int, first_frame: int, num_frames: int, _bits: int) -> dict[str, np.ndarray]:
    """Labels that tell which frame of which utterance they belong to."""
    return {"labels": (1000 * index + first_frame + np.arange(num_frames)).astype(np.int32)}


def crops(corpus: Corpus, loader: LoaderSettings = NOW, seed: int = 5, **options) -> CropStream:
    return CropStream(corpus, BATCH, loader, seed=seed, annotate=labels, **options)


def take(stream, count: int, start: int = 0) -> list:
    batches = stream.batches(start)
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def assert_same(first, second) -> None:
    for (spec, arrays), (other_spec, other) in zip(first, second, strict=True):
        assert spec.name == other_spec.name
        assert arrays.keys() == other.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, other[name], err_msg=name)


def test_batches_have_the_shapes_that_were_announced(corpus: Corpus):
    stream = crops(corpus, devices=2, group=2)
    epoch = take(stream, stream.census.num_batches)
    assert {spec.name for spec, _ in epoch} == {spec.name for spec in stream.specs}
    assert stream.num_batches is None
    for spec, arrays in epoch:
        assert {name: (array.shape, array.dtype) for name, array in arrays.items()} == {
            name: (shape.shape, shape.dtype) for name, shape in spec.arrays.items()
        }
        rows, samples = arrays["waveform"].shape
        assert samples in {samples_for(bucket) for bucket in BATCH.buckets}
        assert spec.seconds == pytest.approx(rows * samples / 16000)
        assert spec.seconds / spec.microbatches / 2 <= BATCH.seconds_per_device
        assert rows % (spec.microbatches * 2 * 2) == 0
        assert (arrays["num_samples"] == samples).all()
        assert (arrays["weight"] == 1).all()


def test_crops_lie_on_the_grid_of_frames_and_labels_with_them(corpus: Corpus):
    starts = set()
    for _, arrays in take(crops(corpus), 40):
        for row, index in enumerate(arrays["id"]):
            first_frame = int(arrays["labels"][row, 0]) - 1000 * int(index)
            expected = corpus.wave(int(index), 320 * first_frame, arrays["waveform"].shape[1])
            np.testing.assert_array_equal(arrays["waveform"][row], expected)
            np.testing.assert_allclose(arrays["mean"][row], corpus.means[index])
            np.testing.assert_allclose(arrays["variance"][row], corpus.variances[index])
            starts.add(first_frame)
    assert len(starts) > 15


def test_crops_anywhere_take_the_nearest_label(corpus: Corpus):
    """FACTS E24: fairseq's rule, round(start / 320) with halves to even."""
    off_grid = 0
    for _, arrays in take(crops(corpus, LoaderSettings(threads=0, crop_alignment="sample")), 20):
        for row, index in enumerate(arrays["id"].tolist()):
            start = int(arrays["waveform"][row, 0]) - 7 * index
            assert arrays["labels"][row, 0] == 1000 * index + round(start / 320)
            off_grid += start % 320 != 0
    assert off_grid > 50


def test_every_crop_is_possible(corpus: Corpus):
    """Both ends are reached: an utterance one frame longer than its bucket has two crops."""
    chosen: dict[tuple[int, int, int], set[int]] = {}
    for _, arrays in take(crops(corpus), 300):
        frames = arrays["labels"].shape[1]
        for row, index in enumerate(arrays["id"].tolist()):
            spare = (int(corpus.lengths[index]) - samples_for(frames)) // 320
            first = int(arrays["labels"][row, 0]) - 1000 * index
            assert 0 <= first <= spare
            chosen.setdefault((index, frames, spare), set()).add(first)
    reached = [found == {0, 1} for (_, _, spare), found in chosen.items() if spare == 1]
    assert reached
    assert all(reached)


@given(st.integers(0, 200), st.integers(0, 2**40))
@settings(max_examples=15, deadline=None)
def test_a_stream_can_start_anywhere(corpus: Corpus, start: int, seed: int):
    stream = crops(corpus, seed=seed)
    ahead = take(stream, 3, start)
    assert_same(ahead, take(crops(corpus, seed=seed), 3, start))
    assert_same(ahead[2:], take(stream, 1, start + 2))


def test_a_stream_can_start_far_away_at_once(corpus: Corpus):
    stream, began = crops(corpus), time.monotonic()
    assert_same(take(stream, 1, 10**9), take(stream, 1, 10**9))
    assert time.monotonic() - began < 5


def test_hosts_share_the_rows_of_one_stream(corpus: Corpus):
    whole = take(crops(corpus, devices=4, group=1), 12)
    for count in (2, 4):
        parts = [take(crops(corpus, devices=4, group=1, host=Host(index, count)), 12) for index in range(count)]
        joined = [
            (spec, {name: np.concatenate([part[number][1][name] for part in parts]) for name in arrays})
            for number, (spec, arrays) in enumerate(whole)
        ]
        assert_same(whole, joined)


@pytest.mark.parametrize("loader", [LoaderSettings(threads=1, prefetch=1), LoaderSettings(threads=4, prefetch=8)])
def test_reading_ahead_changes_nothing(corpus: Corpus, loader: LoaderSettings):
    assert_same(take(crops(corpus), 30, 17), take(crops(corpus, loader), 30, 17))


def test_worker_processes_change_nothing_and_leave_with_the_stream(corpus: Corpus):
    before = set(psutil.Process().children(recursive=True))
    there = take(crops(corpus, LoaderSettings(workers=2, threads=1, prefetch=2)), 9, 5)
    assert_same(take(crops(corpus), 9, 5), there)
    left = [child for child in set(psutil.Process().children(recursive=True)) - before if _is_worker(child)]
    assert not psutil.wait_procs(left, timeout=10)[1]


def _is_worker(process: psutil.Process) -> bool:
    try:
        return any("spawn_main" in word for word in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def test_a_worker_that_dies_is_an_error_within_seconds(corpus: Corpus):
    stream = crops(corpus, LoaderSettings(workers=1, threads=1, prefetch=1)).batches()
    next(stream)
    [worker] = [child for child in psutil.Process().children(recursive=True) if _is_worker(child)]
    worker.kill()
    began = time.monotonic()
    with pytest.raises(LoaderError, match=r"a loader process died .*fewer loader.workers"):
        list(itertools.islice(stream, 1000))
    assert time.monotonic() - began < 10


def test_an_evaluation_shows_every_utterance_once_padded_with_zeros(corpus: Corpus):
    batches = BatchSettings(buckets=(30, 70), seconds_per_update=4.0, seconds_per_device=3.0, row_multiple=4)
    stream = PaddedStream(corpus, batches, NOW, annotate=labels, devices=2, group=2)
    taken = list(stream.batches())
    assert len(taken) == stream.num_batches == stream.census.num_batches
    seen = []
    for spec, arrays in taken:
        assert {name: array.shape for name, array in arrays.items()} == {n: a.shape for n, a in spec.arrays.items()}
        for row, index in enumerate(arrays["id"].tolist()):
            length = int(arrays["num_samples"][row])
            if index < 0:
                assert arrays["weight"][row] == 0
                assert stream.name(index) == "filler"
                assert length == arrays["waveform"].shape[1]
                continue
            seen.append(index)
            assert stream.name(index) == corpus.ids[index]
            assert arrays["weight"][row] == 1
            assert arrays["labels"][row, 0] == 1000 * index
            assert length == corpus.lengths[index]
            np.testing.assert_array_equal(arrays["waveform"][row, :length], corpus.wave(index))
            assert not arrays["waveform"][row, length:].any()
    assert sorted(seen) == list(range(len(corpus)))
    assert_same(taken[2:], list(stream.batches(2)))


def test_fine_tuning_is_endless_padded_and_shuffled(corpus: Corpus):
    batches = BatchSettings(buckets=(30, 70), seconds_per_update=4.0, seconds_per_device=4.0, row_multiple=4)
    stream = PaddedStream(corpus, batches, NOW, annotate=labels, seed=3)
    per_epoch = stream.census.num_batches
    assert stream.num_batches is None
    epochs = [take(stream, per_epoch, per_epoch * epoch) for epoch in (0, 1)]
    for epoch in epochs:
        ids = np.concatenate([arrays["id"] for _, arrays in epoch])
        assert set(ids.tolist()) == set(range(len(corpus)))
        assert len(ids) - len(corpus) == stream.census.repeats
    assert not np.array_equal(epochs[0][0][1]["id"], epochs[1][0][1]["id"])


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[Corpus, set[int]]:
    """A corpus of which four utterances went bad on disk after it was made."""
    for number in range(60):
        save(tmp_path / f"in/{number:02d}.flac", ramp(8000, number))
    prepare(from_folder(tmp_path / "in"), tmp_path / "corpus", Preparation(name="damaged"))
    bad = {3, 4, 30, 59}
    [shard] = (tmp_path / "corpus").glob("*.arrow")
    data = shard.read_bytes()
    for number in bad:
        flac = encoded(ramp(8000, number))
        broken = flac[: len(flac) // 2] + bytes(len(flac) - len(flac) // 2)
        assert data.count(flac) == 1
        data = data.replace(flac, broken)
    shard.write_bytes(data)
    return Corpus.open(tmp_path / "corpus"), bad


def test_a_damaged_utterance_is_replaced_the_same_way_every_time(damaged, caplog: pytest.LogCaptureFixture):
    corpus, bad = damaged
    batch = BatchSettings(buckets=(20,), seconds_per_update=4.0, seconds_per_device=4.0, row_multiple=4)
    tolerant = LoaderSettings(threads=0, fault_cap=0.5)

    def stream(loader: LoaderSettings, **options) -> CropStream:
        return CropStream(corpus, batch, loader, seed=1, annotate=labels, **options)

    with caplog.at_level(logging.WARNING):
        first = take(stream(tolerant), 20)
    planned = [set(stream(tolerant)._reader.plans(number).indices.tolist()) for number in range(20)]
    assert set().union(*planned) >= bad
    for (_, arrays), plan in zip(first, planned, strict=True):
        ids = set(arrays["id"].tolist())
        assert not ids & bad
        assert ids == plan - bad  # others of the same batch stand in
    assert "a row was replaced" in caplog.text
    assert "utterance 59" in caplog.text
    assert_same(first[7:], take(stream(LoaderSettings(threads=3, fault_cap=0.5)), 13, 7))
    halves = [take(stream(tolerant, host=Host(index, 2)), 20) for index in (0, 1)]
    for number, (_, arrays) in enumerate(first):
        joined = np.concatenate([half[number][1]["id"] for half in halves])
        np.testing.assert_array_equal(arrays["id"], joined)
    with pytest.raises(LoaderError, match=r"6 of \d+ rows could not be decoded.*python -m wavlm_jax.data verify"):
        take(stream(NOW), 100)


def test_a_damaged_utterance_of_an_evaluation_counts_for_nothing(damaged):
    corpus, bad = damaged
    batch = BatchSettings(buckets=(25,), seconds_per_update=4.0, seconds_per_device=4.0, row_multiple=4)
    taken = list(PaddedStream(corpus, batch, NOW, annotate=labels).batches())
    ids = np.concatenate([arrays["id"] for _, arrays in taken])
    weights = np.concatenate([arrays["weight"] for _, arrays in taken])
    assert set(ids[weights > 0].tolist()) == set(range(60)) - bad
    assert (weights[ids < 0] == 0).all()


def test_a_batch_without_one_good_row_is_an_error(damaged):
    corpus, _ = damaged
    [shard] = corpus.path.glob("*.arrow")
    data = bytearray(shard.read_bytes())
    while (place := data.find(b"fLaC")) >= 0:
        data[place] = 0
    shard.write_bytes(data)
    broken = Corpus.open(corpus.path)
    stream = CropStream(broken, BATCH, LoaderSettings(threads=0, fault_cap=1.0), seed=0, annotate=labels)
    with pytest.raises(
        LoaderError, match=r"not one of the \d+ utterances of a batch can be decoded; the last: .*corpus"
    ):
        take(stream, 1)


def test_one_utterance_is_a_corpus(tmp_path: Path):
    save(tmp_path / "in/only.flac", ramp(15_000, 0))
    prepare(from_folder(tmp_path / "in"), tmp_path / "corpus", Preparation(name="one"))
    one = Corpus.open(tmp_path / "corpus")
    [(spec, arrays)] = take(crops(one), 1)
    assert spec.name == "20x10"
    assert (arrays["id"] == 0).all()
    assert len({int(row[0]) for row in arrays["waveform"]}) > 3  # twenty crops of it
    assert spec.seconds == 20 * seconds_of(10)
