"""Weights as trainers leave them: typed configs, wrappers, sections, buffers, and state dicts without any config."""

import shutil
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.support.foreign_layouts import microsoft_config, microsoft_head, microsoft_state, torchaudio_state
from tests.support.torch_twins import small_config, torch_model
from wavlm_jax.convert import bare
from wavlm_jax.loading import load, load_weights

CONFIGS = sorted((Path(__file__).parents[1] / "support" / "omegaconf").glob("*.pickle"))


@pytest.fixture(scope="module")
def model():
    return torch_model(small_config())


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    model.save_pretrained(folder := tmp_path_factory.mktemp("model"))
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    return load_weights(folder).params


@pytest.fixture(scope="module")
def hubert(tmp_path_factory):
    large = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "position_bias": False}
    model = torch_model(small_config(**large))
    model.save_pretrained(folder := tmp_path_factory.mktemp("hubert"))
    return model, load_weights(folder).params


@pytest.fixture
def tiny_base(monkeypatch):
    """The published Base is a tiny model."""
    monkeypatch.setitem(bare.LIKE, "base", small_config)


def saved(value, path: Path) -> Path:
    torch.save(value, path)
    return path


def assert_same(found, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, found.params, expected)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_configs_that_omegaconf_has_pickled(tmp_path, hubert, config):
    """The files are real, `support/omegaconf/make.py` wrote them; they are put before real weights of torch's."""
    model, expected = hubert
    weights, path = saved(microsoft_state(model), tmp_path / "state.pt"), tmp_path / "hubert.pt"
    with zipfile.ZipFile(weights) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("/data.pkl"):
                parts = {"cfg": config.read_bytes(), "model": content}
                keys = {key: b"X" + len(key).to_bytes(4, "little") + key.encode() for key in parts}
                content = b"\x80\x02}(" + b"".join(keys[key] + part[2:-1] for key, part in parts.items()) + b"u."
            target.writestr(name, content)
    found = load_weights(path)
    assert_same(found, expected)
    assert (found.config.do_normalize, found.config.do_stable_layer_norm) == (True, True)


