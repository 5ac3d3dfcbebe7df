"""Every kind of source is found out by looking, and gives the same model; what is none says what was expected."""

import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, Mesh
from safetensors.numpy import load_file, save_file

import wavlm_jax
from pretrain.task import build
from tests.support.foreign_layouts import microsoft_config, microsoft_head, microsoft_state, torchaudio_state
from tests.support.hostile import code_in_tensor_slot
from tests.support.speech import make_corpora, tiny_config
from tests.support.torch_twins import small_config, torch_model
from wavlm_jax.convert import huggingface_files
from wavlm_jax.convert.state_dict import ConversionError
from wavlm_jax.files import DamagedFile, HostileFile
from wavlm_jax.loading import _task_head, load_weights
from wavlm_jax.settings import read_sections
from wavlm_jax.training import checkpoint, loop
from wavlm_jax.training.sharding import MESH_AXES
from wavlm_jax.training.start import RunSettings
from wavlm_jax.training.task import Topology
from wavlm_jax.training.workdir import Workdir

CONFIG = small_config()


@pytest.fixture(scope="module")
def model():
    return torch_model(CONFIG)


@pytest.fixture
def folder(model, tmp_path):
    """A Hugging Face folder."""
    model.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected")
    model.save_pretrained(folder)
    return load_weights(folder)


