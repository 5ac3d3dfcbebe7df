"""What pre-training adds to the rows of the loader: frame labels, and noise clips. Picklable, for worker processes."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Int32

from pretrain.labels import LabelStore
from pretrain.objective import NO_LABEL
from wavlm_jax.audio.frames import label_index
from wavlm_jax.data.corpus import Corpus
from wavlm_jax.shapes import samples_for


@dataclass(frozen=True)
class FrameLabels:
    """The labels of the frames of a crop (FACTS C5): frame i of the utterance has label floor(i * rate / 50)."""

    store: LabelStore

    def __call__(self, index: int, first_frame: int, frames: int, bits: int) -> Mapping[str, np.ndarray]:
        """`labels` int32 (frames,), NO_LABEL behind the last one."""
        del bits  # labels are not random
        return {"labels": self.frame_labels(index, first_frame, frames)}

    @staticmethod
    def shapes(frames: int) -> Mapping[str, jax.ShapeDtypeStruct]:
        """What a row of `frames` gets."""
        return {"labels": jax.ShapeDtypeStruct((frames,), np.int32)}

    def frame_labels(self, index: int, first_frame: int, frames: int) -> Int32[np.ndarray, " frames"]:
        """Labels of the frames `first_frame`, `first_frame` + 1, ... of utterance `index`."""
        stored = self.store.labels(index)
        wanted = label_index(first_frame + np.arange(frames), self.store.header.rate_hz)
        found = np.full(frames, NO_LABEL, np.int32)
        there = wanted < len(stored)
        found[there] = stored[wanted[there]]
        return found


@dataclass(frozen=True)
class NoiseClips:
    """Deals a noise clip to a share of the rows, so that the same share of the mixed rows is mixed with noise."""

    corpus: Corpus
    share: float

    def __call__(self, index: int, first_frame: int, frames: int, bits: int) -> Mapping[str, np.ndarray]:
        """`noise` int16 (samples / 2,), zeros behind `num_noise_samples`, which is 0 where the row got no clip.

        A span never takes more than half of a row (FACTS C7), so more of a clip is never needed; its start is random.
        """
        del index, first_frame
        size = samples_for(frames) // 2
        dealt, which, where = np.random.Generator(np.random.Philox(bits)).random(3)
        noise, count = np.zeros(size, np.int16), 0
        if dealt < self.share:
            clip = self.corpus.random_piece(which, where, size)
            count = len(clip)
            noise[:count] = clip
        return {"noise": noise, "num_noise_samples": np.asarray(count, np.int32)}

    @staticmethod
    def shapes(frames: int) -> Mapping[str, jax.ShapeDtypeStruct]:
        """What a row of `frames` gets."""
        noise = jax.ShapeDtypeStruct((samples_for(frames) // 2,), np.int16)
        return {"noise": noise, "num_noise_samples": jax.ShapeDtypeStruct((), np.int32)}


@dataclass(frozen=True)
class Together:
    """Several annotations as one."""

    parts: tuple[FrameLabels | NoiseClips, ...]

    def __call__(self, index: int, first_frame: int, frames: int, bits: int) -> Mapping[str, np.ndarray]:
        """The arrays of all parts."""
        arrays: dict[str, np.ndarray] = {}
        for part in self.parts:
            arrays.update(part(index, first_frame, frames, bits))
        return arrays
