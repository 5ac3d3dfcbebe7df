"""One batch at a time: which rows are made here, where each crop starts, and what stands in for a damaged utterance.

A batch is a function of its number alone, so it does not matter which process makes it, or in what order.

The static shapes of batches, which follow from the config alone: a run can be compiled before there is any data.

Batches of a corpus, one after the other, from any number on: the data position of a run is its step (DESIGN 3).

Grain reads ahead, in threads or in worker processes; what a batch holds is settled in plan.py and reader.py. Samples
travel as int16.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import grain
import jax
import numpy as np
from absl import flags
from jaxtyping import Float32, Int16

from wavlm_jax.audio.wave import FULL_SCALE, AudioFault, to_int16
from wavlm_jax.data.augment import after_speed, before_speed
from wavlm_jax.data.batches import (
    FILLER,
    BatchSettings,
    Census,
    Fit,
    PlannedBatch,
    census,
    evaluation_plan,
    microbatches,
    of_corpus,
    plan,
    random_bits,
    rows_per_bucket,
    seconds_of,
)
from wavlm_jax.data.corpus import Corpus
from wavlm_jax.shapes import STANDARD, samples_for
from wavlm_jax.training.task import BatchSpec

Alignment: TypeAlias = Literal["frame", "sample"]
Arrays: TypeAlias = dict[str, np.ndarray]
Annotate: TypeAlias = Callable[[int, int, int, int], Mapping[str, np.ndarray]]
"""(utterance, first frame, frames, bits) -> arrays of one row, such as {"labels": int32 (frames,)}; of static shape a
bucket. `bits` are 64 random ones that belong to (seed, batch, row), 0 in evaluation: what is random comes from them.
Picklable where there are worker processes."""

_CROP_STREAM = 2


@runtime_checkable
class Augmenter(Protocol):
    """What is done to the rows of training (`data.augment.Augment`): a function of the row's bits."""

    def speed(self, bits: int) -> float:
        """How much faster the row is than it was recorded."""
        ...

    def __call__(self, wave: Float32[np.ndarray, "source"], speed: float, bits: int) -> Float32[np.ndarray, "samples"]:
        """The row as it is heard."""
        ...


class LoaderError(RuntimeError):
    """No batch can be made any more; says why."""


@dataclass(frozen=True)
class Host:
    """Which rows of a global batch are made here: a block of consecutive ones."""

    index: int = 0
    count: int = 1

    def rows(self, total: int) -> range:
        """This host's rows of `total`.

        Raises:
            ValueError: they do not divide.

        """
        if total % self.count:
            raise ValueError(f"{total} rows cannot be shared by {self.count} hosts; change row_multiple")
        share = total // self.count
        return range(self.index * share, (self.index + 1) * share)


class EpochPlans:
    """Batch number -> planned batch; keeps the plan of the epoch at hand, in every process its own."""

    def __init__(
        self,
        corpus: Corpus,
        settings: BatchSettings,
        seed: int,
        fit: Fit,
        per_epoch: int,
        chosen: np.ndarray | None = None,
    ) -> None:
        self._arguments = (corpus, settings, seed, fit, per_epoch, chosen)
        self._lock = threading.Lock()
        self._kept: dict[int, list[PlannedBatch]] = {}

    def __call__(self, number: int) -> PlannedBatch:
        """Batch `number`, counted from the start of the run."""
        corpus, settings, seed, fit, per_epoch, chosen = self._arguments
        epoch, place = divmod(number, per_epoch)
        with self._lock:
            if epoch not in self._kept:
                self._kept = {key: value for key, value in self._kept.items() if key == epoch - 1}
                lengths = corpus.lengths if chosen is None else corpus.lengths[chosen]
                self._kept[epoch] = of_corpus(plan(lengths, settings, seed, epoch, fit), chosen)
            return self._kept[epoch][place]

    def __reduce__(self) -> Any:
        return EpochPlans, self._arguments


class Loaded(NamedTuple):
    """A batch, and what went wrong on the way."""

    bucket: int
    arrays: Arrays
    faults: list[str]


