"""Diarisation of recordings: the table of errors, by hand; long files with a model that is right and has no order."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from tests.support.inference_models import alone, model_of, two_recordings
from wavlm_jax.audio.recordings import ChunkSettings, Piece, Recording, open_recordings
from wavlm_jax.config import HeadConfig, WavLMConfig
from wavlm_jax.inference.diarization import TurnSettings, diarize, error_table, join, pieces_of, turns
from wavlm_jax.inference.running import InferenceSettings, Job, PieceResult
from wavlm_jax.metrics import DiarizationError, diarization_error, one_speaker, one_voice
from wavlm_jax.model.heads import FrameOutput, WavLMForAudioFrameClassification
from wavlm_jax.shapes import Geometry
from wavlm_jax.text.records import Region, Turn
from wavlm_jax.weights import Model, Weights

TEN = [Region("r", 0.0, 10.0)]
CHANGED = [Turn("r", 0, 5, "A"), Turn("r", 5, 5, "B")]


def test_windows_have_orders_of_speakers_of_their_own():
    """One voice for two speakers in turn is half wrong over the whole file, and right within each half of it."""
    heard = [Turn("r", 0, 10, "x")]
    assert diarization_error(CHANGED, heard, TEN) == pytest.approx(DiarizationError(0, 0, 5, 10))
    assert diarization_error(CHANGED, heard, TEN, window=5.0) == pytest.approx(DiarizationError(0, 0, 0, 10))
    # 0-4, 4-8, 8-10: in the second one A has a second of four
    assert diarization_error(CHANGED, heard, TEN, window=4.0) == pytest.approx(DiarizationError(0, 0, 1, 10))
    parts = [Region("r", 0.0, 3.0), Region("r", 4.5, 10.0)]  # windows start anew with each region
    assert diarization_error(CHANGED, heard, parts, window=5.0) == pytest.approx(DiarizationError(0, 0, 0.5, 8.5))
    with pytest.raises(ValueError, match=r"window: found 0\.0 s, expected more than 0"):
        diarization_error(CHANGED, heard, TEN, window=0.0)


def test_answers_that_know_no_speaker():
    reference = [Turn("r", 6, 2, "A"), Turn("r", 1, 3, "A"), Turn("r", 2, 4, "B"), Turn("s", 1, 1, "A")]
    assert one_voice(reference) == [Turn("r", 1, 7, "one"), Turn("s", 1, 1, "one")]
    assert one_speaker([*TEN, Region("s", 1.0, 3.0)]) == [Turn("r", 0, 10, "one"), Turn("s", 1, 2, "one")]
    found = diarization_error(reference[:3], one_speaker(TEN), TEN)
    assert found == pytest.approx(DiarizationError(3, 2, 2, 9))  # silence, overlap, B alone


def test_the_table_has_recordings_reference_files_and_all():
    regions = [*TEN, Region("s", 0.0, 4.0), Region("t", 0.0, 4.0)]
    truth = {"a/one.rttm": [*CHANGED, Turn("s", 0, 2, "C")], "b/two.rttm": [Turn("t", 0, 4, "A")]}
    heard = [Turn("r", 0, 10, "x"), Turn("s", 0, 4, "x"), Turn("t", 0, 3, "x")]
    lines = [line.split() for line in error_table(truth, heard, regions, window=5.0).splitlines()]
    whole = [
        ["r", "10.0", "0.00", "0.00", "50.00", "50.00", "50.00", "50.00"],
        ["s", "2.0", "0.00", "100.00", "0.00", "100.00", "100.00", "0.00"],
        ["t", "4.0", "25.00", "0.00", "0.00", "25.00", "0.00", "0.00"],
        ["one.rttm", "12.0", "0.00", "16.67", "41.67", "58.33", "58.33", "41.67"],
        ["two.rttm", "4.0", "25.00", "0.00", "0.00", "25.00", "0.00", "0.00"],
        ["all", "16.0", "6.25", "12.50", "31.25", "50.00", "43.75", "31.25"],
    ]
    assert lines[1:7] == whole
    assert lines[8][:4] == ["windows", "of", "5.0", "s"]
    assert lines[9] == ["r", "10.0", "0.00", "0.00", "0.00", "0.00", "0.00", "0.00"]
    assert [line[0] for line in lines[9:]] == [line[0] for line in whole]


ORDERS = list(itertools.permutations(range(4)))


class Oracle(WavLMForAudioFrameClassification):
    """Hears every speaker, and its outputs have another order in each piece.

    Samples of a frame are 1/32 for the first speaker, 2/32 for the second, 4/32 for the third, summed.
    """

    def setup(self) -> None:
        pass

    def __call__(self, waveform, num_samples=None, masks=None, keys=None) -> FrameOutput:
        del masks, keys
        frames = (waveform.shape[1] - 80) // 320
        speaking = jnp.round(32 * waveform[:, 160 : 160 + 320 * frames : 320]).astype(jnp.int32)
        active = jnp.stack([(speaking >> speaker) & 1 for speaker in range(3)] + [0 * speaking], axis=2)
        orders = jnp.array(ORDERS)[(speaking**2).sum(axis=1) % len(ORDERS)]
        logits = jnp.take_along_axis(20.0 * active - 10.0, orders[:, None, :], axis=2)
        mask = jnp.arange(frames)[None] < ((num_samples - 80) // 320)[:, None]
        return FrameOutput(logits, mask, None)


EXACT = TurnSettings(fill_seconds=0.0, least_seconds=0.0)


def error_of_an_oracle(folder, active, overlap):
    """Of pieces of 4 s, against who spoke."""
    samples = np.repeat(active @ np.array([1, 2, 4, 0]) / 32, 320)
    soundfile.write(folder / "talk.wav", np.concatenate([samples, np.zeros(80)]), 16_000)
    settings = InferenceSettings(chunks=ChunkSettings(seconds=4.0, overlap_seconds=overlap))
    recordings = open_recordings([folder / "talk.wav"])
    config = WavLMConfig.tiny()
    oracle = Model(config, {}, Oracle(config, HeadConfig(num_labels=4)), Weights(config, {}, None))
    [(_, found)] = diarize(oracle, recordings, settings, EXACT)
    regions = [Region("talk", 0.0, 0.02 * len(active))]
    return diarization_error(turns("talk", active.astype(np.float32), EXACT), found, regions)


def test_speakers_keep_their_names_over_pieces_that_overlap(tmp_path):
    """Three speakers of whom each says something within every second."""
    active = np.zeros((60, 50, 4), bool)
    active[:, :, :3] = np.random.default_rng(0).random((60, 50, 3)) < 0.3
    active = active.reshape(3000, 4)
    assert error_of_an_oracle(tmp_path, active, overlap=2.0).rate == 0
    assert error_of_an_oracle(tmp_path, active, overlap=0.0).confusion > 10


def test_a_voice_that_comes_back_is_one_of_those_who_spoke(tmp_path):
    """The second speaker is silent for 13 s, longer than a piece: the fourth output is no third speaker then."""
    active = np.zeros((3000, 4), bool)
    active[:, 0] = np.random.default_rng(1).random(3000) < 0.7
    for start in range(0, 3000, 800):
        active[start : start + 150, 1] = True
    assert error_of_an_oracle(tmp_path, active, overlap=2.0).rate == 0


def test_pieces_are_as_long_as_the_rows_of_the_training():
    assert pieces_of(None) == ChunkSettings(seconds=30.0, overlap_seconds=15.0)
    assert pieces_of(3.845) == ChunkSettings(seconds=3.845, overlap_seconds=3.845 / 2)


def test_turns_by_hand():
    activity = np.zeros((50, 2), np.float32)
    activity[5:15, 0] = activity[20:30, 0] = activity[29:40, 1] = 0.9
    activity[45, 1] = 0.9
    how = TurnSettings(fill_seconds=0.05, least_seconds=0.1)
    speakers = [Turn("r", 0.1, 0.2, "speaker1"), Turn("r", 0.4, 0.2, "speaker1"), Turn("r", 0.58, 0.22, "speaker2")]
    assert turns("r", activity, how) == speakers
    filled = turns("r", activity, TurnSettings(fill_seconds=0.11, least_seconds=0.1))
    assert filled[0] == Turn("r", 0.1, 0.5, "speaker1")
    other = Geometry(strides=(5, 2, 2, 2, 2, 2, 4))  # 40 ms
    slower = turns("r", activity, TurnSettings(fill_seconds=0.1, least_seconds=0.2), other)
    assert slower[0] == Turn("r", 0.2, 0.4, "speaker1")


def test_pieces_of_a_long_file_agree_on_who_is_who(tmp_path):
    random = np.random.default_rng(0)
    truth = (random.random((120, 3)) > 0.5).astype(np.float32)
    recording = Recording("r", tmp_path, 16_000, 120 * 320 + 80)
    results = []
    for start, keep, order in ((0, (0, 45), [0, 1, 2]), (40, (45, 85), [2, 0, 1]), (70, (85, 120), [1, 0, 2])):
        piece = Piece(start * 320, 50 * 320 + 80, start, *keep)
        padding = np.ones((7, 3), np.float32)
        results.append(
            PieceResult(Job(recording, piece), np.concatenate([truth[start : start + 50][:, order], padding]))
        )
    np.testing.assert_array_equal(join(results), truth)


@pytest.mark.slow
def test_turns_are_those_of_each_file_alone(tmp_path):
    model = model_of("WavLMForAudioFrameClassification")
    for recording, found in diarize(model, two_recordings(tmp_path), InferenceSettings(), EXACT):
        expected = np.asarray(jax.nn.sigmoid(alone(model, recording).logits[0]))
        assert found == turns(recording.name, expected, EXACT)
