"""Lists of files as they are: some bad, folders, odd names; answers come one by one and a second start goes on."""

import io
import json
import os
import signal

import numpy as np
import pytest
import soundfile

from tests.support.inference_models import TOKENS, weights_of
from wavlm_jax.__main__ import main
from wavlm_jax.convert.huggingface import export_huggingface
from wavlm_jax.inference import running, work
from wavlm_jax.text.records import read_rttm
from wavlm_jax.text.vocabulary import write_vocabulary

KINDS = {
    "ctc": "WavLMForCTC",
    "speakers": "WavLMForXVector",
    "classes": "WavLMForSequenceClassification",
    "turns": "WavLMForAudioFrameClassification",
}
GOOD = ["a.wav", "b.wav"]
BAD = ["half.flac", "gone.wav", "text.wav", "short.wav", "*.mp3", "https://example.org/a.wav", "empty"]
COMMANDS = [
    ("transcribe", "ctc", ["--format", "tsv"]),
    ("align", "ctc", ["--texts", "texts.tsv", "--format", "ctm"]),
    ("embed", "speakers", []),
    ("classify", "classes", []),
    ("diarize", "turns", ["--threshold", "0.01"]),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, kind in KINDS.items():
        export_huggingface(weights_of(kind, 500 if name == "ctc" else 30), folder / name)
    write_vocabulary(TOKENS, folder / "ctc")
    return folder


@pytest.fixture
def place(models, tmp_path, monkeypatch):
    """A folder with two good recordings and bad ones, the present one."""
    monkeypatch.chdir(tmp_path)
    for name in KINDS:
        (tmp_path / name).symlink_to(models / name)
    random = np.random.default_rng(0)
    for name, length in {"a.wav": 9_000, "b.wav": 8_000, "short.wav": 300, "half.flac": 64_000}.items():
        soundfile.write(name, random.normal(size=length) * 0.1, 16_000)
    whole = (tmp_path / "half.flac").read_bytes()
    (tmp_path / "half.flac").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.wav").write_text("no audio")
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts.tsv").write_text("a\tAB\nb\tC\nhalf\tA\nshort\tA\ntext\tA\n")
    return tmp_path


def stdin(lines):
    return io.TextIOWrapper(io.BytesIO(lines))


def content(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("command", "model", "flags"), COMMANDS)
def test_bad_files_are_skipped_and_named_twice(place, capsys, command, model, flags):
    files = [BAD[0], GOOD[0], *BAD[1:4], GOOD[1], *BAD[4:]]
    assert main([command, *files, "--model", model, *flags, "--out", "out"]) == 3
    err, lines = capsys.readouterr().err, (place / "out").read_text().splitlines()
    assert f"wavlm_jax {command}: {len(BAD)} of {len(files)} files left out" in err
    errors = [line for line in lines if line.startswith(";; ") or line.count("\t") == 2 or '"error"' in line]
    for name, line in zip(BAD, errors, strict=True):
        last = name.split("://")[-1]
        assert last in err
        assert last in line
        if line.startswith("{"):
            assert json.loads(line).keys() == {"name", "path", "error"}
    assert lines[0] == errors[0]
    assert lines[-len(BAD[4:]) :] == errors[-len(BAD[4:]) :]
    good = [line for line in lines if line not in errors]
    named = {line.split()[1 if command == "diarize" else 0] for line in good if not line.startswith("{")}
    assert (named or {json.loads(line)["name"] for line in good}) == {"a", "b"}
    assert content(place) == sorted([*KINDS, *GOOD, *BAD[:1], *BAD[2:4], "empty", "texts.tsv", "out"])
    if command == "diarize":
        assert {turn.recording for turn in read_rttm(place / "out")} == {"a", "b"}


def test_where_nothing_can_be_used_or_nothing_may_be_left_out_nothing_is_written(place, capsys):
    assert main(["transcribe", *BAD, "--model", "ctc", "--out", "out"]) == 2
    assert "no file could be used; each is named above" in capsys.readouterr().err
    assert main(["transcribe", *GOOD, *BAD[:3], "--model", "ctc", "--strict", "--out", "out"]) == 2
    assert "gone.wav: no such file" in capsys.readouterr().err
    assert not (place / "out").exists()


def test_texts_that_do_not_fit_are_skipped_too(place, capsys):
    (place / "texts.tsv").write_text("a\tAXB\nb\tC\n")
    soundfile.write("c.wav", np.random.default_rng(1).normal(size=8_000) * 0.1, 16_000)
    assert main(["align", "a.wav", "b.wav", "c.wav", "--model", "ctc", "--texts", "texts.tsv"]) == 3
    first, second, third = map(json.loads, capsys.readouterr().out.splitlines())
    assert "'X' (U+0058)" in first["error"]
    assert second["text"] == "C"
    assert "has no text for c.wav" in third["error"]


def test_an_array_of_embeddings_has_a_row_for_every_file(place):
    files = ["a.wav", "gone.wav", "b.wav"]
    assert main(["embed", *files, "--model", "speakers", "--out", "e.npy"]) == 3
    rows = np.load(place / "e.npy")
    assert json.loads((place / "e.json").read_text()) == files
    assert np.isnan(rows).all(axis=1).tolist() == [False, True, False]


def test_trials_of_a_damaged_file_have_no_score(place, capsys):
    (place / "trials.txt").write_text("1 a.wav a.wav\n0 a.wav half.flac\n0 a.wav b.wav\n")
    assert main(["verify", "trials.txt", "--model", "speakers"]) == 3
    out, err = capsys.readouterr()
    assert [line.split("\t")[0] == "nan" for line in out.splitlines()] == [False, True, False]
    assert "EER 0.00 %" in err
    assert "of the 2 of 3 trials whose files could be used" in err
    assert main(["verify", "a.wav", "half.flac", "--model", "speakers"]) == 2


def test_features_of_a_damaged_file_are_nan_and_its_index_says_why(place, capsys):
    call = ["features", "a.wav", "half.flac", "gone.wav", "b.wav", "--model", "ctc", "--layer", "0", "--out", "f"]
    for _ in range(2):  # the second start finds the shard, and the fault in its index
        assert main(call) == 3
        err = capsys.readouterr().err
        assert "left out: half.flac" in err
        assert "2 of 4 files left out" in err
        index = json.loads((place / "f/features-00000.json").read_text())
        assert ["error" in row for row in index] == [False, True, False]
        array = np.load(place / "f/features-00000.npy")
        for row in index:
            frames = array[row["start"] : row["start"] + row["frames"]]
            assert np.isnan(frames).all() == np.isnan(frames).any() == ("error" in row)
        assert len((place / "f/bad_files.jsonl").read_text().splitlines()) == 2


def test_a_state_that_float16_does_not_hold_is_refused(place, capsys, monkeypatch):
    monkeypatch.setattr("wavlm_jax.inference.features._hidden_states", _large_states)
    call = ["features", "a.wav", "--model", "ctc", "--layer", "0"]
    assert main([*call, "--out", "half", "--dtype", "float16"]) == 2
    assert "a.wav: a hidden state of 70000.0, expected at most 65504, as float16 holds; take --dtype float32" in (
        capsys.readouterr().err
    )
    assert not list((place / "half").glob("*.npy"))
    assert main([*call, "--out", "single"]) == 0


def _large_states(_module, layers, _params, inputs):
    return np.full((len(inputs.waveform), inputs.waveform.shape[1] // 320, len(layers), 32), -70_000, np.float32)


@pytest.mark.parametrize(("command", "model", "flags"), [COMMANDS[1], COMMANDS[2], COMMANDS[4]])
def test_a_second_start_goes_on(place, capsys, monkeypatch, command, model, flags):
    call = [command, "a.wav", "b.wav", "--model", model, *flags, "--out", "out", "--batch-seconds", "0.1"]
    assert main(call) == 0
    expected = (place / "out").read_text()
    (place / "out").unlink()
    monkeypatch.setattr(work, "progress_bar", lambda *_: lambda _: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        main(call)
    monkeypatch.undo()
    monkeypatch.chdir(place)
    kept = (place / "out.partial").read_text()
    assert kept
    with (place / "out.partial").open("a") as partial, (place / ".out.done").open("a") as index:
        partial.write("half an ans")  # of a start that was killed
        index.write('\n{"key": ["a"')
    read = []
    monkeypatch.setattr(running.Recording, "read", _noting(read, running.Recording.read))
    capsys.readouterr()
    assert main(call) == 0
    assert "going on: 1 of 2 answers are there" in capsys.readouterr().err
    assert read == ["a.wav"]
    assert (place / "out").read_text() == expected
    assert not (place / "out.partial").exists()
    assert not (place / ".out.done").exists()


def _noting(names, original):
    def read(recording, *arguments):
        names.append(str(recording.path))
        return original(recording, *arguments)

    return read


def test_a_second_start_takes_nothing_of_another_model_or_another_file(place, capsys, monkeypatch):
    call = ["transcribe", "a.wav", "b.wav", "--model", "ctc", "--out", "out", "--format", "tsv"]
    monkeypatch.setattr(work, "progress_bar", lambda *_: lambda _: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        main([*call, "--batch-seconds", "0.1"])
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert main([*call[:-1], "ctm"]) == 2
    assert "out.partial: has answers with other format; move it, or name another --out" in capsys.readouterr().err
    soundfile.write("b.wav", np.random.default_rng(5).normal(size=8_000) * 0.1, 16_000)
    assert main(call) == 0
    assert "going on" not in capsys.readouterr().err
    assert main([*call[:-4], "--format", "tsv"]) == 0
    assert (place / "out").read_text() == capsys.readouterr().out
    (place / "out.partial").write_text("mine")
    assert main(call) == 2
    assert "out.partial: is not from an earlier start; move it" in capsys.readouterr().err
    assert (place / "out.partial").read_text() == "mine"


@pytest.mark.usefixtures("place")
def test_answers_are_printed_as_they_come_in_the_order_of_the_files(capsys, monkeypatch):
    files = [f"{number}.wav" for number in range(6)]
    for number, name in enumerate(files):
        soundfile.write(name, np.random.default_rng(number).normal(size=16_000 - 1_000 * (number % 2)) * 0.1, 16_000)
    monkeypatch.setattr(running, "_WINDOW_BATCHES", 1)
    seen = []
    monkeypatch.setattr(work, "progress_bar", lambda *_: lambda _: seen.append(capsys.readouterr().out))
    call = ["transcribe", *files, "--model", "ctc", "--format", "tsv"]
    assert main([*call, "--batch-seconds", "1.9"]) == 0
    whole = "".join(seen) + capsys.readouterr().out
    assert [line.split("\t")[0] for line in whole.splitlines()] == [str(number) for number in range(6)]
    assert len([part for part in seen[:-1] if part]) >= 2


def test_files_are_named_in_every_way(place, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    (place / "deep/er").mkdir(parents=True)
    (place / "deep/.Trash").mkdir()
    for name in ("deep/er/c.wav", "deep/d.wav", "deep/.Trash/old.wav", "deep/._d.wav", "~e.wav", "-f.wav"):
        soundfile.write(name, np.random.default_rng(1).normal(size=8_000) * 0.1, 16_000)
    (place / "deep/x.ape").write_bytes(bytes(100))  # a kind that nothing here reads
    odd = os.fsdecode(b"f\xff.wav")
    (place / "a.wav").rename(odd)
    call = ["--model=~/ctc", "--format", "tsv"]

    def names(*files):
        status = main(["transcribe", *call, *files])
        out, err = capsys.readouterr()
        return status, [line.split("\t")[0] for line in out.splitlines()], err

    status, found, err = names("~/b.wav", "deep", "~e.wav", odd, "b.wav", "./b.wav")
    assert (status, sorted(found)) == (0, sorted([str(place / "b"), "d", "c", "~e", "f\\xff", "b"]))
    for left_out in ("._d.wav", ".Trash", "1 .ape", "1 files are named more than once"):
        assert left_out in err
    monkeypatch.setattr("sys.stdin", stdin(b"\xef\xbb\xbf~/b.wav\r\n\r\nf\xff.wav\n"))
    assert names("-")[:2] == (0, ["b", "f\\xff"])
    assert names("--", "-f.wav")[:2] == (0, ["-f"])
    assert names("b.wav", os.fsdecode(b"gone\xff.wav"))[:2] == (3, ["b", "gone\\xff"])
    for lines, message in ((b"", "no file name"), (b"b.wav\0c.wav\0", "found NUL between the names")):
        monkeypatch.setattr("sys.stdin", stdin(lines))
        status, _, err = names("-")
        assert status == 2
        assert message in err
    with pytest.raises(SystemExit, match="2"):
        names("-f.wav")
    assert "-f.wav: looks like an option; a file of this name is ./-f.wav, or stands behind --" in (
        capsys.readouterr().err
    )
    assert main(["embed", odd, "--model", "speakers", "--out", "~/e.npy"]) == 0
    assert json.loads((place / "e.json").read_text()) == ["f\\xff.wav"]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("empty", "empty: a folder, expected the name of a file"),
        ("gone/x", "gone: no such folder; make it first"),
        ("x" * 250, "File name too long"),
        ("/proc/x", "No such file"),
        ("pipe", "a pipe or device, expected a file"),
        ("/dev/null", "a pipe or device, expected a file"),
    ],
)
def test_a_place_that_cannot_be_written_is_found_before_anything_is_read(place, capsys, out, message):
    os.mkfifo(place / "pipe")
    before = content(place)
    with pytest.raises(SystemExit, match="2"):
        main(["transcribe", "a.wav", "--model", "nowhere", "--out", out])
    assert message in capsys.readouterr().err
    assert content(place) == before


@pytest.mark.usefixtures("place")
def test_features_want_a_folder(capsys):
    assert main(["features", "a.wav", "--model", "ctc", "--layer", "0", "--out", "b.wav"]) == 2
    assert "b.wav: a file, expected a folder or a new name" in capsys.readouterr().err


def test_two_at_once_do_not_write_one_file(place, capsys):
    from wavlm_jax.inference.answers import Journal

    journal = Journal(place / "out", {})
    assert main(["transcribe", "a.wav", "--model", "ctc", "--out", "out"]) == 2
    assert "--out: another process is writing out" in capsys.readouterr().err
    journal.close(remove=True)


def test_a_recording_without_a_turn_is_one_in_which_nobody_speaks(place, capsys):
    (place / "a.rttm").write_text("SPEAKER a 1 0.000 0.400 <NA> <NA> x <NA> <NA>\n")
    (place / "all.uem").write_text("a 1 0.000 0.500\nb 1 0.000 0.500\n")
    call = ["diarize", *GOOD, "--model", "turns", "--threshold", "0.01", "--reference", "a.rttm"]
    assert main([*call, "--uem", "all.uem"]) == 0
    err = capsys.readouterr().err
    assert "--reference: has no turn of b, which is scored as without speech" in err
    row = next(line.split() for line in err.splitlines() if line.startswith("b "))
    assert row[1:6] == ["0.0", "0.00", "inf", "0.00", "inf"]
    (place / "a.rttm").write_text("SPEAKER other 1 0.000 0.400 <NA> <NA> x <NA> <NA>\n")
    assert main(call) == 2
    assert "has no turn of a nor of any other file" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--reference", "--uem"])
def test_a_pipe_is_no_file_of_records(place, capsys, option):
    os.mkfifo("pipe")
    (place / "a.rttm").write_text("SPEAKER a 1 0.000 0.400 <NA> <NA> x <NA> <NA>\n")
    given = {"--reference": "a.rttm", option: "pipe"}
    words = [word for pair in given.items() for word in pair]
    assert main(["diarize", *GOOD, "--model", "turns", *words]) == 2
    assert "pipe: a folder, pipe or device, expected a file" in capsys.readouterr().err
