"""The classification task end to end: ten utterances by heart, scores that are no sums, classes that are not there."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
import torch
import transformers

import wavlm_jax
from configs.finetune import classification as recipes
from tests.support.tones import ONE, assert_outlined, make_corpus, one_device, ten_texts, tiny_classes, train
from tests.support.torch_twins import waveforms
from wavlm_jax.data.corpus import Corpus
from wavlm_jax.settings import SettingsError, read_sections
from wavlm_jax.tasks import classification
from wavlm_jax.text.records import RecordError
from wavlm_jax.training.checkpoint import load_params
from wavlm_jax.training.metric_writers import Totals
from wavlm_jax.training.start import RunSettings
from wavlm_jax.training.step import eval_step
from wavlm_jax.training.task import LossSums
from wavlm_jax.weights import ready

NAMES = tuple(f"speaker{number}" for number in range(5))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("classes")


@pytest.fixture(scope="module")
def folders(root):
    texts = [(text, number % 5, text) for number, (text, _, _) in enumerate(ten_texts())]
    return {split: make_corpus(root, split, texts) for split in ("train", "same")}


@pytest.fixture(scope="module")
def run(root, folders):
    """A finished run, and what its evaluation said."""
    return root / "run", train(classification.build, tiny_classes(folders["train"], folders["same"]), root / "run")


def test_it_can_be_planned_without_its_data(folders):
    assert_outlined(classification.outline, classification.build, tiny_classes(folders["train"], folders["same"]))


def test_ten_utterances_are_learned_by_heart(run):
    assert run[1].metrics["same"]["accuracy"] == 1
    assert run[1].metrics["same"]["macro_f1"] == 1


def test_a_run_says_its_classes_and_transformers_gives_its_answers(run, tmp_path):
    """The exported head is `WavLMForSequenceClassification`'s, class by class."""
    config, _ = load_params(run[0])
    assert tuple(config["classes"]) == NAMES
    assert config["head"]["num_labels"] == 5
    model = wavlm_jax.load(run[0])
    wavlm_jax.save_huggingface(model, tmp_path / "exported", compared=False)
    theirs = transformers.WavLMForSequenceClassification.from_pretrained(tmp_path / "exported").eval()
    wave = waveforms((9000,))
    with torch.no_grad():
        expected = theirs(torch.tensor(wave)).logits.numpy()
    np.testing.assert_allclose(model(wave).logits, expected, atol=1e-4, rtol=0)


def test_a_further_stage_takes_the_head_along(run, folders, root):
    given = {"path": str(run[0]), "head": True}
    task = classification.build(tiny_classes(folders["train"], folders["same"], init=given), ONE)
    fresh = jax.jit(task.init)(jax.random.key(0))
    _, trained = load_params(run[0])
    jax.tree.map(np.testing.assert_array_equal, dict(task.initial_params(fresh)), trained)
    body = classification.build(tiny_classes(folders["train"], folders["same"], init={"path": str(run[0])}), ONE)
    assert body.initial_params(fresh)["classifier"] is fresh["classifier"]
    alone = ready(dataclasses.replace(wavlm_jax.load(run[0]).weights, task=None))
    wavlm_jax.save_huggingface(alone, root / "encoder", compared=False)
    given = {"path": str(root / "encoder"), "head": True}
    with pytest.raises(SettingsError, match=r"has a head of no parts, expected one of classifier, projector"):
        classification.build(tiny_classes(folders["train"], folders["same"], init=given), ONE).initial_params(fresh)
    trained_there = wavlm_jax.load(run[0]).weights
    head = dataclasses.replace(trained_there.task.config, problem_type="multi_label_classification")
    other = dataclasses.replace(trained_there, task=dataclasses.replace(trained_there.task, config=head))
    wavlm_jax.save_huggingface(ready(other), root / "labels", compared=False)
    given = {"path": str(root / "labels"), "head": True}
    with pytest.raises(SettingsError, match=r"has a head for multi_label_classification.*config\.init\.head = False"):
        classification.build(tiny_classes(folders["train"], folders["same"], init=given), ONE).initial_params(fresh)
    with pytest.raises(SettingsError, match=r"config\.init.*head: found True without a path"):
        classification.build(tiny_classes(folders["train"], folders["same"], init={"head": True}), ONE)


