"""A prepared corpus: what went in comes out, in any process; a damaged one is refused with the file's name."""

import json
import multiprocessing
import pickle
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.audio_files import encoded, save, tone
from wavlm_jax.audio.wave import AudioFault, to_int16
from wavlm_jax.data.corpus import Corpus, CorpusError
from wavlm_jax.data.manifests import from_manifest
from wavlm_jax.data.prepare import Preparation, prepare

LENGTHS = [400, 401, 5000, 16000, 32000, 12345, 8000] * 20
PHONES = {"symbols": ["a", "b"], "starts": [0, 200], "ends": [200, 400]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A corpus of 140 utterances in three shards, from a manifest with everything in it."""
    root = tmp_path_factory.mktemp("speech")
    rows = []
    for number, length in enumerate(LENGTHS):
        path = f"audio/{number:03d}.flac"
        save(root / path, to_int16(tone(length, number)))
        row = {
            "id": f"utt-{number}",
            "path": path,
            "samples": length,
            "speaker": f"s{number % 7}",
            "text": f"TEXT {number}",
        }
        rows.append(row | ({"phones": PHONES} if number % 2 == 0 else {}))
    manifest = root / "all.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(from_manifest(manifest), root / "corpus", Preparation(name="small"))
    return root / "corpus"


@pytest.fixture
def corpus(folder: Path) -> Corpus:
    return Corpus.open(folder)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A corpus to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_it_holds_what_went_in(corpus: Corpus, folder: Path):
    assert len(corpus) == corpus.header.count == len(LENGTHS)
    assert corpus.header.speakers == 7
    assert corpus.header.hours == pytest.approx(sum(LENGTHS) / 16000 / 3600, abs=1e-6)
    assert list(corpus.ids) == [f"utt-{number}" for number in range(len(LENGTHS))]
    assert corpus.ids[3] == "utt-3"
    assert corpus.ids[1:4] == ["utt-1", "utt-2", "utt-3"]
    assert corpus.speakers[8] == "s1"
    assert corpus.texts[139] == "TEXT 139"
    np.testing.assert_array_equal(corpus.lengths, LENGTHS)
    assert (corpus.lengths.dtype, corpus.means.dtype, corpus.variances.dtype) == (np.int64, np.float32, np.float32)
    for index in (0, 63, 64, 139):  # both sides of a shard's border
        expected, _ = soundfile.read(folder.parent / f"audio/{index:03d}.flac", dtype="int16")
        wave = corpus.wave(index)
        assert wave.dtype == np.int16
        np.testing.assert_array_equal(wave, expected)
        scaled = expected / 32768
        np.testing.assert_allclose(corpus.means[index], scaled.mean(), atol=1e-7)
        np.testing.assert_allclose(corpus.variances[index], scaled.var(), rtol=1e-5)


def test_phones_are_null_where_there_are_none(corpus: Corpus):
    phones = corpus.phones(0)
    assert phones is not None
    assert phones.symbols == ["a", "b"]
    np.testing.assert_array_equal(phones.starts, [0, 200])
    np.testing.assert_array_equal(phones.ends, [200, 400])
    assert corpus.phones(1) is None


@given(st.integers(0, len(LENGTHS) - 1), st.data())
@settings(max_examples=60, deadline=None)
def test_any_crop_is_a_slice(folder: Path, index: int, data: st.DataObject):
    corpus = Corpus.open(folder)
    start = data.draw(st.integers(0, LENGTHS[index] - 1))
    size = data.draw(st.integers(1, LENGTHS[index] - start))
    np.testing.assert_array_equal(corpus.wave(index, start, size), corpus.wave(index)[start : start + size])


def test_numbers_out_of_range_are_refused(corpus: Corpus):
    for index in (-1, len(LENGTHS)):
        with pytest.raises(IndexError, match="expected 0 to 139"):
            corpus.wave(index)
    with pytest.raises(AudioFault, match=r"utterance utt-0: found 390 samples from sample 10 on, expected 400"):
        corpus.wave(0, 10, 400)


def test_only_its_path_travels_to_a_worker(corpus: Corpus):
    corpus.wave(5)
    sent = pickle.dumps(corpus)
    assert len(sent) < 4000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.apply(_digest, (corpus,))
    assert there == _digest(corpus)


def _digest(corpus: Corpus) -> list[int]:
    return [int(corpus.wave(index).astype(np.int64).sum()) for index in range(0, len(corpus), 10)]


def test_datasets_opens_it_too(folder: Path):
    dataset = datasets.load_from_disk(str(folder))
    assert dataset.num_rows == len(LENGTHS)
    assert isinstance(dataset.features["audio"], datasets.Audio)
    row = dataset[70]
    assert row["id"] == "utt-70"
    assert row["audio"]["bytes"] == (folder.parent / "audio/070.flac").read_bytes()


def test_a_whole_corpus_verifies(corpus: Corpus):
    corpus.verify()


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.arrow"))


def test_a_missing_shard_is_named(copy: Path):
    shards(copy)[1].unlink()
    with pytest.raises(CorpusError, match=r"data-00001-of-00003.arrow: missing"):
        Corpus.open(copy)


def test_a_shard_that_was_cut_off_is_named(copy: Path):
    shard = shards(copy)[2]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CorpusError, match=r"data-00002-of-00003.arrow: \d+ bytes long, header.json says"):
        Corpus.open(copy)


def test_one_flipped_byte_is_found_by_verify_and_named_when_it_is_read(copy: Path):
    shard = shards(copy)[0]
    data = bytearray(shard.read_bytes())
    place = data.index(encoded(to_int16(tone(5000, 2)))) + 3000
    data[place] ^= 0xFF
    shard.write_bytes(data)
    damaged = Corpus.open(copy)
    with pytest.raises(CorpusError, match=r"data-00000-of-00003.arrow: SHA-256"):
        damaged.verify()
    with pytest.raises(AudioFault, match="utterance utt-2: "):
        damaged.wave(2)
    assert len(damaged.wave(3)) == LENGTHS[3]


def test_a_shard_of_another_corpus_is_named(copy: Path):
    first, second = shards(copy)[:2]
    shutil.copy(second, first)
    with pytest.raises(CorpusError, match=r"data-00000-of-00003.arrow"):
        Corpus.open(copy).verify()


def test_headers_that_are_missing_or_broken_or_from_the_future_are_refused(copy: Path):
    header = copy / "header.json"
    values = json.loads(header.read_text())
    for text, message in (
        ("{", "not a corpus header"),
        ("[]", "not a corpus header"),
        (json.dumps(values | {"format": 99}), "corpus format 99, this version reads 1"),
        (json.dumps(values | {"count": "many"}), "not a corpus header.*count"),
        (json.dumps(values | {"count": 10**30}), "count: found 1000"),
        (json.dumps(values | {"hours": float("nan")}), "hours: found nan"),
        (
            json.dumps(values | {"shards": [values["shards"][0] | {"file": "../../x"}]}),
            r"names the shard '\.\./\.\./x'",
        ),
        (json.dumps(values | {"shards": [values["shards"][0] | {"file": "/etc/passwd"}]}), "names the shard '/etc"),
        (json.dumps(values | {"shards": values["shards"][:1] * 2}), "names the shard 'data-00000"),
        (json.dumps(values | {"shards": []}), "its shards have 0 rows"),
    ):
        header.write_text(text)
        with pytest.raises(CorpusError, match=message):
            Corpus.open(copy)
    header.unlink()
    with pytest.raises(CorpusError, match=r"python -m wavlm_jax.data SOURCE --out"):
        Corpus.open(copy)
