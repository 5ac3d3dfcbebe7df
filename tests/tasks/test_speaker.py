"""Speaker tasks end to end: ten utterances by heart, trials scored in the evaluation, embeddings exported; margins."""

import json
import math
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import torch
import transformers
from sklearn.metrics import roc_curve
from transformers.models.wavlm.modeling_wavlm import AMSoftmaxLoss

import wavlm_jax
from configs.finetune import speaker_ecapa, speaker_xvector
from tests.support.head_twins import head_twins, small_head
from tests.support.tones import ONE, assert_outlined, make_corpus, ten_texts, tiny_speakers, train
from tests.support.torch_twins import attention_mask, small_config, waveforms
from tests.support.trials import trial_list
from wavlm_jax.__main__ import main
from wavlm_jax.audio.recordings import pad
from wavlm_jax.convert.state_dict import ConversionError
from wavlm_jax.data.corpus import Corpus
from wavlm_jax.model.heads import WavLMForXVector, unit_length
from wavlm_jax.settings import SettingsError, read_sections
from wavlm_jax.tasks import speaker
from wavlm_jax.tasks.speaker import MarginSettings, VerificationScores, margin_loss, place_trials
from wavlm_jax.text.records import Trial
from wavlm_jax.training.checkpoint import load_params
from wavlm_jax.training.start import RunSettings

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # transformers' own call

RECIPES = {"speaker_xvector": speaker_xvector, "speaker_ecapa": speaker_ecapa}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("speakers")


@pytest.fixture(scope="module")
def folders(root):
    texts = [(text, number % 5, text) for number, (text, _, _) in enumerate(ten_texts())]
    return {split: make_corpus(root, split, texts) for split in ("train", "same")}


@pytest.fixture(scope="module")
def trials(root):
    """All pairs of the ten, by the paths of their manifest."""
    pairs = [Trial(a % 5 == b % 5, f"{a:03d}.flac", f"{b:03d}.flac") for a, b in combinations(range(10), 2)]
    (root / "pairs.txt").write_text(trial_list(pairs))
    return root / "pairs.txt"


@pytest.fixture(scope="module", params=["speaker_xvector", pytest.param("speaker_ecapa", marks=pytest.mark.slow)])
def run(request, root, folders, trials):
    """A finished run of each head: its task, its folder, and what its evaluation said."""
    name, folder = request.param, root / request.param
    config = tiny_speakers(RECIPES[name], folders["train"], folders["same"], trials=[str(trials)])
    return name, folder, train(speaker.build, config, folder)


@pytest.mark.parametrize("name", list(RECIPES))
def test_it_can_be_planned_without_its_data(name, folders, trials):
    config = tiny_speakers(RECIPES[name], folders["train"], folders["same"], trials=[str(trials)])
    assert_outlined(speaker.outline, speaker.build, config)


def test_ten_utterances_are_learned_by_heart(run):
    """Accuracy over the training speakers, and no error in any trial."""
    found = run[2].metrics["same"]
    assert found["accuracy"] == 1
    assert found["eer"] == 0
    assert found["min_dcf"] == 0
    assert found["trials"] == 45


def test_embeddings_of_a_run_are_those_that_were_scored(run, folders, tmp_path):
    """Loaded, the run tells speakers apart by cosine; an x-vector does so through transformers' class too."""
    name, folder, _ = run
    config, params = load_params(folder)
    assert config["classes"] == [f"speaker{number}" for number in range(5)]
    model = wavlm_jax.load(folder)
    corpus = Corpus.open(folders["same"])
    inputs = pad([corpus.wave(index).astype(np.float32) / 32768 for index in range(10)])
    vectors = np.asarray(model(*inputs).embeddings)
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    speakers = np.arange(10) % 5
    same = speakers[:, None] == speakers[None, :]
    assert (vectors @ vectors.T)[same].min() > (vectors @ vectors.T)[~same].max()
    if name == "speaker_ecapa":
        moved = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "mean"]
        assert all(np.abs(leaf).max() > 0.01 for leaf in moved)
        with pytest.raises(ConversionError, match="no class like our WavLMForECAPA"):
            wavlm_jax.save_huggingface(model, tmp_path / "exported", compared=False)
        return
    wavlm_jax.save_huggingface(model, tmp_path / "exported", compared=False)
    theirs = transformers.WavLMForXVector.from_pretrained(tmp_path / "exported").eval()
    wave = waveforms((16000,))
    with torch.no_grad():
        expected = theirs(torch.tensor(wave)).embeddings.numpy()
    np.testing.assert_allclose(model(wave).embeddings, expected, atol=1e-4, rtol=0)


