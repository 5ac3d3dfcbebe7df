"""Well-known corpora as they are laid out: a tiny tree of each, and what is read of it."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.support.audio_files import encoded, tone
from tests.support.preparing import bad_files, failure, run
from wavlm_jax.audio.wave import to_int16
from wavlm_jax.data.corpus import Corpus, turns_of
from wavlm_jax.data.entries import Entry, SourceError
from wavlm_jax.data.sources import open_source
from wavlm_jax.tasks.speaker import place_trials

WAVE = to_int16(tone(16000))
FLAC, WAV = encoded(WAVE[:500]), encoded(WAVE[:500], kind="WAV")


def tree(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def read(root: Path, **options) -> dict[str, tuple[str, str]]:
    """Id -> (speaker, text)."""
    return {entry.id: (entry.speaker, entry.text) for entry in open_source(str(root), **options).entries}


def test_librispeech(tmp_path: Path):
    texts = "\ufeff19-198-0000 NORTHANGER ABBEY\n19-198-0001 THIS LITTLE WORK\n19-198-0009 IS NOT THERE\n"
    files = {f"19/198/19-198-000{n}.flac": FLAC for n in range(3)} | {"19/198/19-198.trans.txt": texts}
    assert read(tree(tmp_path, files)) == {
        "19/198/19-198-0000": ("19", "NORTHANGER ABBEY"),
        "19/198/19-198-0001": ("19", "THIS LITTLE WORK"),
        "19/198/19-198-0002": ("", ""),
    }
    assert open_source(str(tmp_path)).notes == (
        "read as LibriSpeech: 3 files, 2 with a transcript, 2 with a speaker",
        "1 transcripts have no audio file, such as that of 19/198/19-198-0009",
    )


def test_plain_takes_the_audio_alone(tmp_path: Path):
    tree(tmp_path / "in", {"19/198/19-198-0000.flac": encoded(WAVE), "19/198/19-198.trans.txt": "19-198-0000 A TEXT\n"})
    for options, text in (((), "A TEXT"), (("--plain",), "")):
        out = tmp_path / f"out{len(options)}"
        assert run(tmp_path / "in", *options, "--out", out) == 0
        assert list(Corpus.open(out).texts) == [text]


def test_libri_light(tmp_path: Path):
    meta = json.dumps({"speaker": "100", "book_meta": {"id": "1"}, "snr": 9.0})
    files = {"small/100/book/a_00.flac": FLAC, "small/100/book/a_00.json": meta, "small/7/b/c.flac": FLAC}
    files |= {"1h/0/clean/5/6/5-6-0000.flac": FLAC, "1h/0/clean/5/6/5-6.trans.txt": "5-6-0000 LABELLED\n"}
    assert read(tree(tmp_path, files)) == {
        "small/100/book/a_00": ("100", ""),
        "small/7/b/c": ("", ""),
        "1h/0/clean/5/6/5-6-0000": ("5", "LABELLED"),
    }
    for odd in ('{"speaker": ["7"]}', "[1]", "{", '{"name": 1}'):
        tree(tmp_path, {"small/7/b/c.json": odd})
        assert read(tmp_path)["small/7/b/c"] == ("", "")


def test_timit(tmp_path: Path):
    place = "TRAIN/DR1/FCJF0/"
    files = {
        place + "SA1.WAV": encoded(WAVE[:500], kind="NIST"),
        place + "SA1.WAV.wav": WAV,
        place + "SA1.TXT": "0 500 She had your dark suit.\n",
        place + "SA1.WRD": "0 200 she\n200 500 had\n",
        place + "SA1.PHN": "0 200 h#\n200 500 sh\n",
        place + "SX2.WAV.wav": WAV,
        place + "SX2.WRD": "0 200 she\n200 500 had\n",
    }
    source = open_source(str(tree(tmp_path, files)))
    assert [entry.id for entry in source.entries] == [place + "SA1", place + "SX2.WAV"]
    assert [entry.text for entry in source.entries] == ["She had your dark suit.", "she had"]
    assert {entry.speaker for entry in source.entries} == {"FCJF0"}
    assert source.entries[0].phones == (["h#", "sh"], [0, 200], [200, 500])
    assert "left out: 1 further copies of these (second microphones, converted files)" in source.notes
    tree(tmp_path, {place + "SA1.PHN": "0 h#\n"})
    with pytest.raises(SourceError, match=r"SA1.PHN:1: found '0 h#', expected start end text"):
        read(tmp_path)
    assert set(read(tmp_path, plain=True).values()) == {("", "")}
    assert len(read(tmp_path, plain=True)) == 3


def test_vctk(tmp_path: Path):
    names = ("wav48_silence_trimmed/p225/p225_001_mic1.flac", "wav48_silence_trimmed/p225/p225_001_mic2.flac")
    files = dict.fromkeys(names, FLAC) | {"wav48_silence_trimmed/p280/p280_002_mic2.flac": FLAC}
    files |= {"txt/p225/p225_001.txt": "Please call Stella.\n", "txt/p280/p280_002.txt": "Ask her.\n"}
    assert read(tree(tmp_path, files)) == {
        "wav48_silence_trimmed/p225/p225_001_mic1": ("p225", "Please call Stella."),
        "wav48_silence_trimmed/p280/p280_002_mic2": ("p280", "Ask her."),
    }
    old = {"VCTK/wav48/p225/p225_001.wav": WAV, "VCTK/txt/p225/p225_001.txt": "Please call Stella."}
    assert read(tree(tmp_path / "old", old)) == {"VCTK/wav48/p225/p225_001": ("p225", "Please call Stella.")}


def test_voxceleb_and_its_trials(tmp_path: Path):
    names = ("id10270/x6uYqmx31kE/00001", "id10270/8jEAjG6SegY/00008", "id10300/ize_eiCFEg0/00003")
    tree(tmp_path / "vox", {f"wav/{name}.wav": WAV for name in names})
    assert {speaker for speaker, _ in read(tmp_path / "vox").values()} == {"id10270", "id10300"}
    assert run(tmp_path / "vox", "--out", tmp_path / "out") == 0
    trials = f"1 {names[0]}.wav {names[1]}.wav\n0 {names[0]}.wav {names[2]}.wav\n"
    tree(tmp_path, {"veri_test2.txt": trials})
    pairs = place_trials([str(tmp_path / "veri_test2.txt")], {"test": Corpus.open(tmp_path / "out")})["test"][0]
    assert (list(pairs.left), list(pairs.right), list(pairs.same)) == ([1, 1], [0, 2], [True, False])


def test_ljspeech(tmp_path: Path):
    lines = 'LJ001-0001|Printing, in "1440"|Printing, in "fourteen forty"\nLJ001-0002|it, was|\n'
    tree(tmp_path, {"wavs/LJ001-0001.wav": WAV, "wavs/LJ001-0002.wav": WAV, "metadata.csv": lines})
    expected = {"LJ001-0001": ("", 'Printing, in "fourteen forty"'), "LJ001-0002": ("", "it, was")}
    assert read(tmp_path) == read(tmp_path / "metadata.csv") == expected
    assert read(tmp_path, chosen={"text": "raw_text"})["LJ001-0001"] == ("", 'Printing, in "1440"')


def test_common_voice(tmp_path: Path):
    head, row = "client_id\tpath\tsentence_id\tsentence\tup_votes\n", 'f00\tcommon_voice_en_1.mp3\t7\tSaid "so"\t2\n'
    tree(tmp_path, {"clips/common_voice_en_1.mp3": b"x", "train.tsv": "\ufeff" + head + row, "test.tsv": head + row})
    tree(tmp_path, {"clip_durations.tsv": "clip\tduration[ms]\n"})
    with pytest.raises(SourceError, match=r"has the splits test, train, .*; pass --split"):
        read(tmp_path)
    expected = {"common_voice_en_1": ("f00", 'Said "so"')}
    with pytest.raises(SourceError, match=r"--split \*: found 2 tables; they are read one at a time"):
        read(tmp_path, split="*")
    assert read(tmp_path, split="train") == read(tmp_path / "train.tsv") == expected


KALDI = {
    "rec1.wav": encoded(WAVE, kind="WAV"),
    "data/wav.scp": "rec1 rec1.wav\n",
    "data/segments": "a-1 rec1 0.10 0.35\nb-2 rec1 0.50 -1\n",
    "data/text": "a-1 HELLO WORLD\nb-2\n",
    "data/utt2spk": "a-1 a\nb-2 b\n",
}


def test_kaldi_segments_are_pieces_of_their_recording(tmp_path: Path):
    tree(tmp_path, KALDI)
    assert read(tmp_path / "data") == {"a-1": ("a", "HELLO WORLD"), "b-2": ("b", "")}
    assert run(tmp_path / "data", "--out", tmp_path / "out") == 0
    corpus = Corpus.open(tmp_path / "out")
    np.testing.assert_array_equal(corpus.wave(0), WAVE[1600:5600])
    np.testing.assert_array_equal(corpus.wave(1), WAVE[8000:])
    turns = "SPEAKER rec1 1 0.1 0.2 <NA> <NA> a <NA> <NA>\n"
    tree(tmp_path, {"data/rttm": turns})
    assert run(tmp_path / "data", "--rttm", tmp_path / "data/rttm", "--out", tmp_path / "whole") == 0
    whole = Corpus.open(tmp_path / "whole")
    assert list(whole.ids) == list(turns_of(whole)) == ["rec1"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("wav.scp", "rec1 touch PWNED; cat rec1.wav |\n", r"wav.scp:1: rec1 is the output of a command .* not run"),
        ("wav.scp", "rec1\n", r"wav.scp:1: found 'rec1', expected a name and its value"),
        ("segments", "a-1 rec2 0 1\n", r"segments:1: recording 'rec2' is not in"),
        ("segments", "a-1 rec1 nan 1\n", r"segments:1: found the time 'nan', expected seconds"),
        ("segments", "a-1 rec1 0\n", r"segments:1: found the time '', expected seconds"),
    ],
)
def test_wrong_lines_of_a_kaldi_folder(tmp_path: Path, monkeypatch, file: str, content: str, message: str):
    monkeypatch.chdir(tmp_path)
    tree(tmp_path, KALDI | {f"data/{file}": content})
    with pytest.raises(SourceError, match=message):
        read(tmp_path / "data")
    assert not (tmp_path / "PWNED").exists()


def cut(**changes) -> dict:
    recording = {
        "id": "r",
        "sources": [{"type": "file", "channels": [0, 1], "source": "r.wav"}],
        "sampling_rate": 16000,
    }
    said = [
        {"id": "s1", "start": 0.2, "duration": 0.05, "text": "WORLD", "speaker": "a"},
        {"id": "s0", "start": 0.0, "duration": 0.1, "text": "HELLO", "speaker": "a"},
    ]
    usual = {"id": "c", "start": 0.1, "duration": 0.25, "channel": 1, "supervisions": said, "recording": recording}
    return usual | {"type": "MonoCut"} | changes


def test_lhotse_cuts_are_parts_of_one_channel(tmp_path: Path):
    stereo = np.stack([WAVE[::-1], WAVE], axis=1)
    soundfile.write(tmp_path / "r.wav", stereo, 16000)
    other = [{"start": 0.2, "duration": 0.4, "text": "TOO LONG", "speaker": "a"}]
    cuts = [cut(), cut(id="out", supervisions=other), cut(id="late", start=0.9, duration=0.2), cut(id="c3", channel=0)]
    lines = "".join(json.dumps(row) + "\n" for row in cuts)
    tree(tmp_path, {"cuts.jsonl.gz": gzip.compress(lines.encode()), "cuts.jsonl": lines})
    expected = {"c": ("a", "HELLO WORLD"), "out": ("", ""), "late": ("a", "HELLO WORLD"), "c3": ("a", "HELLO WORLD")}
    assert read(tmp_path / "cuts.jsonl.gz") == read(tmp_path / "cuts.jsonl") == expected
    assert "1 cuts are of several speakers or reach into other texts" in open_source(f"{tmp_path}/cuts.jsonl").notes[0]
    assert run(tmp_path / "cuts.jsonl.gz", "--out", tmp_path / "out") == 0
    corpus = Corpus.open(tmp_path / "out")
    np.testing.assert_array_equal(corpus.wave(0), WAVE[1600:5600])
    np.testing.assert_array_equal(corpus.wave(2), WAVE[::-1][1600:5600])
    assert bad_files(tmp_path / "out") == {"late": "length_mismatch"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "MixedCut"}, "expected a MonoCut"),
        ({"channel": 2}, "channel 2 is in no file"),
        ({"recording": {"sources": [{"type": "command", "channels": [1], "source": "touch PWNED"}]}}, "is in no file"),
        ({"start": "x"}, "found the time 'x'"),
        ({"recording": cut()["recording"] | {"transforms": [{"name": "Speed"}]}}, "changes its audio"),
        ({"recording": {"sources": [{"type": "file", "channels": 1, "source": "r.wav"}]}}, "channel 1 is in no file"),
        ({"supervisions": [{"start": 10**400, "duration": 1}]}, "found the time '1000"),
        ({"recording": None}, "expected a MonoCut with a recording"),
    ],
)
def test_cuts_that_are_refused(tmp_path: Path, change: dict, message: str):
    tree(tmp_path, {"cuts.jsonl": json.dumps(cut(**change))})
    with pytest.raises(SourceError, match=rf"cuts.jsonl:1: .*{message}"):
        read(tmp_path / "cuts.jsonl")


def test_a_list_that_unpacks_without_end_is_refused(tmp_path: Path):
    tree(tmp_path, {"bomb.jsonl.gz": gzip.compress(b" " * 30_000_000), "cut.jsonl.gz": gzip.compress(b"{}" * 999)[:20]})
    with pytest.raises(SourceError, match=r"bomb.jsonl.gz: grows to more than"):
        read(tmp_path / "bomb.jsonl.gz")
    with pytest.raises(SourceError, match=r"cut.jsonl.gz: cannot be read"):
        read(tmp_path / "cut.jsonl.gz")


def test_columns_that_are_not_used_are_said(tmp_path: Path):
    tree(
        tmp_path, {"a.wav": WAV, "a.csv": "path,emotion\na.wav,joy\n", "a.jsonl": '{"path": "a.wav", "emotion": "joy"}'}
    )
    for name in ("a.csv", "a.jsonl"):
        (note,) = open_source(str(tmp_path / name)).notes
        assert note.startswith(f"{tmp_path / name}: columns not used: emotion (--text-column, ")


def test_nemo(tmp_path: Path):
    rows = [
        {"audio_filepath": "a.wav", "duration": 0.998, "text": "whole", "speaker": 7},
        {"audio_filepath": "b.wav", "offset": 0.5, "duration": 0.25, "text": "a part"},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    tree(tmp_path, {"a.wav": encoded(WAVE, kind="WAV"), "b.wav": encoded(WAVE, kind="WAV"), "manifest.json": lines})
    assert read(tmp_path / "manifest.json") == {"a": ("7", "whole"), "b": ("", "a part")}
    assert run(tmp_path / "manifest.json", "--out", tmp_path / "out") == 0
    corpus = Corpus.open(tmp_path / "out")
    np.testing.assert_array_equal(corpus.wave(0), WAVE)
    np.testing.assert_array_equal(corpus.wave(1), WAVE[8000:12000])


def test_ami_and_librimix_turns_are_found_by_file_name(tmp_path: Path, capsys):
    line = "SPEAKER {} 1 0.1 0.2 <NA> <NA> a <NA> <NA>\n"
    names = ("ES2002a/audio/ES2002a.Mix-Headset", "ES2002b/audio/ES2002b.Mix-Headset")
    tree(tmp_path / "ami", {f"{name}.wav": encoded(WAVE, kind="WAV") for name in names})
    tree(tmp_path / "rttms", {f"{name}.rttm": line.format(name) for name in ("ES2002a", "ES2002b")})
    assert run(tmp_path / "ami", "--rttm", tmp_path / "rttms", "--out", tmp_path / "out") == 0
    assert set(turns_of(Corpus.open(tmp_path / "out"))) == set(names)
    tree(tmp_path / "mix", {f"{kind}/1_2.wav": encoded(WAVE, kind="WAV") for kind in ("mix_clean", "s1", "s2")})
    tree(tmp_path, {"mix.rttm": line.format("1_2")})
    message = failure(capsys, tmp_path / "mix", "--rttm", tmp_path / "mix.rttm", "--out", tmp_path / "out2")
    assert re.search(r"turns are of 1_2, which is the name of several utterances; give the folder", message)
    assert run(tmp_path / "mix/mix_clean", "--rttm", tmp_path / "mix.rttm", "--out", tmp_path / "out3") == 0


def test_digests_of_whole_files_are_those_of_before():
    assert Entry("a", "a.wav", "9@9", 3, "s", "t").listing == '["a", "a.wav", "", 3, "s", "t", null]'
