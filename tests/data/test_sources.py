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

from tests.support.audio_files import encoded, hide_pyav, save, tone
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


def corpus_of(folder: Path, source: object, *words: object) -> Corpus:
    assert run(source, "--out", folder / "out", *words) == 0
    return Corpus.open(folder / "out")


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
    assert main([str(tmp_path / "saved"), "--out", str(tmp_path / "out")]) == 2
    assert "has the splits train, test, which are not joined unasked; pass --split" in capsys.readouterr().err
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
    audio += [{"bytes": None, "path": "beside.flac"}, {"bytes": None, "path": str(tmp_path / "in/beside.flac")}, None]
    save(tmp_path / "in/beside.flac", SPEECH[2])
    pyarrow.parquet.write_table(pyarrow.table({"audio": audio}), tmp_path / "in/rows.parquet")
    assert main([str(tmp_path / "in/rows.parquet"), "--out", str(tmp_path / "refused")]) == 0
    assert Corpus.open(tmp_path / "refused").header.faults == {"outside_root": 2, "missing": 1}
    cured = re.findall(r"--root (\S+),", (tmp_path / "refused/bad_files.jsonl").read_text())
    assert cured == [str(tmp_path)] * 2
    corpus = corpus_of(tmp_path, tmp_path / "in/rows.parquet", "--root", tmp_path / "in/..")
    assert [len(corpus), corpus.header.faults] == [5, {"missing": 1}]


def test_paths_in_a_column_of_texts(tmp_path: Path):
    names = [save(tmp_path / f"saved/clips/{n}.flac", samples).name for n, samples in enumerate(SPEECH)]
    datasets.Dataset.from_dict({"audio": [f"clips/{name}" for name in names]}).save_to_disk(str(tmp_path / "saved"))
    assert len(corpus_of(tmp_path, tmp_path / "saved")) == len(names)


def test_what_lies_outside_is_read_where_root_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The hub's cache has links to blobs elsewhere; lists have absolute paths. The cure that a message names works."""
    blob = save(tmp_path / "blobs/0a1b", SPEECH[0], kind="FLAC")
    snapshot = tmp_path / "snapshots/main"
    snapshot.mkdir(parents=True)
    (snapshot / "a.flac").symlink_to(blob)
    (tmp_path / "lists/deep").mkdir(parents=True)
    (tmp_path / "lists/deep/absolute.csv").write_text(f"path,text\n{snapshot}/a.flac,x\n{blob},y\n")
    (tmp_path / "list.csv").write_text("path,text\nsnapshots/main/a.flac,x\n")
    (tmp_path / "lists/deep/m.tsv").write_text(f"{snapshot}\na.flac\t{len(SPEECH[0])}\n")
    for number, source in enumerate(("snapshots/main", "lists/deep/absolute.csv", "lists/deep/m.tsv")):
        message = failure(capsys, tmp_path / source, "--out", tmp_path / "refused")
        cure = re.search(r"--root (\S+),", message)
        assert cure is not None, message
        shutil.rmtree(tmp_path / "refused.partial", ignore_errors=True)
        for root in (cure[1], tmp_path, "/"):
            assert run(tmp_path / source, "--out", tmp_path / f"out{number}", "--root", root) == 0, root
    assert run(tmp_path / "list.csv", "--out", tmp_path / "inside") == 0
    (tmp_path / "lists/up.csv").write_text("path\n../snapshots/main/a.flac\n")
    assert run(tmp_path / "lists/up.csv", "--out", tmp_path / "up", "--root", tmp_path) == 0


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("data/train-00000-of-00001", "data/test-00000-of-00001"), ("data/train", "test")),
        (("train/0", "test/0"), ("train", "test")),
        (("train", "test"), ("train", "test")),
        (("train.100-00000-of-00001", "train.360-00000-of-00001"), ("train.100", "train.360")),
        (("en/train-00000-of-00001-0123456789abcdef", "de/train-00000-of-00001"), ("en/train", "de/train")),
        (("part-0000", "part-0001"), None),
        (("train-00000-of-00002", "train-00001-of-00002"), None),
    ],
)
def test_parquet_files_of_several_splits_are_never_joined_unasked(tmp_path: Path, capsys, names, splits):
    for name, picked in zip(names, ([0, 1, 2], [3, 4]), strict=True):
        file = tmp_path / "in" / f"{name}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        rows("FLAC", id=list("abcdef")).select(picked).to_parquet(file)
    if splits is None:
        assert len(corpus_of(tmp_path, tmp_path / "in")) == 5
        return
    message = failure(capsys, tmp_path / "in", "--out", tmp_path / "refused")
    assert "not joined unasked; pass --split" in message
    assert all(split in message for split in splits)
    lengths = [len(corpus_of(tmp_path / str(n), tmp_path / "in", "--split", split)) for n, split in enumerate(splits)]
    assert lengths == [3, 2]
    assert len(corpus_of(tmp_path, tmp_path / "in", "--split", "*")) == 5
    assert "found 0" in failure(capsys, tmp_path / "in", "--out", tmp_path / "refused", "--split", "valid")
    if names[0].startswith("en"):
        assert "found 2" in failure(capsys, tmp_path / "in", "--out", tmp_path / "refused", "--split", "train")
        assert len(corpus_of(tmp_path / "en", tmp_path / "in", "--subset", "en")) == 3


