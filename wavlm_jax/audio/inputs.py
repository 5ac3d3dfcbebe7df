"""Waves of any length as one array that a model takes: normalised over their own samples, then padded (FACTS B6).

Equal to transformers' Wav2Vec2FeatureExtractor where that looks at real samples only; where it would normalise over
the padding (no attention mask, FACTS E13) the result here is the one with the mask.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from wavlm_jax.config import WavLMConfig
from wavlm_jax.shapes import SAMPLE_RATE

Samples = Float32[np.ndarray, "samples"]


class Statistics(NamedTuple):
    """What normalisation subtracts and divides by: of the whole wave, also where only a piece of it is looked at."""

    mean: float
    variance: float


class Inputs(NamedTuple):
    """Rows for a model."""

    waveform: Float32[np.ndarray, "rows samples"]
    num_samples: Int32[np.ndarray, "rows"]
    """Real samples of each row; zeros follow."""


def check_rate(rate: int, name: str = "audio") -> None:
    """Refuse a wave at another rate than the model's.

    Raises:
        ValueError: naming both rates and the cure.

    """
    if rate != SAMPLE_RATE:
        raise ValueError(f"{name}: found {rate} Hz, expected {SAMPLE_RATE} Hz; resample it (`audio.wave.resample`)")


def statistics(wave: Samples) -> Statistics:
    """Mean and population variance over all samples, accumulated in float64."""
    return Statistics(float(wave.mean(dtype=np.float64)), float(wave.var(dtype=np.float64)))


def normalize(wave: Samples, config: WavLMConfig, of: Statistics | None = None) -> Samples:
    """`wave` with mean 0 and variance 1 where the model wants it, else as it is.

    Args:
        wave: at 16 kHz.
        config: of the model; `do_normalize` and `normalize_eps` count (1e-7 in Hugging Face's extractor, 1e-5 in the
            authors' code, FACTS E12).
        of: the statistics of the utterance that `wave` is a piece of; None: `wave` is the whole of it.

    """
    if not config.do_normalize or not len(wave):
        return wave
    mean, variance = of or statistics(wave)
    return ((wave - np.float32(mean)) / np.float32(np.sqrt(variance + config.normalize_eps))).astype(np.float32)


def pad(waves: Sequence[Float32[np.ndarray, "_"]], samples: int | None = None) -> Inputs:
    """Waves as rows with zeros behind them.

    Args:
        waves: one a row.
        samples: the width of the rows; None: of the longest wave.

    Raises:
        ValueError: a wave is longer than `samples`.

    """
    longest = max((len(wave) for wave in waves), default=0)
    width = longest if samples is None else samples
    if longest > width:
        raise ValueError(f"waves: the longest has {longest} samples, expected at most {width}; nothing is cut off here")
    waveform = np.zeros((len(waves), width), np.float32)
    for row, wave in zip(waveform, waves, strict=True):
        row[: len(wave)] = wave
    return Inputs(waveform, np.array([len(wave) for wave in waves], np.int32))
