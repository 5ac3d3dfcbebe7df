"""The plan of an epoch: which utterances make up which batch. Pure numpy, the same on every host.

A bucket is a static length in frames, and a batch has one bucket: so all shapes of a run are known before it starts
(USERS #25). Each bucket has its own number of rows, which keeps the seconds of audio per update constant.

Two ways to fit utterances into buckets: "crop" (pre-training) takes the largest bucket that is not longer, and nothing
is padded; "pad" (fine-tuning, evaluation) takes the smallest that is not shorter, and nothing is cut.

The order is a function of (seed, epoch): an argsort of raw Philox output, which numpy keeps the same over
versions, unlike its shuffles.
"""

import math
import os
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt64

from wavlm_jax.shapes import SAMPLE_RATE, STANDARD, samples_for

Fit = Literal["crop", "pad"]
Lengths = Int64[np.ndarray, "utterances"]

FILLER = -1
"""Instead of an utterance's number: a row of weight 0."""
_MOST_SECONDS = 1_000_000
"""Of an update, and the most rows that belong together; beyond, memory would be taken before anything else is wrong."""
_MOST_FRAMES = 1 << 20
"""Of a bucket: 5.8 h."""
_BUCKET_STEP = 128
"""Frames: buckets that are proposed are multiples of it."""
_WARN_FROM = 0.2
"""Relative difference between an update's seconds and the config's from which on there is a warning (USERS #39)."""


class PlanError(ValueError):
    """Batches that are impossible; the message shows the arithmetic."""


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """Sizes of batches."""

    buckets: tuple[int, ...]
    """Frames, ascending; multiples of 128 suit accelerators. The waveform of a bucket has 320 * frames + 80 samples."""
    seconds_per_update: float
    """Audio in a global batch, all micro-batches together."""
    seconds_per_device: float
    """Most audio in a micro-batch on one device, as its memory allows."""
    row_multiple: int
    """The rows of a batch are a multiple of this: of devices x rows that stay together. A larger multiple keeps the
    same batches on other numbers of devices."""

    def __post_init__(self) -> None:
        if (
            not self.buckets
            or list(self.buckets) != sorted(set(self.buckets))
            or not 1 <= self.buckets[0] <= self.buckets[-1] <= _MOST_FRAMES
        ):
            raise ValueError(f"buckets: found {self.buckets}, expected frames, ascending, up to {_MOST_FRAMES:,}")
        for name in ("seconds_per_update", "seconds_per_device", "row_multiple"):
            if not 0 < getattr(self, name) <= _MOST_SECONDS:
                raise ValueError(
                    f"{name}: found {getattr(self, name)}, expected more than 0 and at most {_MOST_SECONDS:,}"
                )


class PlannedBatch(NamedTuple):
    """One global batch."""

    bucket: int
    """Frames."""
    indices: Int64[np.ndarray, "rows"]
    """Numbers of utterances; `FILLER` (in evaluation only) for a row of weight 0."""


class Census(NamedTuple):
    """Counts of a plan, the same in every epoch."""

    batches: dict[int, int]
    """Bucket -> batches per epoch; only buckets that have any."""
    rows: dict[int, int]
    """Bucket -> rows per batch."""
    left_out: int
    """Utterances that fit no bucket: shorter than the smallest ("crop"), longer than the largest ("pad")."""
    repeats: int
    """Rows per epoch that repeat an utterance, to fill the last batch."""
    fillers: int
    """Rows of weight 0 (evaluation)."""

    @property
    def num_batches(self) -> int:
        """Batches per epoch."""
        return sum(self.batches.values())

    def describe(self) -> str:
        """One line for the log."""
        parts = [f"{count} batches of {self.rows[b]} rows x {b} frames" for b, count in sorted(self.batches.items())]
        notes = {
            "utterances fit no bucket and are left out": self.left_out,
            "rows are repeats": self.repeats,
            "rows are fillers": self.fillers,
        }
        return "; ".join([", ".join(parts), *(f"{count} {what}" for what, count in notes.items() if count)])


def seconds_of(bucket: int) -> float:
    """Seconds of audio in one row of a bucket."""
    return samples_for(bucket) / SAMPLE_RATE


def rows_per_bucket(settings: BatchSettings) -> dict[int, int]:
    """Bucket -> rows of a global batch: the multiple nearest to the seconds per update, at least one."""
    multiple = settings.row_multiple
    wanted = {bucket: settings.seconds_per_update / seconds_of(bucket) / multiple for bucket in settings.buckets}
    return {bucket: max(round(share), 1) * multiple for bucket, share in wanted.items()}


