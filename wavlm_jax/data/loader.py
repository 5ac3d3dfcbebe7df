"""Batches of a corpus, from any number on: the data position of a run is its step.

A batch is a function of its number alone, so it does not matter which process makes it, or in what order: `BatchReader`
takes the planned utterances of a batch (`data.batches`), crops or pads them, and replaces damaged ones. Grain calls it
ahead of time, in threads or in worker processes. Samples travel as int16.

The static shapes of batches (`BatchSpec`) follow from the config alone: a run can be compiled before there is any data.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import grain
import jax
import numpy as np
from absl import flags
from jaxtyping import Int16

from wavlm_jax.audio.wave import FULL_SCALE, AudioFault, to_int16
from wavlm_jax.data.augment import Augment, after_speed, before_speed
from wavlm_jax.data.batches import (
    FILLER,
    BatchSettings,
    Fit,
    PlanError,
    PlannedBatch,
    census,
    check_memory,
    evaluation_plan,
    microbatches,
    of_corpus,
    plan,
    random_bits,
    rows_per_bucket,
    seconds_of,
)
from wavlm_jax.data.corpus import Corpus
from wavlm_jax.settings import check_sizes
from wavlm_jax.shapes import STANDARD, samples_for
from wavlm_jax.training.task import BatchSpec

CropAlignment: TypeAlias = Literal["frame", "sample"]
Arrays: TypeAlias = dict[str, np.ndarray]
Annotate: TypeAlias = Callable[[int, int, int, int], Mapping[str, np.ndarray]]
"""(utterance, first frame, frames, bits) -> arrays of one row, such as {"labels": int32 (frames,)}, whose shape depends
on the number of frames alone. `bits` are 64 random bits that belong to (seed, batch, row), 0 in evaluation; all
randomness comes from them. Picklable if there are worker processes."""

_CROP_STREAM = 2
_ENDLESS = 2**53
_FREE_FAULTS = 5
"""Rows that cannot be decoded which are always tolerated."""
_LOG = logging.getLogger(__name__)


class LoaderError(RuntimeError):
    """Batches cannot be made any more; says why."""


class LoaderLostError(LoaderError):
    """A loader process has ended; another start may go well."""


@dataclass(frozen=True, kw_only=True)
class LoaderSettings:
    """How batches are read ahead. Only the crop alignment changes what they contain."""

    workers: int = 0
    """Processes; 0 reads in threads of this process."""
    threads: int = 2
    """Per process: batches decoded at a time."""
    prefetch: int = 4
    """Batches that wait ready in each process."""
    crop_alignment: CropAlignment = "frame"
    """"frame": crops start on the grid of 320 samples, so labels fit exactly. "sample": anywhere, the first label being
    round(start / 320), as in fairseq (FACTS E24)."""
    fault_cap: float = 0.001
    """Share of rows that cannot be decoded above which the run stops; five are always tolerated."""

    def __post_init__(self) -> None:
        check_sizes(self, "prefetch", most=1024)
        check_sizes(self, "workers", "threads", least=0, most=1024)


@dataclass(frozen=True)
class Host:
    """Which rows of a global batch this host makes: a block of consecutive ones."""

    index: int = 0
    count: int = 1

    def rows(self, total: int) -> range:
        """This host's rows of `total`.

        Raises:
            ValueError: `total` is not divisible by the number of hosts.

        """
        if total % self.count:
            raise ValueError(f"{total} rows cannot be shared by {self.count} hosts; change row_multiple")
        share = total // self.count
        return range(self.index * share, (self.index + 1) * share)


class EpochPlans:
    """Batch number -> planned batch; each process keeps the plans of the current epoch and the one before."""

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
        """Batch `number`, counted from the start of the run; thread-safe."""
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
    """A batch, and the faults of its rows."""

    arrays: Arrays
    faults: list[str]


@dataclass(frozen=True)
class BatchReader:
    """Batch number -> this host's rows of that batch. Picklable, for worker processes."""

    corpus: Corpus
    plans: Callable[[int], PlannedBatch]
    annotate: Annotate
    seed: int | None
    """None (evaluation): nothing is random, and a row that cannot be decoded gets weight 0 and is not replaced."""
    alignment: CropAlignment | None
    """Of random crops; None: whole utterances, padded."""
    host: Host
    augment: Augment | None

    def __call__(self, number: int) -> Loaded:
        """Decode the rows of batch `number`."""
        planned = self.plans(number)
        total, faults = len(planned.indices), list[str]()
        bits = np.zeros(total, np.uint64)
        if self.seed is not None:
            bits = random_bits(self.seed, number, _CROP_STREAM, total)
        rows = [self._row(planned, row, int(bits[row]), faults) for row in self.host.rows(total)]
        return Loaded({name: np.stack([row[name] for row in rows]) for name in rows[0]}, faults)

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
        """Speed of a row; 1 for a whole utterance that slowed down would be longer than its bucket: nothing is cut."""
        speed = 1.0 if self.augment is None else self.augment.speed(bits)
        return 1.0 if self.alignment is None and samples < after_speed(length, speed) else speed

    def _row(self, planned: PlannedBatch, row: int, bits: int, faults: list[str]) -> Arrays:
        """The planned utterance, or instead of a damaged one the next of the batch that can be decoded."""
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
        """Silence of weight 0, with its full length as `num_samples`, so that nothing is divided by 0 frames."""
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
    """Mean and variance of an augmented row in [-1, 1] scale (the corpus has those of the original utterance)."""
    values = waveform.astype(np.float64) / FULL_SCALE
    return np.float32(values.mean()), np.float32(values.var())


