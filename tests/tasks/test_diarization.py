"""The diarisation task end to end: ten clips by heart, frames where the turns are, errors as pyannote counts them."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.finetune import frame_classification as recipes
from configs.finetune import superb_sd
from tests.support.head_twins import small_head, torch_head
from tests.support.tones import ONE, assert_outlined, make_corpus, tiny, train
from tests.support.torch_twins import attention_mask, small_config, waveforms
from wavlm_jax.__main__ import main
from wavlm_jax.data.__main__ import main as data_main
from wavlm_jax.data.corpus import TURNS, Corpus, attach_turns
from wavlm_jax.inference.diarization import TurnSettings, turns
from wavlm_jax.loading import load_weights
from wavlm_jax.metrics import diarization_error
from wavlm_jax.model.heads import FrameOutput, WavLMForAudioFrameClassification
from wavlm_jax.settings import SettingsError, read_sections
from wavlm_jax.tasks import diarization
from wavlm_jax.tasks.diarization import (
    ActivityLabels,
    CorpusTurns,
    activity_errors,
    crops_per_epoch,
    first_speaker_cross_entropy,
    frames_of,
    permutation_invariant_loss,
    read_turns,
)
from wavlm_jax.text.records import Region, Turn, read_rttm, write_rttm
from wavlm_jax.training.checkpoint import load_params
from wavlm_jax.training.start import RunSettings

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # transformers' own call

FRAMES = 64
SAMPLES = 320 * FRAMES + 80
EVERY_FRAME = TurnSettings(fill_seconds=0.0, least_seconds=0.0)


class Waves(WavLMForAudioFrameClassification):
    """Stands in for a model where only the loss is asked for: scores are waves over the frames."""

    def setup(self) -> None:
        pass

    def __call__(self, waveform, num_samples=None, masks=None, keys=None) -> FrameOutput:
        del masks, keys
        frames = (waveform.shape[1] - 80) // 320
        phase = jnp.arange(frames)[:, None] * 0.3 + 2.0 * jnp.arange(self.head.num_labels)[None]
        logits = jnp.broadcast_to(3 * jnp.sin(phase)[None], (len(waveform), *phase.shape))
        mask = jnp.arange(frames)[None] < ((num_samples - 80) // 320)[:, None]
        return FrameOutput(logits, mask, None)


def conversation(number: int, frames: int = FRAMES) -> list[tuple[int, int, int]]:
    """(speaker, first frame, end) of two speakers, overlapping in the middle; other times in every clip."""
    first, second = (number % 2, 1 - number % 2) if number % 3 else (number % 2, 2)
    return [(first, 3 + number, frames // 2 + 4), (second, frames // 2 - 4, frames - 2 * number - 1)]


def speak(spoken: list[tuple[int, int, int]], samples: int = SAMPLES) -> np.ndarray:
    """Every speaker a chord of its own, from the start of its first frame to that of its end."""
    time = np.arange(samples) / 16_000
    wave = np.random.default_rng(samples + spoken[0][1]).normal(0, 0.003, samples)
    for speaker, start, end in spoken:
        inside = (time >= 0.02 * start) & (time < 0.02 * end)
        wave += inside * 0.15 * (np.sin(2 * np.pi * (320 + 210 * speaker) * time) + np.sin(900 * (speaker + 2) * time))
    return wave


def turns_of(name: str, spoken: list[tuple[int, int, int]]) -> list[Turn]:
    return [Turn(name, 0.02 * start, 0.02 * (end - start), f"voice{speaker}") for speaker, start, end in spoken]


def make_meetings(root: Path, name: str, talks: list[list[tuple[int, int, int]]], samples: int = SAMPLES) -> Path:
    """A corpus with turns, by the command that people use."""
    folder = root / name
    folder.mkdir()
    for number, spoken in enumerate(talks):
        soundfile.write(folder / f"{name}{number}.wav", speak(spoken, samples), 16_000)
    rttm = [turn for number, spoken in enumerate(talks) for turn in turns_of(f"{name}{number}", spoken)]
    (root / f"{name}.rttm").write_text(write_rttm(rttm))
    words = [str(folder), "--out", str(root / "corpus" / name), "--workers", "1"]
    assert data_main([*words, "--rttm", str(root / f"{name}.rttm")]) == 0
    return root / "corpus" / name


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("frames")


@pytest.fixture(scope="module")
def folders(root):
    talks = [conversation(number) for number in range(10)]
    return {name: make_meetings(root, name, talks) for name in ("train", "same")}


def tiny_frames(folders, **changes) -> dict:
    config = recipes.get_config("demo")
    config.head.num_labels = 3
    config.optim.update({"learning_rate": 3e-3, "warmup_steps": 20})
    config.metrics.log_every = 20
    return tiny(config, folders["train"], folders["same"], **changes)


@pytest.fixture(scope="module")
def run(root, folders):
    return root / "run", train(diarization.build, tiny_frames(folders), root / "run")


def test_it_can_be_planned_without_its_data(folders):
    assert_outlined(diarization.outline, diarization.build, tiny_frames(folders))


def test_ten_clips_are_learned_by_heart(run):
    found = run[1].metrics["same"]
    assert found["der"] < 0.02
    assert found["der"] == pytest.approx(found["missed"] + found["false_alarm"] + found["confusion"])
    config, params = load_params(run[0])
    assert config["head"]["num_labels"] == params["classifier"]["kernel"].shape[1] == 3
    assert load_weights(run[0]).origin.trained_seconds == SAMPLES / 16_000


def test_the_command_finds_the_turns_and_pyannote_agrees(run, root, capsys):
    """`diarize` on the files of the corpus: the error rate of the written RTTM is small too."""
    files = [str(root / "same" / f"same{number}.wav") for number in range(10)]
    found = root / "found.rttm"
    reference = ["--reference", str(root / "same.rttm")]
    assert main(["diarize", *files, "--model", str(run[0]), "--out", str(found), *reference]) == 0
    said = capsys.readouterr().err
    regions = [Region(f"same{number}", 0.0, SAMPLES / 16_000) for number in range(10)]
    error = diarization_error(read_rttm(root / "same.rttm"), read_rttm(found), regions)
    assert error.rate < 0.03
    cells = said.splitlines()[-1].split()
    assert (cells[0], cells[5]) == ("all", f"{100 * error.rate:.2f}")
    assert main(["diarize", *files, "--model", str(run[0]), "--reference", str(root / "none.rttm")]) == 2
    (root / "other.rttm").write_text(write_rttm([Turn("other", 0, 1, "A")]))
    assert main(["diarize", *files, "--model", str(run[0]), "--reference", str(root / "other.rttm")]) == 2
    assert "--reference: has no turn of same0" in capsys.readouterr().err


@given(st.integers(0, 10**7), st.integers(0, 10**6))
@settings(deadline=None, max_examples=200)
def test_a_frame_is_active_when_its_middle_is(start, length):
    first, end = frames_of(Turn("r", start / 16_000, length / 16_000, "A"))
    middles = np.arange(first - 2, end + 2) * 320 + 160
    np.testing.assert_array_equal(
        (middles >= start) & (middles < start + length), [0, 0] + [1] * (end - first) + [0, 0]
    )


spans = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 90), st.integers(1, 40)), min_size=1, max_size=12)


def a_recording(turns_in_frames) -> tuple[CorpusTurns, list[Turn]]:
    found = [Turn("r", 0.02 * start, 0.02 * length, f"s{who}") for who, start, length in turns_in_frames]
    ordered = sorted(found)
    names = list(dict.fromkeys(turn.speaker for turn in ordered))
    rows = [(*frames_of(turn), names.index(turn.speaker)) for turn in ordered]
    return CorpusTurns(np.array([0, len(rows)]), *np.array(rows, np.int32).T), ordered


@given(spans, st.integers(0, 60), st.integers(10, 50))
@settings(deadline=None, max_examples=60)
def test_a_crop_has_its_speakers_and_counts_those_it_has_no_room_for(spoken, first, frames):
    recording, found = a_recording(spoken)
    labels = ActivityLabels(recording, 2)(0, first, frames, 0)
    everyone = {turn.speaker: np.zeros(200, bool) for turn in found}
    for turn in found:
        start, end = frames_of(turn)
        everyone[turn.speaker][start:end] = True
    held = {name: active[first : first + frames] for name, active in everyone.items()}
    assert labels["activity"].shape == (frames, 2)
    np.testing.assert_array_equal(labels["activity"].sum(axis=1) + labels["others"], sum(held.values()))
    columns = [column for column in labels["activity"].T if column.any()]
    assert len(columns) == min(2, sum(active.any() for active in held.values()))
    assert all(any(np.array_equal(column, active) for active in held.values()) for column in columns)
    starts = [int(column.argmax()) for column in columns]
    assert starts == sorted(starts)
    left = sorted((int(active.sum()) for active in held.values()), reverse=True)
    assert sorted((int(column.sum()) for column in columns), reverse=True) == left[: len(columns)]


@given(st.integers(0, 2**31), st.integers(1, 4))
@settings(deadline=None, max_examples=12)
def test_errors_in_jit_are_those_of_pyannote(seed, speakers):
    """On the frame grid and with room for every speaker: seconds of the scorer, to the frame."""
    generator = np.random.default_rng(seed)
    wanted, found = (np.repeat(generator.random((1, 20, speakers)) < 0.4, 3, axis=1) for _ in range(2))
    found = np.where(generator.random((1, 60, 1)) < 0.5, wanted[:, :, ::-1], found)
    mask = np.arange(60)[None] < 50
    others = np.zeros((1, 60), np.uint8)
    sums = jax.jit(activity_errors)(jnp.array(found), jnp.array(wanted), jnp.array(others), jnp.array(mask))
    written = [turns("r", one[0, :50].astype(np.float32), EVERY_FRAME) for one in (wanted, found)]
    error = diarization_error(*written, [Region("r", 0.0, 1.0)])
    np.testing.assert_allclose(
        np.array(sums)[:, 0] * 0.02, [error.missed, error.false_alarm, error.confusion, error.total], atol=1e-4
    )


def test_speakers_without_room_are_missed():
    wanted, found = jnp.ones((1, 4, 1), bool), jnp.ones((1, 4, 1), bool)
    others = jnp.array([[0, 1, 2, 0]], jnp.uint8)
    sums = activity_errors(found, wanted, others, jnp.array([[True, True, True, False]]))
    assert [float(part[0]) for part in sums] == [3, 0, 0, 6]


def test_a_crop_of_a_long_recording_has_the_labels_of_its_time(root, folders):
    """Training cuts anywhere on the grid: the loudness of each frame is that of its labels."""
    long = make_meetings(root, "long", [[(0, 10, 120), (1, 200, 330)]], samples=320 * 400 + 80)
    assert list(crops_per_epoch(np.array([SAMPLES - 1, SAMPLES, 2 * SAMPLES]), FRAMES)) == [1, 1, 2]
    task = diarization.build(tiny_frames({**folders, "train": long}), ONE)
    stream, heard = task.stream("train"), set()
    for _, (_, batch) in zip(range(4), stream.batches(), strict=False):
        for row in range(len(batch["id"])):
            power = np.square(batch["waveform"][row, : 320 * FRAMES].astype(float) / 32768).reshape(FRAMES, 320).mean(1)
            np.testing.assert_array_equal(batch["activity"][row].any(axis=1), power > 1e-3)
            heard.add(int(batch["activity"][row].sum()))
    assert len(heard) > 2
    assert stream.census.num_batches * 10 >= 400 // FRAMES


def totals(task, split="same"):
    params = jax.jit(task.init)(jax.random.key(0))
    evaluate = jax.jit(lambda params, batch: task.loss(params, batch, None))
    sums = [
        evaluate(params, {name: jnp.asarray(array) for name, array in batch.items()})
        for _, batch in task.stream(split).batches()
    ]
    return jax.tree.map(lambda *leaves: float(sum(leaves)), *sums)


def test_evaluation_does_not_depend_on_padding_and_is_cut_nowhere(folders):
    wide = tiny_frames(folders, model={"num_hidden_layers": 1})
    narrow = tiny_frames(
        folders, model={"num_hidden_layers": 1}, batch={"seconds_per_update": 4.0}, data={"evaluation_buckets": (80,)}
    )
    first, second = (totals(diarization.build(config, ONE)) for config in (wide, narrow))
    np.testing.assert_allclose(second.loss, first.loss, rtol=1e-5)
    assert first.count == second.count == 10 * FRAMES * 3
    spoken = sum(end - start for number in range(10) for _, start, end in conversation(number))
    assert first.metrics["der"][1] == second.metrics["der"][1] == spoken
    assert first.metrics["der"][0] == second.metrics["der"][0]


def waves_and_sums(config, split):
    """The one batch of a split, and what the task's loss makes of scores that are waves."""
    task = diarization.build(config, ONE)
    [(_, batch)] = task.stream(split).batches()
    batch = {name: jnp.asarray(array) for name, array in batch.items()}
    loss = dataclasses.replace(task.loss, model=Waves(task.loss.model.config, task.loss.model.head))
    return batch, jax.jit(lambda: loss({}, batch, None))()


