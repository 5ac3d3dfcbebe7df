"""Diarisation of recordings: the table of errors, by hand."""

import pytest

from wavlm_jax.inference.diarize_command import report
from wavlm_jax.metrics.diarization import DiarizationError, diarization_error, one_speaker, one_voice
from wavlm_jax.text.rttm import Region, Turn

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
    lines = [line.split() for line in report(truth, heard, regions, window=5.0).splitlines()]
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
