"""Preparation: all kinds of dirt (USERS #15), options, held-out shares, and interruptions at any moment."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.support.audio_files import encoded, save, tone, with_flac_length
from tests.support.preparing import bad_files, failure, run, speech
from wavlm_jax.audio.wave import to_int16
from wavlm_jax.data.__main__ import main
from wavlm_jax.data.corpus import Corpus, CorpusError, is_corpus, turns_of
from wavlm_jax.data.entries import Entry, FileReader, UtteranceSource
from wavlm_jax.data.prepare import PrepareError, split
from wavlm_jax.data.sources import from_folder
from wavlm_jax.text.records import Turn, write_rttm

COMMAND = [sys.executable, "-m", "wavlm_jax.data"]


def test_a_folder_of_all_formats_and_odd_names(tmp_path: Path):
    source = tmp_path / "in"
    names = [
        "a b.flac",
        "new\nline.wav",
        "deep/er/x.mp3",
        "caf\u00e9.ogg",
        "cafe\u0301.ogg",
        "same.wav",
        "same.flac",
        "UPPER.WAV",
    ]
    for seed, name in enumerate(names):
        save(source / name, tone(4000, seed), kind=name[-4:].strip(".").upper())
    Path(os.fsdecode(os.fsencode(source) + b"/\xff.flac")).write_bytes(encoded(tone(4000, 99)))
    assert run(source, "--out", tmp_path / "out") == 0
    corpus = Corpus.open(tmp_path / "out")
    expected = {"a b", "new\nline", "deep/er/x", "caf\u00e9", "cafe\u0301", "same.wav", "same.flac", "UPPER", "\\xff"}
    assert set(corpus.ids) == expected
    assert (corpus.lengths == 4000).all()
    assert corpus.header.faults == {}


def test_linked_folders_are_not_entered_but_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = speech(tmp_path / "in", 2)
    (source / "more").symlink_to(speech(tmp_path / "elsewhere", 3))
    (source / "round").symlink_to(source)
    assert run(source, "--out", tmp_path / "out") == 0
    assert len(Corpus.open(tmp_path / "out")) == 2
    notes = capsys.readouterr().err
    assert f"{source / 'more'}: a linked folder, not entered" in notes
    assert f"{source / 'round'}: a linked folder, not entered" in notes


def test_the_fingerprint_knows_speech_and_nothing_else(tmp_path: Path):
    first = speech(tmp_path / "first", 150)
    second = Path(shutil.copytree(first, tmp_path / "elsewhere"))
    assert run(first, "--out", tmp_path / "a") == 0
    subprocess.run([*COMMAND, second, "--out", tmp_path / "b", "--workers", "2"], check=True, capture_output=True)
    save(second / "0003.flac", to_int16(tone(3030, 77)))
    assert run(second, "--out", tmp_path / "c") == 0
    a, b, c = (Corpus.open(tmp_path / name) for name in "abc")
    assert a.fingerprint == b.fingerprint != c.fingerprint
    assert [shard.sha256 for shard in a.header.shards] == [shard.sha256 for shard in b.header.shards]
    assert main(["verify", str(tmp_path / "b")]) == 0


def test_dirt_is_counted_and_never_stops_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, good = speech(tmp_path / "in", 20), encoded(tone(3000))
    for name, data in {
        "cut": good[: len(good) * 7 // 10],
        "lie": with_flac_length(good, 2000),
        "zero": b"",
        "text": b"hello" * 100,
        "nan": encoded(np.array([0.0] * 500 + [np.nan], np.float32), kind="WAV", subtype="FLOAT"),
        "fast": encoded(tone(3000), 44100),
        "one": encoded(tone(1), kind="WAV"),
        "short": encoded(tone(399), kind="WAV"),
        "stereo": encoded(np.stack([tone(3000), -tone(3000)], axis=1), kind="WAV"),
        "silent": encoded(np.zeros(3000, np.int16)),
        "frame": encoded(tone(400), kind="WAV"),
    }.items():
        (source / f"{name}.flac").write_bytes(data)
    (source / "folder.flac").mkdir()
    (source / "link.flac").symlink_to("nowhere")
    (source / "out.flac").symlink_to(tmp_path / "secret.flac")
    save(tmp_path / "secret.flac", tone(3000))
    os.mkfifo(source / "pipe.flac")
    assert run(source, "--out", tmp_path / "out", "--fault-cap", 1) == 0
    assert bad_files(tmp_path / "out") == {
        "cut": "damaged",
        "lie": "checksum_mismatch",
        "zero": "empty",
        "text": "unreadable",
        "nan": "not_finite",
        "fast": "wrong_rate",
        "folder": "not_a_file",
        "link": "missing",
        "out": "outside_root",
        "pipe": "not_a_file",
    }
    corpus = Corpus.open(tmp_path / "out")
    assert len(corpus) == 23
    assert {"stereo", "silent", "frame"} < set(corpus.ids)
    assert corpus.header.dropped == {"too_short": 2}
    assert corpus.header.warnings == {"silent": 2, "down_mix_cancels": 1}
    assert sum(corpus.header.faults.values()) == 10
    assert np.isfinite(corpus.variances).all()
    assert "2 too_short" in capsys.readouterr().out


def test_too_much_dirt_stops_and_keeps_what_was_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = speech(tmp_path / "in", 70)
    for number in range(6):
        (source / f"z{number}.flac").write_bytes(b"bad")
    message = failure(capsys, source, "--out", tmp_path / "out")
    assert "6 bad files (6 unreadable) of 76, more than the 5 that --fault-cap allows" in message
    assert not (tmp_path / "out").exists()
    assert len((tmp_path / "out.partial/bad_files.jsonl").read_text().splitlines()) == 6
    done = tmp_path / "out.partial/data-00000-of-00002.arrow"
    before = done.stat().st_mtime_ns
    (source / "z0.flac").write_bytes(encoded(tone(3000, 70)))  # mended
    assert run(source, "--out", tmp_path / "out") == 0
    assert (tmp_path / "out" / done.name).stat().st_mtime_ns == before
    assert bad_files(tmp_path / "out").keys() == {f"z{number}" for number in range(1, 6)}
    assert len(Corpus.open(tmp_path / "out")) == 71


def test_a_corpus_without_one_good_file_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.wav").write_bytes(b"bad")
    assert "no usable utterance: {'unreadable': 1} bad" in failure(capsys, tmp_path / "in", "--out", tmp_path / "out")


def test_a_second_run_does_nothing_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, out = speech(tmp_path / "in"), tmp_path / "out"
    assert run(source, "--out", out) == 0
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    assert {file.name for file in before} == {
        "header.json",
        "bad_files.jsonl",
        "dataset_info.json",
        "state.json",
        "data-00000-of-00001.arrow",
    }
    capsys.readouterr()
    assert run(source, "--out", out) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before
    assert "with other options" in failure(capsys, source, "--out", out, "--min-seconds", 0.5)
    save(source / "new.flac", tone(3000))
    assert "made from folder" in failure(capsys, source, "--out", out)


def test_a_folder_that_is_no_corpus_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, out = speech(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    assert "exists and is no corpus" in failure(capsys, source, "--out", out)
    assert [file.name for file in out.iterdir()] == ["thesis.txt"]


def test_lengths_and_rates_by_option(tmp_path: Path):
    source = tmp_path / "in"
    for number, length in enumerate((8000, 16000, 40000)):
        save(source / f"{number}.wav", tone(length, number))
    save(source / "3.wav", tone(48000), rate=48000)
    words = ["--rate-policy", "resample", "--min-seconds", 0.75, "--max-seconds", 2]
    assert run(source, "--out", tmp_path / "drop", *words) == 0
    corpus = Corpus.open(tmp_path / "drop")
    assert list(corpus.ids) == ["1", "3"]
    assert corpus.header.dropped == {"too_short": 1, "too_long": 1}
    np.testing.assert_allclose(corpus.lengths, 16000, atol=1)
    assert run(source, "--out", tmp_path / "split", *words, "--long", "split") == 0
    corpus = Corpus.open(tmp_path / "split")
    assert list(corpus.ids) == ["1", "2#0000", "3"]  # 8000 left over: shorter than allowed, and said
    assert corpus.header.warnings["rest_too_short"] == 1


@pytest.mark.parametrize("seconds", [1.2, 0.55, 0.5])  # two pieces; one and a rest; as much as is allowed
def test_a_piece_has_no_text_and_no_phones_that_are_not_its_own(tmp_path: Path, seconds: float):
    length = round(seconds * 16000)
    save(tmp_path / "long.wav", tone(length))
    phones = {"symbols": ["a", "b"], "starts": [0, 4000], "ends": [4000, length]}
    row = {"path": "long.wav", "text": "ALL THAT IS SAID", "speaker": "anna", "phones": phones}
    (tmp_path / "list.jsonl").write_text(json.dumps(row) + "\n")
    words = ["--long", "split", "--max-seconds", 0.5, "--min-seconds", 0.1]
    assert run(tmp_path / "list.jsonl", "--out", tmp_path / "out", *words) == 0
    corpus = Corpus.open(tmp_path / "out")
    if seconds <= 0.5:
        assert (list(corpus.ids), list(corpus.texts)) == (["long"], ["ALL THAT IS SAID"])
        assert corpus.phones(0) is not None
        return
    assert corpus.ids[0] == "long#0000"
    assert set(corpus.texts) == {""}
    assert set(corpus.speakers) == {"anna"}
    assert all(corpus.phones(number) is None for number in range(len(corpus)))
    assert corpus.header.warnings["cut_without_text"] == 1


@pytest.mark.parametrize(
    "words",
    [
        ["--max-seconds", "0"],
        ["--max-seconds", "nan"],
        ["--min-seconds", "-1"],
        ["--min-seconds", "2", "--max-seconds", "1", "--long", "split"],
        ["--holdout", "1.5"],
        ["--fault-cap", "-0.1"],
        ["--rate-policy", "guess"],
    ],
)
def test_options_that_cannot_be_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]):
    with pytest.raises(SystemExit):
        run(speech(tmp_path / "in", 1), "--out", tmp_path / "out", *words)
    assert words[0] in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_a_held_out_share_is_a_matter_of_each_id(tmp_path: Path):
    for number in range(60):
        save(tmp_path / f"in/{number:02d}.flac", to_int16(tone(3000)))
    words = [str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--holdout", "0.2", "--workers", "1", "--name", "n"]
    assert main(words) == 0
    train, valid = (Corpus.open(tmp_path / "out" / part) for part in ("train", "valid"))
    assert not set(train.ids) & set(valid.ids)
    assert len(train) + len(valid) == 60
    assert 5 <= len(valid) <= 20
    assert (train.header.name, valid.header.name) == ("n/train", "n/valid")
    with pytest.raises(CorpusError, match="it holds the corpora train, valid: open one of them"):
        Corpus.open(tmp_path / "out")
    # without some of the others, each stays where it was
    source = from_folder(tmp_path / "in")
    fewer = UtteranceSource(source.description, source.entries[:30], source.reader)
    kept, held_out = split(fewer, 0.2)
    assert {entry.id for entry in held_out.entries} <= set(valid.ids)
    assert {entry.id for entry in kept.entries} <= set(train.ids)


def test_a_held_out_share_is_never_nobody():
    entries = [Entry(id=str(number), audio="x") for number in range(3)]
    for share in (1e-9, 0.999):
        train, valid = split(UtteranceSource("three", entries, FileReader(Path())), share)
        assert train.entries
        assert valid.entries
    with pytest.raises(PrepareError, match="1 utterance, a held-out share needs two"):
        split(UtteranceSource("one", entries[:1], FileReader(Path())), 0.5)


COUNT = 64 * 10


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Ten shards' worth of files, few enough different ones."""
    root = tmp_path_factory.mktemp("speech")
    originals = [save(root / f"{number:04d}.wav", to_int16(tone(12_000, number))) for number in range(8)]
    for number in range(8, COUNT):
        os.link(originals[number % 8], root / f"{number:04d}.wav")
    return root


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory) -> Corpus:
    """What comes out when nothing goes wrong."""
    out = tmp_path_factory.mktemp("whole") / "corpus"
    assert main([str(source), "--out", str(out), "--workers", "1"]) == 0
    return Corpus.open(out)


