"""Simulated conversations: nobody overlaps himself, sums are exact, turns are what was mixed, workers do not matter."""

import contextlib
import itertools

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import fftconvolve

from wavlm_jax.data.__main__ import main
from wavlm_jax.data.corpus import TURNS, Corpus
from wavlm_jax.data.simulate import (
    GRID,
    ConversationSettings,
    Draws,
    Room,
    Speech,
    lay_out,
    open_mixer,
    overlap_share,
    speech_spans,
)
from wavlm_jax.text.records import read_rttm

PAUSE = np.zeros(4800)


def voice(speaker: int, number: int) -> np.ndarray:
    """A fifth of a second of silence, a tone, a pause that is too long to be filled, a tone, silence."""
    tones = [
        0.2 * np.sin(2 * np.pi * (200 + 150 * speaker) * np.arange(1600 * (3 + number + part)) / 16_000)
        for part in range(2)
    ]
    return np.concatenate([PAUSE, tones[0], PAUSE, tones[1], PAUSE])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Corpora: eight utterances of four speakers, noise, and one room response with an echo after 100 ms."""
    root = tmp_path_factory.mktemp("simulate")
    (root / "audio").mkdir()
    lines = ["id\tpath\tspeaker"]
    for speaker, number in itertools.product(range(4), range(2)):
        soundfile.write(root / "audio" / f"{speaker}-{number}.flac", voice(speaker, number), 16_000)
        lines.append(f"{speaker}-{number}\t{speaker}-{number}.flac\tvoice {speaker}")
    (root / "audio" / "rows.tsv").write_text("\n".join(lines) + "\n")
    response = np.zeros(2000)
    response[[100, 1700]] = 0.8, 0.4
    for name, wave in (("noise", np.random.default_rng(0).normal(0, 0.1, 30_000)), ("rirs", response)):
        (root / name).mkdir()
        soundfile.write(root / name / "one.wav", wave, 16_000)
        assert main([str(root / name), "--out", str(root / "corpus" / name), "--workers", "1"]) == 0
    words = [str(root / "audio" / "rows.tsv"), "--root", str(root / "audio"), "--workers", "1"]
    assert main([*words, "--out", str(root / "corpus" / "voices")]) == 0
    return root / "corpus"


@given(st.integers(0, 12), st.integers(0, 12), st.integers(2, 40), st.integers(0, 30))
@settings(deadline=None, max_examples=40)
def test_speech_is_where_it_is_loud(before, behind, length, gap):
    """Edges to 10 ms; a gap below 200 ms is filled."""
    tone = 0.3 * np.sin(np.arange(length * 10 * GRID) / 3)
    wave = np.concatenate([np.zeros(before * GRID), tone, np.zeros(gap * GRID), tone, np.zeros(behind * GRID)])
    middle = before + 10 * length
    ends = [(before, 2 * 10 * length + gap + before)] if gap < 20 else []
    ends = ends or [(before, middle), (middle + gap, middle + gap + 10 * length)]
    np.testing.assert_array_equal(speech_spans(wave.astype(np.float32)), np.array(ends) * GRID)


def test_silence_has_no_speech():
    assert speech_spans(np.zeros(16_000, np.float32)).shape == (0, 2)
    assert speech_spans(np.zeros(10, np.float32)).shape == (0, 2)


def speech_of(lengths) -> Speech:
    """Utterances of the given numbers of 10 ms, spread over five speakers."""
    spans = {number: np.array([[5 * GRID, (5 + length) * GRID]]) for number, length in enumerate(lengths)}
    return Speech({f"s{speaker}": list(range(speaker, len(lengths), 5)) for speaker in range(5)}, spans)


layouts = st.fixed_dictionaries(
    {
        "speakers": st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
        "seconds": st.floats(1.0, 90.0),
        "pause_seconds": st.floats(0.05, 3.0),
        "overlap": st.none() | st.floats(0.0, 0.6),
    }
)


@given(layouts, st.lists(st.integers(5, 900), min_size=5, max_size=25), st.integers(0, 2**40))
@settings(deadline=None, max_examples=150)
def test_a_layout_keeps_its_promises(values, lengths, seed):
    speech, wanted = speech_of(lengths), ConversationSettings(**values)
    placed = lay_out(speech, wanted, Draws(seed, 3))
    assert placed == lay_out(speech, wanted, Draws(seed, 3))
    assert len({one.speaker for one in placed}) in wanted.speakers
    assert all(one.start % GRID == 0 and one.samples == lengths[one.utterance] * GRID for one in placed)
    assert [one.start for one in placed] == sorted(one.start for one in placed)
    for speaker in {one.speaker for one in placed}:
        own, available = [one for one in placed if one.speaker == speaker], speech.utterances[speaker]
        assert all(before.end <= after.start for before, after in itertools.pairwise(own))
        heard = [one.utterance for one in own]
        available = len(speech.utterances[speaker])
        assert all(
            len(set(heard[i : i + available])) == len(heard[i : i + available]) for i in range(0, len(heard), available)
        )
    if wanted.overlap is not None:
        edges = sorted([(one.start, 1) for one in placed] + [(one.end, -1) for one in placed])
        assert max(itertools.accumulate(change for _, change in edges)) <= 2
        if wanted.overlap == 0:
            assert max(itertools.accumulate(change for _, change in edges)) == 1


@pytest.mark.parametrize("share", [0.05, 0.15, 0.3])
def test_overlap_comes_near_what_is_asked_for(share):
    lengths = np.random.default_rng(0).integers(50, 600, 60)
    wanted = ConversationSettings(seconds=120.0, overlap=share)
    found = []
    for number in range(40):
        placed = lay_out(speech_of(lengths.tolist()), wanted, Draws(0, number))
        edges = sorted([(one.start, 1) for one in placed] + [(one.end, -1) for one in placed])
        times = np.diff([time for time, _ in edges])
        active = np.array(list(itertools.accumulate(change for _, change in edges)))[:-1]
        found.append(times[active == 2].sum() / times[active >= 1].sum())
    assert np.mean(found) == pytest.approx(share, rel=0.15)


def test_pauses_are_exponential():
    draws = Draws(5, 0)
    pauses = np.array([draws.pause(2.0) for _ in range(4000)]) / 16_000
    assert pauses.mean() == pytest.approx(2.0, rel=0.06)
    assert np.mean(pauses > 4.0) == pytest.approx(np.exp(-2), abs=0.02)


def test_what_is_written_is_what_was_mixed(root, tmp_path, capsys):
    """The corpus' samples are the sum of the voices at their places, and the turns are where each voice is loud."""
    words = [
        "simulate",
        str(root / "voices"),
        "--out",
        str(tmp_path / "sim"),
        "--conversations",
        "3",
        "--seconds",
        "12",
    ]
    assert main([*words, "--workers", "1"]) == 0
    assert "3 utterances" in (said := capsys.readouterr().out)
    assert "of the time in which anybody speaks" in said
    corpus, turns = Corpus.open(tmp_path / "sim"), read_rttm(tmp_path / "sim" / TURNS)
    mixer = open_mixer(root / "voices", ConversationSettings(seconds=12.0), Room(), 0, 1)
    for number, name in enumerate(corpus.ids):
        parts = {one.speaker: np.zeros(int(corpus.lengths[number])) for one in mixer.layout(number)}
        for one in mixer.layout(number):
            parts[one.speaker][one.start : one.end] += mixer.voice(one)
        wave = corpus.wave(number) / 32768
        stack = np.stack(list(parts.values()), axis=1)
        gains, *_ = np.linalg.lstsq(stack, wave, rcond=None)
        assert np.abs(stack @ gains - wave).max() < 3 / 32768
        assert np.all(np.abs(20 * np.log10(gains / gains.mean())) < 10.1)
        for speaker, part in parts.items():
            loud = np.zeros(len(part), bool)
            for turn in turns:
                if (turn.recording, turn.speaker) == (name, speaker):
                    loud[round(turn.start * 16_000) : round(turn.end * 16_000)] = True
            assert not np.abs(part[~loud]).any()
            blocks = np.square(part[: len(part) // GRID * GRID]).reshape(-1, GRID).mean(axis=1)
            np.testing.assert_array_equal(blocks > 1e-6, loud[::GRID][: len(blocks)])
    assert overlap_share(turns) <= 0.5


def test_workers_and_interruptions_change_nothing(root, tmp_path):
    words = ["simulate", str(root / "voices"), "--conversations", "70", "--seconds", "2", "--speakers", "2"]
    assert main([*words, "--out", str(tmp_path / "one"), "--workers", "1"]) == 0
    assert main([*words, "--out", str(tmp_path / "two"), "--workers", "2"]) == 0
    one, two = (Corpus.open(tmp_path / name) for name in ("one", "two"))
    assert len(one.header.shards) == 2
    assert one.fingerprint == two.fingerprint
    assert (tmp_path / "one" / TURNS).read_text() == (tmp_path / "two" / TURNS).read_text()
    assert main([*words, "--out", str(tmp_path / "one"), "--workers", "1"]) == 0
    assert main([*words, "--out", str(tmp_path / "one"), "--seed", "1"]) == 2
    assert main([*words, "--out", str(tmp_path / "other"), "--workers", "1", "--seed", "1"]) == 0
    assert Corpus.open(tmp_path / "other").fingerprint != one.fingerprint


def test_rooms_keep_the_time_and_noise_has_its_level(root):
    plain = open_mixer(root / "voices", ConversationSettings(seconds=6.0), Room(), 0, 1)
    rooms = Room(responses=Corpus.open(root / "rirs"))
    echoing = open_mixer(root / "voices", ConversationSettings(seconds=6.0), rooms, 0, 1)
    dry, wet = plain.wave(0), echoing.wave(0)
    response = np.zeros(1601)
    response[[0, 1600]] = np.array([0.8, 0.4]) / np.hypot(0.8, 0.4)
    np.testing.assert_allclose(wet, fftconvolve(dry, response)[: len(dry)], atol=1e-4)
    noisy = Room(noise=Corpus.open(root / "noise"), snr_db=(10.0, 10.0))
    heard = open_mixer(root / "voices", ConversationSettings(seconds=6.0), noisy, 0, 1).wave(0) - dry
    assert 20 * np.log10(dry.std() / heard.std()) == pytest.approx(10.0, abs=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--speakers", "6"], "found 4 with speech, expected 6 or more"),
        (["--overlap", "1.5"], "overlap: found 1.5, expected a share in [0, 1)"),
        (["--pause-seconds", "0"], "pause_seconds: found 0.0, expected more than 0"),
        (["--conversations", "0"], "--conversations: found 0"),
        (["--snr-db", "9", "3"], "snr_db: found (9.0, 3.0)"),
        (["--noise", "nowhere"], "nowhere"),
        (["--snr-db", "nan", "nan"], "--snr-db: found nan, expected a finite number"),
        (["--snr-db", "0", "inf"], "--snr-db: found inf"),
        (["--snr-db", "-500", "0"], "snr_db: found (-500.0, 0.0)"),
        (["--level-db", "1e6"], "level_db: found 1000000.0"),
        (["--seconds", "1e12"], "seconds: found 1000000000000.0"),
    ],
)
def test_wrong_options_get_an_answer(root, tmp_path, capsys, options, message):
    words = ["simulate", str(root / "voices"), "--out", str(tmp_path / "sim"), "--workers", "1", *options]
    with contextlib.suppress(SystemExit):  # argparse leaves with its own message
        assert main(words) == 2
    assert message in capsys.readouterr().err


def test_a_corpus_without_speakers_is_refused(root, tmp_path, capsys):
    assert main(["simulate", str(root / "noise"), "--out", str(tmp_path / "sim"), "--workers", "1"]) == 2
    assert "names no speaker" in capsys.readouterr().err
