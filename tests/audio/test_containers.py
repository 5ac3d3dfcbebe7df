"""Containers: all samples that the bytes hold come out, or the file is named; nothing is lost in silence."""

import io
import struct
import sys
from fractions import Fraction
from pathlib import Path

import av
import lameenc
import numpy as np
import pytest
import soundfile

from tests.support.audio_files import encoded, save, tone, with_flac_length
from wavlm_jax.audio import wave
from wavlm_jax.audio.recordings import RecordingError, open_recordings
from wavlm_jax.audio.wave import AudioFault, decode, open_audio, read_crop
from wavlm_jax.data.conform import Policy, conform

SPEECH = tone(16_000)
KINDS = [
    ("WAV", "PCM_16"),
    ("WAV", "PCM_U8"),
    ("WAV", "GSM610"),
    ("WAV", "IMA_ADPCM"),
    ("RF64", "PCM_16"),
    ("W64", "PCM_24"),
    ("AIFF", "PCM_16"),
    ("AU", "ULAW"),
    ("NIST", "PCM_16"),
    ("CAF", "ALAC_16"),
    ("FLAC", "PCM_16"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", None),
]


def fault_of(data: bytes) -> str:
    with pytest.raises(AudioFault) as caught:
        decode(data)
    return caught.value.fault


@pytest.mark.parametrize(("kind", "subtype"), KINDS)
def test_a_file_cut_in_half_is_named(kind: str, subtype: str | None):
    data = encoded(SPEECH, kind=kind, subtype=subtype)
    assert fault_of(data[: len(data) // 2]) in ("truncated", "damaged")


@pytest.mark.parametrize(("kind", "subtype"), KINDS[:-1])
def test_joined_files_are_named(kind: str, subtype: str | None):
    data = encoded(SPEECH, kind=kind, subtype=subtype)
    assert fault_of(data + data) == "length_mismatch"


@pytest.mark.parametrize(("kind", "subtype"), KINDS)
def test_what_stands_behind_the_samples_is_no_sample(kind: str, subtype: str | None):
    data = encoded(SPEECH, kind=kind, subtype=subtype)
    for tail in (b"TAG" + bytes(125), bytes(9_000)):
        np.testing.assert_array_equal(decode(data + tail).samples, decode(data).samples)


def test_samples_that_a_header_does_not_count_are_named():
    """As of a recorder that was killed, or of a WAV of more than 4 GiB, whose size is taken modulo 2^32."""
    data = encoded(SPEECH, kind="WAV")
    assert fault_of(data[:40] + struct.pack("<I", 10_000) + data[44:]) == "length_mismatch"


FIELDS = {
    "WAV": lambda data: (data.index(b"data") + 4, 4, "little"),
    "AIFF": lambda data: (data.index(b"SSND") + 4, 4, "big"),
    "AU": lambda _: (8, 4, "big"),
    "CAF": lambda data: (data.index(b"data", 60) + 4, 8, "big"),
    "W64": lambda data: (data.index(b"data") + 16, 8, "little"),
    "RF64": lambda data: (data.index(b"ds64") + 16, 8, "little"),
}


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("size", [0, 2**64 - 1, 0x7FFFF000, 0x80000000, 0x7FFFFFFF - 36])
def test_a_header_that_does_not_know_its_length_is_read_whole(kind: str, size: int):
    data = encoded(SPEECH, kind=kind)
    at, width, order = FIELDS[kind](data)
    stream = data[:at] + (size % 256**width).to_bytes(width, order) + data[at + width :]
    np.testing.assert_array_equal(decode(stream).samples, decode(data).samples)


LIST = b"LIST" + struct.pack("<I", 26) + b"INFOISFT" + struct.pack("<I", 14) + b"Lavf60.16.100\0"


@pytest.mark.parametrize("behind", [b"", LIST, LIST[:-10], b"LIST" + struct.pack("<I", 526) + b"INFO"])
@pytest.mark.parametrize("off", [-16, 0, 4, 8, 500])
def test_a_riff_size_that_is_off_loses_nothing(behind: bytes, off: int):
    data = encoded(SPEECH, kind="WAV")
    found = decode(data[:4] + struct.pack("<I", len(data) - 8 + off) + data[8:] + behind)
    np.testing.assert_array_equal(found.samples, decode(data).samples)


def test_a_flac_of_a_stream_is_counted(tmp_path: Path):
    data = encoded(SPEECH)
    stream = with_flac_length(data, 0)
    np.testing.assert_array_equal(decode(stream).samples, decode(data).samples)
    np.testing.assert_array_equal(read_crop(stream, 12_000, None), read_crop(data, 12_000, None))
    (tmp_path / "a.flac").write_bytes(stream)
    (recording,) = open_recordings([tmp_path / "a.flac"])
    assert recording.num_samples == 16_000
    np.testing.assert_array_equal(recording.read(5_000, 700), decode(data).samples[5_000:5_700, 0])
    [stored], _ = conform(stream, Policy())
    assert soundfile.info(io.BytesIO(stored.flac)).frames == 16_000  # its header knows
    assert fault_of(stream[: len(stream) // 2]) == "damaged"


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_an_ogg_without_end_flag_is_read_whole(subtype: str):
    data = encoded(tone(32_000), kind="OGG", subtype=subtype)
    last = data.rindex(b"OggS")
    endless = bytearray(data[last:])
    endless[5] &= ~4
    endless[22:26] = bytes(4)
    checksum = 0
    for byte in endless:
        checksum ^= byte << 24
        for _ in range(8):
            checksum = (checksum << 1 ^ 0x04C11DB7 if checksum >> 31 else checksum << 1) & 0xFFFFFFFF
    endless[22:26] = checksum.to_bytes(4, "little")
    stream = data[:last] + bytes(endless)
    np.testing.assert_array_equal(decode(stream).samples, decode(data).samples)
    assert fault_of(stream[:-100]) == "truncated"
    assert fault_of(data[: last + 10]) == "truncated"
    before = len(decode(data[:last]).samples)  # a stream that ended with a page
    assert 10_000 < before < 32_000


def by_lame(samples: np.ndarray, rate: int, quality: int | None) -> bytes:
    """CBR, or VBR of a quality, without an Info frame."""
    encoder = lameenc.Encoder()
    encoder.silence()
    encoder.set_in_sample_rate(rate)
    encoder.set_channels(samples.shape[1])
    encoder.set_bit_rate(128 if rate >= 32_000 else 64)
    if quality is not None:
        encoder.set_vbr(quality)
    return bytes(encoder.encode((samples * 32767).astype("<i2").tobytes()) + encoder.flush())


def by_ffmpeg(samples: np.ndarray, rate: int, kind: str, codec: str, **options: str) -> bytes:
    file = io.BytesIO()
    layout = "mono" if samples.shape[1] == 1 else "stereo"
    with av.open(file, "w", format=kind, options=options) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        for at in range(0, len(samples), 1024):
            block = np.ascontiguousarray(samples[at : at + 1024]).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(block, format="flt", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, at, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


MP3S = {
    "LAME, CBR": lambda *sound: by_lame(*sound, None),
    "LAME, VBR": lambda *sound: by_lame(*sound, 4),
    "ffmpeg": lambda *sound: by_ffmpeg(*sound, "mp3", "libmp3lame"),
    "ffmpeg, ABR": lambda *sound: by_ffmpeg(*sound, "mp3", "libmp3lame", abr="1"),
    "ffmpeg, no header": lambda *sound: by_ffmpeg(*sound, "mp3", "libmp3lame", write_xing="0"),
}


@pytest.mark.parametrize("encoder", MP3S)
@pytest.mark.parametrize("rate", [48_000, 44_100, 32_000, 16_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_mp3s_of_real_encoders_are_read_whole(encoder: str, rate: int, channels: int):
    sound = np.stack([tone(rate, seed) for seed in range(channels)], axis=1)
    data = MP3S[encoder](sound, rate)
    found = decode(data)
    assert found.rate == rate
    assert found.samples.shape[1] == channels
    assert 0 <= len(found.samples) - rate < 4 * 1152  # delay and padding, where no header tells them
    assert fault_of(data[: len(data) // 2]) == "truncated" if encoder == "ffmpeg" else True


def test_a_long_mp3_without_a_header_is_not_judged_by_a_guess():
    """At 44.1 kHz libsndfile guesses 0.7 % too many from the first frame."""
    sound = tone(20 * 44_100)[:, None]
    assert 0 <= len(decode(by_lame(sound, 44_100, None)).samples) - len(sound) < 4 * 1152


@pytest.mark.parametrize(
    ("kind", "codec"), [("ipod", "aac"), ("mp4", "aac"), ("adts", "aac"), ("webm", "libopus"), ("matroska", "libopus")]
)
def test_containers_are_read_by_pyav(tmp_path: Path, kind: str, codec: str):
    sound = np.stack([tone(48_000), tone(48_000, 1)], axis=1)
    data = by_ffmpeg(sound, 48_000, kind, codec)
    found = decode(data)
    assert (found.rate, found.samples.shape[1]) == (48_000, 2)
    start = 1024 if kind == "adts" else 0  # no header that tells the encoder's delay
    assert 0 <= len(found.samples) - start - 48_000 < 2 * 1024
    assert np.abs(found.samples[start : start + 48_000] - sound).mean() < 0.01
    assert fault_of(data[: len(data) // 2]) in ("truncated", "damaged")
    (tmp_path / "a.m4a").write_bytes(data)
    (recording,) = open_recordings([tmp_path / "a.m4a"], resampling=True)
    np.testing.assert_array_equal(recording.read(4_000, 900), recording.read()[4_000:4_900])
    [stored], _ = conform(tmp_path / "a.m4a", Policy(rate="resample"))
    assert abs(stored.num_samples - recording.num_samples) <= 1


def test_a_container_without_pyav_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    data = by_ffmpeg(SPEECH[:, None], 16_000, "ipod", "aac")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(
        AudioFault, match=r"pip install 'wavlm-jax\[containers\]', or convert it to flac \(unreadable\)"
    ):
        decode(data)


def test_a_playlist_opens_nothing(tmp_path: Path):
    """Which ffmpeg would follow to other files and addresses."""
    (tmp_path / "a.m4a").write_text(f"#EXTM3U\n#EXTINF:1,\nfile://{save(tmp_path / 'secret.wav', SPEECH)}\n")
    with pytest.raises(AudioFault, match="unreadable"):
        decode(tmp_path / "a.m4a")


@pytest.mark.parametrize("subtype", ["GSM610", "G721_32"])
def test_a_file_that_cannot_seek_is_read_in_order(tmp_path: Path, subtype: str):
    (tmp_path / "a.wav").write_bytes(encoded(SPEECH, kind="WAV", subtype=subtype))
    (recording,) = open_recordings([tmp_path / "a.wav"])
    whole = decode(tmp_path / "a.wav").samples[:, 0]
    for start in (9_000, 0, 3_000):
        np.testing.assert_array_equal(recording.read(start, 500), whole[start : start + 500])
    assert recording.statistics().mean == pytest.approx(whole.mean(), abs=1e-6)
    part = decode(wave.cut(tmp_path / "a.wav", wave.Span(0.5, 0.1))).samples[:, 0]
    np.testing.assert_array_equal(part, whole[8_000:9_600])


def test_a_damaged_file_of_another_rate_is_named_when_it_is_opened(tmp_path: Path):
    save(tmp_path / "good.flac", tone(44_100), 44_100)
    data = encoded(tone(44_100), 44_100)
    (tmp_path / "bad.flac").write_bytes(data[: len(data) // 2])
    with pytest.raises(RecordingError, match=r"bad\.flac: libsndfile stopped"):
        open_recordings([tmp_path / "good.flac", tmp_path / "bad.flac"], resampling=True)


@pytest.mark.parametrize(("rate", "named"), [(1, True), (1_999, True), (2_000, False), (768_000, False), (2**30, True)])
def test_rates_that_no_sound_has_are_refused(rate: int, named: bool):
    data = encoded(SPEECH, kind="WAV")
    data = data[:24] + struct.pack("<II", rate, (rate * 2) % 2**32) + data[32:]
    if named:
        with pytest.raises(AudioFault, match=rf"its header says {rate} Hz, expected 2000 to 768000.*wrong_rate"):
            conform(data, Policy(rate="resample"))
    else:
        assert decode(data).rate == rate


def test_files_are_bounded_before_memory_is_taken(tmp_path: Path):
    file = save(tmp_path / "a.flac", tone(44_100), 44_100)
    with pytest.raises(RecordingError, match=r"44100 samples, expected at most 16000 \(1 s at 16000 Hz\); .*max-sec"):
        open_recordings([file], resampling=True, max_seconds=1.0)
    long = with_flac_length(encoded(SPEECH), 24 * 3600 * 16_000 + 1)
    with pytest.raises(AudioFault, match="too_long"):
        conform(long, Policy())
    (tmp_path / "b.flac").write_bytes(long)
    with pytest.raises(RecordingError, match="too_long"):
        open_recordings([tmp_path / "b.flac"])


def test_errors_of_the_caller_stay_its_own(tmp_path: Path):
    file = save(tmp_path / "a.wav", SPEECH)
    for error in (OSError(28, "No space left on device"), soundfile.LibsndfileError(7), ValueError("mine")):
        with pytest.raises(type(error)) as caught, open_audio(file):
            raise error
        assert caught.value is error


def test_a_file_is_compared_with_its_header_once_per_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scanned = []
    monkeypatch.setattr(
        wave, "whole", lambda handle, whole=wave.whole, **how: scanned.append(1) or whole(handle, **how)
    )
    file = save(tmp_path / "a.mp3", SPEECH)
    for _ in range(3):
        assert len(decode(file).samples) == 16_000
    assert len(scanned) == 1
    save(file, tone(8_000))
    assert len(decode(file).samples) == 8_000
    assert len(scanned) == 2