def start(source: Path, out: Path, workers: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "wavlm_jax.data", source, "--out", out, "--workers", workers]
    return subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    """Until `condition` holds; the test fails if it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


def finished_shards(out: Path) -> set[str]:
    return {file.stem for file in out.with_name(out.name + ".partial").glob("data-*.json")}


@pytest.mark.parametrize(("workers", "shards"), [(1, 1), (2, 4)])
def test_killed_and_started_again(source: Path, whole: Corpus, tmp_path: Path, workers: int, shards: int):
    out = tmp_path / "corpus"
    process = start(source, out, workers)
    wait_for(lambda: len(finished_shards(out)) >= shards or process.poll() is not None)
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not psutil.wait_procs(family, timeout=0)[1], 20)
    assert not is_corpus(out), "killed too late to show anything"
    partial = out.with_name("corpus.partial")
    kept = {name: (partial / f"{name}.arrow").stat().st_mtime_ns for name in finished_shards(out)}
    assert len(kept) >= shards
    assert main([str(source), "--out", str(out), "--workers", "1"]) == 0
    again = Corpus.open(out)
    assert again.header == whole.header
    assert {name: (out / f"{name}.arrow").stat().st_mtime_ns for name in kept} == kept
    assert not partial.exists()
    assert not [file for file in out.iterdir() if file.suffix in (".tmp", ".partial")]


def test_killed_between_the_header_and_the_name(source: Path, whole: Corpus, tmp_path: Path):
    out, partial = tmp_path / "corpus", tmp_path / "corpus.partial"
    shutil.copytree(whole.path, partial)
    (partial / "plan.json").write_text("{}")
    assert main([str(source), "--out", str(out)]) == 0
    assert Corpus.open(out).header == whole.header
    assert not partial.exists()
    assert {file.name for file in out.iterdir()} == {file.name for file in whole.path.iterdir()}


def test_a_worker_that_is_killed_is_an_error_that_says_so(source: Path, whole: Corpus, tmp_path: Path):
    out = tmp_path / "corpus"
    process = start(source, out, 2)
    wait_for(lambda: finished_shards(out) or process.poll() is not None)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if any("spawn_main" in word for word in child.cmdline())
    ]
    workers[0].kill()
    _, message = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "a worker process died" in message
    assert "run the same command again" in message
    assert main([str(source), "--out", str(out), "--workers", "1"]) == 0
    assert Corpus.open(out).header == whole.header


def test_a_source_that_changed_in_between_is_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "corpus"
    process = start(source, out, 1)
    wait_for(lambda: finished_shards(out))
    process.kill()
    process.communicate()
    other = save(tmp_path / "other/0000.wav", to_int16(tone(3000))).parent
    for words in ([other, "--out", out], [source, "--out", out, "--min-seconds", 1]):
        assert main([str(word) for word in words]) == 2
        message = capsys.readouterr().err
        assert "cannot be resumed" in message
        assert "remove this folder to start over" in message


def test_a_root_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        run(speech(tmp_path / "in", 2), "--out", tmp_path / "out", "--root", tmp_path / "gone")
    assert f"--root: {tmp_path / 'gone'}: no such folder" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_what_the_system_refuses_is_one_line_that_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = speech(tmp_path / "in", 2)
    for content in ("[]", "{", "{}", '{"listing": 1}', "\xff"):
        (tmp_path / "out.partial").mkdir(exist_ok=True)
        (tmp_path / "out.partial/plan.json").write_text(content, encoding="latin-1")
        message = failure(capsys, source, "--out", tmp_path / "out")
        assert f"{tmp_path / 'out.partial'}" in message
        assert re.search(r"remove (this folder|\S+out.partial) to start over$", message)
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "wide.csv").write_text(",".join(f"column{n}" for n in range(300_000)) + "\n")
    (tmp_path / "long.csv").write_text("path\n" + "x" * 100_000 + "\n")
    for words, named in (
        ((source, "--out", tmp_path / "file/corpus"), "file"),
        ((source, "--out", tmp_path / ("n" * 300)), "nnn"),
        ((source, "--out", tmp_path / "o", "--rttm", tmp_path / "pipe"), "pipe: a folder, pipe or device"),
        ((source, "--out", tmp_path / "o", "--rttm", tmp_path / "binary"), "binary"),
        ((source, "--out", tmp_path / "o", "--rttm", tmp_path / "none"), "none: No such file"),
        ((source, "--out", tmp_path / "o", "--rttm", source), "in has no file *.rttm"),
        ((tmp_path / "wide.csv", "--out", tmp_path / "o"), "wide.csv:1: found columns column0"),
        ((tmp_path / "long.csv", "--out", tmp_path / "o"), "long.csv, first utterance: path 'xxx"),
        (("x" * 5000, "--out", tmp_path / "o"), "xxx"),
    ):
        message = failure(capsys, *words)
        assert named in message
        assert message.count("\n") == 1
        assert len(message) < 4000


def test_the_pieces_of_a_recording_have_the_turns_that_are_their_own(tmp_path: Path):
    for name, seconds in (("meeting", 2.5), ("short", 0.8)):
        save(tmp_path / f"in/{name}.wav", tone(round(seconds * 16000)))
    turns = [Turn("meeting", 0.25, 1.0, "a"), Turn("meeting", 1.5, 0.25, "b"), Turn("short", 0.1, 0.5, "c")]
    (tmp_path / "all.rttm").write_text(write_rttm(turns))
    words = ["--long", "split", "--max-seconds", 1, "--rttm", tmp_path / "all.rttm"]
    assert run(tmp_path / "in", "--out", tmp_path / "out", *words) == 0
    corpus = Corpus.open(tmp_path / "out")
    assert list(corpus.ids) == ["meeting#0000", "meeting#0001", "meeting#0002", "short"]
    assert turns_of(corpus) == {
        "meeting#0000": [Turn("meeting#0000", 0.25, 0.75, "a")],
        "meeting#0001": [Turn("meeting#0001", 0.0, 0.25, "a"), Turn("meeting#0001", 0.5, 0.25, "b")],
        "short": [Turn("short", 0.1, 0.5, "c")],
    }