def test_commands_and_python_take_a_run_of_either_head(run, root, capsys):
    """`embed` and `verify` on files of the corpus, two of one speaker among three: as the model itself has them."""
    _, folder, _ = run
    names, model = ("000.flac", "001.flac", "005.flac"), wavlm_jax.load(folder)
    recordings, stored = [root / "audio" / "same" / name for name in names], root / "vectors.npy"
    assert main(["embed", *map(str, recordings), "--model", str(folder), "--out", str(stored)]) == 0
    assert json.loads(stored.with_suffix(".json").read_text()) == [str(file) for file in recordings]
    vectors = np.load(stored)
    alone = np.asarray(model(soundfile.read(recordings[0], dtype="float32")[0][None]).embeddings[0])
    np.testing.assert_allclose(vectors[0], alone / np.linalg.norm(alone), atol=1e-5)
    np.testing.assert_allclose(wavlm_jax.embed(model, recordings), vectors, atol=1e-6)
    few = root / "few.txt"
    few.write_text(trial_list([Trial(False, *names[:2]), Trial(True, names[0], names[2])]))
    assert main(["verify", str(few), "--root", str(root / "audio" / "same"), "--model", str(folder)]) == 0
    out, err = capsys.readouterr()
    other, same = (float(line.split("\t")[0]) for line in out.splitlines())
    assert same > other
    np.testing.assert_allclose([other, same], [vectors[0] @ vectors[1], vectors[0] @ vectors[2]], atol=1e-5)
    assert "EER 0.00 %" in err


def test_strangers_are_embedded_and_not_in_the_loss(root, folders):
    """An evaluation on other speakers has trials, and no accuracy."""
    corpus = make_corpus(root, "strangers", [("ABC", 7, "ABC"), ("ABE", 8, "ABE"), ("ABD", 7, "ABD")])
    config = tiny_speakers(speaker_xvector, folders["train"], corpus)
    task = speaker.build(config, ONE)
    _, batch = next(task.stream("strangers").batches())
    assert batch["labels"][batch["id"] >= 0].tolist() == [-1, -1, -1]
    params = jax.eval_shape(task.init, jax.random.key(0))
    sums = jax.eval_shape(lambda params, batch: task.loss(params, batch, None), params, batch)
    assert sums.answers["embedding"].shape == (len(batch["id"]), 128)


def test_scores_of_trials_are_those_of_their_embeddings(folders, trials):
    """Equal error rate against scikit-learn's curve; embeddings in any order, one of them missing."""
    corpora = {"train": Corpus.open(folders["train"]), "same": Corpus.open(folders["same"])}
    placed = place_trials([str(trials)], corpora)
    generator = np.random.default_rng(0)
    order = generator.permutation(10)
    vectors = generator.normal(size=(10, 4)).astype(np.float32)
    found = VerificationScores(placed)("same", {"id": np.int32(order), "embedding": vectors[order]})
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = list(combinations(range(10), 2))
    same = np.array([a % 5 == b % 5 for a, b in pairs])
    false_alarms, hits, _ = roc_curve(same, [float(unit[a] @ unit[b]) for a, b in pairs], drop_intermediate=False)
    gap = np.abs(false_alarms - (1 - hits))
    near = int(np.argmin(gap))
    assert abs(found["eer"] - false_alarms[near]) <= gap[near] + 1e-9
    assert found["trials"] == 45
    fewer = VerificationScores(placed)("same", {"id": np.int32(order[1:]), "embedding": vectors[order[1:]]})
    assert fewer["trials"] == 36
    assert VerificationScores(placed)("other", {}) == {}
    twice = VerificationScores({"same": [*placed["same"], placed["same"][0]._replace(name="again")]})
    scores = twice("same", {"id": np.int32(order), "embedding": vectors[order]})
    assert scores["eer_pairs"] == scores["eer_again"] == found["eer"]


