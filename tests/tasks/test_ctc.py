"""The CTC task end to end; its loss against torch's on every small size; errors in jit against jiwer's."""

import contextlib
import io
import json
from dataclasses import asdict
from functools import partial

import jax
import jax.numpy as jnp
import jiwer
import numpy as np
import pytest
import soundfile
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import wavlm_jax
from configs.finetune import ctc as recipes
from tests.support.head_twins import small_head, torch_head
from tests.support.tones import ONE, make_corpus, one_device, ten_texts, tiny_ctc, train
from tests.support.torch_twins import attention_mask, small_config, waveforms
from wavlm_jax.__main__ import main
from wavlm_jax.config import HeadConfig
from wavlm_jax.data.corpus import Corpus
from wavlm_jax.model.heads import WavLMForCTC
from wavlm_jax.settings import SettingsError, read, read_sections
from wavlm_jax.tasks import ctc
from wavlm_jax.tasks.ctc import (
    Sequences,
    ctc_loss,
    decode_greedily,
    edit_distance,
    has_alignment,
    single_delimiters,
    word_hashes,
)
from wavlm_jax.text.decoding import decode
from wavlm_jax.text.vocabulary import Vocabulary
from wavlm_jax.training.checkpoint import load_params
from wavlm_jax.training.optim import Group, check_groups
from wavlm_jax.training.sharding import path_name
from wavlm_jax.training.start import RunSettings
from wavlm_jax.training.step import add_up

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # transformers' own call

ODD = [("ABC", 0, "ABC AB"), ("ABCD", 1, ""), ("AB", 0, "A" * 12), ("ABE ED", 0, "ABE ED")]
"""One with the wrong text, one without text, one whose text needs 23 frames and has 15, one that is right."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("ctc")


@pytest.fixture(scope="module")
def folders(root):
    return {
        "train": make_corpus(root, "train", ten_texts()),
        "same": make_corpus(root, "same", ten_texts()),
        "odd": make_corpus(root, "odd", ODD),
    }


@pytest.fixture(scope="module")
def run(root, folders):
    """A finished run, what its evaluation said, and what it printed."""
    config, printed = tiny_ctc(folders["train"], folders["same"]), io.StringIO()
    with contextlib.redirect_stdout(printed):
        outcome = train(ctc.build, config, root / "run")
    return root / "run", outcome, printed.getvalue()


def test_ten_utterances_are_learned_by_heart(run):
    found = run[1].metrics["same"]
    assert found["wer"] == 0
    assert found["cer"] == 0
    assert found["length_ratio"] == 1
    assert found["infeasible"] == 0


def test_the_log_shows_what_is_heard(run):
    """The first utterances of the split, in order, after every evaluation."""
    for number, (_, _, text) in enumerate(ten_texts()[:3]):
        assert f"same same-{number:03d}: said  {text}\nsame same-{number:03d}: heard {text}\n" in run[2]
    assert "same-003: heard" not in run[2]


def test_transformers_hears_what_we_hear(run, folders, tmp_path, capsys):
    """The run, transcribed by our command; its export, by transformers' own pipeline: word for word."""
    files = sorted((folders["same"].parents[1] / "audio" / "same").glob("*.flac"))
    main(["transcribe", *map(str, files), "--model", str(run[0]), "--format", "tsv"])
    ours = [line.partition("\t")[2] for line in capsys.readouterr().out.splitlines()]
    wavlm_jax.save_huggingface(wavlm_jax.load(run[0]), tmp_path / "export", compared=False)
    recogniser = transformers.pipeline("automatic-speech-recognition", model=str(tmp_path / "export"))
    waves = [soundfile.read(path, dtype="float32")[0] for path in files]
    theirs = [recogniser({"raw": wave, "sampling_rate": 16_000})["text"] for wave in waves]
    assert ours == theirs == [text for _, _, text in ten_texts()]


def test_a_run_says_all_about_its_model(run):
    """Head and vocabulary stand in the config of the checkpoint, complete and readable."""
    config, params = load_params(run[0])
    vocabulary = Vocabulary(**{**config["vocabulary"], "tokens": tuple(config["vocabulary"]["tokens"])})
    head = read(config["head"], HeadConfig, "head")
    assert sorted(vocabulary.tokens[5:]) == list("ABCDE")
    assert params["lm_head"]["kernel"].shape == (32, len(vocabulary)) == (32, head.vocab_size)
    assert head.pad_token_id == vocabulary.blank_id
    assert json.loads(json.dumps(asdict(head))) == config["head"]