def _crop(length: int, samples: int, bits: int, alignment: CropAlignment | None) -> tuple[int, int]:
    """(first sample, first frame) of a crop, chosen by `bits`."""
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
    """The specs of batches, one per bucket.

    Args:
        rows: bucket in frames -> rows of a global batch.
        batch: seconds per device.
        annotations: bucket -> arrays of a row besides its audio: name -> an array, or its shape and dtype.
        devices: that share the rows.
        group: consecutive rows that stay on one device and in one micro-batch.

    Raises:
        PlanError: rows that the devices cannot share, or too much audio for one device.

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
    """A `training.task.BatchStream` that has only shapes, for planning."""

    specs: tuple[BatchSpec, ...]
    num_batches: int | None = None

    def batches(self, start: int = 0) -> Iterator[tuple[BatchSpec, dict[str, np.ndarray]]]:
        """Not available."""
        raise NotImplementedError(f"batch {start}: this task was made for planning and has no data")

    def name(self, index: int) -> str:
        """Not available."""
        raise NotImplementedError(f"utterance {index}: this task was made for planning and has no data")


def spec_stream(
    batch: BatchSettings,
    annotations: Callable[[int], Mapping[str, Any]],
    devices: int,
    group: int,
    host: Host,
) -> SpecStream:
    """The stream of a run without data: every bucket is used, every batch is full.

    Args:
        batch: buckets and seconds.
        annotations: see `batch_specs`.
        devices: see `batch_specs`.
        group: see `batch_specs`.
        host: any of the hosts that will make the rows.

    Raises:
        ValueError: rows that hosts or devices cannot share, or too much audio for one device.

    """
    rows = rows_per_bucket(batch)
    for count in rows.values():
        host.rows(count)
    return SpecStream(batch_specs(rows, batch, annotations, devices, group))


class _CorpusStream:
    """A `training.task.BatchStream` of a corpus.

    Arrays of a batch (this host's rows): waveform int16 (rows, samples), num_samples, id int32, weight, mean, variance
    float32 (rows,), and those of `annotate`.

    Args:
        corpus: opened.
        batch: sizes of batches.
        loader: how to read ahead.
        annotate: adds the labels of a row.
        seed: of order and crops. None (of `PaddedStream` only): evaluation.
        chosen: numbers of the utterances that take part; None: all.
        devices: that share the rows.
        group: consecutive rows that stay on one device and in one micro-batch.
        host: which rows are made here; None: all.
        augment: applied to each row.

    Raises:
        PlanError, ValueError: batches that are impossible.

    """

    _fit: ClassVar[Fit]

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
        augment: Augment | None = None,
    ) -> None:
        host = host or Host()
        check_memory(batch, host.count)
        lengths = corpus.lengths if chosen is None else corpus.lengths[chosen]
        self.num_batches: int | None = None
        plans: Callable[[int], PlannedBatch]
        if seed is None:
            try:
                planned, self.census = evaluation_plan(lengths, batch)
            except PlanError as error:
                raise PlanError(f"{corpus.path}: {error}") from error
            self.num_batches = len(planned)
            plans = of_corpus(planned, chosen).__getitem__
        else:
            self.census = census(lengths, batch, self._fit)
            plans = EpochPlans(corpus, batch, seed, self._fit, self.census.num_batches, chosen)
        alignment = loader.crop_alignment if self._fit == "crop" else None
        self._loader = loader
        self._reader = BatchReader(corpus, plans, annotate, seed, alignment, host, augment)
        for rows in self.census.rows.values():
            self._reader.host.rows(rows)
        longest = int(np.argmax(corpus.lengths))
        self.specs = batch_specs(
            self.census.rows, batch, lambda bucket: annotate(longest, 0, bucket, 0), devices, group
        )

    def name(self, index: int) -> str:
        """The id of utterance `index`."""
        return "filler" if index == FILLER else str(self._reader.corpus.ids[index])

    def batches(self, start: int = 0) -> Iterator[tuple[BatchSpec, Arrays]]:
        """This host's rows of the batches number `start`, `start` + 1, ...

        Raises:
            LoaderError: too many rows cannot be decoded, or a worker process died.

        """
        if not flags.FLAGS.is_parsed():  # Grain's workers read a flag, and a library's user has no reason to parse any
            flags.FLAGS.mark_as_parsed()
        by_samples = {spec.arrays["waveform"].shape[1]: spec for spec in self.specs}
        settings = self._loader
        ahead = grain.ReadOptions(num_threads=settings.threads, prefetch_buffer_size=settings.prefetch)
        stop = _ENDLESS if self.num_batches is None else self.num_batches
        dataset = grain.MapDataset.range(start, stop).map(self._reader).to_iter_dataset(ahead)
        if settings.workers:
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=settings.workers, per_worker_buffer_size=settings.prefetch)
            )
        count = _FaultCount(settings.fault_cap)
        iterator = iter(dataset)
        try:
            for loaded in iterator:
                count.add(len(loaded.arrays["id"]), loaded.faults)
                yield by_samples[loaded.arrays["waveform"].shape[1]], loaded.arrays
        except RuntimeError as error:
            if "process was terminated" not in str(error):
                raise
            raise LoaderLostError(
                f"a loader process died ({error}); killed, or out of memory? Then fewer loader.workers or a smaller "
                "loader.prefetch help. Start again: training goes on from its last checkpoint"
            ) from error
        finally:
            iterator.close()


class CropStream(_CorpusStream):
    """Endless random crops, for pre-training; `seed` is required.

    Nothing is padded, unless `augment` makes an utterance faster that is then too short for its bucket.
    """

    _fit = "crop"


class PaddedStream(_CorpusStream):
    """Whole utterances, padded with zeros to their bucket, for fine-tuning and evaluation.

    With a seed endless and shuffled; utterances longer than the largest bucket are left out. Without a seed an
    evaluation: finite, each utterance once and whole (a PlanError where a bucket for it is missing), rows of weight 0
    (id -1) where a batch is not full or an utterance cannot be decoded.
    """

    _fit = "pad"


@dataclass
class _FaultCount:
    """Rows that could not be decoded, of all rows."""

    cap: float
    rows: int = 0
    faults: int = 0

    def add(self, rows: int, faults: list[str]) -> None:
        """Count the rows and faults of a batch, and log the faults; a LoaderError above the cap."""
        self.rows += rows
        self.faults += len(faults)
        for fault in faults:
            _LOG.warning("a row was replaced (%d of %d rows so far): %s", self.faults, self.rows, fault)
        if self.faults > max(_FREE_FAULTS, self.cap * self.rows):
            raise LoaderError(
                f"{self.faults} of {self.rows} rows could not be decoded, more than loader.fault_cap allows "
                f"({self.cap:.2%}); the last: {faults[-1]}. Check the disk: python -m wavlm_jax.data verify CORPUS"
            )