def test_frames_of_speakers_without_room_do_not_count(root, folders):
    talk = [(0, 0, 40), (1, 10, 30), (2, 20, 25), (3, 50, 54)]
    crowd = {**folders, "same": make_meetings(root, "crowd", [talk])}
    _, sums = waves_and_sums(tiny_frames(crowd, head={"num_labels": 2}), "crowd")
    assert sums.count == (FRAMES - 5 - 4) * 2
    assert sums.metrics["der"][1] == 40 + 20 + 5 + 4


def test_transformers_loss_is_there_where_asked_for(folders):
    """Every frame counts, padding too, and overlap is the first speaker's: cross entropy, by torch."""
    batch, sums = waves_and_sums(tiny_frames(folders, objective={"compat": "huggingface"}), "same")
    phase = np.arange(FRAMES)[:, None] * 0.3 + 2.0 * np.arange(3)
    logits = torch.tensor(3 * np.sin(phase)).repeat(10, 1)
    labels = torch.tensor(np.array(batch["activity"]).argmax(axis=-1)).flatten()
    assert sums.count == 10 * FRAMES
    np.testing.assert_allclose(sums.loss / sums.count, torch.nn.functional.cross_entropy(logits, labels), rtol=1e-5)


@pytest.mark.parametrize("config", [recipes.get_config("base"), recipes.get_config("demo"), superb_sd.get_config()])
def test_every_recipe_can_be_read(config):
    values = json.loads(config.to_json())
    read_sections(values, RunSettings)
    assert read_sections(values, diarization.FrameClassificationSettings).objective.compat == "exact"