def check_memory(settings: BatchSettings, hosts: int) -> None:
    """Checks before any memory is taken that a host can hold its rows of a batch.

    Raises:
        PlanError: a batch that is larger than half of this machine's memory.

    """
    most = max(rows * samples_for(bucket) for bucket, rows in rows_per_bucket(settings).items()) * 2 // hosts
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if most > machine // 2:
        raise PlanError(
            f"one batch is {most / 1e9:.1f} GB of samples on each of {hosts} hosts, at most half of the machine's "
            f"{machine / 1e9:.1f} GB are expected; lower batch.seconds_per_update ({settings.seconds_per_update}), "
            f"the buckets or batch.row_multiple ({settings.row_multiple})"
        )


def microbatches(rows: int, bucket: int, settings: BatchSettings, devices: int, group: int) -> int:
    """The smallest number of micro-batches that keeps each device within `seconds_per_device`.

    Args:
        rows: of the global batch.
        bucket: frames.
        settings: seconds per device.
        devices: that share the rows.
        group: consecutive rows that stay on one device and in one micro-batch.

    Raises:
        PlanError: the rows are not divisible, or one group is already too much for a device.

    """
    unit = devices * group
    if rows % unit:
        raise PlanError(
            f"{rows} rows of {bucket} frames cannot be shared by {devices} devices x groups of {group} rows; make "
            f"row_multiple ({settings.row_multiple}) a multiple of {devices} x {group} = {unit}"
        )
    steps = rows // unit
    least = int(rows / devices * seconds_of(bucket) / settings.seconds_per_device)
    for count in range(max(least, 1), steps + 1):
        if steps % count == 0 and rows / (count * devices) * seconds_of(bucket) <= settings.seconds_per_device:
            return count
    raise PlanError(
        f"a group of {group} rows x {seconds_of(bucket):.2f} s ({bucket} frames) is {group * seconds_of(bucket):.2f} s "
        f"on one device, seconds_per_device is {settings.seconds_per_device}; raise it, or lower the group or buckets"
    )


def describe(settings: BatchSettings, devices: int, group: int) -> list[str]:
    """The arithmetic of an update, one line per bucket; warns if it differs much from the config (USERS #39)."""
    lines = []
    for bucket, rows in rows_per_bucket(settings).items():
        accumulation = microbatches(rows, bucket, settings, devices, group)
        total = rows * seconds_of(bucket)
        line = (
            f"{total / devices / accumulation:.1f} s/device x {devices} devices x accumulation {accumulation} "
            f"= {total:.0f} s per update (config: {settings.seconds_per_update:.0f}), {rows} rows x {bucket} frames"
        )
        departure = total / settings.seconds_per_update - 1
        if abs(departure) > _WARN_FROM:
            line += f"; warning: {departure:+.0%}, because rows come in multiples of {settings.row_multiple}"
        lines.append(line)
    return lines


def random_bits(seed: int, number: int, stream: int, count: int) -> UInt64[np.ndarray, "count"]:
    """`count` random 64-bit words, a function of the other three; element i does not depend on `count`."""
    key = np.array([seed % 2**64, number], np.uint64)
    philox = np.random.Philox(key=key, counter=np.array([0, 0, 0, stream], np.uint64))
    bits: UInt64[np.ndarray, "count"] = philox.random_raw(count)
    return bits


def plan(lengths: Lengths, settings: BatchSettings, seed: int, epoch: int, fit: Fit = "crop") -> list[PlannedBatch]:
    """All batches of an epoch in random order; all are full; each utterance that fits occurs once, but for repeats.

    Utterances that do not fill a batch of their bucket move on to the next smaller ("crop") or larger ("pad") bucket;
    the last batch is filled by repeating utterances. The number of batches is the same in every epoch.

    Args:
        lengths: samples of each utterance.
        settings: buckets and rows.
        seed: of the run.
        epoch: 0, 1, ...
        fit: how utterances go into buckets.

    Raises:
        PlanError: no utterance fits.

    """
    order = _shuffled(np.arange(len(lengths)), seed, epoch, stream=0)
    home = _buckets_of(lengths, settings, fit)[order]
    rows = rows_per_bucket(settings)
    cascade = settings.buckets if fit == "pad" else settings.buckets[::-1]
    batches: list[PlannedBatch] = []
    left = order[:0]
    for bucket in cascade:
        pool = np.concatenate([left, order[home == bucket]])
        full = len(pool) // rows[bucket] * rows[bucket]
        batches += [PlannedBatch(bucket, part) for part in pool[:full].reshape(-1, rows[bucket])]
        left = pool[full:]
    if len(left):  # filled with others in the order of the epoch, again and again if there are too few
        everyone = order[home >= 0]
        filled = np.concatenate([left, everyone[~np.isin(everyone, left)]])
        batches.append(PlannedBatch(cascade[-1], np.resize(filled, rows[cascade[-1]])))
    if not batches:
        raise PlanError(_nothing_fits(lengths, settings, fit))
    return [batches[number] for number in _shuffled(np.arange(len(batches)), seed, epoch, stream=1)]


