"""Features to cluster, in batches of static shape: MFCC from threads, or a layer of a teacher (layer_features.py).

Its pieces say which frames of a batch belong to which utterance, the others are filler. Nobody holds more than a few
batches, however large the corpus is. Who makes them meet those of other hosts: rounds.py.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, Int16, Int64

from pretrain.batches import Batch, Piece
from pretrain.mfcc import MFCC_DIM, MFCC_GEOMETRY, mfcc
from wavlm_jax.shapes import Geometry, num_frames

Item = TypeVar("Item")
Result = TypeVar("Result")
Utterances = Int64[np.ndarray, " utterances"]
MFCC_BLOCK = 2**14
"""Frames of MFCC that a host labels at a time."""


@runtime_checkable
class Corpus(Protocol):
    """What labels need of a `wavlm_jax.data.corpus.Corpus`."""

    @property
    def fingerprint(self) -> str:
        """Tells two corpora apart."""
        ...

    @property
    def ids(self) -> Sequence[str]:
        """Utterance ids."""
        ...

    @property
    def lengths(self) -> Any:
        """int64 (utterances,): samples of each utterance."""
        ...

    @property
    def means(self) -> Any:
        """float32 (utterances,): mean of each whole utterance in [-1, 1] scale."""
        ...

    @property
    def variances(self) -> Any:
        """float32 (utterances,): variance of each whole utterance in [-1, 1] scale."""
        ...

    def wave(self, index: int, start: int = 0, num_samples: int | None = None) -> Int16[np.ndarray, " samples"]:
        """Samples `start` to `start + num_samples` of an utterance."""
        ...

    def phones(self, index: int) -> Any:
        """Aligned phones of an utterance (symbols, starts, ends), or None."""
        ...


@runtime_checkable
class FeatureSource(Protocol):
    """Something that turns utterances into frames of features, a part on the host and a part on the devices."""

    @property
    def geometry(self) -> Geometry:
        """Hop and window of a frame; the hop gives the label rate."""
        ...

    @property
    def dim(self) -> int:
        """Width of a frame."""
        ...

    @property
    def description(self) -> Mapping[str, str | int]:
        """What the features are, for the header of the labels."""
        ...

    @property
    def params(self) -> Any:
        """What the devices compute with, on each of them."""
        ...

    @property
    def compute(self) -> Callable[[Any, Any], Float[Array, "frames dim"]]:
        """(params, arrays of a batch) -> its features; traced, with the rows over all devices."""
        ...

    def counts(self, lengths: Utterances) -> Utterances:
        """Frames of utterances of `lengths` samples."""
        ...

    def sizes(self, lengths: Utterances) -> Counter[int]:
        """How many batches of each size utterances of `lengths` samples make."""
        ...

    def batches(self, corpus: Corpus, utterances: Utterances) -> Iterator[Batch]:
        """All frames of the numbered utterances, each frame once, the smallest size first."""
        ...

    def empty(self, size: int) -> Batch:
        """A batch of nobody's frames."""
        ...


def mfcc_frames(_params: Any, frames: Float[Array, "frames 39"]) -> Float[Array, "frames 39"]:
    """The devices' part of MFCC: none."""
    return frames


class MfccFeatures:
    """MFCC-39 at 100 Hz (FACTS C9); decoding and Kaldi's arithmetic run in threads, outside Python's lock."""

    geometry = MFCC_GEOMETRY
    dim = MFCC_DIM
    description: Mapping[str, str | int] = {"kind": "mfcc"}
    params = ()
    compute = staticmethod(mfcc_frames)

    def __init__(self, num_threads: int, block_frames: int = MFCC_BLOCK) -> None:
        self._num_threads = num_threads
        self._block_frames = block_frames - block_frames % jax.local_device_count()

    def counts(self, lengths: Utterances) -> Utterances:
        """1 + floor((samples - 400) / 160), 0 below 400 samples."""
        counts: Utterances = num_frames(lengths, MFCC_GEOMETRY)
        return counts

    def sizes(self, lengths: Utterances) -> Counter[int]:
        """Blocks of one size, the last one perhaps not full."""
        return Counter({self._block_frames: -(-int(self.counts(lengths).sum()) // self._block_frames)})

    def batches(self, corpus: Corpus, utterances: Utterances) -> Iterator[Batch]:
        """The utterances in their order, one behind the other, cut into blocks."""

        def features(utterance: int) -> tuple[int, Float32[np.ndarray, "frames dim"]]:
            return utterance, mfcc(corpus.wave(utterance))

        return self._packed(in_threads(features, (int(u) for u in utterances), self._num_threads))

    def _packed(self, utterances: Iterable[tuple[int, Float32[np.ndarray, "frames dim"]]]) -> Iterator[Batch]:
        block, filled, pieces = self._filler(), 0, list[Piece]()
        for utterance, features in utterances:
            start = 0
            while start < len(features):
                count = min(len(features) - start, self._block_frames - filled)
                block[filled : filled + count] = features[start : start + count]
                pieces.append(Piece(utterance, start, count, filled))
                start, filled = start + count, filled + count
                if filled == self._block_frames:
                    yield Batch(self._block_frames, block, tuple(pieces))
                    block, filled, pieces = self._filler(), 0, []
        if pieces:
            yield Batch(self._block_frames, block, tuple(pieces))

    def empty(self, size: int) -> Batch:
        """A block of zeros."""
        return Batch(size, self._filler(), ())

    def _filler(self) -> Float32[np.ndarray, "rows dim"]:
        return np.zeros((self._block_frames, self.dim), np.float32)


def in_threads(function: Callable[[Item], Result], items: Iterable[Item], num_threads: int) -> Iterator[Result]:
    """`function` of each item, in order; a few items ahead of the reader and never more, so that memory stays flat."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 4 * num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
