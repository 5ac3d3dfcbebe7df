"""Folders that transformers reads and writes: nothing missing, nothing left over, not one bit changed."""

import json
import logging

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from tests.support.torch_twins import small_config, torch_model, waveforms
from wavlm_jax.convert.huggingface import export_huggingface, import_huggingface
from wavlm_jax.convert.state_dict import ConversionError, to_torch
from wavlm_jax.files import DamagedFile
from wavlm_jax.model.heads import tree_shapes
from wavlm_jax.model.wavlm import WavLM
from wavlm_jax.settings import SettingsError
from wavlm_jax.weights import Weights

CONFIGS = {
    "base": small_config(),
    "large": small_config(feat_extract_norm="layer", do_stable_layer_norm=True, do_normalize=True, conv_bias=True),
    "hubert": small_config(position_bias=False),
}


def export(config, params, folder):
    export_huggingface(Weights(config, params, None), folder)


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture
def folder(config, tmp_path):
    """A folder written by transformers."""
    torch_model(config).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def load_strictly(folder, config):
    kind = transformers.WavLMModel if config.position_bias else transformers.HubertModel
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    problems = {name: list(keys) for name, keys in report.items() if keys}
    assert not problems, problems
    return model.eval()


def test_our_folder_loads_in_transformers_and_gives_the_same_hidden_states(config, tmp_path):
    model = WavLM(config)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 400), np.float32))["params"]
    export(config, params, tmp_path)
    theirs = load_strictly(tmp_path, config)
    waveform = waveforms((8000,))
    with torch.no_grad():
        states = torch.stack(theirs(torch.tensor(waveform), output_hidden_states=True).hidden_states)
    ours = jax.jit(lambda p, w: model.apply({"params": p}, w, output_hidden_states=True))(params, waveform)
    np.testing.assert_allclose(ours.hidden_states, states.numpy(), atol=1e-4, rtol=0)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path)
    assert extractor.do_normalize == config.do_normalize
    assert extractor.sampling_rate == 16000


def test_round_trip_keeps_every_bit(folder, tmp_path):
    read = import_huggingface(folder)
    export(read.config, read.params, tmp_path / "ours")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "ours" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        np.testing.assert_array_equal(tensor, after[name], err_msg=name)
    again = import_huggingface(tmp_path / "ours")
    assert again.config == read.config
    jax.tree.map(np.testing.assert_array_equal, read.params, again.params)


def test_old_spelling_of_weight_norm_is_read(folder):
    params = import_huggingface(folder).params
    tensors = load_file(folder / "model.safetensors")
    for new, old in (
        ("parametrizations.weight.original0", "weight_g"),
        ("parametrizations.weight.original1", "weight_v"),
    ):
        tensors[f"encoder.pos_conv_embed.conv.{old}"] = tensors.pop(f"encoder.pos_conv_embed.conv.{new}")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    jax.tree.map(np.testing.assert_array_equal, import_huggingface(folder).params, params)


def test_encoder_of_a_model_with_a_head(tmp_path):
    config = CONFIGS["base"]
    torch.manual_seed(0)
    values = {key: value for key, value in config.to_huggingface().items() if key != "architectures"}
    with_head = transformers.WavLMForCTC(transformers.WavLMConfig(**values))
    with_head.save_pretrained(tmp_path)
    params = import_huggingface(tmp_path).params
    expected = {name: tensor.detach().numpy() for name, tensor in with_head.wavlm.state_dict().items()}
    for name, tensor in to_torch(params).items():
        np.testing.assert_array_equal(tensor, expected[name])


def test_model_that_never_masks_has_no_mask_vector(tmp_path):
    config = small_config(mask_time_prob=0.0)
    torch_model(config).save_pretrained(tmp_path / "theirs")
    assert "masked_spec_embed" not in load_file(tmp_path / "theirs" / "model.safetensors")
    read = import_huggingface(tmp_path / "theirs")
    export(read.config, read.params, tmp_path / "ours")
    load_strictly(tmp_path / "ours", config)


