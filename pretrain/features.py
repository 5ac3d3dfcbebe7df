"""Features to cluster, in blocks of static shape: MFCC from threads, or a layer of a teacher (layer_features.py).

A block is a matrix of frames; its pieces say which rows belong to which utterance, the other rows are filler. Nobody
holds more than a few blocks, however large the corpus is.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, Int16, Int64

from pretrain.mfcc import MFCC_DIM, MFCC_GEOMETRY, mfcc
from pretrain.row_shards import row_sharding
from wavlm_jax.shapes import Geometry, num_frames

Item = TypeVar("Item")
Result = TypeVar("Result")
Utterances = Int64[np.ndarray, " utterances"]


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


class Piece(NamedTuple):
    """Some frames of one utterance, and where a block has them."""

    utterance: int
    start: int
    """First frame, counted in the utterance."""
    frames: int
    row: int
    """First row, counted in the block."""


class Block(NamedTuple):
    """Features of one shape, on the devices."""

    features: Float[Array, "rows dim"]
    pieces: tuple[Piece, ...]


@runtime_checkable
class FeatureSource(Protocol):
    """Something that turns utterances into frames of features."""

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

    def counts(self, lengths: Utterances) -> Utterances:
        """Frames of utterances of `lengths` samples."""
        ...

    def blocks(self, corpus: Corpus, utterances: Utterances) -> Iterator[Block]:
        """All frames of the numbered utterances, each frame once, in any order."""
        ...


class MfccFeatures:
    """MFCC-39 at 100 Hz (FACTS C9); decoding and Kaldi's arithmetic run in threads, outside Python's lock."""

    geometry = MFCC_GEOMETRY
    dim = MFCC_DIM
    description: Mapping[str, str | int] = {"kind": "mfcc"}

    def __init__(self, num_threads: int, block_frames: int = 2**14) -> None:
        self._num_threads = num_threads
        self._block_frames = block_frames

    def counts(self, lengths: Utterances) -> Utterances:
        """1 + floor((samples - 400) / 160), 0 below 400 samples."""
        counts: Utterances = num_frames(lengths, MFCC_GEOMETRY)
        return counts

    def blocks(self, corpus: Corpus, utterances: Utterances) -> Iterator[Block]:
        """The utterances in their order, one behind the other, cut into blocks."""

        def features(utterance: int) -> tuple[int, Float32[np.ndarray, "frames dim"]]:
            return utterance, mfcc(corpus.wave(utterance))

        return self._packed(in_threads(features, (int(u) for u in utterances), self._num_threads))

    def _packed(self, utterances: Iterable[tuple[int, Float32[np.ndarray, "frames dim"]]]) -> Iterator[Block]:
        block, filled, pieces = self._empty(), 0, list[Piece]()
        for utterance, features in utterances:
            start = 0
            while start < len(features):
                count = min(len(features) - start, self._block_frames - filled)
                block[filled : filled + count] = features[start : start + count]
                pieces.append(Piece(utterance, start, count, filled))
                start, filled = start + count, filled + count
                if filled == self._block_frames:
                    yield self._placed(block, pieces)
                    block, filled, pieces = self._empty(), 0, []
        if pieces:
            yield self._placed(block, pieces)

    def _empty(self) -> Float32[np.ndarray, "rows dim"]:
        return np.zeros((self._block_frames, self.dim), np.float32)

    def _placed(self, block: Float32[np.ndarray, "rows dim"], pieces: Sequence[Piece]) -> Block:
        return Block(jax.device_put(block, row_sharding(len(block))), tuple(pieces))


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
