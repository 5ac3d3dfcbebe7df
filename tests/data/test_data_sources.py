"""What `datasets` loads as a source, and held-out shares."""

import io
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import soundfile

from tests.support.audio_files import encoded, save, tone
from wavlm_jax.audio.wave import to_int16
from wavlm_jax.data.__main__ import main
from wavlm_jax.data.corpus import Corpus, CorpusError
from wavlm_jax.data.prepare import PrepareError, split
from wavlm_jax.data.sources import Entry, FileReader, UtteranceSource, from_folder

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
    for source, expected in (
        ("no/such_data_set", "`datasets` cannot load it either"),
        (tmp_path / "nothing_here.tsv", "`datasets` cannot load it either"),
        (tmp_path / "empty", "`datasets` cannot load it either"),
        (tmp_path / "text.parquet", "found 0 audio columns among text, expected one"),
        (tmp_path / "twice.parquet", "rows 0 and 1 have the same id 'a'"),
    ):
        capsys.readouterr()
        assert main([str(source), "--out", str(tmp_path / "out")]) == 1, source
        assert expected in capsys.readouterr().err


def test_a_held_out_share_is_a_matter_of_each_id(tmp_path: Path):
    for number in range(60):
        save(tmp_path / f"in/{number:02d}.flac", SPEECH[0])
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


def test_stored_flac_is_libsndfile_flac(tmp_path: Path):
    rows().to_parquet(tmp_path / "speech.parquet")
    prepared(tmp_path, tmp_path / "speech.parquet")
    stored = datasets.load_from_disk(str(tmp_path / "out"))[2]["audio"]["bytes"]
    info = soundfile.info(io.BytesIO(stored))
    assert (info.format, info.subtype, info.channels, info.samplerate) == ("FLAC", "PCM_16", 1, 16000)