@dataclass(frozen=True)
class Reader:
    """Batch number -> this host's rows of that batch. Travels to worker processes."""

    corpus: Corpus
    plans: Callable[[int], PlannedBatch]
    annotate: Annotate
    seed: int | None
    """None: nothing is random, and a row that cannot be decoded gets weight 0 instead of another utterance."""
    alignment: Alignment | None
    """None: from the start of the utterance, padded."""
    host: Host
    augment: Augmenter | None = None
    """What is done to the rows of training."""

    def __call__(self, number: int) -> Loaded:
        """Decode the rows of batch `number`."""
        planned = self.plans(number)
        total, faults = len(planned.indices), list[str]()
        bits = np.zeros(total, np.uint64)
        if self.seed is not None:
            bits = random_bits(self.seed, number, _CROP_STREAM, total)
        rows = [self._row(planned, row, int(bits[row]), faults) for row in self.host.rows(total)]
        return Loaded(planned.bucket, {name: np.stack([row[name] for row in rows]) for name in rows[0]}, faults)

    def row(self, index: int, bucket: int, bits: int) -> Arrays:
        """One utterance as one row of `bucket` frames.

        Raises:
            AudioFault: it cannot be decoded.

        """
        samples, length = samples_for(bucket), int(self.corpus.lengths[index])
        speed = self._speed(length, samples, bits)
        wanted = min(length, before_speed(samples, speed))
        start, first_frame = _crop(length, wanted, bits, self.alignment)
        waveform = self.corpus.wave(index, start, wanted)
        mean, variance = self.corpus.means[index], self.corpus.variances[index]
        if self.augment is not None:
            waveform = to_int16(self.augment(waveform.astype(np.float32) / FULL_SCALE, speed, bits))
            mean, variance = _statistics(waveform)
        num_samples = len(waveform)
        return {
            "waveform": np.pad(waveform, (0, samples - num_samples)) if num_samples < samples else waveform,
            "num_samples": np.array(num_samples, np.int32),
            "id": np.array(index, np.int32),
            "weight": np.array(1, np.float32),
            "mean": np.array(mean),
            "variance": np.array(variance),
            **self.annotate(index, first_frame, bucket, bits),
        }

    def _speed(self, length: int, samples: int, bits: int) -> float:
        """Of a row. A whole utterance that would be slowed down beyond its bucket keeps its own: nothing is cut off."""
        speed = 1.0 if self.augment is None else self.augment.speed(bits)
        return 1.0 if self.alignment is None and length <= samples < after_speed(length, speed) else speed

    def _row(self, planned: PlannedBatch, row: int, bits: int, faults: list[str]) -> Arrays:
        """The planned utterance, or what stands in for it: the next of the batch that can be decoded."""
        total = len(planned.indices)
        for place in range(row, row + total if self.seed is not None else row + 1):
            index = int(planned.indices[place % total])
            if index == FILLER:
                break
            try:
                return self.row(index, planned.bucket, bits)
            except AudioFault as fault:
                faults.append(str(fault))
        if self.seed is not None:
            raise LoaderError(f"not one of the {total} utterances of a batch can be decoded; the last: {faults[-1]}")
        return self._filler(planned.bucket)

    def _filler(self, bucket: int) -> Arrays:
        """Silence of weight 0. It claims its full length, so that nothing is divided by 0 frames."""
        samples = samples_for(bucket)
        return {
            "waveform": np.zeros(samples, np.int16),
            "num_samples": np.array(samples, np.int32),
            "id": np.array(FILLER, np.int32),
            "weight": np.array(0, np.float32),
            "mean": np.array(0, np.float32),
            "variance": np.array(0, np.float32),
            **{name: np.zeros_like(array) for name, array in self.annotate(0, 0, bucket, 0).items()},
        }


def _statistics(waveform: Int16[np.ndarray, "samples"]) -> tuple[np.float32, np.float32]:
    """Mean and variance of an augmented row, in [-1, 1] scale: those of the utterance are of what it was before."""
    values = waveform.astype(np.float64) / FULL_SCALE
    return np.float32(values.mean()), np.float32(values.var())


