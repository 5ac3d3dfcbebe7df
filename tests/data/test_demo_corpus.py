"""The embedded corpus: the same bytes every time, exact phones, and no network."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest

from wavlm_jax.data.__main__ import main
from wavlm_jax.data.corpus import Corpus
from wavlm_jax.data.demo_corpus import ACCENTS, PAUSE, DemoSettings, Synthesizer, Voice, sentence, voices

SPLITS = ("train", "valid", "unseen_voices")


def make(out: Path, *words: str) -> int:
    sizes = ["--voices", "4", "--unseen-voices", "1", "--sentences", "6"]
    return main(["demo", "--out", str(out), *sizes, *words])


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "corpus"
    assert make(out) == 0
    return out


def files(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_two_runs_give_the_same_bytes(demo: Path, tmp_path: Path):
    again = tmp_path / "elsewhere"
    assert make(again, "--workers", "1") == 0
    assert files(again) == files(demo)
    assert not list(demo.parent.glob("*.audio"))


def test_a_second_run_does_nothing(demo: Path, capsys: pytest.CaptureFixture[str]):
    before = {file: file.stat().st_mtime_ns for file in demo.rglob("*")}
    assert make(demo) == 0
    assert capsys.readouterr().out.count("nothing to do") == 3
    assert {file: file.stat().st_mtime_ns for file in demo.rglob("*")} == before
    assert make(demo, "--sentences", "7") == 2
    assert "holds a demo corpus of" in capsys.readouterr().err


def test_splits(demo: Path):
    train, valid, unseen = (Corpus.open(demo / name) for name in SPLITS)
    assert (len(train), len(valid), len(unseen)) == (3 * 4, 3 * 2, 6)
    assert set(train.speakers) == set(valid.speakers)
    assert not set(unseen.speakers) & set(train.speakers)
    ids = [*train.ids, *valid.ids, *unseen.ids]
    assert len(set(ids)) == 24
    for corpus in (train, valid, unseen):
        assert corpus.header.faults == {}
        assert corpus.lengths.min() >= 16000
        assert corpus.lengths.max() <= 5 * 16000


def test_words_and_phones(demo: Path):
    corpus = Corpus.open(demo / "train")
    for index, text in enumerate(corpus.texts):
        assert set(text) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZ' ")
        phones = corpus.phones(index)
        assert phones is not None
        assert phones.starts[0] == 0
        assert phones.ends[-1] == corpus.lengths[index]
        np.testing.assert_array_equal(phones.starts[1:], phones.ends[:-1])
        assert (phones.ends > phones.starts).all()
        assert not set("".join(phones.symbols)) & set("',")


def test_phones_are_where_the_sound_is():
    """An s hisses: far more of its power lies above 3 kHz than of a vowel's."""
    spoken = Synthesizer(voices(1)[0]).speak("See the seven silver stones.")
    high: dict[str, list[float]] = {"s": [], "i:": [], "E": [], "oU": []}
    for symbol, start, end in zip(spoken.symbols, spoken.starts, spoken.ends, strict=True):
        if symbol in high and end - start > 400:
            spectrum = np.abs(np.fft.rfft(spoken.samples[start:end].astype(float))) ** 2
            high[symbol].append(spectrum[len(spectrum) * 3 // 8 :].sum() / spectrum.sum())
    assert len(high["s"]) >= 3
    vowels = high["i:"] + high["E"] + high["oU"]
    assert len(vowels) >= 3
    assert min(high["s"]) > 2 * max(vowels)
    quiet = [
        np.median(np.abs(spoken.samples[start:end].astype(int)))
        for symbol, start, end in zip(spoken.symbols, spoken.starts, spoken.ends, strict=True)
        if symbol == PAUSE
    ]
    assert max(quiet) < 0.01 * np.abs(spoken.samples.astype(int)).max()


def test_the_default_has_forty_voices_and_several_hundred_words():
    settings = DemoSettings()
    cast = voices(settings.voices)
    assert settings.voices - settings.unseen_voices >= 40
    assert len({voice.name for voice in cast}) == settings.voices
    assert {voice.accent for voice in cast} == set(ACCENTS)
    said = [sentence(f"{voice.name}-{number:03d}") for voice in cast for number in range(settings.sentences)]
    assert len(set(said)) > 0.99 * len(said)
    words = {word.strip(".?").lower() for text in said for word in text.split()}
    assert len(words) > 400
    assert all(4 <= len(text.split()) <= 14 for text in said)
    assert not [text for text in said if " a a" in text or " a e" in text or " a i" in text or " a o" in text]


def test_every_voice_of_the_default_is_known_to_espeak():
    """Each voice that the default asks for can be chosen and says something."""
    for voice in voices(DemoSettings().voices):
        assert len(Synthesizer(voice).speak("Yes.").samples) > 1000


def test_a_voice_that_does_not_exist_is_an_error_that_names_it():
    with pytest.raises(RuntimeError, match=r"no voice en-us\+nobody"):
        Synthesizer(Voice(name="x", accent="en-us", variant="nobody", speed=170, pitch=50, range=50))


def test_without_the_wheel_the_error_gives_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    assert make(tmp_path / "out") == 2
    assert "pip install 'wavlm-jax[demo]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_voice_rendered_before_an_interruption_is_kept(demo: Path, tmp_path: Path):
    out = tmp_path / "corpus"
    folder = tmp_path / "corpus.audio" / voices(1)[0].name
    folder.mkdir(parents=True)
    (folder / "voice.jsonl").write_text("")  # a finished voice without sentences
    assert make(out) == 0
    kept = Corpus.open(out / "train")
    assert set(kept.speakers) == {voice.name for voice in voices(3)[1:]}
    whole = Corpus.open(demo / "train")
    assert [kept.texts[0], kept.lengths[0]] == [whole.texts[4], whole.lengths[4]]


def test_sizes_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["demo", "--out", str(tmp_path), "--voices", "3", "--unseen-voices", "3"])
    assert "found 3 voices, 3 unseen" in capsys.readouterr().err