def assert_same(found, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def shard(folder: Path, kind: str) -> Path:
    """The same weights in two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    where = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-{number:05d}-of-00002.{suffix}"
        where |= dict.fromkeys(part, file)
        if kind == "safetensors":
            save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        else:
            torch.save({name: torch.tensor(tensors[name]) for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards(folder, expected, kind):
    shard(folder, kind)
    assert_same(load_weights(folder), expected)


def test_one_pickled_file_with_the_old_spelling(folder, model, expected):
    (folder / "model.safetensors").unlink()
    old = {"original0": "weight_g", "original1": "weight_v"}
    state = {
        name.replace("parametrizations.weight.", "").replace(name[-9:], old.get(name[-9:], name[-9:])): tensor
        for name, tensor in model.state_dict().items()
    }
    assert any(name.endswith("weight_g") for name in state)
    torch.save(state, folder / "pytorch_model.bin")
    assert_same(load_weights(folder), expected)
    assert_same(load_weights(folder / "pytorch_model.bin"), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(model, tmp_path, dtype):
    import copy

    half = copy.deepcopy(model).to(dtype)
    half.save_pretrained(tmp_path)
    half.float().save_pretrained(tmp_path / "float")
    assert_same(load_weights(tmp_path), load_weights(tmp_path / "float"))


def test_the_authors_file_fairseqs_and_torchaudios(model, tmp_path, expected):
    width = model.config.hidden_size
    checkpoint = {"cfg": microsoft_config(model), "model": microsoft_state(model) | microsoft_head(width)}
    torch.save(checkpoint, tmp_path / "WavLM.pt")
    found = load_weights(tmp_path / "WavLM.pt")
    assert_same(found, expected)
    assert found.head is not None
    assert (found.origin.dialect, found.config.padding) == ("microsoft", "microsoft")
    prefixed = {f"w2v_encoder.w2v_model.{name}": tensor for name, tensor in microsoft_state(model).items()}
    tuned = {"cfg": {"model": {"w2v_args": {"model": checkpoint["cfg"]}}}, "model": prefixed, "optimizer_history": []}
    torch.save(tuned, tmp_path / "checkpoint_best.pt")
    assert_same(load_weights(tmp_path / "checkpoint_best.pt"), expected)
    torch.save(torchaudio_state(model), tmp_path / "audio.pth")
    found = load_weights(tmp_path / "audio.pth")
    without_vector = {name: part for name, part in found.params.items() if name != "masked_spec_embed"}
    jax.tree.map(np.testing.assert_array_equal, without_vector, {n: expected.params[n] for n in without_vector})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two updates of pre-training, a checkpoint after each."""
    root = tmp_path_factory.mktemp("run")
    config = tiny_config(root, make_corpora(root, train=8, valid=2))
    config["batch"].update({"buckets": [48], "seconds_per_update": 3.8, "row_multiple": 4})
    config["data"]["evaluation"], config["train"]["eval_splits"] = [], []
    config["train"].update({"num_steps": 2, "compilation_cache": None})
    config["optim"]["warmup_steps"] = 0
    config["checkpoint"].update({"every": 1, "keep_last": 9})
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 2, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    loop.run(
        build(config, Topology.of(mesh)),
        read_sections(config, RunSettings),
        mesh,
        Workdir(root / "run"),
        config=config,
    )
    return root / "run"


def test_any_step_of_a_sharded_run_while_it_goes_on(run, tmp_path):
    newest, first = load_weights(run), load_weights(run, 1)
    assert newest.config.padding == "exact"
    assert newest.head["label_embeddings"].shape == (8, 64)
    assert not np.array_equal(newest.head["label_embeddings"], first.head["label_embeddings"])
    assert_same(load_weights(run / "checkpoints" / "1"), first)
    assert newest.origin.facts["updates"] == "2 of 2"
    shutil.copytree(run, tmp_path / "copy")
    unfinished = tmp_path / "copy" / "checkpoints" / ".unfinished" / "3"  # as a save under way looks
    unfinished.mkdir(parents=True)
    with (tmp_path / "copy" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "eval/valid", "st')
    assert_same(load_weights(tmp_path / "copy"), newest)
    with pytest.raises(ValueError, match="7"):
        load_weights(run, 7)


def test_a_checkpoint_that_is_removed_while_it_is_read(run, monkeypatch, tmp_path):
    """Retention of a run that goes on: the newest one vanishes, another takes its place."""
    shutil.copytree(run, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "2"
    original = checkpoint.orbax.load_checkpointables

    def vanishing(path, *arguments):
        if newest.is_dir():
            shutil.rmtree(newest)
        return original(path, *arguments)

    monkeypatch.setattr(checkpoint.orbax, "load_checkpointables", vanishing)
    assert_same(load_weights(tmp_path / "run"), load_weights(run, 1))


def test_a_hub_name_comes_from_the_cache(folder, expected, tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    snapshot = cache / "models--someone--wavlm" / "snapshots" / ("a" * 40)
    blobs = cache / "models--someone--wavlm" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (cache / "models--someone--wavlm" / "refs").mkdir()
    (cache / "models--someone--wavlm" / "refs" / "main").write_text("a" * 40)
    for file in folder.iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(blobs / file.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub._snapshot_download.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    assert_same(load_weights(Path("someone/wavlm")), expected)
    assert_same(wavlm_jax.load("someone/wavlm@main").weights, expected)


def test_a_partial_snapshot_in_the_cache_does_not_win(folder, expected, tmp_path, monkeypatch):
    """transformers' AutoModel leaves config and weights there; the vocabulary is fetched when it is wanted."""
    (tmp_path / "partial").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path / "partial")

    def download(_, *, local_files_only, **__):
        return str(tmp_path / "partial") if local_files_only else str(folder)

    monkeypatch.setattr(huggingface_files, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    found = load_weights("someone/wavlm")
    assert_same(found, expected)
    assert found.origin.path == str(folder)


def test_a_hub_name_without_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"nobody/nothing: no such file or folder here, not in .*cache.*hf download"):
        load_weights(Path("nobody/nothing"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), r"no model here.*the folder has nothing"),
        (lambda path: (path.mkdir(), (path / "x.txt").write_text("")), r"no model here.*the folder has x.txt"),
        (lambda _: None, r"no such file or folder; no model here; expected the workdir of a run"),
        (lambda path: path.write_bytes(b"hello"), "neither a zip archive nor a pickle"),
    ],
)
def test_what_is_no_model(tmp_path, make, message):
    make(tmp_path / "thing")
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path / "thing")


def test_a_step_of_what_has_none(folder):
    with pytest.raises(ValueError, match="found step 3 for a Hugging Face folder"):
        load_weights(folder, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: m.update(x="../../etc/passwd"), ConversionError, "leads out of the folder"),
        (lambda m: m.update(x="/etc/passwd"), ConversionError, "leads out of the folder"),
        (lambda m: m.update(x="absent.safetensors"), FileNotFoundError, r"absent\.safetensors: no such file"),
        (lambda m: m.update(x=min(m.values())), ConversionError, "x is in none of its files"),
        (lambda m: m.update(x=3), ConversionError, "no map from tensors to files"),
        (lambda m: m.update({f"x{i}": f"{i}.safetensors" for i in range(20_000)}), ConversionError, "at most 10000"),
    ],
)
def test_hostile_indices(folder, change, error, message):
    index = shard(folder, "safetensors")
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    with pytest.raises(error, match=message):
        load_weights(folder)