def test_another_split_is_another_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    parts = {"train": rows(), "test": rows().select([5, 4, 3, 2, 1, 0])}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    corpus_of(tmp_path, tmp_path / "saved", "--split", "train")
    assert run(tmp_path / "saved", "--out", tmp_path / "out", "--split", "train") == 0
    assert "made from data set" in failure(capsys, tmp_path / "saved", "--out", tmp_path / "out", "--split", "test")


def test_folders_that_are_named_like_splits_are_never_joined_unasked(tmp_path: Path, capsys):
    for name in ("train-clean-100/1/a", "train-clean-360/2/b", "dev-clean/3/c", "tester/d"):
        save(tmp_path / "in" / f"{name}.flac", SPEECH[0])
    message = failure(capsys, tmp_path / "in", "--out", tmp_path / "refused")
    assert "the splits dev-clean, train-clean-100, train-clean-360, which" in message
    for split, ids in (
        ("dev-clean", ["dev-clean/3/c"]),
        ("train*", ["train-clean-100/1/a", "train-clean-360/2/b"]),
        ("*", ["dev-clean/3/c", "tester/d", "train-clean-100/1/a", "train-clean-360/2/b"]),
    ):
        assert list(corpus_of(tmp_path / f"of {split}", tmp_path / "in", "--split", split).ids) == ids
    shutil.rmtree(tmp_path / "in/dev-clean")
    assert len(corpus_of(tmp_path / "alike", tmp_path / "in")) == 3  # all for training
    (tmp_path / "list.csv").write_text("path\nin/tester/d.flac\n")
    assert "choose nothing" in failure(capsys, tmp_path / "list.csv", "--out", tmp_path / "o", "--split", "train")


def test_metadata_below_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in (
        "splits/train/a",
        "splits/test/b",
        "inner/data/a",
        "inner/more/b",
        "two/en/a",
        "two/de/b",
        "top/test/a",
    ):
        save(tmp_path / f"{name}.flac", SPEECH[0])
    save(tmp_path / "top/train/b.flac", SPEECH[1])
    for name, cells in (
        ("splits/train", "a.flac,HELLO\n"),
        ("splits/test", "b.flac,WORLD\n"),
        ("inner/data", "a.flac,HELLO\n"),
        ("two/en", "a.flac,HELLO\n"),
        ("two/de", "b.flac,HALLO\n"),
        ("top", "test/a.flac,HELLO\ntrain/b.flac,WORLD\n"),
    ):
        (tmp_path / name / "metadata.csv").write_text("file_name,transcription\n" + cells)
    for name in ("splits", "top"):
        assert "the splits test, train, which" in failure(capsys, tmp_path / name, "--out", tmp_path / "refused")
    assert "metadata stands in 2 folders (de, en)" in failure(capsys, tmp_path / "two", "--out", tmp_path / "refused")
    assert list(corpus_of(tmp_path / "1", tmp_path / "splits", "--split", "train").texts) == ["HELLO"]
    assert list(corpus_of(tmp_path / "2", tmp_path / "top", "--split", "train").texts) == ["WORLD"]
    assert list(corpus_of(tmp_path / "3", tmp_path / "top", "--split", "*").texts) == ["HELLO", "WORLD"]
    capsys.readouterr()
    assert list(corpus_of(tmp_path / "4", tmp_path / "inner").texts) == ["HELLO"]
    assert "does not list 1 audio files, left out, such as more/b.flac" in capsys.readouterr().err


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
        assert main([*map(str, words), "--out", str(tmp_path / "out")]) == 2, source
        assert expected in capsys.readouterr().err


def test_a_folder_of_nothing_but_containers_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    hide_pyav(monkeypatch)
    for name in ("a.m4a", "b.m4a", "c.webm"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(bytes(100))
    message = failure(capsys, tmp_path / "in", "--out", tmp_path / "out")
    assert "only 2 .m4a, 1 .webm, which are not read (pip install 'wavlm-jax[containers]', or convert them" in message
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