def test_init_path_gives_the_body_and_leaves_the_head_fresh(run, folders):
    task = ctc.build(tiny_ctc(folders["train"], folders["same"], init={"path": str(run[0])}), ONE)
    fresh = jax.jit(task.init)(jax.random.key(0))
    params = task.initial_params(fresh)
    assert params["lm_head"] is fresh["lm_head"]
    _, trained = load_params(run[0])
    jax.tree.map(np.testing.assert_array_equal, params["wavlm"], trained["wavlm"])
    other = tiny_ctc(folders["train"], folders["same"], init={"path": str(run[0])}, model={"num_hidden_layers": 1})
    with pytest.raises(SettingsError, match=r"config\.init\.path.*num_hidden_layers is 2"):
        ctc.build(other, ONE).initial_params(fresh)


def test_a_further_stage_has_the_vocabulary_that_its_head_learned(root, run, folders):
    """The same letters in another order are other outputs of the same shape."""
    turned = [text.translate(str.maketrans("ABCDE", "BCDEA")) for text, _, _ in ten_texts()]
    other = make_corpus(root, "turned", [(text, 0, text) for text in turned])
    given = {"init": {"path": str(run[0]), "head": True}}
    task = ctc.build(tiny_ctc(folders["train"], folders["same"], **given), ONE)
    fresh = jax.jit(task.init)(jax.random.key(0))
    _, trained = load_params(run[0])
    jax.tree.map(np.testing.assert_array_equal, dict(task.initial_params(fresh)), trained)
    with pytest.raises(SettingsError, match=r"config\.init\.head: the vocabulary of .* \(<pad>.*\) is not the one"):
        ctc.build(tiny_ctc(other, other, **given), ONE).initial_params(fresh)
    wide = {**fresh, "lm_head": {"kernel": np.zeros((32, 11)), "bias": np.zeros(11)}}
    with pytest.raises(SettingsError, match=r"other sizes: \['lm_head'\]\['bias'\]: found \(10,\), expected \(11,\)"):
        task.initial_params(wide)


def totals(task, split):
    """Sums of an evaluation, and the utterances that were shown."""
    params = jax.jit(task.init)(jax.random.key(0))
    evaluate = jax.jit(lambda params, batch: task.loss(params, batch, None))
    sums, ids = [], []
    for _, batch in task.stream(split).batches():
        found = evaluate(params, {name: jnp.asarray(array) for name, array in batch.items()})
        sums.append(found.replace(answers={}))
        ids += batch["id"][batch["weight"] > 0].tolist()
    return jax.tree.map(lambda *leaves: float(sum(leaves)), *sums), sorted(ids)


def test_evaluation_counts_every_utterance_once_however_it_is_cut(folders):
    """Other buckets, other rows, other padding: the same sums, so the same error rates."""
    wide, ids = totals(ctc.build(tiny_ctc(folders["train"], folders["same"]), ONE), "same")
    narrow = tiny_ctc(folders["train"], folders["same"], batch={"seconds_per_update": 4.0})
    narrow["data"]["evaluation_buckets"] = [48, 72]
    cut, same_ids = totals(ctc.build(narrow, ONE), "same")
    assert ids == same_ids == list(range(10))
    assert wide.count == cut.count == 10
    np.testing.assert_allclose(cut.loss, wide.loss, rtol=1e-5)
    letters = sum(len(text) for _, _, text in ten_texts())
    assert wide.metrics["cer"][1] == cut.metrics["cer"][1] == letters
    assert wide.metrics["cer"][0] == cut.metrics["cer"][0]


def test_what_cannot_be_learned_is_dropped_and_counted(root, folders, capsys):
    """Training leaves out texts that do not fit and rows without text; evaluation keeps the former and counts them."""
    task = ctc.build(tiny_ctc(folders["odd"], make_corpus(root, "also", ODD)), ONE)
    said = capsys.readouterr().out
    assert "train: 2 utterances" in said
    assert said.count("1 without a transcript, left out; 1 with more text than frames") == 2
    seen = {
        int(index)
        for _, (_, batch) in zip(range(6), task.stream("train").batches(), strict=False)
        for index in batch["id"]
    }
    assert seen == {0, 3}
    sums, ids = totals(task, "also")
    assert ids == [0, 2, 3]
    assert sums.metrics["infeasible"] == (1.0, 3.0)
    assert sums.metrics["cer"][1] == sum(len(text) for _, _, text in ODD)


