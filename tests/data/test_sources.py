"""Sources: manifests whose every fault names its line, folders with metadata, and what `datasets` loads."""

import io
import json
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import soundfile

from tests.support.audio_files import encoded, save, tone
from tests.support.preparing import bad_files, failure, run, speech
from wavlm_jax.audio.wave import to_int16
from wavlm_jax.data.__main__ import main
from wavlm_jax.data.corpus import Corpus

SPEECH = [to_int16(tone(3000 + 100 * number, number)) for number in range(6)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows(kind: str = "WAV", **columns: list) -> datasets.Dataset:
    audio = [{"bytes": encoded(samples, kind=kind), "path": f"{n}.{kind.lower()}"} for n, samples in enumerate(SPEECH)]
    plain = datasets.Dataset.from_dict({"audio": audio, **columns})
    return plain.cast_column("audio", datasets.Audio(decode=False))


def prepared(tmp_path: Path, source: object, *words: object) -> Corpus:
    out = tmp_path / "out"
    assert main([str(word) for word in (source, "--out", out, "--workers", 2, *words)]) == 0
    corpus = Corpus.open(out)
    assert len(corpus) == len(SPEECH)
    for number, samples in enumerate(SPEECH):
        np.testing.assert_array_equal(corpus.wave(number), samples)
    return corpus


def test_parquet(tmp_path: Path):
    columns = {"sentence": [f"text {n}" for n in range(6)], "client_id": ["x", "y"] * 3, "utterance_id": list("abcdef")}
    rows("FLAC", **columns).to_parquet(tmp_path / "speech.parquet")
    corpus = prepared(tmp_path, tmp_path / "speech.parquet")
    assert list(corpus.ids) == list("abcdef")
    assert corpus.texts[5] == "text 5"
    assert corpus.speakers[1] == "y"


def test_columns_as_they_are_on_the_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    voices, words = datasets.ClassLabel(names=["anna", "bert"]), datasets.ClassLabel(names=["yes", "no"])
    plain = rows(
        speaker=[0, 1, None, -1, 0, 1],
        speaker_number=[1272.0, None, 84.0, 1.5, 2.0, 3.0],
        label=[0, 1, 0, 1, 0, 1],
        about=[{"client_id": "u", "text": f"a\n b{n}"} for n in range(6)],
    )
    plain.cast_column("speaker", voices).cast_column("label", words).to_parquet(tmp_path / "in.parquet")
    corpus = prepared(tmp_path, tmp_path / "in.parquet")
    assert list(corpus.speakers) == ["anna", "bert", "", "", "anna", "bert"]
    assert list(corpus.texts) == [f"a  b{n}" for n in range(6)]
    note = "columns: speaker is 'speaker', text is 'about.text'; not used: speaker_number, label (--text-column"
    assert note in capsys.readouterr().err
    named = ("--text-column", "label", "--speaker-column", "speaker_number", "--audio-column", "audio")
    shutil.rmtree(tmp_path / "out")
    corpus = prepared(tmp_path, tmp_path / "in.parquet", *named)
    assert list(corpus.texts) == ["yes", "no"] * 3
    assert list(corpus.speakers) == ["1272", "", "84", "1.5", "2", "3"]
    shutil.rmtree(tmp_path / "out")
    assert (
        list(prepared(tmp_path, tmp_path / "in.parquet", "--speaker-column", "about.client_id").speakers) == ["u"] * 6
    )


def test_ids_that_repeat_are_no_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows(id=[7, 7, 7, 8, 9, 10], audio_id=[*"abcde", None]).to_parquet(tmp_path / "in.parquet")
    assert list(prepared(tmp_path, tmp_path / "in.parquet").ids) == list("012345")
    said = capsys.readouterr().err
    assert "rows 0 and 1 have the same id '7' in column 'id', which is no id" in said
    assert "row 5 has none in column 'audio_id', which is no id" in said
    assert "ids are the paths of the audio" in said
    rows(id=[7, 7, 7, 8, 9, 10], utt_id=list("abcdef")).to_parquet(tmp_path / "two.parquet")
    shutil.rmtree(tmp_path / "out")
    assert list(prepared(tmp_path, tmp_path / "two.parquet").ids) == list("abcdef")


def test_arrow_from_save_to_disk_with_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    parts = datasets.DatasetDict({"train": rows(), "test": rows().select([0])})
    parts.save_to_disk(str(tmp_path / "saved"))
    capsys.readouterr()
    assert main([str(tmp_path / "saved"), "--out", str(tmp_path / "out")]) == 1
    assert "has the splits train, test; pass --split" in capsys.readouterr().err
    corpus = prepared(tmp_path, tmp_path / "saved", "--split", "train")
    assert list(corpus.ids) == [f"{n:08d}" for n in range(6)]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_audiofolder_with_metadata(tmp_path: Path, name: str):
    table, lines = ["file_name,transcription"], []
    for number, samples in enumerate(SPEECH):
        save(tmp_path / f"in/{number}.flac", samples)
        lines.append(json.dumps({"file_name": f"{number}.flac", "transcription": f'{number}, "TEXT"'}))
        table.append(f'{number}.flac,"{number}, ""TEXT"""')
    (tmp_path / "in" / name).write_text("\n".join(table if name.endswith("csv") else lines))
    corpus = prepared(tmp_path, tmp_path / "in")
    assert list(corpus.texts) == [f'{number}, "TEXT"' for number in range(6)]
    assert list(corpus.ids) == [str(number) for number in range(6)]


def test_a_row_that_points_out_of_the_data_set_is_a_fault(tmp_path: Path):
    secret = save(tmp_path / "secret.flac", SPEECH[0])
    audio = [{"bytes": encoded(SPEECH[1]), "path": None}, {"bytes": None, "path": str(secret)}]
    audio.append({"bytes": None, "path": "../secret.flac"})
    pyarrow.parquet.write_table(pyarrow.table({"audio": audio}), tmp_path / "in.parquet")
    assert main([str(tmp_path / "in.parquet"), "--out", str(tmp_path / "out")]) == 0
    assert Corpus.open(tmp_path / "out").header.faults == {"outside_root": 2}


def test_what_nobody_can_load_is_an_error_with_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty").mkdir()
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "text.parquet")
    rows(id=["a"] * 6).to_parquet(tmp_path / "twice.parquet")
    rows(text=[["a", "b"]] * 6).to_parquet(tmp_path / "list.parquet")
    rows(speaker=[{"key": 1}] * 6).to_parquet(tmp_path / "nested.parquet")
    for source, expected in (
        ("no/such_data_set", "`datasets` cannot load it either"),
        (tmp_path / "nothing_here.tsv", "`datasets` cannot load it either"),
        (tmp_path / "empty", "`datasets` cannot load it either"),
        (tmp_path / "text.parquet", "found 0 audio columns among text, expected one; --audio-column names it"),
        ((tmp_path / "twice.parquet", "--id-column", "id"), "rows 0 and 1 have the same id 'a' in column 'id'"),
        ((tmp_path / "twice.parquet", "--text-column", "txt"), "no column 'txt' for the text; found id"),
        ((tmp_path / "twice.parquet", "--audio-column", "id"), "found 0 audio columns among audio, id, and 'id' is"),
        (tmp_path / "list.parquet", "row 0: column 'text' is \"['a', 'b']\", expected text"),
        (tmp_path / "nested.parquet", "row 0: column 'speaker' is \"{'key': 1}\", expected text; name speaker.key"),
    ):
        capsys.readouterr()
        words = source if isinstance(source, tuple) else (source,)
        assert main([*map(str, words), "--out", str(tmp_path / "out")]) == 1, source
        assert expected in capsys.readouterr().err


