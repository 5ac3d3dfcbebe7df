"""RTTM, UEM, CTM and trial lists: what is written is what is read, and every wrong line is named."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.trials import trial_list
from wavlm_jax.text.records import (
    RecordError,
    Region,
    TimedWord,
    Trial,
    Turn,
    read_rttm,
    read_trials,
    read_uem,
    trial_files,
    write_ctm,
    write_rttm,
)

names = st.text(st.characters(categories=("L", "N", "P")), min_size=1, max_size=8).filter(
    lambda name: not name.startswith(";;")
)
times = st.integers(0, 10**8).map(lambda milliseconds: milliseconds / 1000)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("records") / "file"


@given(turns=st.lists(st.builds(Turn, names, times, times, names, names)))
def test_turns_survive(path, turns):
    path.write_text(write_rttm(turns), encoding="utf-8")
    assert read_rttm(path) == turns


@given(
    regions=st.lists(
        st.builds(
            lambda name, start, length, channel: Region(name, start / 1000, (start + length) / 1000, channel),
            names,
            st.integers(0, 10**8),
            st.integers(1, 10**8),
            names,
        )
    )
)
def test_regions_survive(path, regions):
    path.write_text("".join("{0} {3} {1:.3f} {2:.3f}\n".format(*region) for region in regions), encoding="utf-8")
    assert read_uem(path) == regions


@given(words=st.lists(st.builds(TimedWord, names, times, times, names)))
def test_words_have_a_line_each(words):
    lines = [line.split(" ") for line in write_ctm(words).splitlines()]
    assert all(channel == "1" for _, channel, *_ in lines)
    assert [TimedWord(name, float(start), float(long), word) for name, _, start, long, word in lines] == words


@given(trials=st.lists(st.builds(Trial, st.booleans(), names, names), min_size=1))
def test_trials_survive(path, trials):
    path.write_text(trial_list(trials), encoding="utf-8")
    assert read_trials(path) == trials


def test_files_as_others_write_them(path):
    path.write_text(
        ";; made by hand\n\nSPKR-INFO m 1 <NA> <NA> <NA> unknown A <NA>\nSPEAKER m 1 0 1.5 <NA> <NA> A <NA>\n"
    )
    assert read_rttm(path) == [Turn("m", 0.0, 1.5, "A")]
    path.write_text("m 1 0.0 0.3\r\nm 1 0.5 0.8\r\n")
    assert read_uem(path) == [Region("m", 0.0, 0.3), Region("m", 0.5, 0.8)]
    path.write_text("a.wav b.wav target\na.wav c.wav nontarget\n")
    assert read_trials(path) == [Trial(True, "a.wav", "b.wav"), Trial(False, "a.wav", "c.wav")]


@pytest.mark.parametrize(
    ("read", "line", "message"),
    [
        (read_rttm, "SPEAKER m 1 0 1", "found '5 fields', expected SPEAKER recording"),
        (read_rttm, "SPEAKER m 1 -1 1 <NA> <NA> A <NA> <NA>", "found '-1', expected start: a number, 0 or more"),
        (read_rttm, "SPEAKER m 1 0 nan <NA> <NA> A <NA> <NA>", "found 'nan', expected duration"),
        (read_rttm, "SPEAKER m 1 0 1e999 <NA> <NA> A <NA> <NA>", "found '1e999', expected duration"),
        (read_rttm, "m 1 0.0 30.0", "found 'm', expected a line type such as SPEAKER"),
        (read_uem, "m 1 0.0", "found '3 fields', expected recording channel start end"),
        (read_uem, "m 1 5 5", "found '5 5', expected an end behind the start"),
        (read_uem, "m 1 0 x", "found 'x', expected end: a number, 0 or more"),
        (read_trials, "1 a", "found '2 fields'"),
        (read_trials, "2 a b", "found '2 a b', expected 1 or 0 in front"),
    ],
)
def test_a_wrong_line_is_named_by_its_number(path, read, line, message):
    good = {
        read_rttm: "SPEAKER m 1 0 1 <NA> <NA> A <NA> <NA>",
        read_uem: "m 1 0 1",
        read_trials: "0 a b",
    }[read]
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(RecordError, match=message) as caught:
        read(path)
    assert f"{path}, line 2" in str(caught.value)


@pytest.mark.parametrize(
    ("read", "content"),
    [(read_rttm, "SPEAKER m 1 0 1 <NA> <NA> A <NA> <NA>"), (read_uem, "m 1 0 1"), (read_trials, "0 a b")],
)
def test_a_byte_order_mark_is_no_part_of_the_first_line(path, read, content):
    path.write_text(content)
    plain = read(path)
    path.write_text("\ufeff" + content)
    assert read(path) == plain


@pytest.mark.parametrize("read", [read_rttm, read_uem, read_trials])
@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"1 " * 70_000])
def test_what_is_no_text_is_refused(path, read, content):
    path.write_bytes(content)
    with pytest.raises(RecordError, match="is it a"):
        read(path)
    with pytest.raises(RecordError, match="No such file"):
        read(path.with_name("none"))


def test_files_that_trials_ask_for_have_to_be_there(tmp_path, path):
    (tmp_path / "a").touch()
    assert trial_files([Trial(True, "a", "a")], tmp_path) == {"a": tmp_path / "a"}
    with pytest.raises(RecordError, match=r"2 of 3 files of the trials are not there: b \(trial 1\), c \(trial 2\)"):
        trial_files([Trial(True, "a", "b"), Trial(False, "c", "b")], tmp_path)
    path.write_text("\n")
    with pytest.raises(RecordError, match="found no trial"):
        read_trials(path)


def test_importing_the_library_loads_no_scorer():
    heavy = "jiwer", "pyannote", "flashlight", "torch", "transformers", "pandas"
    code = (
        "import sys, wavlm_jax, wavlm_jax.text.beam, wavlm_jax.metrics, wavlm_jax.metrics;"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_names_in_an_rttm_have_no_white_space_and_stay_different():
    text = write_rttm([Turn("a b", 0.0, 1.0, "Ms X"), Turn("a b", 1.0, 1.0, "Y"), Turn("c", 0.0, 1.0, "Ms_X")])
    assert [line.split()[1] + " " + line.split()[7] for line in text.splitlines()] == ["a_b Ms_X", "a_b Y", "c Ms_X"]
    for other in (Turn("a_b", 0.0, 1.0, "Ms X"), Turn("a b", 0.0, 1.0, "Ms_X")):
        with pytest.raises(RecordError, match="would both be"):
            write_rttm([Turn("a b", 0.0, 1.0, "Ms X"), other])
