"""MFCC-39: the features of the first k-means labels (FACTS C9).

Kaldi's MFCC (13 cepstra of 23 mel bins, 25 ms every 10 ms, Povey window, no energy, no dither, no mean normalisation)
of a wave in [-1, 1], then slopes and slopes of slopes over five frames, as HuBERT's first iteration took them.
"""

from collections.abc import Iterable

import kaldi_native_fbank
import numpy as np
from jaxtyping import Float32, Int16

from wavlm_jax.shapes import SAMPLE_RATE, Geometry

MFCC_GEOMETRY = Geometry(kernels=(400,), strides=(160,))
"""Windows of 25 ms every 10 ms, none that reaches over an edge: `num_frames(n, MFCC_GEOMETRY)` frames."""

NUM_CEPSTRA = 13
MFCC_DIM = 3 * NUM_CEPSTRA
_SLOPE_WEIGHTS = (1, 2)


def mfcc(wave: Int16[np.ndarray, " samples"]) -> Float32[np.ndarray, "frames 39"]:
    """Cepstra, deltas and delta-deltas of a 16 kHz wave, 100 frames a second.

    1 + floor((samples - 400) / 160) frames; none below 400 samples.
    """
    computer = kaldi_native_fbank.OnlineMfcc(_options())
    computer.accept_waveform(SAMPLE_RATE, (wave.astype(np.float32) / 32768).tolist())
    computer.input_finished()
    cepstra = _stacked(computer.get_frame(frame) for frame in range(computer.num_frames_ready))
    slopes = deltas(cepstra)
    return np.concatenate([cepstra, slopes, deltas(slopes)], axis=1)


def deltas(features: Float32[np.ndarray, "frames dim"]) -> Float32[np.ndarray, "frames dim"]:
    """Slope of each dimension over five frames: sum n (c[t+n] - c[t-n]) / 10, n = 1, 2; edge frames are repeated."""
    if not len(features):
        return features
    reach, frames = max(_SLOPE_WEIGHTS), len(features)
    padded = np.pad(features, ((reach, reach), (0, 0)), mode="edge")
    slope = np.zeros_like(features)
    for n in _SLOPE_WEIGHTS:
        slope += n * (padded[reach + n : reach + n + frames] - padded[reach - n : reach - n + frames])
    return slope / np.float32(2 * sum(n * n for n in _SLOPE_WEIGHTS))


def _stacked(frames: Iterable[np.ndarray]) -> Float32[np.ndarray, "frames 13"]:
    # Copied one by one: the extractor owns the buffer behind each frame.
    copies = [frame.copy() for frame in frames]
    return np.stack(copies) if copies else np.zeros((0, NUM_CEPSTRA), np.float32)


def _options() -> kaldi_native_fbank.MfccOptions:
    """Kaldi's options; what is not set is Kaldi's default and equals FACTS C9 (20 Hz to Nyquist, lifter 22)."""
    options = kaldi_native_fbank.MfccOptions()
    options.frame_opts.samp_freq = SAMPLE_RATE
    options.frame_opts.dither = 0.0
    options.frame_opts.preemph_coeff = 0.97
    options.frame_opts.window_type = "povey"
    options.frame_opts.snip_edges = True
    options.mel_opts.num_bins = 23
    options.num_ceps = NUM_CEPSTRA
    options.use_energy = False
    return options