def test_a_folder_of_nothing_but_containers_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("a.m4a", "b.m4a", "c.webm"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(bytes(100))
    message = failure(capsys, tmp_path / "in", "--out", tmp_path / "out")
    assert "only 2 .m4a, 1 .webm, which are not read, expected some of *.aif" in message
    assert message.count("\n") == 1


def test_stored_flac_is_libsndfile_flac(tmp_path: Path):
    rows().to_parquet(tmp_path / "speech.parquet")
    prepared(tmp_path, tmp_path / "speech.parquet")
    stored = datasets.load_from_disk(str(tmp_path / "out"))[2]["audio"]["bytes"]
    info = soundfile.info(io.BytesIO(stored))
    assert (info.format, info.subtype, info.channels, info.samplerate) == ("FLAC", "PCM_16", 1, 16000)


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
    "JSON list as id": (['{"id": [3], "path": "0000.flac"}'], r"m.tsv:1: id is '\[3\]', expected text"),
    "nested speaker": (
        ['{"path": "0000.flac", "speaker": {"name": "a"}}'],
        r"m.tsv:1: speaker is .*, expected text; --speaker-column names another",
    ),
    "blank line in a table": (["path,text", "0000.flac,a", "", "0001.flac,b"], r"m.csv:3: empty line"),
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
    name = "m.csv" if "m.csv" in expected else "m.tsv"
    file = manifest(tmp_path / "data", name, [line.replace(ROOT, str(tmp_path / "data")) for line in lines])
    message = failure(capsys, file, "--out", tmp_path / "out")
    assert re.search(expected, message), message
    assert not list(tmp_path.glob("out*"))


def test_a_manifest_that_lies_about_lengths_is_counted(tmp_path: Path):
    speech(tmp_path / "data", 10)
    lines = [HEADER, *[f"{n}\t{n:04d}.flac\t{3000 + 10 * n + (n == 4)}" for n in range(10)]]
    assert run(manifest(tmp_path / "data", "m.tsv", lines), "--out", tmp_path / "out") == 0
    assert bad_files(tmp_path / "out") == {"4": "length_mismatch"}


def test_columns_of_a_manifest_by_name(tmp_path: Path):
    speech(tmp_path / "data", 2)
    lines = ["\ufeffid,wav,who,said,path", '7,0000.flac,a,"hello\r\nworld\n\nagain",x', "7,0001.flac,b,,x"]
    file = manifest(tmp_path / "data", "m.csv", lines)
    words = ("--id-column", "wav", "--audio-column", "wav", "--speaker-column", "who", "--text-column", "said")
    assert run(file, "--out", tmp_path / "out", *words) == 0
    corpus = Corpus.open(tmp_path / "out")
    assert list(corpus.ids) == ["0000.flac", "0001.flac"]
    assert list(corpus.texts) == ["hello world again", ""]
    assert list(corpus.speakers) == ["a", "b"]
    objects = ['\ufeff{"path": "0000.flac", "speaker": 3, "x": {"norm": 1.0}, "text": ""}']
    file = manifest(tmp_path / "data", "m.jsonl", objects)
    assert run(file, "--out", tmp_path / "json", "--text-column", "x.norm") == 0
    corpus = Corpus.open(tmp_path / "json")
    assert (list(corpus.speakers), list(corpus.texts)) == (["3"], ["1"])


def test_a_folder_has_no_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = speech(tmp_path / "data", 1)
    message = failure(capsys, source, "--out", tmp_path / "out", "--text-column", "said")
    assert "a folder of audio, which has no columns; --text-column is for tables" in message


def test_binary_that_calls_itself_a_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "m.tsv").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text at byte 0" in failure(capsys, tmp_path / "m.tsv", "--out", tmp_path / "out")