def test_scores_of_an_evaluation_are_those_of_its_answers(folders):
    """However the batches are cut, micro-batches or not, fillers or not: each answer once, F1 is scikit-learn's."""

    def loss(params, batch, key):
        del params, key
        heard = jnp.abs(batch["waveform"][:, 5000:5100].astype(jnp.int32)).sum(axis=1) % 5
        count = jnp.sum(batch["weight"])
        return LossSums(count, count, {}, answers={"id": batch["id"], "answer": heard, "label": batch["labels"]})

    found = {}
    for microbatches, changes in {1: {}, 2: {"seconds_per_update": 8.0, "row_multiple": 4}}.items():
        built = classification.build(tiny_classes(folders["train"], folders["same"], batch=changes), ONE)
        task = dataclasses.replace(built, loss=loss)
        step = jax.jit(partial(eval_step, {}, task=task, microbatches=microbatches))
        totals = Totals()
        with jax.set_mesh(one_device()):
            for _, batch in built.stream("same").batches():
                totals.add(jax.device_get(step({name: jnp.asarray(array) for name, array in batch.items()})))
        answers = totals.answers()
        order = np.argsort(answers["id"])
        assert answers["id"][order].tolist() == list(range(10))
        labels, given = answers["label"][order], answers["answer"][order]
        assert labels.tolist() == [number % 5 for number in range(10)]
        score = sklearn.metrics.f1_score(labels, given, average="macro", zero_division=0.0)
        np.testing.assert_allclose(built.score("same", answers)["macro_f1"], score)
        found[microbatches] = given.tolist()
    assert found[1] == found[2]
    assert len({*found[1]}) > 1


def test_answers_of_fillers_do_not_count():
    totals = Totals()
    one = np.float32(1)
    for ids in ([3, -1], [0, 5]):
        totals.add(LossSums(one, one, {}, answers={"id": np.int32(ids), "label": np.int32(ids) * 10}))
    assert totals.answers()["label"].tolist() == [30, 0, 50]


def test_classes_come_from_the_speaker_the_text_or_a_table(root, folders, capsys):
    table = root / "table.tsv"
    table.write_text("\ufeffspeaker0\tlow\nspeaker1\tlow\nspeaker2\thigh\nspeaker3\thigh\n")
    mapped = {"table": str(table)}
    task = classification.build(tiny_classes(folders["train"], folders["same"], target=mapped), ONE)
    assert task.resolved["classes"] == ["high", "low"]
    said = capsys.readouterr().out
    assert "train: 8 utterances of 2 classes, 4 to 4 a class; 2 without a class, left out" in said
    shown = {int(index) for _, batch in task.stream("same").batches() for index in batch["id"] if index >= 0}
    assert shown == {0, 1, 2, 3, 5, 6, 7, 8}
    by_text = classification.build(tiny_classes(folders["train"], folders["same"], target={"column": "text"}), ONE)
    assert by_text.resolved["classes"] == sorted(text for text, _, _ in ten_texts())


def test_a_class_is_one_in_every_normal_form(root):
    names = ["E\u0301", "\u00c9", "\ufeffB"]
    corpus = Corpus.open(make_corpus(root, "forms", [("AB", 0, name) for name in names]))
    target = classification.TargetSettings(column="text", table=None, shown="utterances")
    assert classification.training_classes(target, corpus).numbers(corpus).tolist() == [1, 1, 0]
    (root / "forms.tsv").write_text("\ufeffE\u0301\tx\nB\ty\n")
    tabled = dataclasses.replace(target, table=str(root / "forms.tsv"))
    assert classification.training_classes(tabled, corpus).of(corpus) == ["x", "x", "y"]


def test_crops_are_shown_where_any_part_tells_the_class(folders):
    config = tiny_classes(folders["train"], folders["same"], target={"shown": "crops"}, batch={"buckets": (32,)})
    task = classification.build(config, ONE)
    _, batch = next(task.stream("train").batches())
    assert batch["waveform"].shape[1] == 320 * 32 + 80
    assert (batch["num_samples"] == 320 * 32 + 80).all()
    assert (batch["labels"] == batch["id"] % 5).all()


def test_wrong_configs_get_an_answer(root, folders):
    strange = make_corpus(root, "strange", [("ABC", 0, "ABC"), ("ABE", 7, "ABE")])
    with pytest.raises(SettingsError, match=r"utterance strange-001 is of class 'speaker7'.*expected one of speaker0"):
        classification.build(tiny_classes(folders["train"], strange), ONE)
    alone = make_corpus(root, "alone", [("ABC", 0, "ABC"), ("ABE", 0, "ABE")])
    with pytest.raises(SettingsError, match=r"config\.target: speaker of .*gives the one class 'speaker0'"):
        classification.build(tiny_classes(alone, folders["same"]), ONE)
    with pytest.raises(SettingsError, match=r"'id' without a table"):
        classification.build(tiny_classes(folders["train"], folders["same"], target={"column": "id"}), ONE)
    table = root / "twice.tsv"
    table.write_text("speaker0\tlow\nspeaker0\thigh\n")
    with pytest.raises(RecordError, match=r"twice\.tsv, line 2: 'speaker0' for the second time"):
        classification.build(tiny_classes(folders["train"], folders["same"], target={"table": str(table)}), ONE)
    with pytest.raises(SettingsError, match=r"config\.head\.num_labels.*follows from the data"):
        classification.build({**tiny_classes(folders["train"], folders["same"]), "head": {"num_labels": 5}}, ONE)


@pytest.mark.parametrize("preset", ["base", "large", "speakers"])
def test_every_preset_can_be_read(preset):
    config = json.loads(recipes.get_config(preset).to_json())
    assert read_sections(config, RunSettings).optim.schedule == "linear"
    assert read_sections(config, classification.ClassificationSettings).target.column == "speaker"