def census(lengths: Lengths, settings: BatchSettings, fit: Fit = "crop") -> Census:
    """Counts of `plan` for a corpus, in any epoch."""
    batches = plan(lengths, settings, seed=0, epoch=0, fit=fit)
    left_out = int(np.sum(_buckets_of(lengths, settings, fit) < 0))
    shown = sum(len(batch.indices) for batch in batches)
    return _census(batches, left_out=left_out, repeats=shown - (len(lengths) - left_out))


def evaluation_plan(lengths: Lengths, settings: BatchSettings) -> tuple[list[PlannedBatch], Census]:
    """Batches that hold every utterance exactly once, padded to its bucket, longest first.

    The utterances of a bucket are spread evenly over as few batches as its rows allow; open rows go to the longest of
    the shorter utterances, and at the very end to `FILLER`.

    Raises:
        PlanError: no utterance, or one that is longer than the largest bucket; says which buckets would do.

    """
    if not len(lengths):
        raise PlanError("evaluation: the corpus has no utterance")
    home = _buckets_of(lengths, settings, "pad")
    if (home < 0).any():
        raise PlanError(_too_long(lengths, int(np.sum(home < 0)), settings))
    longest_first = np.argsort(-lengths, kind="stable")
    batches, placed = [], 0
    for bucket, most in reversed(rows_per_bucket(settings).items()):
        own = int(np.sum(home[longest_first[placed:]] == bucket))
        if own:
            count = -(-own // most)
            rows = -(-own // (count * settings.row_multiple)) * settings.row_multiple
            taken = longest_first[placed : placed + count * rows]
            filled = np.pad(taken, (0, count * rows - len(taken)), constant_values=FILLER)
            batches += [PlannedBatch(bucket, part) for part in filled.reshape(count, rows)]
            placed += len(taken)
    return batches, _census(batches, left_out=0, repeats=0)


def of_corpus(batches: list[PlannedBatch], chosen: Int64[np.ndarray, "chosen"] | None) -> list[PlannedBatch]:
    """Batches planned for the subset `chosen` of a corpus, renumbered to the whole corpus."""
    if chosen is None:
        return batches
    numbers = np.append(chosen, FILLER)
    return [PlannedBatch(batch.bucket, numbers[batch.indices]) for batch in batches]


def _census(batches: list[PlannedBatch], left_out: int, repeats: int) -> Census:
    counts: dict[int, int] = {}
    for batch in batches:
        counts[batch.bucket] = counts.get(batch.bucket, 0) + 1
    rows = {batch.bucket: len(batch.indices) for batch in batches}
    fillers = sum(int(np.sum(batch.indices == FILLER)) for batch in batches)
    return Census(counts, rows, left_out, repeats, fillers)


def _buckets_of(lengths: Lengths, settings: BatchSettings, fit: Fit) -> Int64[np.ndarray, "utterances"]:
    """The bucket of each utterance, -1 if it fits none."""
    sizes = np.array([samples_for(bucket) for bucket in settings.buckets])
    if fit == "crop":
        place = np.searchsorted(sizes, lengths, side="right") - 1
    else:
        place = np.searchsorted(sizes, lengths, side="left")
        place[place == len(sizes)] = -1
    return np.where(place < 0, -1, np.array(settings.buckets)[place])


def _shuffled(items: Int64[np.ndarray, "items"], seed: int, epoch: int, stream: int) -> Int64[np.ndarray, "items"]:
    return items[np.argsort(random_bits(seed, epoch, stream, len(items)), kind="stable")]


def _nothing_fits(lengths: Lengths, settings: BatchSettings, fit: Fit) -> str:
    edge, side = (settings.buckets[0], "shorter") if fit == "crop" else (settings.buckets[-1], "longer")
    found = (
        f"the {len(lengths)} utterances last {lengths.min()} to {lengths.max()} samples" if len(lengths) else "empty"
    )
    return (
        f"nothing to train on: {found}, all {side} than the bucket of {edge} frames = {samples_for(edge)} samples; "
        "change the buckets"
    )


def _too_long(lengths: Lengths, count: int, settings: BatchSettings) -> str:
    enough = math.ceil(int(lengths.max()) / STANDARD.hop / _BUCKET_STEP) * _BUCKET_STEP
    wanted = ", ".join(map(str, (*settings.buckets, enough)))
    memory = ""
    if seconds_of(enough) > settings.seconds_per_device:
        memory = f" with config.batch.seconds_per_device={math.ceil(seconds_of(enough))}.0"
    return (
        f"evaluation: {count} of {len(lengths)} utterances are longer than the largest bucket of {settings.buckets}, "
        f"the longest lasts {lengths.max() / SAMPLE_RATE:.2f} s; none is cut, as its labels are of the whole. Expected "
        f'config.data.evaluation_buckets="({wanted})"{memory}, or a corpus prepared with --max-seconds '
        f"{seconds_of(settings.buckets[-1])} (longer ones are then dropped, or cut with --long split)"
    )
