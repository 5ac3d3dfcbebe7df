"""config.json and the files beside it: odd but clear values load as in transformers, others are named."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers

from tests.support.torch_twins import shake, small_config, torch_model
from wavlm_jax.convert.compare import compare
from wavlm_jax.convert.huggingface import import_huggingface
from wavlm_jax.export import save_huggingface, save_microsoft
from wavlm_jax.weights import ready

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # transformers' own call
SMALL = {"vocab_size": 8, "num_labels": 3, "classifier_proj_size": 8, "tdnn_dim": [8] * 5, "xvector_output_dim": 8}


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name of the class -> a folder of it."""
    values = small_config(num_hidden_layers=1).to_huggingface() | SMALL
    values.pop("architectures")
    root = tmp_path_factory.mktemp("folders")
    kinds = ("WavLMModel", "WavLMForCTC", "WavLMForSequenceClassification", "WavLMForXVector")
    made = {kind: getattr(transformers, kind)(transformers.WavLMConfig(**values)) for kind in kinds}
    return {kind: saved(model, root / kind) for kind, model in made.items()}


def changed(folder, to, file="config.json", **values):
    shutil.copytree(folder, to)
    before = json.loads((to / file).read_text()) if (to / file).is_file() else {}
    (to / file).write_text(json.dumps(before | values))
    return to


@pytest.mark.parametrize("name", ["relu", "gelu_new", "quick_gelu", "tanh"])
def test_activations_are_those_of_transformers(tmp_path, name):
    config = small_config(num_hidden_layers=1, hidden_act=name, feat_extract_activation=name)
    folder = saved(torch_model(config), tmp_path / "theirs")
    assert compare(folder)["max_error"] < 1e-5
    model = ready(import_huggingface(folder))
    assert (model.config.hidden_act, model.config.feat_extract_activation) == (name, name)
    with pytest.raises(ValueError, match="feat_extract_activation is"):
        save_microsoft(model, tmp_path / "x.pt", compared=False)


def test_the_authors_layout_has_activations_too(tmp_path):
    folder = saved(torch_model(small_config(num_hidden_layers=1, hidden_act="gelu_new")), tmp_path / "theirs")
    save_microsoft(ready(import_huggingface(folder)), tmp_path / "x.pt", compared=False)
    assert torch.load(tmp_path / "x.pt", weights_only=True)["cfg"]["activation_fn"] == "gelu_accurate"
    assert compare(tmp_path / "x.pt")["max_error"] < 1e-5


def test_a_hubert_with_batch_norm_there_and_back(tmp_path):
    values = small_config(num_hidden_layers=1, position_bias=False).to_huggingface() | {"conv_pos_batch_norm": True}
    values.pop("architectures")
    model = transformers.HubertModel(transformers.HubertConfig(**values))
    shake(model)
    norm = model.encoder.pos_conv_embed.batch_norm
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.2, 2)
    assert compare(saved(model, tmp_path / "theirs"))["max_error"] < 1e-5
    save_huggingface(ready(import_huggingface(tmp_path / "theirs")), tmp_path / "ours", compared=False)
    assert compare(tmp_path / "ours")["max_error"] < 1e-5


