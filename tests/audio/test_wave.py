"""Decoding: what libsndfile gives is what comes out, and every fault of section 11 of USERS has its name."""

import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.audio_files import encoded, tone, with_flac_length
from wavlm_jax.audio.wave import (
    AudioFault,
    decode,
    encode_flac,
    open_audio,
    read_crop,
    resample,
    to_int16,
    to_mono,
)

SPEECH = tone(8000)


@pytest.mark.parametrize(
    ("kind", "subtype", "tolerance"),
    [
        ("WAV", "PCM_16", 1e-4),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "DOUBLE", 1e-7),
        ("WAV", "ULAW", 2e-2),
        ("FLAC", "PCM_16", 1e-4),
        ("FLAC", "PCM_24", 1e-6),
        ("OGG", "VORBIS", 0.1),
        ("OGG", "OPUS", 0.2),
        ("MP3", None, 0.1),
    ],
)
def test_all_formats_decode(tmp_path: Path, kind: str, subtype: str | None, tolerance: float):
    data = encoded(SPEECH, 16000, kind, subtype)
    file = tmp_path / "named_wrongly.wav"  # the content decides, not the name
    file.write_bytes(data)
    for source in (data, file):
        wave = decode(source)
        assert wave.rate == 16000
        assert wave.samples.shape == (8000, 1)
        np.testing.assert_allclose(wave.samples[:, 0], SPEECH, atol=tolerance)


@given(st.integers(1, 5000), st.data())
@settings(max_examples=40, deadline=None)
def test_a_crop_is_a_slice_of_the_whole(num_samples: int, data: st.DataObject):
    samples = to_int16(tone(num_samples, seed=num_samples))
    flac = encode_flac(samples)
    start = data.draw(st.integers(0, num_samples - 1))
    size = data.draw(st.integers(1, num_samples - start))
    np.testing.assert_array_equal(read_crop(flac, start, size), samples[start : start + size])
    np.testing.assert_array_equal(read_crop(flac, start, None), samples[start:])


def test_a_crop_beyond_the_end_is_a_fault_not_a_shorter_crop():
    with pytest.raises(AudioFault, match="found 90 samples from sample 10 on, expected 100"):
        read_crop(encode_flac(to_int16(tone(100))), 10, 100)


def fault_of(source: bytes | Path) -> str:
    with pytest.raises(AudioFault) as caught:
        decode(source)
    return caught.value.fault


GOOD = encoded(SPEECH)
DAMAGED = {
    "no bytes": (b"", "empty"),
    "header only": (GOOD[:42], "damaged"),
    "last 30 % cut": (GOOD[: len(GOOD) * 7 // 10], "damaged"),
    "header claims 1000 more": (with_flac_length(GOOD, 9000), "damaged"),
    "header claims 2^36": (with_flac_length(GOOD, 2**36 - 1), "damaged"),
    "bytes flipped": (GOOD[:4000] + bytes(255 - byte for byte in GOOD[4000:4010]) + GOOD[4010:], "damaged"),
    "no audio": (b"no audio at all" * 100, "unreadable"),
    "magic only": (b"fLaC", "unreadable"),
    "wav cut": (encoded(SPEECH, kind="WAV")[:-100], "truncated"),
    "mp3 cut": (encoded(SPEECH, kind="MP3")[:1500], "truncated"),
    "ogg cut": (encoded(SPEECH, kind="OGG")[:-100], "truncated"),
    "wav of 0 samples": (encoded(SPEECH[:0], kind="WAV"), "empty"),
    "one NaN": (encoded(np.array([0, np.nan, 0], np.float32), kind="WAV", subtype="FLOAT"), "not_finite"),
    "one infinity": (encoded(np.array([0, np.inf, 0], np.float32), kind="WAV", subtype="DOUBLE"), "not_finite"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_bytes_are_named(name: str):
    data, expected = DAMAGED[name]
    assert fault_of(data) == expected


def mp3_without_length(samples: np.ndarray) -> bytes:
    return encoded(samples, kind="MP3").replace(b"Xing", bytes(4), 1).replace(b"Info", bytes(4), 1)


def test_an_mp3_is_read_whole_whatever_its_header_counts():
    """One without an Info frame, and one of two parts whose Info frame counts the first."""
    one, two = tone(64_000), tone(32_000, seed=1)
    quiet_first = one * np.where(np.arange(64_000) < 16_000, 1e-4, 1)
    for data, num_samples in (
        (mp3_without_length(one), 64_000),
        (mp3_without_length(quiet_first), 64_000),
        (encoded(one, kind="MP3") + encoded(two, kind="MP3"), 96_000),
        (mp3_without_length(one) + mp3_without_length(two), 96_000),
    ):
        found = decode(data).samples[:, 0]
        assert 0 <= len(found) - num_samples < 4_000  # encoder delay, which an Info frame would tell
        np.testing.assert_array_equal(read_crop(data, 40_000, 2_000), decode_int16(data)[40_000:42_000])


def decode_int16(data: bytes) -> np.ndarray:
    return read_crop(data, 0, None)


def test_a_lossy_length_is_a_hint(monkeypatch: pytest.MonkeyPatch):
    """Common Voice's MP3s decode to 4 to 8 ms less than libsndfile says."""
    data = encoded(SPEECH, kind="MP3")
    with open_audio(data) as audio:
        frames = audio.frames
    for extra, whole in ((270, True), (2_000, False)):
        monkeypatch.setattr(soundfile.SoundFile, "frames", property(lambda _, extra=extra: frames + extra))
        if whole:
            assert len(decode(data).samples) == frames
        else:
            assert fault_of(data) == "truncated"


def test_what_is_no_file_is_named_and_never_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.flac")
    (tmp_path / "folder.flac").mkdir()
    (tmp_path / "link.flac").symlink_to("nowhere.flac")
    assert fault_of(tmp_path / "pipe.flac") == "not_a_file"
    assert fault_of(tmp_path / "folder.flac") == "not_a_file"
    assert fault_of(tmp_path / "link.flac") == "missing"
    assert fault_of(Path("/dev/zero")) == "not_a_file"


def test_no_header_makes_us_allocate_what_it_claims():
    lying = with_flac_length(encoded(SPEECH), 2**36 - 1)
    tracemalloc.start()
    assert fault_of(lying) == "damaged"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000])
def test_resampling_keeps_a_tone(rate: int):
    seconds, pitch = 1.0, 440.0
    original = np.sin(2 * np.pi * pitch * np.arange(int(rate * seconds)) / rate).astype(np.float32)
    resampled = resample(original, rate)
    assert abs(len(resampled) - 16000) <= 1
    expected = np.sin(2 * np.pi * pitch * np.arange(len(resampled)) / 16000)
    middle = slice(2000, -2000)
    np.testing.assert_allclose(resampled[middle], expected[middle], atol=2e-3)


def test_int16_rounds_and_clips():
    samples = np.array([0, 0.5, -1, 1, 2, -2, 0.4 / 32768, 0.6 / 32768], np.float32)
    np.testing.assert_array_equal(to_int16(samples), [0, 16384, -32768, 32767, 32767, -32768, 0, 1])


def test_faults_travel_between_processes():
    fault = pickle.loads(pickle.dumps(AudioFault("empty", "0 samples")))  # noqa: S301  (our own bytes)
    assert (fault.fault, fault.detail, str(fault)) == ("empty", "0 samples", "0 samples (empty)")


def test_down_mix_is_the_mean():
    left, right = tone(4000, 1), tone(4000, 2)
    np.testing.assert_allclose(to_mono(np.stack([left, right], axis=1)), (left + right) / 2, atol=1e-7)