def _crop(length: int, samples: int, bits: int, alignment: Alignment | None) -> tuple[int, int]:
    """(first sample, first frame) of a crop; `bits` choose among all that are possible."""
    if alignment is None:
        return 0, 0
    if alignment == "frame":
        frame = bits % ((length - samples) // STANDARD.hop + 1)
        return frame * STANDARD.hop, frame
    start = bits % (length - samples + 1)
    return start, round(start / STANDARD.hop)


def batch_specs(
    rows: Mapping[int, int],
    batch: BatchSettings,
    annotations: Callable[[int], Mapping[str, Any]],
    devices: int,
    group: int,
) -> tuple[BatchSpec, ...]:
    """One spec a bucket.

    Args:
        rows: bucket in frames -> rows of a global batch.
        batch: seconds per device.
        annotations: bucket -> what a row has besides its audio: name -> an array, or its shape and dtype.
        devices: that share the rows.
        group: consecutive rows that stay on one device and in one micro-batch.

    Raises:
        PlanError: rows that the devices cannot share, or too much audio for one.

    """
    specs = []
    for bucket, count in sorted(rows.items()):
        arrays = {
            "waveform": jax.ShapeDtypeStruct((count, samples_for(bucket)), np.int16),
            **dict.fromkeys(("num_samples", "id"), jax.ShapeDtypeStruct((count,), np.int32)),
            **dict.fromkeys(("weight", "mean", "variance"), jax.ShapeDtypeStruct((count,), np.float32)),
            **{
                name: jax.ShapeDtypeStruct((count, *array.shape), array.dtype)
                for name, array in annotations(bucket).items()
            },
        }
        steps = microbatches(count, bucket, batch, devices, group)
        specs.append(BatchSpec(f"{count}x{bucket}", arrays, steps, count * seconds_of(bucket)))
    return tuple(specs)


@dataclass(frozen=True)
class SpecStream:
    """A `training.task.BatchStream` of which only the shapes are there."""

    specs: tuple[BatchSpec, ...]
    num_batches: int | None = None

    def batches(self, start: int = 0) -> Iterator[tuple[BatchSpec, dict[str, np.ndarray]]]:
        """There are none."""
        raise NotImplementedError(f"batch {start}: this task was made for planning and has no data")

    def name(self, index: int) -> str:
        """There are none here either."""
        raise NotImplementedError(f"utterance {index}: this task was made for planning and has no data")


def spec_stream(
    batch: BatchSettings,
    annotations: Callable[[int], Mapping[str, Any]],
    devices: int,
    group: int,
    host: Host,
) -> SpecStream:
    """The stream of a run that has no data yet: every bucket counts as used, and every batch as full.

    Args:
        batch: buckets and seconds.
        annotations: as for `batch_specs`.
        devices: that share the rows.
        group: as for `batch_specs`.
        host: one of those that are to make the rows.

    Raises:
        ValueError: rows that hosts or devices cannot share, or too much audio for one device.

    """
    rows = rows_per_bucket(batch)
    for count in rows.values():
        host.rows(count)
    return SpecStream(batch_specs(rows, batch, annotations, devices, group))


_ENDLESS = 2**53
_FREE_FAULTS = 5
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoaderSettings:
    """How batches are read ahead. None of it changes what they hold, but for the crop alignment."""

    workers: int = 0
    """Processes; 0 reads in threads of this one."""
    threads: int = 2
    """Of each process: that many batches are decoded at a time."""
    prefetch: int = 4
    """Batches that wait ready in each process."""
    crop_alignment: Alignment = "frame"
    """"frame": crops start on the grid of 320 samples, so labels fit exactly. "sample": anywhere, the first label being
    round(start / 320), as in fairseq (FACTS E24)."""
    fault_cap: float = 0.001
    """Share of rows that cannot be decoded above which the run stops; five are always tolerated."""


class CropStream:
    """Endless batches for pre-training: random crops, nothing padded. A `training.task.BatchStream`.

    Arrays of a batch (this host's rows): waveform int16 (rows, samples), num_samples, id int32, weight, mean, variance
    float32 (rows,), and those of `annotate`. `chosen` are the numbers of the utterances that take part; None: all.
    Only `augment` pads: where a faster utterance is too short for its bucket.
    """

    num_batches: None = None

    def __init__(
        self,
        corpus: Corpus,
        batch: BatchSettings,
        loader: LoaderSettings,
        *,
        seed: int,
        annotate: Annotate,
        chosen: np.ndarray | None = None,
        devices: int = 1,
        group: int = 1,
        host: Host | None = None,
        augment: Augmenter | None = None,
    ) -> None:
        self.census = census(corpus.lengths if chosen is None else corpus.lengths[chosen], batch, "crop")
        plans = EpochPlans(corpus, batch, seed, "crop", self.census.num_batches, chosen)
        self._reader = Reader(corpus, plans, annotate, seed, loader.crop_alignment, host or Host(), augment)
        self._loader = loader
        self.specs = _specs(self._reader, self.census, batch, devices, group)

    def batches(self, start: int = 0) -> Iterator[tuple[BatchSpec, Arrays]]:
        """This host's rows of the batches number `start`, `start` + 1, ..."""
        return _batches(self._reader, self.specs, self._loader, start, _ENDLESS)

    def name(self, index: int) -> str:
        """The id of utterance `index`."""
        return _name(self._reader.corpus, index)


class PaddedStream:
    """Whole utterances, padded with zeros up to their bucket, for fine-tuning and evaluation. A `BatchStream`.

    Arrays as in `CropStream`; `num_samples` is the length without padding. Without a seed it is an evaluation: finite,
    each utterance once, rows of weight 0 (id -1) where a batch is not full or an utterance cannot be decoded. With a
    seed it is endless and shuffled, and utterances longer than the largest bucket are left out. `chosen` are the
    numbers of the utterances that take part; None: all.
    """

    def __init__(
        self,
        corpus: Corpus,
        batch: BatchSettings,
        loader: LoaderSettings,
        *,
        annotate: Annotate,
        seed: int | None = None,
        chosen: np.ndarray | None = None,
        devices: int = 1,
        group: int = 1,
        host: Host | None = None,
        augment: Augmenter | None = None,
    ) -> None:
        plans: Callable[[int], PlannedBatch]
        lengths = corpus.lengths if chosen is None else corpus.lengths[chosen]
        if seed is None:
            planned, self.census = evaluation_plan(lengths, batch)
            self.num_batches: int | None = len(planned)
            plans = of_corpus(planned, chosen).__getitem__
        else:
            self.census = census(lengths, batch, "pad")
            self.num_batches = None
            plans = EpochPlans(corpus, batch, seed, "pad", self.census.num_batches, chosen)
        self._reader = Reader(corpus, plans, annotate, seed, None, host or Host(), augment)
        self._loader = loader
        self.specs = _specs(self._reader, self.census, batch, devices, group)

    def batches(self, start: int = 0) -> Iterator[tuple[BatchSpec, Arrays]]:
        """This host's rows of the batches number `start`, `start` + 1, ..."""
        stop = _ENDLESS if self.num_batches is None else self.num_batches
        return _batches(self._reader, self.specs, self._loader, start, stop)

    def name(self, index: int) -> str:
        """The id of utterance `index`."""
        return _name(self._reader.corpus, index)


@dataclass
class FaultCount:
    """Rows that could not be decoded, against all rows."""

    cap: float
    rows: int = 0
    faults: int = 0

    def add(self, rows: int, faults: list[str]) -> None:
        """Count a batch in, and log its faults.

        Raises:
            LoaderError: above the cap.

        """
        self.rows += rows
        self.faults += len(faults)
        for fault in faults:
            _LOG.warning("a row was replaced (%d of %d rows so far): %s", self.faults, self.rows, fault)
        if self.faults > max(_FREE_FAULTS, self.cap * self.rows):
            raise LoaderError(
                f"{self.faults} of {self.rows} rows could not be decoded, more than loader.fault_cap allows "
                f"({self.cap:.2%}); the last: {faults[-1]}. Check the disk: python -m wavlm_jax.data verify CORPUS"
            )


def _specs(reader: Reader, found: Census, batch: BatchSettings, devices: int, group: int) -> tuple[BatchSpec, ...]:
    """One a bucket that has batches."""
    longest = int(np.argmax(reader.corpus.lengths))
    for rows in found.rows.values():
        reader.host.rows(rows)
    return batch_specs(found.rows, batch, lambda bucket: reader.annotate(longest, 0, bucket, 0), devices, group)


def _batches(
    reader: Reader, specs: tuple[BatchSpec, ...], settings: LoaderSettings, start: int, stop: int
) -> Iterator[tuple[BatchSpec, Arrays]]:
    if not flags.FLAGS.is_parsed():  # Grain's workers read a flag, and a library's user has no reason to parse any
        flags.FLAGS.mark_as_parsed()
    by_samples = {spec.arrays["waveform"].shape[1]: spec for spec in specs}
    ahead = grain.ReadOptions(num_threads=settings.threads, prefetch_buffer_size=settings.prefetch)
    dataset = grain.MapDataset.range(start, stop).map(reader).to_iter_dataset(ahead)
    if settings.workers:
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=settings.workers, per_worker_buffer_size=settings.prefetch)
        )
    count = FaultCount(settings.fault_cap)
    iterator = iter(dataset)
    try:
        for loaded in iterator:
            count.add(len(loaded.arrays["id"]), loaded.faults)
            yield by_samples[loaded.arrays["waveform"].shape[1]], loaded.arrays
    except RuntimeError as error:
        if "process was terminated" not in str(error):
            raise
        raise LoaderError(
            f"a loader process died ({error}); killed, or out of memory? Then fewer loader.workers or a smaller "
            "loader.prefetch help. Start again: training goes on from its last checkpoint"
        ) from error
    finally:
        iterator.close()


def _name(corpus: Corpus, index: int) -> str:
    return "filler" if index == FILLER else str(corpus.ids[index])
