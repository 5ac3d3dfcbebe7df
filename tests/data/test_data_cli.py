"""`python -m wavlm_jax.data` on folders and manifests, with every kind of dirt (USERS #15, section 11)."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.audio_files import encoded, save, tone, with_flac_length
from wavlm_jax.audio.wave import to_int16
from wavlm_jax.data.__main__ import main
from wavlm_jax.data.corpus import Corpus

COMMAND = [sys.executable, "-m", "wavlm_jax.data"]


def speech(root: Path, count: int = 8, length: int = 3000) -> Path:
    """A folder of FLAC files of different lengths."""
    for number in range(count):
        save(root / f"{number:04d}.flac", to_int16(tone(length + 10 * number, number)))
    return root


def run(*words: object) -> int:
    return main([str(word) for word in words] + ["--workers", "1"])


def failure(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The message of a run that has to fail."""
    capsys.readouterr()
    assert run(*words) == 1
    return capsys.readouterr().err


def bad_files(corpus: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (corpus / "bad_files.jsonl").read_text().splitlines()]
    assert all(set(row) == {"id", "path", "fault", "detail"} for row in rows)
    return {row["id"]: row["fault"] for row in rows}


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
    assert list(Corpus.open(tmp_path / "split").ids) == ["1", "2", "3"]  # 8000 left over: shorter than allowed


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


def manifest(root: Path, name: str, lines: list[str], end: str = "\n") -> Path:
    file = root / name
    file.write_bytes(("".join(line + end for line in lines)).encode())
    return file


def test_all_manifests_say_the_same(tmp_path: Path):
    speech(tmp_path / "data/audio", 5)
    lists = tmp_path / "data/manifests"
    lists.mkdir()
    rows = [(f"{n:04d}", f"audio/{n:04d}.flac", 3000 + 10 * n, f"s{n}", f"TEXT {n}") for n in range(5)]
    columns = ("id", "path", "samples", "speaker", "text")
    table = ["\t".join(("lang", *columns)), *["\t".join(("en", *map(str, row))) for row in rows]]
    objects = [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]
    fairseq = [str(tmp_path / "data"), *[f"audio/{n:04d}.flac\t{3000 + 10 * n}" for n in range(5)]]
    corpora = {}
    for name, lines, end in (
        ("a.tsv", table, "\n"),
        ("b.tsv", table, "\r\n"),
        ("c.jsonl", objects, "\n"),
        ("d.tsv", fairseq, "\n"),
    ):
        assert run(manifest(lists, name, lines, end), "--out", tmp_path / name) == 0
        corpora[name] = Corpus.open(tmp_path / name)
    assert len({corpora[name].fingerprint for name in ("a.tsv", "b.tsv", "c.jsonl")}) == 1
    assert corpora["a.tsv"].texts[4] == "TEXT 4"
    assert corpora["b.tsv"].texts[4] == "TEXT 4"
    assert list(corpora["a.tsv"].speakers) == [f"s{n}" for n in range(5)]
    assert list(corpora["d.tsv"].ids) == [f"audio/{n:04d}" for n in range(5)]


