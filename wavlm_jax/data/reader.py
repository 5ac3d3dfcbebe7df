"""One batch at a time: which rows are made here, where each crop starts, and what stands in for a damaged utterance.

A batch is a function of its number alone, so it does not matter which process makes it, or in what order.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int16

from wavlm_jax.audio.acoustics import after_speed, before_speed
from wavlm_jax.audio.wave import FULL_SCALE, AudioFault, to_int16
from wavlm_jax.data.corpus import Corpus
from wavlm_jax.data.plan import FILLER, BatchSettings, Fit, PlannedBatch, of_corpus, plan, random_bits
from wavlm_jax.shapes import STANDARD, samples_for

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
