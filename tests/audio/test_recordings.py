"""Recordings as model inputs: the rows of transformers' feature extractor, every frame of a long file once.

A recording that is read in pieces is the file.
"""

import tracemalloc

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Wav2Vec2FeatureExtractor

from wavlm_jax.audio import recordings
from wavlm_jax.audio.recordings import (
    ChunkSettings,
    RecordingError,
    cut,
    normalize,
    open_recordings,
    pad,
    statistics,
)
from wavlm_jax.audio.wave import AudioFault
from wavlm_jax.config import WavLMConfig
from wavlm_jax.shapes import num_frames

LARGE = WavLMConfig.tiny(do_normalize=True, normalize_eps=1e-7)
BASE = WavLMConfig.tiny(do_normalize=False, normalize_eps=1e-7)


def _waves(lengths, scale=0.1, offset=0.03):
    random = np.random.default_rng(1)
    return [(random.normal(size=n) * scale + offset).astype(np.float32) for n in lengths]


def _theirs(waves, ours, **how):
    extractor = Wav2Vec2FeatureExtractor(do_normalize=ours.do_normalize, return_attention_mask=True)
    return extractor(waves, sampling_rate=16_000, padding=True, return_tensors="np", **how)


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 3_000), min_size=1, max_size=5), multiple=st.sampled_from([None, 320, 1_000]))
def test_rows_are_those_of_transformers(lengths, multiple):
    waves = _waves(lengths)
    for kind in (LARGE, BASE):
        theirs = _theirs(waves, kind, pad_to_multiple_of=multiple)
        ours = pad([normalize(wave, kind) for wave in waves], theirs.input_values.shape[1])
        np.testing.assert_allclose(ours.waveform, theirs.input_values, atol=1e-5)
        np.testing.assert_array_equal(ours.num_samples, theirs.attention_mask.sum(axis=1))


def test_batch_mates_and_padding_change_nothing():
    waves = _waves([400, 5_000])
    together = pad([normalize(wave, LARGE) for wave in waves], 8_000).waveform
    np.testing.assert_array_equal(together[0, :400], normalize(waves[0], LARGE))
    assert not together[0, 400:].any()
    blind = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False)
    theirs = blind(waves, sampling_rate=16_000, padding=True, return_tensors="np").input_values
    assert np.abs(theirs[0, :400] - together[0, :400]).max() > 0.1  # their trap: the padding counts


def test_a_piece_is_normalised_by_the_whole():
    (wave,) = _waves([4_000])
    pieces = [normalize(wave[start : start + 1_000], LARGE, statistics(wave)) for start in range(0, 4_000, 1_000)]
    np.testing.assert_array_equal(np.concatenate(pieces), normalize(wave, LARGE))


def test_eps_follows_the_source():
    (quiet,) = _waves([4_000], scale=1e-3, offset=0.0)
    authors = WavLMConfig.tiny(do_normalize=True, normalize_eps=1e-5)
    assert normalize(quiet, authors).std() == pytest.approx(np.sqrt(1e-6 / 1.1e-5), rel=0.05)
    assert not normalize(np.full(500, 0.5, np.float32), LARGE).any()  # a constant wave is silence, not NaN


def test_wrong_inputs_are_refused():
    with pytest.raises(ValueError, match="the longest has 500 samples, expected at most 400"):
        pad(_waves([500]), 400)
    assert pad([]).waveform.shape == (0, 0)