def test_wrong_trials_get_an_answer(root, folders, trials):
    def build(text):
        (root / "list.txt").write_text(text)
        config = tiny_speakers(
            speaker_xvector, folders["train"], folders["same"], trials=[str(trials), str(root / "list.txt")]
        )
        return speaker.build(config, ONE)

    with pytest.raises(SettingsError, match=r"no folder.*list\.txt: same, the nearest, lacks 099\.flac"):
        build("1 000.flac 005.flac\n0 000.flac 099.flac\n")
    with pytest.raises(SettingsError, match=r"every trial of .*list\.txt is of one speaker"):
        build("1 000.flac 005.flac\n")
    assert build("1 same-000 same-005\n0 same-000 001.flac\n").score("same", ANSWERS)["trials_list"] == 2
    config = tiny_speakers(speaker_xvector, folders["train"], folders["same"])
    config["margin"]["margin"] = 1.5
    with pytest.raises(SettingsError, match=r"config\.margin: scale 30\.0, margin 1\.5"):
        speaker.build(config, ONE)


ANSWERS = {"id": np.arange(10, dtype=np.int32), "embedding": np.eye(10, 4, dtype=np.float32)}


@pytest.mark.parametrize(
    "recipe",
    [(speaker_xvector, name) for name in ("base", "large", "speakers")]
    + [(speaker_ecapa, name) for name in (*speaker_ecapa._PRESETS, "speakers")],
    ids=lambda recipe: recipe[1],
)
def test_every_preset_can_be_read(recipe):
    module, preset = recipe
    config = json.loads(module.get_config(preset).to_json())
    config["init"]["path"] = "a run"
    read_sections(config, RunSettings)
    found = read_sections(config, speaker.SpeakerSettings)
    assert found.init.head == preset.endswith(("joint", "large_margin"))
    assert found.margin.kind == ("angular" if module is speaker_ecapa else "additive")


ADDITIVE = MarginSettings(kind="additive", scale=30.0, margin=0.4)


def test_the_loss_of_an_x_vector_is_that_of_transformers_class():
    """From our own model's outputs: the cosines with its speaker vectors."""
    twin = head_twins(WavLMForXVector, small_config(), small_head())
    labels, lengths = np.array([4, 1]), (9000, 7000)
    waveform, mask = waveforms(lengths), attention_mask(lengths, 9000).long()
    with torch.no_grad():
        given = twin.torch(torch.tensor(waveform), attention_mask=mask, labels=torch.tensor(labels))
    output = jax.jit(twin.model.apply)({"params": twin.params}, jnp.array(waveform), jnp.array(lengths))
    np.testing.assert_allclose(
        margin_loss(output.cosines, jnp.array(labels), ADDITIVE).mean(), given.loss.item(), atol=1e-4
    )


def test_additive_margin_is_transformers_s():
    torch.manual_seed(0)
    reference = AMSoftmaxLoss(8, 5)
    embeddings, labels = torch.randn(7, 8, requires_grad=True), torch.arange(7) % 5
    expected = reference(embeddings, labels)
    expected.backward()

    def loss(embeddings):
        weight = jnp.array(reference.weight.detach().numpy())
        cosines = unit_length(embeddings, axis=1) @ unit_length(weight, axis=0)
        return margin_loss(cosines, jnp.array(labels.numpy()), ADDITIVE).mean()

    value, gradient = jax.value_and_grad(loss)(jnp.array(embeddings.detach().numpy()))
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, embeddings.grad.numpy(), atol=1e-5)


@pytest.mark.parametrize("margin", [0.2, 0.5])
def test_angular_margin_turns_the_angle(margin):
    """Against arccos and cos in double precision, with the usual continuation behind pi."""
    cosines = np.random.default_rng(1).uniform(-0.999, 0.999, (40, 6)).astype(np.float32)
    cosines[:6, 0] = [-0.999, -0.99, -0.95, 0.0, 0.5, 0.999]
    labels = np.arange(40) % 6
    labels[:6] = 0
    angles = np.arccos(cosines.astype(np.float64))[np.arange(40), labels] + margin
    reduced = np.where(angles < math.pi, np.cos(angles), np.cos(angles - margin) - margin * math.sin(margin))
    logits = 30.0 * cosines.astype(np.float64)
    logits[np.arange(40), labels] = 30.0 * reduced
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels), reduction="none")
    settings = MarginSettings(kind="angular", scale=30.0, margin=margin)
    found = margin_loss(jnp.array(cosines), jnp.array(labels), settings)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-3)
    ends = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    slope = jax.grad(lambda c: margin_loss(c, jnp.array([0, 0]), settings).sum())(ends)
    assert np.isfinite(slope).all()