WRAPPED = {
    "DataParallel": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "Lightning": lambda state: {"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}, "epoch": 3},
    "compiled": lambda state: {"model_state_dict": {f"_orig_mod.module.{name}": part for name, part in state.items()}},
    "a loop of one's own": lambda state: {"model": state, "optimizer": {"lr": 0.1}, "epoch": 3},
    "buffers": lambda state: {
        **state,
        "encoder.position_ids": torch.arange(5),
        "some.mask": torch.ones(3, dtype=torch.bool),
        "dummy_weight": torch.ones(1),
        "encoder.norm.num_batches_tracked": torch.tensor(3),
    },
}


@pytest.mark.usefixtures("tiny_base")
@pytest.mark.parametrize("how", WRAPPED)
def test_what_trainers_put_around_the_weights(tmp_path, model, folder, expected, how):
    """In a folder, as a file beside a config and without one, in the authors' names and in torchaudio's."""
    shutil.copytree(folder, tmp_path / "folder")
    (tmp_path / "folder" / "model.safetensors").unlink()
    path = saved(WRAPPED[how](model.state_dict()), tmp_path / "folder" / "pytorch_model.bin")
    assert_same(load_weights(tmp_path / "folder"), expected)
    assert_same(load_weights(path.rename(path.with_name("last.ckpt"))), expected)
    assert_same(load_weights(path.with_name("last.ckpt").rename(tmp_path / "alone.pt"), like="base"), expected)
    wrapped = WRAPPED[how](microsoft_state(model))
    assert_same(load_weights(saved(wrapped, tmp_path / "authors.pt"), like="base"), expected)
    if "model" not in wrapped:
        checkpoint = {"cfg": microsoft_config(model), "model": wrapped.get("state_dict", wrapped)}
        assert_same(load_weights(saved(checkpoint, tmp_path / "cfg.pt")), expected)
    audio = load_weights(saved(WRAPPED[how](torchaudio_state(model)), tmp_path / "audio.pt"))
    np.testing.assert_array_equal(
        audio.params["feature_projection"]["projection"]["kernel"],
        expected["feature_projection"]["projection"]["kernel"],
    )


@pytest.mark.usefixtures("tiny_base")
def test_what_is_left_out_is_said(tmp_path, model):
    path = saved(WRAPPED["buffers"](model.state_dict()), tmp_path / "x.pt")
    notes = "; ".join(load_weights(path, like="base").origin.notes)
    for name in ("encoder.position_ids", "some.mask", "dummy_weight"):
        assert f"left out: {name}" in notes
    assert "taken for a base" in notes


@pytest.mark.usefixtures("tiny_base")
def test_the_encoder_of_a_speaker_checkpoint(tmp_path, model, expected):
    """UniSpeech's: the authors' names behind `feature_extract.model.`, a head beside them, no config."""
    state = {f"feature_extract.model.{name}": tensor for name, tensor in microsoft_state(model).items()}
    state |= {"feature_weight": torch.zeros(3), "layer1.conv.weight": torch.zeros(4, 32, 5)}
    path = saved({"model": state}, tmp_path / "wavlm_finetune.pth")
    found = load_weights(path, like="base")
    assert_same(found, expected)
    assert found.config.padding == "microsoft"
    assert any("left out: layer1.conv.weight" in note for note in found.origin.notes)
    with pytest.raises(ValueError, match=r"wavlm_finetune\.pth: weights alone, .* --like base or large"):
        load_weights(path)


def test_a_state_dict_beside_a_config(tmp_path, model, folder, expected):
    """The file that is named is the one that is read, whatever else lies in the folder."""
    shutil.copytree(folder, tmp_path / "f")
    other = {name: tensor + 1 if tensor.ndim else tensor for name, tensor in model.state_dict().items()}
    save_file(other, tmp_path / "f" / "model.safetensors", metadata={"format": "pt"})
    assert_same(load_weights(saved(model.state_dict(), tmp_path / "f" / "pytorch_model.bin")), expected)
    authors = saved({**microsoft_state(model), **microsoft_head(32)}, tmp_path / "f" / "authors.pt")
    found = load_weights(authors)
    assert_same(found, expected)
    assert found.head is not None
    with pytest.raises(ValueError, match=r"the config\.json beside it tells the model"):
        load_weights(authors, like="base")


@pytest.mark.usefixtures("tiny_base")
def test_safetensors_alone(tmp_path, model, expected):
    state = {f"wavlm.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file({**state, "head.weight": torch.ones(2), "wavlm.ids": torch.arange(3)}, tmp_path / "x.safetensors")
    assert_same(load_weights(tmp_path / "x.safetensors", like="base"), expected)
    with pytest.raises(ValueError, match=r"x\.safetensors: weights alone.*--like base or large"):
        load_weights(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        ({"weight": torch.ones(2)}, {"like": "base"}, "found 0 encoders of WavLM in it, expected one"),
        ({"weight": torch.ones(2)}, {}, "found 0 encoders of WavLM in it, expected one"),
        ([1, 2], {}, "found a list where a state dict was expected"),
        ({"weight": torch.ones(2)}, {"like": "huge"}, "like: found 'huge', expected base or large"),
        ({"weight": torch.ones(2)}, {"num_attention_heads": 4}, "num_attention_heads is for a torchaudio state dict"),
    ],
)
def test_other_files_are_refused(tmp_path, value, options, message):
    with pytest.raises(ValueError, match=message):
        load(saved(value, tmp_path / "x.pt"), **options)


def test_options_of_files_are_refused_elsewhere(folder):
    with pytest.raises(ValueError, match="like is for a state dict without a config alone"):
        load(folder, like="base")


def test_a_torch_file_is_read_once(tmp_path, model, monkeypatch):
    path, reads = saved(torchaudio_state(model), tmp_path / "x.pt"), []
    from wavlm_jax import loading

    read = loading.read_torch_file
    monkeypatch.setattr(loading, "read_torch_file", lambda path: reads.append(path) or read(path))
    load_weights(path, num_attention_heads=2)
    assert reads == [path]