@settings(deadline=None)
@given(
    num_samples=st.integers(400, 3_000_000),
    seconds=st.floats(0.03, 40),
    share=st.floats(0, 0.95),
)
def test_every_frame_is_kept_once_and_pieces_lie_inside_the_file(num_samples, seconds, share):
    chosen = ChunkSettings(seconds=seconds, overlap_seconds=seconds * share)
    pieces = cut(num_samples, chosen)
    kept = [frame for piece in pieces for frame in range(piece.keep_from, piece.keep_to)]
    assert kept == list(range(num_frames(num_samples)))
    for piece in pieces:
        assert piece.start_sample == 320 * piece.first_frame
        assert piece.start_sample + piece.num_samples <= num_samples
        frames = num_frames(piece.num_samples)
        assert piece.first_frame <= piece.keep_from < piece.keep_to <= piece.first_frame + frames
        assert frames * 320 <= max(seconds * 16_000, 400)
    assert len({piece.num_samples for piece in pieces}) == 1
    context = int(round(seconds * share * 50) / 2 - 1)
    for piece in pieces[1:]:
        assert piece.keep_from - piece.first_frame >= min(context, num_frames(piece.num_samples) // 2 - 1)


def test_a_short_file_is_one_piece_with_all_its_samples():
    assert cut(16_123, ChunkSettings()) == [(0, 16_123, 0, 0, 50)]
    with pytest.raises(ValueError, match="found 399 samples, expected at least 400"):
        cut(399, ChunkSettings())
    with pytest.raises(ValueError, match=r"overlap_seconds: found 30\.0, expected 0 or more and less than the 30\.0 s"):
        ChunkSettings(overlap_seconds=30.0)


@pytest.fixture
def stereo(tmp_path):
    samples = np.random.default_rng(0).normal(size=(300_000, 2)) * 0.1 + 0.05
    soundfile.write(tmp_path / "a b.flac", samples, 16_000)
    return tmp_path / "a b.flac"


def test_pieces_of_a_recording_are_the_recording(stereo):
    (recording,) = open_recordings([stereo])
    whole = recording.read()
    assert (recording.name, recording.num_samples, recording.seconds) == ("a_b", 300_000, 18.75)
    expected, _ = soundfile.read(stereo, dtype="float32")
    np.testing.assert_allclose(whole, expected.mean(axis=1), atol=1e-7)
    np.testing.assert_array_equal(recording.read(123_456, 1_000), whole[123_456:124_456])
    np.testing.assert_allclose(recording.statistics(), statistics(whole), rtol=1e-6)


def test_another_rate_is_refused_or_resampled(tmp_path):
    soundfile.write(tmp_path / "cd.wav", np.sin(np.arange(44_100) / 10), 44_100)
    with pytest.raises(RecordingError, match=r"cd\.wav: found 44100 Hz, expected 16000 Hz; resample it, or ask for"):
        open_recordings([tmp_path / "cd.wav"])
    (recording,) = open_recordings([tmp_path / "cd.wav"], resampling=True)
    assert recording.num_samples == len(recording.read()) == 16_000
    assert len(recording.read(15_000)) == 1_000


def test_files_that_cannot_be_used_are_all_named(tmp_path, stereo):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("hello")
    soundfile.write(tmp_path / "short.wav", np.zeros(399), 16_000)
    names = ("missing.wav", "empty.wav", "text.wav", "short.wav", "")
    with pytest.raises(RecordingError) as caught:
        open_recordings([stereo, *(tmp_path / name for name in names)])
    lines = str(caught.value).splitlines()
    for line, fault in zip(lines, ("missing", "empty", "unreadable", "too_short", "not_a_file"), strict=True):
        assert line.endswith(f"({fault})")
        assert str(tmp_path) in line
    with pytest.raises(RecordingError, match="given more than once"):
        open_recordings([stereo, stereo])


def test_names_stay_apart(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        soundfile.write(tmp_path / folder / "a.wav", np.zeros(400), 16_000)
    found = open_recordings([tmp_path / "x/a.wav", tmp_path / "y/a.wav"])
    assert [recording.name for recording in found] == [str(tmp_path / "x/a"), str(tmp_path / "y/a")]
    soundfile.write(tmp_path / "x/a.flac", np.zeros(400), 16_000)
    paths = [tmp_path / name for name in ("x/a.wav", "y/a.wav", "x/a.flac")]
    names = [str(tmp_path / name) for name in ("x/a.wav", "y/a", "x/a.flac")]
    assert [recording.name for recording in open_recordings(paths)] == names


@pytest.mark.parametrize("group", [("call 1.wav", "call_1.wav"), ("a b.wav", "a\tb.wav", "a  b.wav", "a_b_2.wav")])
def test_names_that_differ_in_white_space_stay_apart(tmp_path, group):
    for name in group:
        soundfile.write(tmp_path / name, np.zeros(400), 16_000)
    names = [recording.name for recording in open_recordings([tmp_path / name for name in group])]
    assert len(set(names)) == len(group)
    assert not any(name.split() != [name] for name in names)


def test_a_file_that_breaks_off_is_named(tmp_path):
    """Its header is whole, so only reading finds out."""
    soundfile.write(tmp_path / "a.flac", np.random.default_rng(0).normal(size=80_000) * 0.1, 16_000)
    (tmp_path / "a.flac").write_bytes((tmp_path / "a.flac").read_bytes()[:40_000])
    (recording,) = open_recordings([tmp_path / "a.flac"])
    for use in (recording.read, recording.statistics, lambda: recording.read(60_000, 400)):
        with pytest.raises(AudioFault, match=r"/a\.flac: "):
            use()


def test_a_two_hour_file_is_read_in_flat_memory(tmp_path):
    with soundfile.SoundFile(tmp_path / "long.wav", "w", 16_000, 1) as file:
        block = (np.random.default_rng(0).normal(size=16_000 * 60) * 0.1).astype(np.float32)
        for _ in range(120):
            file.write(block)
    tracemalloc.start()  # of arrays too; the process's own peak would hide in what other tests have used before
    (recording,) = open_recordings([tmp_path / "long.wav"])
    assert recording.statistics().variance == pytest.approx(0.01, rel=0.01)
    pieces = cut(recording.num_samples, ChunkSettings())
    read = sum(len(recording.read(piece.start_sample, piece.num_samples)) for piece in pieces)
    assert read > recording.num_samples
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6  # bytes; the samples are 460e6


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_a_file_that_is_written_anew_gives_the_new_sound(tmp_path, rate):
    path = tmp_path / "upload.wav"
    for level in (0.1, 0.7):
        soundfile.write(path, np.full(rate, level), rate)  # the same name and size
        (recording,) = open_recordings([path], resampling=True)
        assert abs(recording.read().mean() - level) < 0.01
    soundfile.write(path, np.full(rate // 2, 0.7), rate)
    with pytest.raises(AudioFault, match=r"upload\.wav: found "):
        recording.read()


def test_a_resampled_file_is_decoded_once(tmp_path, monkeypatch):
    paths = [tmp_path / name for name in ("a.wav", "b.wav")]
    for path in paths:
        soundfile.write(path, np.sin(np.arange(22_050) / 9), 22_050)
    decoded = []
    read = recordings._read
    monkeypatch.setattr(recordings, "_read", lambda audio: decoded.append(audio) or read(audio))
    for recording in open_recordings(paths, resampling=True):
        recording.statistics()
        recording.read(0, 1_000)
        recording.read(1_000)
    assert len(decoded) == len(paths)
