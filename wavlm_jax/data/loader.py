"""Batches of a corpus, one after the other, from any number on: the data position of a run is its step (DESIGN 3).

Grain reads ahead, in threads or in worker processes; what a batch holds is settled in plan.py and reader.py. Samples
travel as int16.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grain
import numpy as np
from absl import flags

from wavlm_jax.data.corpus import Corpus
from wavlm_jax.data.plan import (
    FILLER,
    BatchSettings,
    Census,
    PlannedBatch,
    census,
    evaluation_plan,
    of_corpus,
)
from wavlm_jax.data.reader import Alignment, Annotate, Arrays, Augmenter, EpochPlans, Host, LoaderError, Reader
from wavlm_jax.data.specs import batch_specs
from wavlm_jax.training.stream import BatchSpec

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
