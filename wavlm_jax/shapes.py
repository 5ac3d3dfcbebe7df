"""Names of array types that several modules use, and how many frames a number of samples gives.

Shapes are jaxtyping strings. They cost nothing in production and are checked in every test (tests/conftest.py installs
the import hook). Functions that count frames and samples take plain ints, numpy arrays or JAX arrays and return the
same kind.

Axes
    rows      utterances of a batch (global batch inside jit, one host's share in the loader)
    samples   16 kHz samples
    frames    20 ms steps of the conv encoder (320 samples; receptive field 400)
    channels  conv encoder width (512)
    width     Transformer width (768 for Base)
    heads     attention heads; head_dim = width / heads
    layers    stacked Transformer layers
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

Params = Mapping[str, Any]
"""Nested dict of arrays: the `params` collection of a Flax Linen module."""

Batch = Mapping[str, Any]
"""Named arrays of static shape whose first axis is `rows`."""

Waveform = Float[Array, "rows samples"]
NumSamples = Int[Array, "rows"]
FrameMask = Bool[Array, "rows frames"]
"""True where a frame is speech, False where it is padding (the opposite of fairseq's padding_mask)."""
TimeMask = Bool[Array, "rows frames"]
"""True where a frame is masked, that is, to be predicted."""
ChannelMask = Bool[Array, "rows width"]
ConvFeatures = Float[Array, "rows frames channels"]
Hidden = Float[Array, "rows frames width"]
Heads = Float[Array, "rows frames heads head_dim"]
"""Hidden states cut into attention heads."""
Probabilities = Float[Array, "rows heads queries frames"]
"""How much each query frame attends to each frame."""
Scalar = Float[Array, ""]
RowKeys = Key[Array, "rows"]
"""One typed PRNG key for each row of the global batch: results do not depend on how rows are spread over devices."""
StepKey = Key[Array, ""]

SAMPLE_RATE = 16_000
"""Hz. Every corpus is stored at this rate; nothing else reaches the model."""

Count = TypeVar("Count", int, Any)


class Geometry(NamedTuple):
    """Kernels and strides of a conv encoder without padding, first layer first."""

    kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)

    @property
    def hop(self) -> int:
        """Samples from one frame to the next (320)."""
        return int(np.prod(self.strides))

    @property
    def receptive_field(self) -> int:
        """Samples that one frame sees (400)."""
        return samples_for(1, self)


STANDARD = Geometry()


def num_frames(num_samples: Count, geometry: Geometry = STANDARD) -> Count:
    """Frames that the conv encoder makes of `num_samples` samples; 0 below the receptive field.

    floor((n - kernel) / stride) + 1, layer by layer. Hugging Face counts the same way; the authors' padding mask may
    give one or two frames more (`microsoft_num_frames`, FACTS A7).
    """
    for kernel, stride in zip(geometry.kernels, geometry.strides, strict=True):
        num_samples = (num_samples - kernel) // stride + 1
        num_samples = max(num_samples, 0) if isinstance(num_samples, int) else num_samples * (num_samples > 0)
    return num_samples


def samples_for(frames: int, geometry: Geometry = STANDARD) -> int:
    """The fewest samples that give `frames` frames: 320 * frames + 80 in the standard geometry (0 for 0 frames)."""
    if frames == 0:
        return 0
    for kernel, stride in zip(reversed(geometry.kernels), reversed(geometry.strides), strict=True):
        frames = (frames - 1) * stride + kernel
    return frames


def microsoft_num_frames(num_samples: Any, padded_samples: int, geometry: Geometry = STANDARD) -> Any:
    """Frames that the authors' `forward_padding_mask` counts as valid in rows padded to `padded_samples`.

    A frame is padding only if all samples of its block of floor(S / T) are: ceil(n / floor(S / T)) (FACTS A7).
    """
    frames = num_frames(padded_samples, geometry)
    block = padded_samples // max(frames, 1)
    valid = -(-num_samples // block)
    return np.minimum(valid, frames) if isinstance(valid, (int, np.ndarray, np.integer)) else valid.clip(max=frames)


def huggingface_num_frames(num_samples: Any, padded_samples: int, geometry: Geometry = STANDARD) -> Any:
    """Frames that transformers counts as valid in rows padded to `padded_samples`: the conv length formula.

    A row without a frame by the formula is marked at index -1 or before, so it is valid up to there (FACTS E6).
    """
    frames = num_frames(padded_samples, geometry)
    valid = num_samples
    for kernel, stride in zip(geometry.kernels, geometry.strides, strict=True):
        valid = (valid - kernel) // stride + 1
    return valid + frames * (valid <= 0)


def label_index(frame: Count, label_rate: int, geometry: Geometry = STANDARD) -> Count:
    """The label of frame number `frame`: floor(frame * r), with r labels per frame (FACTS C5).

    At 50 Hz every label, at 100 Hz the first of each pair.
    """
    return (frame * (label_rate * geometry.hop)) // SAMPLE_RATE


def expected_labels(num_samples: Count, label_rate: int, geometry: Geometry = STANDARD) -> Count:
    """Labels that `num_samples` samples should have at `label_rate` Hz, within one frame."""
    return label_index(num_frames(num_samples, geometry), label_rate, geometry)