def damage(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def reshape(tensors):
    tensors["encoder.layers.1.layer_norm.bias"] = np.zeros(31, np.float32)


def poison(tensors):
    tensors["encoder.layers.1.attention.k_proj.weight"][3, 4] = np.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("encoder.layers.1.layer_norm.bias"), "1 missing: encoder.layers.1.layer_norm.bias"),
        (lambda t: t.update({"encoder.layers.2.x": np.zeros(3)}), "1 not used by this model: encoder.layers.2.x"),
        (reshape, r"encoder.layers.1.layer_norm.bias \(found \(31,\), expected \(32,\)\)"),
        (poison, "encoder.layers.1.attention.k_proj.weight holds numbers that are not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, message):
    damage(folder, change)
    with pytest.raises(ConversionError, match=message):
        import_huggingface(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", b"", "model.safetensors: not a readable safetensors file"),
        ("model.safetensors", b"\xff" * 100, "model.safetensors: not a readable safetensors file"),
        ("config.json", b"{", "config.json: not readable as JSON"),
        ("config.json", b"[1]", "config.json: found a list, expected an object"),
        ("config.json", b"[" * 100_000, "config.json: not readable as JSON"),
        ("preprocessor_config.json", b'{"do_normalize": "yes"}', "do_normalize is 'yes', expected true or false"),
        ("preprocessor_config.json", b'{"sampling_rate": 8000}', "sampling_rate is 8000; this model only takes 16000"),
        ("processor_config.json", b'{"feature_extractor": 1}', "feature_extractor is a int, expected an object"),
    ],
)
def test_damaged_files_are_named(tmp_path, file, content, message):
    torch_model(CONFIGS["base"]).save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises((DamagedFile, SettingsError), match=message):
        import_huggingface(tmp_path)


@pytest.mark.parametrize(
    ("new", "old"),
    [
        ({"feature_extractor": {"do_normalize": True}}, None),
        ({"feature_extractor": {"do_normalize": False}}, None),
        ({"audio_processor": {"do_normalize": True}}, None),
        ({"feature_extractor": {"do_normalize": True}}, {"do_normalize": False}),
        ({"feature_extractor": {"do_normalize": False}}, {"do_normalize": True}),
        ({"feature_extractor": {}}, {"do_normalize": False}),
        ({"processor_class": "Wav2Vec2Processor"}, {"do_normalize": True}),
        (None, {"do_normalize": True}),
        (None, {"sampling_rate": 16000}),
    ],
)
def test_normalisation_is_what_transformers_reads_from_the_old_and_the_new_file(tmp_path, new, old):
    torch_model(CONFIGS["base"]).save_pretrained(tmp_path)
    for name, values in (("processor_config.json", new), ("preprocessor_config.json", old)):
        if values is not None:
            (tmp_path / name).write_text(json.dumps(values))
    theirs = transformers.Wav2Vec2FeatureExtractor.from_pretrained(tmp_path)
    assert import_huggingface(tmp_path).config.do_normalize == theirs.do_normalize


def test_half_a_file_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DamagedFile, match="not a readable safetensors file"):
        import_huggingface(folder)


@pytest.mark.parametrize(("key", "value"), [("hidden_size", "32"), ("num_hidden_layers", 2.5), ("conv_bias", 1)])
def test_mistyped_config_values_are_named(folder, key, value):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {key: value}))
    with pytest.raises(ValueError, match=f"config.json.{key}: found"):
        import_huggingface(folder)


def test_config_of_absurd_size_is_refused_at_once(folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 10**9}))
    with pytest.raises(SettingsError, match="num_hidden_layers is 1000000000, expected at most"):
        import_huggingface(folder)


def test_folder_without_weights_says_what_it_has(folder):
    (folder / "model.safetensors").rename(folder / "flax_model.msgpack")
    with pytest.raises(FileNotFoundError, match=r"no such file; the folder has flax_model.msgpack"):
        import_huggingface(folder)


def test_parameters_of_another_config_are_not_exported(tmp_path):
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree_shapes(CONFIGS["base"]))
    with pytest.raises(ConversionError, match="missing"):
        export(CONFIGS["large"], params, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("transformers").setLevel(logging.ERROR)