def test_texts_in_two_normal_forms_have_the_same_labels_and_it_is_said(root):
    corpus = Corpus.open(
        make_corpus(root, "forms", [("AB", 0, "E\u0301 A"), ("AB", 0, "\u00c9\u200b A"), ("AB", 0, "A")])
    )
    text = ctc.TextSettings(vocabulary=None, min_count=1, do_lower_case=False, replace_unknown=False)
    vocabulary = ctc.make_vocabulary(text, corpus)
    assert vocabulary.tokens[5:] == ("A", "\u00c9")
    found = ctc.survey(corpus, vocabulary, np.full(3, 20), replace_unknown=False, drop_infeasible=True)
    assert found.num_labels.tolist() == [3, 3, 1]
    assert "2 with text that is not in Unicode's form C" in found.describe("train")


def test_masks_and_dropout_do_not_depend_on_micro_batches(folders):
    """SpecAugment, dropout and layer drop on: one micro-batch or two, the same loss."""
    noisy = {"mask_time_prob": 0.4, "mask_time_length": 4, "mask_feature_prob": 0.3, "mask_feature_length": 4}
    noisy |= {"hidden_dropout": 0.2, "layerdrop": 0.3}
    task = ctc.build(tiny_ctc(folders["train"], folders["same"], model=noisy), ONE)
    params = jax.jit(task.init)(jax.random.key(0))
    _, arrays = next(task.stream("train").batches())
    batch = {name: jnp.asarray(array) for name, array in arrays.items()}

    @partial(jax.jit, static_argnums=3)
    def loss(params, batch, key, microbatches):
        return add_up(lambda part: task.loss(params, part, key), batch, microbatches, 1).loss

    with jax.set_mesh(one_device()):
        whole, other = (float(loss(params, batch, jax.random.key(seed), 1)) for seed in (0, 1))
        split = float(loss(params, batch, jax.random.key(0), 2))
    np.testing.assert_allclose(split, whole, rtol=1e-5)
    assert abs(other - whole) > 1e-3


@pytest.mark.parametrize("preset", [*recipes._PRESETS, *recipes._SMALL])
def test_every_preset_can_be_read(preset):
    config = json.loads(recipes.get_config(preset).to_json())
    settings = read_sections(config, RunSettings)
    task = read_sections(config, ctc.CTCSettings)
    assert settings.optim.schedule == "tri_stage"
    assert task.model.hidden_size == {"base": 768, "large": 1024}.get(preset.partition("_")[0], 128)
    assert preset in recipes._SMALL or config["data"]["evaluation"] == ["corpora/librispeech/dev_other"]
    assert list(settings.train.eval_splits) == [folder.split("/")[-1] for folder in config["data"]["evaluation"]]


def test_layer_groups_cover_the_model(folders):
    task = ctc.build(tiny_ctc(folders["train"], folders["same"]), ONE)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    groups = {name: read(values, Group, name) for name, values in recipes.layer_groups(2, 0.9).items()}
    check_groups(groups, names)


def test_wrong_configs_get_an_answer(root, folders):
    config = tiny_ctc(folders["train"], folders["same"])
    with pytest.raises(SettingsError, match=r"config\.head\.vocab_size.*follows from the data \(here it is 10\)"):
        ctc.build({**config, "head": {"vocab_size": 5}}, ONE)
    few = make_corpus(root, "few", [("ABC", 0, "ABC"), ("ABE", 0, "ABE")])
    with pytest.raises(SettingsError, match=r"utterance same-001.*'D'.*replace_unknown"):
        ctc.build(tiny_ctc(few, folders["same"]), ONE)
    silent = make_corpus(root, "silent", [("ABC", 0, ""), ("ABE", 0, "")])
    with pytest.raises(SettingsError, match="no transcript"):
        ctc.build(tiny_ctc(silent, folders["same"]), ONE)
    with pytest.raises(SettingsError, match=r"config\.labels: no such section"):
        ctc.build({**config, "labels": {}}, ONE)
    with pytest.raises(ValueError, match=r"ctc\.py:base_5h: no such preset"):
        recipes.get_config("base_5h")


# The loss