HEADER = "id\tpath\tsamples"
ROOT = "ROOT"
FAULTY = {
    "duplicate id": ([HEADER, "a\t0000.flac\t", "a\t0001.flac\t"], r"m.tsv:3: id 'a' stands in line 2 already"),
    "missing file": ([HEADER, "a\t0000.flac\t", "b\tnone.flac\t"], r"m.tsv:3: path 'none.flac' does not exist"),
    "blank at the end": ([HEADER, "a\t0000.flac \t"], r"does not exist|neither under"),
    "empty line": ([HEADER, "a\t0000.flac\t", ""], r"m.tsv:3: empty line"),
    "columns swapped": ([HEADER, "a\t0000.flac\t3000", "3010\tb\t0001.flac"], r"m.tsv:3: path 'b' does not exist"),
    "samples no number": ([HEADER, "a\t0000.flac\t3e3"], r"m.tsv:2: samples is '3e3', expected a whole number"),
    "too many columns": ([HEADER, "a\t0000.flac\t3000\tx"], r"m.tsv:2: found 4 columns, the header has 3"),
    "column twice": (["id\tpath\tpath", "a\tx\ty"], r"m.tsv:1: found columns id, path, path"),
    "no path column": (["id\tfile", "a\t0000.flac"], r"m.tsv:1: found columns id, file"),
    "blank id": ([HEADER, " \t0000.flac\t"], r"m.tsv:2: id is ' '"),
    "parent": ([HEADER, "a\t0000.flac\t", "b\t../secret.flac\t"], r"m.tsv:3: path '../secret.flac' leads out of"),
    "absolute": ([HEADER, "a\t0000.flac\t", "b\t/etc/passwd\t"], r"m.tsv:3: path '/etc/passwd' leads out of"),
    "link out": ([HEADER, "a\t0000.flac\t", "b\tout.flac\t"], r"m.tsv:3: path 'out.flac' leads out of"),
    "fairseq swapped": ([ROOT, "3000\t0000.flac"], r"m.tsv:2: path '3000' does not exist"),
    "fairseq no root": (["nowhere", "0000.flac\t3000"], r"m.tsv:1: root 'nowhere' is not a folder"),
    "fairseq columns": ([ROOT, "0000.flac 3000"], r"m.tsv:2: found 1 columns, expected path TAB samples"),
    "header only": ([HEADER], r"m.tsv: no utterance"),
    "number of 5000 digits": ([HEADER, "a\t0000.flac\t" + "9" * 5000], r"m.tsv:2: samples is '999"),
    "endless cell": ([HEADER, "a\t0000.flac\t" + "9" * 200_000], r"m.tsv:2: field larger than field limit"),
    "bottomless JSON": (['{"path": "0000.flac"}', '{"path":' + "[" * 100_000], r"m.tsv:2: not JSON"),
    "half a character": ([r'{"path": "0000.flac", "text": "\ud800"}'], r"m.tsv:1: text is '\\ud800', expected text"),
    "not JSON": (['{"path": "0000.flac"}', "{"], r"m.tsv:2: not JSON"),
    "JSON without path": (
        ['{"path": "0000.flac"}', '{"id": "a"}'],
        r"m.tsv:2: expected an object with a text under 'path'",
    ),
    "JSON number as id": (['{"id": 3, "path": "0000.flac"}'], r"m.tsv:1: id is 3, expected text"),
    "phones of one kind": (
        ['{"path": "0000.flac", "phones": {"symbols": ["a"]}}'],
        r"m.tsv:1: phones has to be an object with symbols, starts, ends",
    ),
    "phones no lists": (
        ['{"path": "0000.flac", "phones": {"symbols": "a", "starts": 0, "ends": 9}}'],
        r"m.tsv:1: phones: symbols, starts and ends have to be lists",
    ),
    "phones overlap": (
        ['{"path": "0000.flac", "phones": {"symbols": ["a", "b"], "starts": [0, 5], "ends": [9, 12]}}'],
        r"m.tsv:1: phones: expected as many starts and ends as symbols, ascending",
    ),
    "phones too long": (
        ['{"path": "0000.flac", "samples": 9, "phones": {"symbols": ["a"], "starts": [0], "ends": [10]}}'],
        r"m.tsv:1: phones end at sample 10, the utterance has 9",
    ),
}


@pytest.mark.parametrize("name", FAULTY)
def test_faults_of_a_manifest_name_the_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str):
    speech(tmp_path / "data", 2)
    save(tmp_path / "secret.flac", tone(3000))
    (tmp_path / "data/out.flac").symlink_to(tmp_path / "secret.flac")
    lines, expected = FAULTY[name]
    file = manifest(tmp_path / "data", "m.tsv", [line.replace(ROOT, str(tmp_path / "data")) for line in lines])
    message = failure(capsys, file, "--out", tmp_path / "out")
    assert re.search(expected, message), message
    assert not list(tmp_path.glob("out*"))


def test_a_manifest_that_lies_about_lengths_is_counted(tmp_path: Path):
    speech(tmp_path / "data", 10)
    lines = [HEADER, *[f"{n}\t{n:04d}.flac\t{3000 + 10 * n + (n == 4)}" for n in range(10)]]
    assert run(manifest(tmp_path / "data", "m.tsv", lines), "--out", tmp_path / "out") == 0
    assert bad_files(tmp_path / "out") == {"4": "length_mismatch"}


def test_binary_that_calls_itself_a_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "m.tsv").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text at byte 0" in failure(capsys, tmp_path / "m.tsv", "--out", tmp_path / "out")
