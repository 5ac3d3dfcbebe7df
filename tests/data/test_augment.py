"""Noise, rooms and speed: exact ratios, scipy's own results, the same rows whoever makes them."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.signal
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.finetune import speaker_xvector
from tests.support.tones import ONE, make_corpus, ten_texts, tiny_classes, tiny_ctc, tiny_speakers
from wavlm_jax.data.augment import (
    Augment,
    AugmentationSettings,
    after_speed,
    before_speed,
    change_speed,
    in_room,
    noise_below,
)
from wavlm_jax.data.batches import BatchSettings
from wavlm_jax.data.corpus import Corpus
from wavlm_jax.data.loader import CropStream, Host, LoaderSettings, PaddedStream
from wavlm_jax.data.prepare import Preparation, prepare
from wavlm_jax.data.sources import from_folder
from wavlm_jax.settings import SettingsError
from wavlm_jax.shapes import samples_for
from wavlm_jax.tasks import classification, ctc, speaker

NOTHING = {
    "noise_corpus": None,
    "noise_prob": 0.0,
    "noise_snr_db": (0.0, 15.0),
    "room_corpus": None,
    "room_prob": 0.0,
    "speeds": (),
    "speed_makes_speakers": False,
}


def wave(samples=16_000, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("augment")


@pytest.fixture(scope="module")
def corpora(root):
    """Speech, noise and rooms, prepared as a user does."""
    (root / "sound").mkdir()
    for number in range(3):
        soundfile.write(root / "sound" / f"{number}.wav", wave(9_000 + 20_000 * number, number), 16_000)
    prepare(from_folder(root / "sound"), root / "noise", Preparation(name="noise"))
    (root / "responses").mkdir()
    tail = 0.9 * np.exp(-np.arange(4_000) / 600) * np.sign(wave(4_000, 9))
    soundfile.write(root / "responses" / "hall.wav", np.concatenate([np.zeros(37), tail]), 16_000)
    prepare(from_folder(root / "responses"), root / "rooms", Preparation(name="rooms"))
    return make_corpus(root, "train", ten_texts()), root / "noise", root / "rooms"


def section(corpora, **changes):
    """All of it on."""
    values = {"noise_corpus": str(corpora[1]), "noise_prob": 0.5, "room_corpus": str(corpora[2]), "room_prob": 0.5}
    return NOTHING | values | {"speeds": (0.9, 1.0, 1.1)} | changes


@settings(deadline=None, max_examples=30)
@given(st.floats(-20, 40), st.integers(1, 40_000), st.integers(1, 50_000))
def test_noise_has_exactly_the_ratio(snr_db, length, noise_length):
    clean, noise = wave(length), wave(noise_length, 1)
    added = noise_below(clean, noise, snr_db).astype(np.float64)
    found = 10 * np.log10(np.mean(np.square(clean, dtype=np.float64)) / np.mean(np.square(added)))
    np.testing.assert_allclose(found, snr_db, atol=1e-4)
    np.testing.assert_allclose(added / added[0], np.resize(noise, length) / noise[0], rtol=1e-4)


def test_silence_stays_what_it_is():
    silent, loud = np.zeros(500, np.float32), wave(500)
    np.testing.assert_array_equal(noise_below(silent, loud, 5.0), silent)
    np.testing.assert_array_equal(noise_below(loud, silent, 5.0), silent)
    np.testing.assert_array_equal(in_room(silent, loud), silent)
    np.testing.assert_array_equal(in_room(loud, silent), loud)


def test_a_room_is_scipys_convolution_with_the_direct_sound_in_place():
    clean = wave(5_000)
    response = np.concatenate([np.zeros(50), np.exp(-np.arange(2_000) / 300)]).astype(np.float32)
    heard = in_room(clean, response)
    direct = scipy.signal.convolve(clean.astype(np.float64), response, method="direct")[50:5_050]
    wanted = direct * np.sqrt(np.mean(clean.astype(np.float64) ** 2) / np.mean(direct**2))
    np.testing.assert_allclose(heard, wanted, atol=1e-5)
    impulse = np.zeros(100, np.float32)
    impulse[30] = 0.7
    np.testing.assert_allclose(in_room(clean, impulse), clean, atol=1e-5)


@pytest.mark.parametrize("speed", [0.5, 0.9, 1.1, 1.25, 2.0])
def test_speed_moves_a_tone_and_the_length(speed):
    time = np.arange(32_000) / 16_000
    faster = change_speed(np.sin(2 * np.pi * 1000 * time).astype(np.float32), speed)
    assert len(faster) == after_speed(32_000, speed) == math.ceil(32_000 / speed - 1e-6)
    wanted = np.sin(2 * np.pi * 1000 * speed * np.arange(len(faster)) / 16_000)
    np.testing.assert_allclose(faster[2_000:-2_000], wanted[2_000:-2_000], atol=3e-3)


@given(st.integers(1, 10**6), st.sampled_from([0.5, 0.8, 0.9, 1.0, 1.05, 1.1, 2.0]))
def test_lengths_of_speeds_belong_together(samples, speed):
    source = before_speed(samples, speed)
    assert after_speed(source, speed) <= samples < after_speed(source + 1, speed) + 1


def read(stream, count=3):
    return [batch for _, (_, batch) in zip(range(count), stream.batches(), strict=False)]


def labels(index, first_frame, frames, bits):
    del index, first_frame, frames, bits
    return {}


BATCH = BatchSettings(buckets=(32, 40), seconds_per_update=5.0, seconds_per_device=100.0, row_multiple=4)


def crops(corpora, host=None, workers=0, **changes):
    augment = Augment(AugmentationSettings(**section(corpora, **changes)))
    loader = LoaderSettings(workers=workers)
    corpus = Corpus.open(corpora[0])
    return CropStream(corpus, BATCH, loader, seed=3, annotate=labels, host=host, augment=augment)


def test_rows_depend_on_seed_and_batch_alone(corpora):
    """Any number of hosts, any start, twice: the same samples; and they are not the clean ones."""
    whole = read(crops(corpora))
    again = [batch for _, (_, batch) in zip(range(2), crops(corpora).batches(1), strict=False)]
    np.testing.assert_array_equal(whole[1]["waveform"], again[0]["waveform"])
    halves = [read(crops(corpora, Host(index, 2))) for index in range(2)]
    for number, batch in enumerate(whole):
        for name, array in batch.items():
            np.testing.assert_array_equal(array, np.concatenate([half[number][name] for half in halves]))
    off = {"noise_prob": 0.0, "room_prob": 0.0, "speeds": ()}
    clean = read(crops(corpora, **off))
    assert any((a["waveform"] != b["waveform"]).any() for a, b in zip(whole, clean, strict=True))


def test_augmented_rows_say_their_own_statistics(corpora):
    for batch in read(crops(corpora, noise_prob=1.0, noise_snr_db=(-5.0, 0.0))):
        for row, count in enumerate(batch["num_samples"]):
            real = batch["waveform"][row, :count].astype(np.float64) / 32768
            np.testing.assert_allclose(batch["mean"][row], real.mean(), atol=1e-6)
            np.testing.assert_allclose(batch["variance"][row], real.var(), rtol=1e-4)
            assert np.abs(real).max() < 1
            assert not batch["waveform"][row, count:].any()


def test_speed_fills_a_crop_from_more_or_less_of_the_recording(corpora):
    """A faster crop takes more samples of its utterance; where there are no more, the rest of the row is padding."""
    corpus = Corpus.open(corpora[0])
    stream = crops(corpora, noise_prob=0.0, room_prob=0.0, speeds=(2.0,))
    for batch in read(stream):
        for row, index in enumerate(batch["id"]):
            samples = batch["waveform"].shape[1]
            assert batch["num_samples"][row] == min(samples, after_speed(int(corpus.lengths[index]), 2.0))
    for batch in read(crops(corpora, noise_prob=0.0, room_prob=0.0, speeds=(0.5,))):
        assert (batch["num_samples"] == batch["waveform"].shape[1]).all()


def test_a_whole_utterance_is_never_cut_by_a_slower_speed(corpora):
    corpus = Corpus.open(corpora[0])
    augment = Augment(AugmentationSettings(**section(corpora, noise_prob=0.0, room_prob=0.0, speeds=(0.8,))))
    batch = replace(BATCH, buckets=(56, 72, 96))
    seen = set()
    for arrays in read(PaddedStream(corpus, batch, LoaderSettings(), annotate=labels, seed=0, augment=augment), 6):
        for index, count in zip(arrays["id"], arrays["num_samples"], strict=True):
            length = int(corpus.lengths[index])
            slower = after_speed(length, 0.8)
            fits = slower <= arrays["waveform"].shape[1]
            assert count == (slower if fits else length)
            seen.add(fits)
    assert seen == {True, False}


def test_a_speaker_at_another_speed_is_another_speaker(corpora):
    values = section(corpora, noise_prob=0.0, room_prob=0.0, speed_makes_speakers=True)
    config = tiny_speakers(speaker_xvector, corpora[0], corpora[0].parent / "train", target={"shown": "crops"})
    config["data"]["evaluation"] = []
    config["train"]["eval_splits"] = []
    config["batch"]["buckets"] = [32]
    config["augmentation"] = json.loads(json.dumps(values))
    task = speaker.build(config, ONE)
    base = ["speaker0", "speaker1"]
    assert task.resolved["classes"] == base + [f"{name} @0.9" for name in base] + [f"{name} @1.1" for name in base]
    assert task.resolved["head"]["num_labels"] == 6
    speeds, plain = set(), Corpus.open(corpora[0])
    for batch in read(task.stream("train"), 6):
        for index, label in zip(batch["id"], batch["labels"], strict=True):
            assert label % 2 == int(plain.speakers[int(index)][-1])
            speeds.add(int(label) // 2)
    assert speeds == {0, 1, 2}


def test_evaluation_is_never_augmented_and_a_resume_insists_on_the_noise(corpora, root):
    same = make_corpus(root, "same", ten_texts())
    config = tiny_classes(corpora[0], same)
    plain = classification.build(config, ONE)
    hard = classification.build({**config, "augmentation": json.loads(json.dumps(section(corpora)))}, ONE)
    for ours, theirs in zip(read(hard.stream("same")), read(plain.stream("same")), strict=True):
        np.testing.assert_array_equal(ours["waveform"], theirs["waveform"])
    assert set(hard.fingerprints) - set(plain.fingerprints) == {"corpus.noise", "corpus.rooms"}


def test_wrong_settings_get_an_answer(corpora):
    def build(**changes):
        config = tiny_ctc(corpora[0], corpora[0].parent / "same")
        config["augmentation"] = json.loads(json.dumps(NOTHING | changes))
        return ctc.build(config, ONE)

    for changes, message in (
        ({"noise_prob": 0.5}, r"config\.augmentation: noise_prob: found 0\.5 without noise_corpus"),
        ({"speeds": (1.0, 3.0)}, r"speeds: found \(1\.0, 3\.0\), expected different ones, each from 0\.5 to 2"),
        ({"noise_snr_db": (5.0, 0.0)}, r"noise_snr_db: found \(5\.0, 0\.0\)"),
        ({"speeds": (1.0, 0.9), "speed_makes_speakers": True}, r"speed_makes_speakers.*speaker tasks alone"),
    ):
        with pytest.raises(SettingsError, match=message):
            build(**changes)
    with pytest.raises(ValueError, match="no corpus itself"):
        build(noise_prob=0.5, noise_corpus=str(corpora[0].parent))


def test_rows_have_static_shapes(corpora):
    for batch in read(crops(corpora)):
        assert batch["waveform"].shape[1] in {samples_for(32), samples_for(40)}