LONGEST = 20
NUM_TOKENS = 5


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_ctc_loss_is_that_of_transformers_class(reduction):
    lengths = (9000, 7000)
    model = torch_head(WavLMForCTC, small_config(), small_head(ctc_loss_reduction=reduction))
    labels = np.array([[3, 3, 1, 7, 2], [5, 1, -100, -100, -100]])
    mask = attention_mask(lengths, 9000).long()
    with torch.no_grad():
        given = model(torch.tensor(waveforms(lengths)), attention_mask=mask, labels=torch.tensor(labels))
    frames, counts = model._get_feat_extract_output_lengths(torch.tensor(lengths)).numpy(), np.array([5, 2])
    loss = ctc_loss(jnp.array(given.logits), jnp.array(frames), jnp.array(labels), jnp.array(counts), 0)
    expected = loss.sum() if reduction == "sum" else (loss / counts).mean()
    np.testing.assert_allclose(expected, given.loss.item(), rtol=1e-5)


def torch_loss(logits, num_frames, labels, num_labels, blank, dtype=torch.float64):
    """torch's loss and its gradient, in double precision."""
    given = torch.tensor(logits, dtype=dtype, requires_grad=True)
    loss = torch.nn.functional.ctc_loss(
        torch.log_softmax(given, dim=-1).transpose(0, 1),
        torch.tensor(labels),
        torch.tensor(num_frames),
        torch.tensor(num_labels),
        blank=blank,
        reduction="none",
        zero_infinity=True,
    )
    loss.sum().backward()
    return loss.detach().numpy(), given.grad.numpy()


def our_loss(logits, num_frames, labels, num_labels, blank):
    def total(logits):
        loss = ctc_loss(logits, jnp.array(num_frames), jnp.array(labels), jnp.array(num_labels), blank)
        return loss.sum(), loss

    gradient, loss = jax.jit(jax.grad(total, has_aux=True))(jnp.array(logits, jnp.float32))
    return np.asarray(loss), np.asarray(gradient)


@pytest.mark.parametrize("blank", [0, 3])
def test_every_size_equals_torch(blank):
    """All T and L from 0 to 20, three texts each: random, of one character repeated, of two in turn."""
    generator = np.random.default_rng(blank)
    sizes = np.array([(t, n) for t in range(LONGEST + 1) for n in range(LONGEST + 1) for _ in range(3)])
    letters = np.array([letter for letter in range(NUM_TOKENS) if letter != blank])
    labels = letters[generator.integers(0, len(letters), (len(sizes), LONGEST))]
    labels[1::3] = labels[1::3, :1]
    labels[2::3, ::2], labels[2::3, 1::2] = letters[0], letters[1]
    logits = (2 * generator.standard_normal((len(sizes), LONGEST, NUM_TOKENS))).astype(np.float32)
    loss, gradient = our_loss(logits, sizes[:, 0], labels, sizes[:, 1], blank)
    expected, slope = torch_loss(logits, sizes[:, 0], labels, sizes[:, 1], blank)
    np.testing.assert_allclose(loss, expected, atol=1e-5, rtol=1e-6)
    np.testing.assert_allclose(gradient, slope, atol=1e-5, rtol=0)
    assert (loss >= 0).all()
    fits = np.asarray(has_alignment(jnp.array(sizes[:, 0]), jnp.array(labels), jnp.array(sizes[:, 1])))
    np.testing.assert_array_equal(fits, (expected > 0) | (sizes[:, 1] == 0) & (expected == 0))


def test_never_negative_nor_nan_when_the_text_is_certain_or_impossible():
    """optax#1771: a loss near 0 must not round below; a text against all odds must not overflow."""
    frames, texts = 200, np.tile(np.array([[1, 2, 3, 1, 2, 3, 4, 4]]), (3, 1))
    path = np.repeat(np.array([1, 2, 3, 1, 2, 3, 4, 0, 4, 0]), 20)
    logits = np.zeros((3, frames, NUM_TOKENS), np.float32)
    logits[0, np.arange(frames), path] = 30.0
    logits[1, np.arange(frames), path] = 300.0
    logits[2, :, 0] = 500.0
    counts = np.full(3, frames), np.full(3, 8)
    loss, gradient = our_loss(logits, counts[0], texts, counts[1], 0)
    assert np.isfinite(gradient).all()
    assert (loss >= 0).all()
    expected, slope = torch_loss(logits, counts[0], texts, counts[1], 0)
    np.testing.assert_allclose(loss, expected, atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, atol=1e-4)


def test_long_rows_stay_near_double_precision():
    """30 s of audio and a long text in float32."""
    generator = np.random.default_rng(1)
    logits = generator.standard_normal((2, 1500, 32)).astype(np.float32)
    labels = generator.integers(1, 32, (2, 400))
    counts = np.array([1500, 900]), np.array([400, 380])
    loss, gradient = our_loss(logits, counts[0], labels, counts[1], 0)
    expected, slope = torch_loss(logits, counts[0], labels, counts[1], 0)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, atol=3e-5)