def test_wrong_uses_get_an_answer(root, folders, capsys):
    with pytest.raises(SettingsError, match=r"config\.head\.num_labels: found 7 speakers, expected 6 or fewer"):
        diarization.build(tiny_frames(folders, head={"num_labels": 7}), ONE)
    with pytest.raises(SettingsError, match=r"config\.model\.conv_kernel"):
        diarization.build(tiny_frames(folders, model={"conv_kernel": (10, 3, 3, 3, 3, 2, 3)}), ONE)
    with pytest.raises(SettingsError, match=r"config\.augmentation\.speeds.*its labels belong to frames"):
        diarization.build(tiny_frames(folders, augmentation={"speeds": (0.9, 1.0, 1.1)}), ONE)
    with pytest.raises(ValueError, match=r"frame_classification\.py:large: no such preset"):
        recipes.get_config("large")
    silent = make_corpus(root, "silent", [("AB", 0, "AB")])
    with pytest.raises(FileNotFoundError, match=r"turns\.rttm: no such file.*--rttm"):
        diarization.build(tiny_frames({**folders, "train": silent}), ONE)
    (silent / TURNS).write_text("")
    with pytest.raises(SettingsError, match="has no turn of any recording"):
        read_turns(Corpus.open(silent))
    same = str(root / "same")
    for text, message in (
        ("SPEAKER other 1 0 1 <NA> <NA> A <NA> <NA>\n", "the turns are of other, the recordings are called same0"),
        ("SPEAKER same0 1 5 1 <NA> <NA> A <NA> <NA>\n", "a turn of same0 begins at 5.000 s, the recording lasts 1.285"),
        ("SPEAKER same0 1 x 1 <NA> <NA> A <NA> <NA>\n", "line 1: found 'x', expected start"),
    ):
        (root / "wrong.rttm").write_text(text)
        words = [same, "--out", str(root / "corpus" / "same"), "--rttm", str(root / "wrong.rttm")]
        assert data_main(words) == 2
        assert message in capsys.readouterr().err
    assert attach_turns(Corpus.open(folders["same"]), read_rttm(root / "same.rttm")) == 10


