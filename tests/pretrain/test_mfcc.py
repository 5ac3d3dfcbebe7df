"""MFCC-39 against the formulas of FACTS C9, written out in float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.features import MFCC_GEOMETRY, deltas, mfcc
from wavlm_jax.shapes import num_frames


def mel(frequency):
    return 1127 * np.log(1 + frequency / 700)


def mel_triangles(num_bins=23, low=20.0, high=8000.0, bins=257):
    """Triangles that are straight lines in mel, evaluated at the FFT bins; the Nyquist bin belongs to none."""
    edges = np.linspace(mel(low), mel(high), num_bins + 2)
    centres = mel(np.arange(bins) * 16000 / 512)
    rising = (centres[None] - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - centres[None]) / (edges[2:] - edges[1:-1])[:, None]
    weights = np.maximum(0, np.minimum(rising, falling))
    weights[:, -1] = 0
    return weights


def reference_cepstra(wave):
    frames = np.lib.stride_tricks.sliding_window_view(wave.astype(np.float64), 400)[::160]
    frames = frames - frames.mean(1, keepdims=True)
    frames = frames - 0.97 * np.concatenate([frames[:, :1], frames[:, :-1]], 1)
    n = np.arange(400)
    frames = frames * (0.5 - 0.5 * np.cos(2 * np.pi * n / 399)) ** 0.85
    power = np.abs(np.fft.rfft(frames, 512)) ** 2
    logs = np.log(np.maximum(power @ mel_triangles().T, np.finfo(np.float32).eps))
    k, m = np.arange(13)[:, None], np.arange(23)[None]
    dct = np.sqrt(2 / 23) * np.cos(np.pi * k * (m + 0.5) / 23)
    dct[0] = np.sqrt(1 / 23)
    return (logs @ dct.T) * (1 + 11 * np.sin(np.pi * np.arange(13) / 22))


def reference_deltas(features):
    last = len(features) - 1
    rows = []
    for t in range(len(features)):
        at = [features[min(max(t + n, 0), last)] for n in (-2, -1, 0, 1, 2)]
        rows.append((at[3] - at[1] + 2 * (at[4] - at[0])) / 10)
    return np.array(rows)


def speech_like(samples, seed=0):
    rng = np.random.default_rng(seed)
    time = np.arange(samples) / 16000
    tones = sum(np.sin(2 * np.pi * f * time + rng.uniform(0, 6)) for f in (120, 700, 1900, 3300))
    wave = 0.1 * tones * (1 + np.sin(2 * np.pi * 3 * time)) + 0.01 * rng.normal(size=samples)
    return np.clip(wave * 32768, -32768, 32767).astype(np.int16)


@pytest.mark.parametrize("samples", [400, 401, 559, 560, 16000, 48123])
def test_equals_the_formulas(samples):
    wave = speech_like(samples)
    cepstra = reference_cepstra(wave / 32768)
    slopes = reference_deltas(cepstra)
    expected = np.concatenate([cepstra, slopes, reference_deltas(slopes)], 1)
    found = mfcc(wave)
    assert found.dtype == np.float32
    assert found.shape == (1 + (samples - 400) // 160, 39)
    np.testing.assert_allclose(found, expected, atol=2e-3, rtol=1e-4)
    assert np.abs(found - expected).mean() < 1e-4


def test_silence_sits_on_the_floor():
    found = mfcc(np.zeros(4000, np.int16))
    np.testing.assert_allclose(found[:, 0], np.log(np.finfo(np.float32).eps) * np.sqrt(23), rtol=1e-5)
    np.testing.assert_allclose(found[:, 1:], 0, atol=1e-4)


@given(samples=st.integers(0, 5000))
@settings(max_examples=50, deadline=None)
def test_frame_count(samples):
    assert len(mfcc(speech_like(samples))) == num_frames(samples, MFCC_GEOMETRY) == max(0, 1 + (samples - 400) // 160)


def test_slope_of_a_line_is_its_slope():
    line = np.arange(20, dtype=np.float32)[:, None] * np.array([[0.5, -2.0]], np.float32)
    np.testing.assert_allclose(deltas(line)[2:-2], np.tile([[0.5, -2.0]], (16, 1)), rtol=1e-6)


def test_is_the_same_every_time():
    wave = speech_like(9000)
    assert np.array_equal(mfcc(wave), mfcc(wave))
