"""Decoding: what libsndfile gives is what comes out, and every fault of section 11 of USERS has its name."""

import hashlib
import io
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
from wavlm_jax.data.conform import Policy, conform

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
    "header claims nothing": (with_flac_length(GOOD, 0), "length_unknown"),
    "bytes flipped": (GOOD[:4000] + bytes(255 - byte for byte in GOOD[4000:4010]) + GOOD[4010:], "damaged"),
    "no audio": (b"no audio at all" * 100, "unreadable"),
    "magic only": (b"fLaC", "unreadable"),
    "wav cut": (encoded(SPEECH, kind="WAV")[:-100], "truncated"),
    "mp3 cut": (encoded(SPEECH, kind="MP3")[:1500], "truncated"),
    "ogg cut": (encoded(SPEECH, kind="OGG")[:-100], "empty"),
    "wav of 0 samples": (encoded(SPEECH[:0], kind="WAV"), "empty"),
    "one NaN": (encoded(np.array([0, np.nan, 0], np.float32), kind="WAV", subtype="FLOAT"), "not_finite"),
    "one infinity": (encoded(np.array([0, np.inf, 0], np.float32), kind="WAV", subtype="DOUBLE"), "not_finite"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_bytes_are_named(name: str):
    data, expected = DAMAGED[name]
    assert fault_of(data) == expected


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


def test_a_flac_that_differs_from_its_own_md5_is_refused():
    samples = to_int16(SPEECH)
    flac = encode_flac(samples)
    assert flac[26:42] == hashlib.md5(samples.tobytes(), usedforsecurity=False).digest()
    assert conform(flac, Policy())[0][0].flac == flac
    short = with_flac_length(flac, 7000)  # decodes without complaint, 1000 samples short
    assert len(decode(short).samples) == 7000
    with pytest.raises(AudioFault, match="checksum_mismatch"):
        conform(short, Policy())


def test_down_mix_is_the_mean_and_tells_when_channels_cancel():
    left, right = tone(4000, 1), tone(4000, 2)
    surround = np.stack([tone(4000, seed) for seed in range(6)], axis=1)
    np.testing.assert_allclose(to_mono(np.stack([left, right], axis=1)), (left + right) / 2, atol=1e-7)
    for channels, warnings in (
        (np.stack([left, right], axis=1), set()),
        (np.stack([left, -left], axis=1), {"down_mix_cancels", "silent"}),
        (surround, set()),
        (np.zeros((4000, 2), np.float32), {"silent"}),
    ):
        assert conform(encoded(channels, kind="WAV"), Policy())[1] == warnings


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


def test_conformed_audio_is_what_libsndfile_and_numpy_say():
    for samples, rate in ((SPEECH, 16000), (np.stack([SPEECH, tone(8000, 3)], axis=1), 16000)):
        [piece], _ = conform(encoded(samples, rate, "WAV"), Policy())
        stored, stored_rate = soundfile.read(io.BytesIO(piece.flac), dtype="int16")
        assert stored_rate == 16000
        mono = to_mono(decode(encoded(samples, rate, "WAV")).samples)
        np.testing.assert_array_equal(stored, to_int16(mono))
        scaled = stored / 32768
        assert piece.num_samples == 8000
        np.testing.assert_allclose([piece.mean, piece.variance], [scaled.mean(), scaled.var()], rtol=1e-9, atol=1e-12)


def test_right_flac_is_kept_byte_for_byte():
    flac = encoded(SPEECH)
    assert conform(flac, Policy())[0][0].flac == flac
    with open_audio(flac) as audio:
        assert audio.frames == 8000


@pytest.mark.parametrize(("num_samples", "fits"), [(1, False), (399, False), (400, True), (401, True)])
def test_one_frame_is_the_shortest_utterance(num_samples: int, fits: bool):
    data = encoded(tone(num_samples), kind="WAV")
    if fits:
        assert conform(data, Policy())[0][0].num_samples == num_samples
    else:
        with pytest.raises(AudioFault, match="too_short"):
            conform(data, Policy())


def test_silence_and_direct_current_and_full_scale_stay_as_they_are():
    zeros = encoded(np.zeros(1000, np.int16))
    [piece], warnings = conform(zeros, Policy())
    assert (piece.mean, piece.variance, warnings) == (0.0, 0.0, {"silent"})
    [piece], _ = conform(encoded(np.full(1000, 1000, np.int16)), Policy())
    assert (piece.mean, piece.variance) == (1000 / 32768, 0.0)
    full = np.where(np.arange(1000) % 2, 32767, -32768).astype(np.int16)
    [piece], _ = conform(encoded(full), Policy())
    np.testing.assert_array_equal(read_crop(piece.flac, 0, None), full)
    [_], warnings = conform(encoded(2 * SPEECH / 0.3, kind="WAV", subtype="FLOAT"), Policy())
    assert warnings == {"clipped"}
    [_], warnings = conform(encoded(np.stack([SPEECH, -SPEECH], axis=1), kind="WAV"), Policy())
    assert warnings == {"down_mix_cancels", "silent"}


@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_other_rates_are_refused_or_resampled(rate: int):
    data = encoded(tone(rate), rate, "WAV")
    with pytest.raises(AudioFault, match=rf"{rate} Hz, expected 16000.*wrong_rate"):
        conform(data, Policy())
    [piece], _ = conform(data, Policy(rate="resample"))
    assert abs(piece.num_samples - 16000) <= 1
    # in blocks or at once: the same samples
    whole = to_int16(resample(decode(data).samples[:, 0], rate))
    assert np.abs(read_crop(piece.flac, 0, None).astype(int) - whole).max() <= 1


def test_long_recordings_are_dropped_or_split():
    data = encoded(tone(10_000), kind="WAV")
    with pytest.raises(AudioFault, match="too_long"):
        conform(data, Policy(max_samples=4000))
    pieces, _ = conform(data, Policy(max_samples=4000, long="split"))
    assert [piece.num_samples for piece in pieces] == [4000, 4000, 2000]
    joined = np.concatenate([read_crop(piece.flac, 0, None) for piece in pieces])
    np.testing.assert_array_equal(joined, read_crop(data, 0, None))
    pieces, _ = conform(data, Policy(max_samples=4900, long="split"))  # 200 left over: less than a frame
    assert [piece.num_samples for piece in pieces] == [4900, 4900]
    pieces, _ = conform(data, Policy(max_samples=5000, long="split"))
    assert [piece.num_samples for piece in pieces] == [5000, 5000]


def test_two_hours_take_no_more_memory_than_their_bytes(tmp_path: Path):
    file = tmp_path / "long.wav"
    num_samples = 2 * 3600 * 16000
    with soundfile.SoundFile(file, "w", 16000, 1, "PCM_16") as audio:
        for _ in range(num_samples // 480_000):
            audio.write(np.zeros(480_000, np.int16))
    tracemalloc.start()
    pieces, _ = conform(file, Policy(max_samples=480_000, long="split"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(piece.num_samples for piece in pieces) == num_samples
    assert peak < 32 * 2**20  # the samples alone are 230 MB