def test_frame_loss_is_that_of_transformers_class_where_asked_for():
    model = torch_head(WavLMForAudioFrameClassification, small_config(), small_head())
    targets = (np.random.default_rng(0).random((2, 27, 5)) < 0.3).astype(np.float32)
    lengths = (9000, 7000)
    mask = attention_mask(lengths, 9000).long()
    with torch.no_grad():
        given = model(torch.tensor(waveforms(lengths)), attention_mask=mask, labels=torch.tensor(targets))
    found = first_speaker_cross_entropy(jnp.array(given.logits), jnp.array(targets))
    np.testing.assert_allclose(found.sum() / (2 * 27), given.loss.item(), rtol=1e-5)


@pytest.mark.parametrize("speakers", [1, 2, 4])
def test_speakers_in_any_order_take_the_best_of_all_orders(speakers):
    generator = np.random.default_rng(speakers)
    logits = (4 * generator.standard_normal((5, 30, speakers))).astype(np.float32)
    targets = (generator.random((5, 30, speakers)) < 0.4).astype(np.float32)
    mask = np.arange(30)[None] < np.array([30, 20, 11, 1, 0])[:, None]
    found = permutation_invariant_loss(jnp.array(logits), jnp.array(targets), jnp.array(mask))
    for row in range(5):
        each = {}
        for order in itertools.permutations(range(speakers)):
            given, wanted = torch.tensor(logits[row][mask[row]]), torch.tensor(targets[row][mask[row]][:, list(order)])
            each[order] = torch.nn.functional.binary_cross_entropy_with_logits(given, wanted, reduction="sum").item()
        np.testing.assert_allclose(found.loss[row], min(each.values()), atol=1e-3, rtol=1e-5)
        np.testing.assert_allclose(each[tuple(np.asarray(found.order[row]).tolist())], min(each.values()), rtol=1e-5)


def test_swapping_the_speakers_changes_nothing_and_too_many_are_refused():
    generator = np.random.default_rng(0)
    logits = jnp.array(generator.standard_normal((2, 9, 3)), jnp.float32)
    targets = jnp.array(generator.random((2, 9, 3)) < 0.5, jnp.float32)
    mask = jnp.ones((2, 9), bool)
    straight = permutation_invariant_loss(logits, targets, mask).loss
    swapped = permutation_invariant_loss(logits, targets[:, :, jnp.array([2, 0, 1])], mask).loss
    np.testing.assert_allclose(straight, swapped, rtol=1e-6)
    with pytest.raises(ValueError, match="found 7, expected 6 or fewer"):
        permutation_invariant_loss(jnp.zeros((1, 2, 7)), jnp.zeros((1, 2, 7)), mask[:1, :2])
