"""The plan of an epoch: every utterance once, full batches, seconds per update, arithmetic (USERS #9, #25, #39)."""

import dataclasses
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wavlm_jax.data.batches import (
    FILLER,
    BatchSettings,
    PlanError,
    census,
    check_memory,
    describe,
    evaluation_plan,
    microbatches,
    plan,
    random_bits,
    rows_per_bucket,
    seconds_of,
)
from wavlm_jax.data.loader import Host
from wavlm_jax.shapes import num_frames, samples_for

BUCKETS = (50, 100, 200, 400)
SIZES = (1, 7, 8, 9, 1000)


def batch_settings(row_multiple: int = 8, **changes) -> BatchSettings:
    values = {"buckets": BUCKETS, "seconds_per_update": 64.0, "seconds_per_device": 64.0}
    return BatchSettings(**(values | {"row_multiple": row_multiple} | changes))


def lengths_of(count: int, seed: int = 0, shortest: float = 1.1, longest: float = 12.0) -> np.ndarray:
    """Long-tailed lengths in samples."""
    seconds = np.exp(np.random.default_rng(seed).normal(1.2, 0.6, count)).clip(shortest, longest)
    return (seconds * 16000).astype(np.int64)


@pytest.mark.parametrize("fit", ["crop", "pad"])
@given(
    st.sampled_from(SIZES),
    st.sampled_from((1, 2, 4, 8)),
    st.sampled_from((1, 3, 8)),
    st.integers(0, 2**63),
    st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_every_utterance_once_an_epoch_whatever_hosts_there_are(fit, size, hosts, rows, seed, epoch):
    lengths = lengths_of(size, longest=7.9)
    batches = batch_settings(row_multiple=hosts * rows)
    planned = plan(lengths, batches, seed, epoch, fit)
    expected_rows = rows_per_bucket(batches)
    for batch in planned:
        assert len(batch.indices) == expected_rows[batch.bucket]
        fitting = lengths[batch.indices] >= samples_for(batch.bucket)
        if fit == "pad":
            fitting = lengths[batch.indices] <= samples_for(batch.bucket)
        assert fitting.all()
    # each host reads its rows; together they read every row once, and each has as many batches as the others
    per_host = [
        [batch.indices[Host(host, hosts).rows(len(batch.indices))] for batch in planned] for host in range(hosts)
    ]
    seen = Counter(np.concatenate([np.concatenate(rows) for rows in per_host]).tolist())
    found = census(lengths, batches, fit)
    assert len(planned) == found.num_batches
    assert set(seen) == set(range(size))
    assert sum(seen.values()) - size == found.repeats
    assert found.repeats < max(expected_rows.values())
    assert max(seen.values()) - min(seen.values()) <= 1 or size < max(expected_rows.values())
    assert found.left_out == 0


@given(st.integers(1, 3000), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_epochs_differ_in_order_and_in_nothing_else(size, seed):
    lengths = lengths_of(size, seed)
    first, again, second = (plan(lengths, batch_settings(), seed, epoch) for epoch in (3, 3, 4))
    for batch, same in zip(first, again, strict=True):
        assert batch.bucket == same.bucket
        np.testing.assert_array_equal(batch.indices, same.indices)
    assert Counter(batch.bucket for batch in first) == Counter(batch.bucket for batch in second)
    if size > 100:
        assert any(not np.array_equal(a.indices, b.indices) for a, b in zip(first, second, strict=True))


def test_an_utterance_goes_to_the_largest_bucket_that_is_not_longer():
    edges = [samples_for(bucket) for bucket in BUCKETS]
    lengths = np.array([edges[0] - 1, edges[0], edges[1] - 1, edges[1], edges[3], 10**9] * 100)
    batches = batch_settings(row_multiple=1, seconds_per_update=0.1)  # one row a batch: nothing is left over
    for batch in plan(lengths, batches, 0, 0):
        length = lengths[batch.indices[0]]
        assert batch.bucket == max(bucket for bucket in BUCKETS if samples_for(bucket) <= length)
    found = census(lengths, batches)
    assert found.left_out == 100
    assert found.repeats == 0
    assert found.batches == {50: 200, 100: 100, 400: 200}
    assert "100 utterances fit no bucket and are left out" in found.describe()


def test_what_is_left_over_goes_on_to_the_next_bucket():
    lengths = np.array([samples_for(400)] * 9 + [samples_for(100)] * 7, np.int64)
    batches = batch_settings(seconds_per_update=8 * seconds_of(400), row_multiple=8)
    assert rows_per_bucket(batches)[400] == 8
    found = census(lengths, batches)
    # 8 in the bucket of 400; 1 + 7 go down to the smallest bucket, whose batch of 64 is filled by repeating
    assert found.batches == {400: 1, 50: 1}
    assert found.repeats == 64 - 8


@pytest.mark.parametrize("size", [1, 5])
def test_fewer_utterances_than_rows_are_repeated_round_and_round(size: int):
    [batch] = plan(np.full(size, samples_for(50)), batch_settings(), 0, 0)
    counts = Counter(batch.indices.tolist())
    assert set(counts) == set(range(size))
    assert max(counts.values()) - min(counts.values()) <= 1
    assert census(np.full(size, samples_for(50)), batch_settings()).repeats == len(batch.indices) - size


def test_nothing_to_train_on_is_an_error_with_the_numbers():
    with pytest.raises(PlanError, match=r"16000 to 16000 samples, all shorter than the bucket of 50 frames = 16080"):
        plan(np.full(9, 16000), batch_settings(), 0, 0)
    with pytest.raises(PlanError, match="all longer than the bucket of 400 frames = 128080"):
        plan(np.full(9, 128081), batch_settings(), 0, 0, "pad")
    with pytest.raises(PlanError, match="nothing to train on: empty"):
        plan(np.zeros(0, np.int64), batch_settings(), 0, 0)
    with pytest.raises(PlanError, match="no utterance"):
        evaluation_plan(np.zeros(0, np.int64), batch_settings())


@given(st.integers(1, 400), st.floats(0.5, 5000), st.integers(1, 64))
def test_rows_keep_the_seconds_of_an_update(bucket, seconds, multiple):
    batches = batch_settings(buckets=(bucket,), seconds_per_update=seconds, row_multiple=multiple)
    rows = rows_per_bucket(batches)[bucket]
    assert rows % multiple == 0
    assert rows >= multiple
    assert rows == multiple or abs(rows * seconds_of(bucket) - seconds) <= 0.5001 * multiple * seconds_of(bucket)


@given(st.sampled_from((1, 2, 4, 8)), st.sampled_from((1, 2, 4)), st.integers(1, 64), st.floats(10, 200))
def test_micro_batches_are_the_fewest_that_fit(devices, group, units, per_device):
    batches, bucket = batch_settings(seconds_per_device=per_device), 100
    rows = units * devices * group
    if group * seconds_of(bucket) > per_device:
        with pytest.raises(PlanError, match="on one device, seconds_per_device is"):
            microbatches(rows, bucket, batches, devices, group)
        return
    count = microbatches(rows, bucket, batches, devices, group)
    assert rows % (count * devices * group) == 0
    assert rows / count / devices * seconds_of(bucket) <= per_device
    for fewer in range(1, count):
        too_much = rows / fewer / devices * seconds_of(bucket) > per_device
        assert rows % (fewer * devices * group) or too_much


def test_a_batch_that_no_memory_holds_is_refused_before_it_is_planned():
    check_memory(batch_settings(), hosts=1)
    for changes in ({"row_multiple": 1_000_000}, {"buckets": (50, 1 << 20), "row_multiple": 100_000}):
        with pytest.raises(PlanError, match=r"one batch is [\d.]+ GB of samples on each of 1 hosts"):
            check_memory(batch_settings(**changes), hosts=1)
    check_memory(batch_settings(row_multiple=1_000_000), hosts=100_000)


def test_rows_that_cannot_be_shared_print_the_arithmetic():
    with pytest.raises(
        PlanError, match=r"12 rows of 100 frames cannot be shared by 8 devices x groups of 4 rows.*= 32"
    ):
        microbatches(12, 100, batch_settings(), 8, 4)


def test_the_line_of_the_start():
    paper = BatchSettings(
        buckets=(437,), seconds_per_update=2800.0, seconds_per_device=87.5, row_multiple=32
    )  # 8.745 s: 320 rows
    assert describe(paper, 8, 1) == [
        "87.4 s/device x 8 devices x accumulation 4 = 2798 s per update (config: 2800), 320 rows x 437 frames"
    ]
    coarse = BatchSettings(buckets=(768,), seconds_per_update=300.0, seconds_per_device=200.0, row_multiple=32)
    [line] = describe(coarse, 8, 4)
    assert line.endswith("32 rows x 768 frames; warning: +64%, because rows come in multiples of 32")


@pytest.mark.parametrize(
    "changes",
    [
        {"buckets": ()},
        {"buckets": (2, 1)},
        {"buckets": (1, 1)},
        {"buckets": (0, 1)},
        {"row_multiple": 0},
        {"seconds_per_update": 0.0},
        {"seconds_per_device": -1.0},
        {"seconds_per_update": 1e9},
        {"row_multiple": 10**9},
        {"buckets": (50, 10**9)},
    ],
)
def test_settings_that_cannot_be(changes):
    with pytest.raises(ValueError, match=rf"^{next(iter(changes))}: found"):
        batch_settings(**changes)


@given(st.sampled_from(SIZES), st.sampled_from((1, 2, 4, 8)), st.sampled_from((1, 3, 8)))
@settings(max_examples=40, deadline=None)
def test_an_evaluation_shows_every_utterance_exactly_once(size, hosts, rows):
    lengths = lengths_of(size, longest=8.0, shortest=0.03)
    planned, found = evaluation_plan(lengths, batch_settings(row_multiple=hosts * rows))
    shown = np.concatenate([batch.indices for batch in planned])
    assert sorted(shown[shown != FILLER]) == list(range(size))
    assert found.fillers == np.sum(shown == FILLER)
    assert all(len(batch.indices) % (hosts * rows) == 0 for batch in planned)
    shapes = {(batch.bucket, len(batch.indices)) for batch in planned}
    assert shapes == set(found.rows.items())
    for batch in planned:
        real = lengths[batch.indices[batch.indices != FILLER]]
        assert len(real)
        assert (real <= samples_for(batch.bucket)).all()
    assert all((batch.indices != FILLER).all() for batch in planned if batch.bucket > planned[-1].bucket)
    assert found.fillers < hosts * rows * found.batches[planned[-1].bucket]


@pytest.mark.parametrize(("more", "per_device"), [(0, 100.0), (1, 100.0), (40_000, 100.0), (640_000, 48.0)])
def test_an_evaluation_cuts_nothing_and_says_which_buckets_would_do(more, per_device):
    lengths = np.array([20_000, samples_for(BUCKETS[-1]) + more, 400])
    sizes = batch_settings(seconds_per_device=per_device)
    if not more:
        assert evaluation_plan(lengths, sizes)[1].num_batches
        return
    with pytest.raises(PlanError, match=rf"1 of 3 utterances .* lasts {lengths[1] / 16000:.2f} s") as refused:
        evaluation_plan(lengths, sizes)
    buckets = re.search(r'evaluation_buckets="\((.*)\)"', str(refused.value))
    assert buckets is not None
    seconds = re.search(r"seconds_per_device=([\d.]+),", str(refused.value))
    mended = dataclasses.replace(
        sizes,
        buckets=tuple(int(bucket) for bucket in buckets[1].split(", ")),
        seconds_per_device=float(seconds[1]) if seconds else per_device,
    )
    planned, found = evaluation_plan(lengths, mended)
    assert sum(int(np.sum(batch.indices != FILLER)) for batch in planned) == 3
    for bucket, count in found.rows.items():
        microbatches(count, bucket, mended, devices=1, group=1)


def padding_share(lengths, planned) -> float:
    """Share of the samples in batches that is padding or filler."""
    held = sum(len(batch.indices) * samples_for(batch.bucket) for batch in planned)
    rows = [(lengths[batch.indices[batch.indices != FILLER]], samples_for(batch.bucket)) for batch in planned]
    return 1 - sum(int(np.minimum(real, samples).sum()) for real, samples in rows) / held


def test_a_long_tailed_corpus_is_padded_little_and_compiles_once_a_bucket():
    lengths = lengths_of(10_000, longest=35.0)
    buckets = (72, 96, 120, 144, 168, 192, 216, 248, 288, 328, 384, 448, 544, 672, 864, 1344)
    batches = batch_settings(buckets=buckets, seconds_per_update=320.0)
    planned, _ = evaluation_plan(lengths, batches)
    assert padding_share(lengths, planned) < 0.10
    assert len({(batch.bucket, len(batch.indices)) for batch in planned}) == len(buckets) == 16
    shapes = {(batch.bucket, len(batch.indices)) for batch in plan(lengths, batches, 0, 0, "crop")}
    assert len(shapes) <= len(buckets)
    assert padding_share(lengths, plan(lengths, batches, 0, 0, "crop")) == 0


def test_random_bits_do_not_depend_on_how_many_are_asked_for():
    np.testing.assert_array_equal(random_bits(1, 2, 3, 10), random_bits(1, 2, 3, 1000)[:10])
    draws = {int(random_bits(*numbers, 1)[0]) for numbers in [(1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3), (-1, 2, 3)]}
    assert len(draws) == 5


def test_these_bits_are_what_numpy_has_given_since_philox_was_added():
    """Philox 4x64-10 of Random123: the order of a run survives every change of numpy's shuffles."""
    known = np.random.Philox(key=np.array([7, 3], np.uint64), counter=np.array([0, 0, 0, 1], np.uint64))
    np.testing.assert_array_equal(random_bits(7, 3, 1, 8), [known.random_raw() for _ in range(8)])


def test_hosts_that_do_not_divide_are_refused():
    assert [list(Host(index, 3).rows(6)) for index in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match="7 rows cannot be shared by 2 hosts"):
        Host(0, 2).rows(7)


def test_frames_of_a_bucket():
    assert [num_frames(samples_for(bucket)) for bucket in BUCKETS] == list(BUCKETS)
