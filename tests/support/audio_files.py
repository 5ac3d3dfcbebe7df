"""Small audio files for tests, good ones and bad ones."""

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from wavlm_jax.audio import folders


def tone(num_samples: int, seed: int = 0, level: float = 0.3) -> np.ndarray:
    """A voiced-sounding float32 signal that differs from seed to seed and never repeats itself exactly."""
    random = np.random.default_rng(seed)
    time = np.arange(num_samples) / 16000
    pitch = 2 * np.pi * (90 + 40 * (seed % 5)) * time
    wave = sum(np.sin(k * pitch + random.uniform(0, 6)) / k for k in range(1, 8))
    wave = wave * (1.2 + np.sin(2 * np.pi * 3 * time + seed)) + 0.05 * random.standard_normal(num_samples)
    return (level * wave / max(np.abs(wave).max(initial=0.0), 1e-9)).astype(np.float32)


def encoded(samples: np.ndarray, rate: int = 16000, kind: str = "FLAC", subtype: str | None = None) -> bytes:
    """An audio file's bytes, written by libsndfile."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def save(path: Path, samples: np.ndarray, rate: int = 16000, kind: str | None = None) -> Path:
    """The same as a file; the format follows the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(samples, rate, kind or path.suffix[1:].upper()))
    return path


def with_flac_length(flac: bytes, num_samples: int) -> bytes:
    """A FLAC file whose header claims another number of samples."""
    word = int.from_bytes(flac[18:26], "big")
    return flac[:18] + ((word >> 36 << 36) | num_samples).to_bytes(8, "big") + flac[26:]


def hide_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders are walked as where the extra `containers` is not installed."""
    monkeypatch.setattr(folders, "AUDIO_SUFFIXES", folders.LIBSNDFILE_SUFFIXES)
    monkeypatch.setattr(folders, "UNREAD_SUFFIXES", folders.UNREAD_SUFFIXES | folders.PYAV_SUFFIXES)
