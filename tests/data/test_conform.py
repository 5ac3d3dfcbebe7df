"""Conforming: what libsndfile and numpy say of a file is what a corpus stores, and every fault of it has its name."""

import hashlib
import io
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.support.audio_files import encoded, tone, with_flac_length
from wavlm_jax.audio.wave import AudioFault, decode, encode_flac, open_audio, read_crop, resample, to_int16, to_mono
from wavlm_jax.data.conform import Policy, conform

SPEECH = tone(8000)


def test_a_flac_that_differs_from_its_own_md5_is_refused():
    samples = to_int16(SPEECH)
    flac = encode_flac(samples)
    assert flac[26:42] == hashlib.md5(samples.tobytes(), usedforsecurity=False).digest()
    assert conform(flac, Policy())[0][0].flac == flac
    short = with_flac_length(flac, 7000)  # decodes without complaint, 1000 samples short
    assert len(decode(short).samples) == 7000
    with pytest.raises(AudioFault, match="checksum_mismatch"):
        conform(short, Policy())


def test_channels_that_cancel_each_other_are_told():
    left, right = tone(4000, 1), tone(4000, 2)
    surround = np.stack([tone(4000, seed) for seed in range(6)], axis=1)
    for channels, warnings in (
        (np.stack([left, right], axis=1), set()),
        (np.stack([left, -left], axis=1), {"down_mix_cancels", "silent"}),
        (surround, set()),
        (np.zeros((4000, 2), np.float32), {"silent"}),
    ):
        assert conform(encoded(channels, kind="WAV"), Policy())[1] == warnings


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