def test_code_in_a_pickled_folder_is_not_run(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    code_in_tensor_slot(folder / "pytorch_model.bin", tmp_path / "sentinel")
    with pytest.raises(HostileFile, match="asks for"):
        load_weights(folder)
    assert not (tmp_path / "sentinel").exists()


def header(**entries) -> bytes:
    content = json.dumps(entries).encode()
    return len(content).to_bytes(8, "little") + content + bytes(64)


LYING = {
    "shape of 10^12": header(w={"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 64]}),
    "offsets of 10^12": header(w={"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}),
    "overlap": header(
        a={"dtype": "F32", "shape": [16], "data_offsets": [0, 64]},
        b={"dtype": "F32", "shape": [16], "data_offsets": [0, 64]},
    ),
    "header of 2^60": (2**60).to_bytes(8, "little") + b"{}",
    "no json": (8).to_bytes(8, "little") + b"{{{{{{{{",
}


@pytest.mark.parametrize("name", LYING)
def test_lying_safetensors(folder, name):
    (folder / "model.safetensors").write_bytes(LYING[name])
    with pytest.raises(DamagedFile, match="not a readable safetensors file"):
        load_weights(folder)


def test_quantised_weights_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.layer_norm.weight"] = tensors["encoder.layer_norm.weight"].astype(np.int8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"encoder.layer_norm.weight holds I8, expected floating-point"):
        load_weights(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", {"hidden_size": 2**40}, "hidden_size is 1099511627776, expected at most"),
        ("config.json", {"conv_dim": [8] * 10_000}, "expected one each per conv layer"),
        (
            "config.json",
            {"num_feat_extract_layers": 9999, **{k: [2] * 9999 for k in ("conv_dim", "conv_kernel", "conv_stride")}},
            "asks for 9999 layers",
        ),
        ("config.json", {"add_adapter": True}, "add_adapter is True"),
        ("config.json", {"model_type": "wav2vec2"}, "model_type is 'wav2vec2'"),
        ("wavlm_jax.json", {"format": 99}, "format: found 99"),
        ("wavlm_jax.json", {"paddding": "exact"}, "did you mean padding"),
    ],
)
def test_configs_that_ask_for_nonsense(folder, file, content, message):
    wavlm_jax.save_huggingface(wavlm_jax.load(folder), folder.with_name("ours"), compared=False)
    path = folder.with_name("ours") / file
    path.write_text(json.dumps(json.loads(path.read_text()) | content))
    with pytest.raises(ValueError, match=message):
        load_weights(path.parent)


def test_large_json_is_not_read(folder):
    with (folder / "config.json").open("wb") as file:
        os.truncate(file.fileno(), 2**27)
    with pytest.raises(ValueError, match=r"config.json: 134217728 bytes, expected at most"):
        load_weights(folder)


def test_padding_is_the_callers_choice(folder):
    waveform, lengths = np.zeros((2, 4000), np.float32), np.array([4000, 1600], np.int32)
    waveform[:] = np.random.default_rng(0).standard_normal(waveform.shape)
    masks = {}
    for padding in ("exact", "huggingface", "microsoft", None):
        model = wavlm_jax.load(folder, padding)
        assert model.config.padding == (padding or "huggingface")
        output = model(waveform, num_samples=lengths)
        masks[padding] = np.asarray(output.frame_mask).sum(axis=1).tolist()
        assert output.hidden_states.shape == (3, 2, 12, 32)
        functional = jax.jit(model.module.apply)({"params": model.params}, jnp.asarray(waveform), jnp.asarray(lengths))
        np.testing.assert_allclose(functional.last_hidden_state, output.last_hidden_state, atol=1e-5)
    assert masks["exact"] == masks["huggingface"] == masks[None] == [12, 4]
    assert masks["microsoft"] == [12, 5]
    with pytest.raises((ValueError, TypeError), match="padding"):  # TypeError: annotations are checked in tests
        wavlm_jax.load(folder, "exakt")
    with pytest.raises((ValueError, TypeError), match="waveform"):
        model(waveform[0])


def test_sizes_of_a_fine_tuned_head_are_those_of_its_parameters():
    """The vocabulary and the speakers come from the data, so a run's config does not have them."""
    config = {"head": {"final_dropout": 0.0}}
    ctc = _task_head(config, {"lm_head": {"kernel": np.zeros((32, 29)), "bias": np.zeros(29)}}, "run")
    assert (ctc.kind, ctc.config.vocab_size, ctc.config.final_dropout) == ("WavLMForCTC", 29, 0.0)
    frames = _task_head(config, {"classifier": {"kernel": np.zeros((32, 3)), "bias": np.zeros(3)}}, "run")
    assert (frames.kind, frames.config.num_labels) == ("WavLMForAudioFrameClassification", 3)
    parts = {
        name: {} for name in ("layer_weights", "projector", "tdnn_0", "tdnn_10", "feature_extractor", "classifier")
    }
    speakers = _task_head(config, {**parts, "objective": {"weight": np.zeros((10, 7))}}, "run")
    assert (speakers.kind, speakers.config.num_labels) == ("WavLMForXVector", 7)


def test_a_head_that_no_row_describes_is_an_error():
    for names in (("decoder",), ("classifier", "decoder"), ("objective", "projector"), ()):
        found = ", ".join(names) or "no parts"
        with pytest.raises(ValueError, match=f"runs/a: found a head of {found}, expected one that"):
            _task_head({"head": {}}, {name: {} for name in names}, "runs/a")


def test_a_field_of_older_runs_counts_only_with_the_value_that_is_left():
    """`ecapa_global_context` was False wherever nobody had asked for it."""
    parts = {"ecapa": {}, "objective": {"weight": np.zeros((10, 7))}}
    assert _task_head({"head": {"ecapa_global_context": False}}, parts, "run").kind == "WavLMForECAPA"
    with pytest.raises(ValueError, match=r"run: config\.head\.ecapa_global_context is True, which this version"):
        _task_head({"head": {"ecapa_global_context": True}}, parts, "run")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda config: config.clear(), "describes no model"),
        (lambda config: config.update(model=3), "config.model: found 3"),
        (lambda config: config["model"].update(hidden_size=64), r"has the shape \(32,\), but its config"),
        (lambda config: config["model"].update(hidden_size=10**9), "hidden_size: found 1000000000, expected at most"),
        (lambda config: config["model"].update({f"conv_{part}": [2] * 9999 for part in ("dim", "kernel", "stride")}),
         "asks for 9999 conv layers"),
        (lambda config: config.update(batch={"buckets": "x"}), "describes no model"),
        (lambda config: config.update(vocabulary={"tokens": 3}), "config.vocabulary.tokens: found 3"),
    ],
)  # fmt: skip
def test_runs_of_strangers_are_one_message(run, tmp_path, harm, message):
    shutil.copytree(run, tmp_path / "run")
    log = b'{"kind": "eval/x", "step": "two"}\n\xff\n' + b"[" * 100_000 + b"\n"
    (tmp_path / "run" / "metrics.jsonl").write_bytes(log)
    path = tmp_path / "run" / "checkpoints" / "2" / "manifest.json"
    assert load_weights(tmp_path / "run").origin.facts["updates"] == "2 of 2"
    values = json.loads(path.read_text())
    del values["checksum"]
    harm(values["config"])
    path.write_text(json.dumps(values | {"format": 1}))
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path / "run")