def test_what_is_behind_the_end_of_a_row_does_not_matter():
    generator = np.random.default_rng(2)
    logits = generator.standard_normal((2, 12, NUM_TOKENS)).astype(np.float32)
    logits[1] = logits[0]
    logits[1, 7:] = 50 * generator.standard_normal((5, NUM_TOKENS))
    labels = np.array([[1, 2, 2, 0, 0], [1, 2, 2, 3, 4]])
    loss, gradient = our_loss(logits, np.array([7, 7]), labels, np.array([3, 3]), 0)
    assert loss[0] == loss[1]
    np.testing.assert_array_equal(gradient[0, :7], gradient[1, :7])
    np.testing.assert_array_equal(gradient[:, 7:], 0)


# Errors of greedy decoding

TOKENS = Vocabulary(tokens=("<pad>", "|", "A", "B", "C"), unknown=None, begin=None, end=None)
MOST = 24


def levenshtein(found, wanted):
    """The textbook's table."""
    table = np.zeros((len(found) + 1, len(wanted) + 1), int)
    table[:, 0], table[0] = np.arange(len(found) + 1), np.arange(len(wanted) + 1)
    for i, a in enumerate(found, 1):
        for j, b in enumerate(wanted, 1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a != b))
    return table[-1, -1]


@jax.jit
def errors(ids, num_frames, wanted, num_wanted):
    """(characters wrong, words wrong, words found, text found, its length) of frames read greedily."""
    logits = jax.nn.one_hot(ids, len(TOKENS))
    found = single_delimiters(decode_greedily(logits, num_frames, TOKENS.blank_id), TOKENS.delimiter_id)
    right = Sequences(wanted, num_wanted)
    found_words, right_words = word_hashes(found, TOKENS.delimiter_id), word_hashes(right, TOKENS.delimiter_id)
    wrong = edit_distance(found, right), edit_distance(found_words, right_words)
    return (*wrong, right_words.length, found.values, found.length)


TEXT = st.lists(st.text("ABC", min_size=1, max_size=4), min_size=1, max_size=4).map(" ".join)


@given(st.lists(st.integers(0, 4), max_size=MOST), TEXT)
@settings(max_examples=150, deadline=None)
def test_errors_are_those_of_the_decoded_text(frames, text):
    """Frames of any kind: doubled letters, blanks between them, delimiters at the ends and side by side."""
    labels = TOKENS.encode(text)
    ids = np.pad(frames, (0, MOST - len(frames)), constant_values=3).astype(np.int32)[None]
    wanted = np.pad(labels, (0, MOST - len(labels)), constant_values=2)[None]
    given_to = jnp.array(ids), jnp.array([len(frames)]), jnp.array(wanted), jnp.array([len(labels)])
    characters, wrong_words, num_words, found, length = jax.device_get(errors(*given_to))
    read = " ".join(decode(np.array(frames, np.int32), TOKENS).text.split())
    assert TOKENS.spell(found[0, : length[0]]) == read
    assert characters[0] == levenshtein(read, text)
    assert wrong_words[0] == levenshtein(read.split(), text.split())
    assert num_words[0] == len(text.split())


def test_error_rates_are_jiwer_s():
    """A corpus of texts at once: sums of edits over sums of lengths."""
    generator = np.random.default_rng(0)
    texts = [" ".join("".join(generator.choice(list("ABC"), 3)) for _ in range(4)) for _ in range(30)]
    labels = np.stack([TOKENS.encode(text) for text in texts])
    frames = np.repeat(labels, 2, axis=1)
    frames[:, 1::2] = TOKENS.blank_id
    noise = generator.random(frames.shape) < 0.2
    frames[noise] = generator.integers(0, 5, int(noise.sum()))
    counts = jnp.full(30, frames.shape[1]), jnp.full(30, labels.shape[1])
    found = errors(jnp.array(frames), counts[0], jnp.array(labels), counts[1])
    read = [" ".join(decode(row, TOKENS).text.split()) for row in frames]
    assert float(found[0].sum() / labels.size) == pytest.approx(jiwer.cer(texts, read))
    assert float(found[1].sum() / found[2].sum()) == pytest.approx(jiwer.wer(texts, read))


def test_a_language_without_delimiter_is_left_alone():
    text = Sequences(jnp.array([[1, 1, 2]]), jnp.array([3]))
    assert single_delimiters(text, None) is text
