"""Frames of other conventions: the authors' padding rule, and labels of any rate (FACTS A7, C5).

How many frames a number of samples makes stands in `wavlm_jax.shapes`. Everything takes plain ints, numpy arrays or JAX
arrays and gives back the same kind.
"""

from typing import Any

import numpy as np

from wavlm_jax.shapes import SAMPLE_RATE, STANDARD, Count, Geometry, num_frames


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
    """The label that frame number `frame` takes: floor(frame * r), r labels a frame (FACTS C5).

    At 50 Hz every label, at 100 Hz the first of each pair.
    """
    return (frame * (label_rate * geometry.hop)) // SAMPLE_RATE


def expected_labels(num_samples: Count, label_rate: int, geometry: Geometry = STANDARD) -> Count:
    """Labels that `num_samples` samples should carry at `label_rate` Hz, give or take one frame."""
    return label_index(num_frames(num_samples, geometry), label_rate, geometry)