def test_a_fresh_model_is_proved_on_its_padding_too(tmp_path):
    """Its biases are 0, so frames of padding are norms of nearly nothing: rounding there would be blown up."""
    values = {key: value for key, value in small_config().to_huggingface().items() if key != "architectures"}
    fresh = transformers.WavLMModel(transformers.WavLMConfig(**values))
    assert compare(saved(fresh, tmp_path / "fresh"))["max_error"] < 2e-5


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("WavLMForSequenceClassification", {"pad_token_id": None}),
        ("WavLMForSequenceClassification", {"pad_token_id": 40, "tdnn_dim": []}),
        ("WavLMForXVector", {"pad_token_id": -1, "classifier_proj_size": 0}),
        ("WavLMModel", {"pad_token_id": 40, "vocab_size": None, "tdnn_dim": "x"}),
        ("WavLMModel", {"layerdrop": 1.0, "hidden_dropout": 1, "mask_time_prob": 1.0}),
        ("WavLMForCTC", {"ctc_loss_reduction": "none"}),
        ("WavLMForCTC", {"layerdrop": 1.0, "num_feat_extract_layers": 7}),
    ],
)
def test_what_does_not_concern_the_model_is_no_reason_to_refuse(folders, tmp_path, kind, values):
    found, expected = (
        import_huggingface(changed(folders[kind], tmp_path / "f", **values)),
        import_huggingface(folders[kind]),
    )
    np.testing.assert_array_equal(
        found.params["encoder"]["layer_norm"]["scale"], expected.params["encoder"]["layer_norm"]["scale"]
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_feat_extract_layers": 5}, "num_feat_extract_layers is 5, conv_dim has 7 layers"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps: found nan .*expected a finite number"),
        ({"layerdrop": float("nan")}, "layerdrop: found nan .*expected a finite number"),
        ({"mask_time_prob": float("inf")}, "mask_time_prob: found inf .*expected a finite number"),
        ({"layer_norm_eps": -1e-5}, "layer_norm_eps: found -1e-05, expected 0 or more"),
        ({"hidden_size": 0}, "hidden_size: found 0, expected 1 or more"),
        ({"hidden_size": -32}, "hidden_size: found -32, expected 1 or more"),
        ({"hidden_size": 10**9}, "hidden_size is 1000000000, expected at most 1048576"),
        ({"hidden_size": 1e9}, r"hidden_size: found 1000000000.0 \(float\), expected int"),
        ({"num_attention_heads": 0}, "num_attention_heads: found 0, expected 1 or more"),
        ({"conv_stride": [5, 2, 2, 2, 2, 2, 0]}, "conv_stride: found .*, expected 1 or more"),
        ({"num_conv_pos_embedding_groups": 0}, "num_conv_pos_embedding_groups: found 0, expected 1 or more"),
        ({"mask_time_length": 0}, "mask_time_length: found 0, expected 1 or more"),
        ({"hidden_act": "sigmoid"}, "hidden_act: found 'sigmoid', expected one of 'gelu'"),
        ({"feat_proj_layer_norm": False}, "feat_proj_layer_norm is False"),
    ],
)
def test_values_that_make_no_model_are_named(folders, tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        import_huggingface(changed(folders["WavLMModel"], tmp_path / "f", **values))


def test_a_mask_vector_that_is_missing_is_filled_and_said(tmp_path):
    folder = saved(torch_model(small_config(num_hidden_layers=1, mask_time_prob=0.0)), tmp_path / "theirs")
    found = import_huggingface(changed(folder, tmp_path / "f", mask_time_prob=0.05))
    assert not found.params["masked_spec_embed"].any()
    assert any("filled with zeros: masked_spec_embed" in note for note in found.origin.notes)


def test_files_of_the_feature_extractor_that_contradict_each_other(folders, tmp_path):
    """As transformers 5 reads them: processor_config.json first, defaults for what it leaves out; the other is told."""
    old = {"do_normalize": False, "padding_side": "left"}
    folder = changed(folders["WavLMModel"], tmp_path / "one", "preprocessor_config.json", **old)
    found = import_huggingface(folder)
    assert not found.config.do_normalize
    assert any("padded on the right" in note for note in found.origin.notes)
    both = changed(folder, tmp_path / "both", "processor_config.json", feature_extractor={"sampling_rate": 16000})
    found = import_huggingface(both)
    assert found.config.do_normalize
    notes = "; ".join(found.origin.notes)
    assert "do_normalize is True in processor_config.json and False in preprocessor_config.json" in notes
    assert transformers.AutoFeatureExtractor.from_pretrained(both).do_normalize
    for key, value in (("feature_size", 80), ("feature_extractor_type", "SeamlessM4TFeatureExtractor")):
        wrong = changed(folders["WavLMModel"], tmp_path / key, "preprocessor_config.json", **{key: value})
        with pytest.raises(ValueError, match=rf"preprocessor_config\.json: {key} is {value!r}; this model only takes"):
            import_huggingface(wrong)
