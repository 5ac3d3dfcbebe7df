"""The authors', fairseq's and torchaudio's checkpoints become the model that they are, or an error with a name.

Conv layers in fairseq's notation are read as Python would read them; what is more than lists, sums and repetitions is
refused.
"""

import argparse
import ast
import dataclasses
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support import hostile
from tests.support.foreign_layouts import (
    HEAD_ROWS,
    HEAD_WIDTH,
    microsoft_config,
    microsoft_head,
    microsoft_state,
    torchaudio_state,
)
from tests.support.torch_twins import small_config, torch_model, waveforms
from wavlm_jax.convert.microsoft import export_microsoft, format_conv_layers, import_microsoft, parse_conv_layers
from wavlm_jax.convert.state_dict import ConversionError, from_torch
from wavlm_jax.convert.torchaudio import import_torchaudio
from wavlm_jax.files import DamagedFile, HostileFile
from wavlm_jax.loading import load
from wavlm_jax.model.heads import tree_shapes
from wavlm_jax.model.wavlm import WavLM

BASE = {}
LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "do_normalize": True}
KINDS = {
    "base": BASE,
    "large": LARGE | {"conv_bias": True},
    "group_pre": {"do_stable_layer_norm": True},
    "hubert_base": {"position_bias": False},
    "hubert_large": LARGE | {"position_bias": False},
}
BY_KIND = pytest.mark.parametrize("kind", KINDS)


def model_of(kind: str = "base") -> torch.nn.Module:
    return torch_model(small_config(**KINDS[kind]))


def checkpoint_of(model: torch.nn.Module, *, head: bool = False) -> dict:
    state = microsoft_state(model) | (microsoft_head(model.config.hidden_size) if head else {})
    return {"cfg": microsoft_config(model), "model": state}


def save(value, path: Path, **options) -> Path:
    torch.save(value, path, **options)
    return path


def saved(folder: Path, kind: str = "base", *, head: bool = False) -> tuple[torch.nn.Module, Path]:
    model = model_of(kind)
    return model, save(checkpoint_of(model, head=head), folder / "wavlm.pt")


def expected_params(model: torch.nn.Module, config) -> dict:
    tensors = {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}
    return from_torch(tensors, tree_shapes(config))


def assert_equal_trees(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(one, other, strict=True), found, expected)


def assert_same_hidden_states(model: torch.nn.Module, imported) -> None:
    waves = waveforms([6000, 6000])
    with torch.no_grad():
        theirs = model(torch.from_numpy(waves), output_hidden_states=True)
    params = jax.tree.map(jnp.asarray, imported.params)
    apply = jax.jit(WavLM(imported.config).apply, static_argnames="output_hidden_states")
    ours = apply({"params": params}, jnp.asarray(waves), output_hidden_states=True)
    np.testing.assert_allclose(ours.last_hidden_state, theirs.last_hidden_state.numpy(), atol=1e-4, rtol=0)
    for layer, states in enumerate(theirs.hidden_states):
        np.testing.assert_allclose(ours.hidden_states[layer], states.numpy(), atol=1e-4, rtol=0)


@BY_KIND
def test_the_authors_file_becomes_the_model(tmp_path, kind):
    model, path = saved(tmp_path, kind)
    imported = import_microsoft(path)
    assert imported.origin.dialect == "microsoft"
    assert imported.head is None
    assert imported.config.padding == "microsoft"
    assert imported.config.do_normalize == KINDS[kind].get("do_normalize", False)
    assert_equal_trees(imported.params, expected_params(model, imported.config))
    assert_same_hidden_states(model, imported)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_other_precisions_and_layouts(tmp_path, dtype, zipped):
    model = model_of()
    checkpoint = checkpoint_of(model.to(dtype))
    imported = import_microsoft(save(checkpoint, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped))
    assert_equal_trees(imported.params, expected_params(model, imported.config))


def test_both_spellings_of_weight_norm(tmp_path):
    model, path = saved(tmp_path)
    checkpoint = checkpoint_of(model)
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        state = checkpoint["model"]
        state[f"encoder.pos_conv.0.parametrizations.weight.{new}"] = state.pop(f"encoder.pos_conv.0.{old}")
    imported = import_microsoft(save(checkpoint, tmp_path / "new.pt"))
    assert_equal_trees(imported.params, import_microsoft(path).params)
    checkpoint["model"]["encoder.pos_conv.0.weight_g"] = torch.ones(1, 1, 16)
    with pytest.raises(ConversionError, match="both spellings"):
        import_microsoft(save(checkpoint, tmp_path / "both.pt"))


@BY_KIND
def test_round_trip_with_head_is_bit_equal(tmp_path, kind):
    _, path = saved(tmp_path, kind, head=True)
    imported = import_microsoft(path)
    export_microsoft(imported, tmp_path / "out.pt")
    again = import_microsoft(tmp_path / "out.pt")
    assert again.config == imported.config
    assert_equal_trees(again.params, imported.params)
    assert_equal_trees(again.head, imported.head)
    assert imported.head["final_proj"]["kernel"].shape == (32, HEAD_WIDTH)
    assert imported.head["label_embeddings"].shape == (HEAD_ROWS, HEAD_WIDTH)


@BY_KIND
def test_torch_loads_the_export_as_the_authors_state_dict(tmp_path, kind):
    model, path = saved(tmp_path, kind, head=True)
    imported = import_microsoft(path)
    export_microsoft(imported, tmp_path / "out.pt")
    expected = torch.load(path, weights_only=True)
    for options in ({}, {"mmap": True}):
        found = torch.load(tmp_path / "out.pt", weights_only=True, **options)
        assert set(found) == {"cfg", "model"}
        assert set(found["model"]) == set(expected["model"])
        for name, tensor in expected["model"].items():
            torch.testing.assert_close(found["model"][name], tensor, rtol=0, atol=0)
    assert (
        microsoft_config(model).items() - {("conv_feature_layers", "")}
        <= (found["cfg"] | {"conv_feature_layers": microsoft_config(model)["conv_feature_layers"]}).items()
    )
    assert found["cfg"]["conv_feature_layers"] == "[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_export_in_half_precision(tmp_path, dtype):
    _, path = saved(tmp_path, head=True)
    imported = import_microsoft(path)
    export_microsoft(imported, tmp_path / "half.pt", dtype=dtype)
    found = torch.load(tmp_path / "half.pt", weights_only=True)["model"]
    for name, tensor in torch.load(path, weights_only=True)["model"].items():
        torch.testing.assert_close(found[name], tensor.to(getattr(torch, dtype)), rtol=0, atol=0)
    imported.params["encoder"]["layer_norm"]["bias"][0] = 1e30 if dtype == "float16" else np.inf
    with pytest.raises(ConversionError, match=r"encoder.layer_norm.bias"):
        export_microsoft(imported, tmp_path / "half.pt", dtype=dtype)


def test_the_export_is_the_same_every_time(tmp_path):
    _, path = saved(tmp_path)
    imported = import_microsoft(path)
    for name in ("one.pt", "two.pt"):
        export_microsoft(imported, tmp_path / name)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.pt", "two.pt", "wavlm.pt"]


def test_every_deleted_tensor_is_missed_by_name(tmp_path):
    """Each kind of tensor once: of numbered modules the last one's."""
    checkpoint = checkpoint_of(model_of())
    first_conv = "feature_extractor.conv_layers.0.0.weight"
    kinds = {re.sub(r"\d+", "", name): name for name in checkpoint["model"]}
    for name in (*kinds.values(), first_conv):
        rest = {key: tensor for key, tensor in checkpoint["model"].items() if key != name}
        path = save(checkpoint | {"model": rest}, tmp_path / "w.pt")
        with pytest.raises(ConversionError, match=rf"w\.pt: .*{name if name == first_conv else f'1 missing: {name}'}"):
            import_microsoft(path)


def test_an_extra_tensor_is_named(tmp_path):
    checkpoint = checkpoint_of(model_of())
    checkpoint["model"]["quantizer.vars"] = torch.ones(2)
    with pytest.raises(ConversionError, match=r"1 not used by this model: quantizer\.vars"):
        import_microsoft(save(checkpoint, tmp_path / "w.pt"))


def test_another_shape_is_named(tmp_path):
    checkpoint = checkpoint_of(model_of())
    checkpoint["model"]["encoder.layers.1.fc1.weight"] = torch.ones(32, 64)
    message = r"encoder.layers.1.fc1.weight \(found \(32, 64\), expected \(64, 32\)\)"
    with pytest.raises(ConversionError, match=message):
        import_microsoft(save(checkpoint, tmp_path / "w.pt"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_numbers_that_are_not_finite_are_refused(tmp_path, value):
    checkpoint = checkpoint_of(model_of())
    bias = checkpoint["model"]["encoder.layers.1.fc2.bias"].double()
    bias[3] = value
    checkpoint["model"]["encoder.layers.1.fc2.bias"] = bias
    with pytest.raises(ConversionError, match=r"encoder.layers.1.fc2.bias holds numbers that are not finite"):
        import_microsoft(save(checkpoint, tmp_path / "w.pt"))


def fairseq_class(monkeypatch, module: str, name: str) -> type:
    """A class that pickles under a foreign name, as fairseq's and OmegaConf's do where they are installed."""
    for count in range(1, module.count(".") + 2):
        package = ".".join(module.split(".")[:count])
        if package not in sys.modules:
            monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    made = type(name, (), {"__module__": module})
    monkeypatch.setattr(sys.modules[module], name, made, raising=False)
    return made


def stateful(kind: type, **state):
    made = kind()
    made.__dict__.update(state)
    return made


def test_a_fairseq_training_checkpoint(tmp_path, monkeypatch):
    model = model_of()
    checkpoint = checkpoint_of(model, head=True)
    dictionary = fairseq_class(monkeypatch, "fairseq.data.dictionary", "Dictionary")
    fields = {key: value for key, value in checkpoint["cfg"].items() if key != "normalize"}
    value = {
        "args": None,
        "cfg": {"_name": None, "model": fields | {"_name": "wavlm"}, "task": {"normalize": True, "label_rate": 50}},
        "model": checkpoint["model"],
        "criterion": None,
        "optimizer_history": [{"num_updates": 400000, "lr_scheduler_state": {"best": np.float64(1.5)}}],
        "task_state": {"dictionaries": [stateful(dictionary, symbols=["<s>", "0"], indices={"<s>": 0})]},
        "extra_state": {"epoch": 3, "metrics": {}},
        "last_optimizer_state": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []},
    }
    imported = import_microsoft(save(value, tmp_path / "checkpoint_last.pt"))
    assert imported.config.do_normalize
    assert_equal_trees(imported.params, expected_params(model, imported.config))
    assert imported.head["label_embeddings"].shape == (HEAD_ROWS, HEAD_WIDTH)
    value["surprise"] = 1
    with pytest.raises(ConversionError, match="unknown entries beside the model: surprise"):
        import_microsoft(save(value, tmp_path / "checkpoint_last.pt"))


@pytest.mark.parametrize("prefix", ["w2v_encoder.w2v_model.", "encoder.w2v_model."])
def test_a_fine_tuned_checkpoint(tmp_path, prefix):
    """The encoder is taken, the CTC projection is left out and named, the config is that of the encoder."""
    model = model_of("large")
    checkpoint = checkpoint_of(model)
    state = {f"{prefix}{name}": tensor for name, tensor in checkpoint["model"].items()}
    state |= {f"{prefix}label_embs_concat": torch.ones(5, 4), "w2v_encoder.proj.weight": torch.ones(32, 32)}
    inner = argparse.Namespace(model=argparse.Namespace(**checkpoint["cfg"]), task={"normalize": True})
    config = {"model": {"_name": "hubert_ctc", "w2v_args": inner, "normalize": True, "dropout": 0.7}, "task": {}}
    imported = import_microsoft(save({"cfg": config, "model": state}, tmp_path / "ctc.pt"))
    assert imported.config.do_normalize
    assert imported.config.hidden_dropout == 0.1
    assert_equal_trees(imported.params, expected_params(model, imported.config))
    assert imported.head is None
    notes = " ".join(imported.origin.notes)
    assert "left out: w2v_encoder.proj.weight" in notes
    assert "left out: label_embs_concat" in notes
    state["decoder.embed.weight"] = torch.ones(2)
    with pytest.raises(ConversionError, match=r"decoder\.embed\.weight is beside the encoder"):
        import_microsoft(save({"cfg": config, "model": state}, tmp_path / "ctc.pt"))


def test_old_checkpoints_with_args(tmp_path):
    model = model_of("hubert_base")
    checkpoint = checkpoint_of(model)
    value = {"args": argparse.Namespace(**checkpoint["cfg"]), "cfg": None, "model": checkpoint["model"]}
    imported = import_microsoft(save(value, tmp_path / "hubert.pt"))
    assert not imported.config.position_bias
    assert_same_hidden_states(model, imported)


def test_the_defaults_of_the_authors_class(tmp_path):
    """The reach of the position bias is 1280 where the file does not say it (FACTS E10)."""
    checkpoint = checkpoint_of(model_of())
    del checkpoint["cfg"]["max_distance"]
    assert import_microsoft(save(checkpoint, tmp_path / "w.pt")).config.max_bucket_distance == 1280


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("conv_feature_layers", "__import__('os').system('touch {sentinel}')", "conv_feature_layers: found"),
        ("conv_feature_layers", "[(512,10,5)] * 10 ** 9", "conv_feature_layers: found"),
        ("conv_feature_layers", "[(512,10,5)] * 999999", "more than 32 layers"),
        ("conv_feature_layers", [(512, 10, 5)], "cfg.conv_feature_layers is a list, expected str"),
        ("encoder_layers", 10**9, "cfg.encoder_layers is 1000000000, expected a size"),
        ("encoder_layers", 10_000, "cfg asks for 10000 layers, the file has 2"),
        ("encoder_layers", "12", "cfg.encoder_layers is '12', expected int"),
        ("encoder_embed_dim", True, "cfg.encoder_embed_dim is True, expected int"),
        ("encoder_attention_heads", 5, "hidden_size: found 32, expected a multiple of 5"),
        ("activation_fn", "glu", "cfg.activation_fn is 'glu'"),
        ("extractor_mode", "conv2d", "cfg.extractor_mode is 'conv2d'"),
        ("gru_rel_pos", False, "cfg.gru_rel_pos differ"),
        ("dropout", 2.0, "hidden_dropout: found 2.0, expected a probability"),
        ("expand_attention_head_size", 128, "cfg.expand_attention_head_size is 128"),
    ],
)
def test_configs_that_are_refused(tmp_path, field, value, message):
    sentinel = tmp_path / "sentinel"
    checkpoint = checkpoint_of(model_of())
    checkpoint["cfg"][field] = value.format(sentinel=sentinel) if isinstance(value, str) else value
    with pytest.raises(ValueError, match=rf"w\.pt: .*{message}"):
        import_microsoft(save(checkpoint, tmp_path / "w.pt"))
    assert not sentinel.exists()


def test_a_config_of_endless_copies_of_itself(tmp_path):
    """2**200 elements if anyone walked through them or printed them."""
    laughs = ["ha"]
    for _ in range(200):
        laughs = [laughs, laughs]
    checkpoint = checkpoint_of(model_of())
    checkpoint["cfg"]["dropout"] = laughs
    with pytest.raises(ValueError, match=r"cfg\.dropout is a list"):
        import_microsoft(save(checkpoint, tmp_path / "w.pt"))


def test_masks_that_are_drawn_otherwise_are_noted(tmp_path):
    checkpoint = checkpoint_of(model_of())
    checkpoint["cfg"]["mask_selection"] = "poisson"
    notes = " ".join(import_microsoft(save(checkpoint, tmp_path / "w.pt")).origin.notes)
    assert "cfg.mask_selection is 'poisson'" in notes


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"w": torch.ones(2)}, "which have the entries cfg and model"),
        ([1, 2], "which have the entries cfg and model"),
        ({"model": {"w": torch.ones(2)}}, "neither cfg nor args"),
        ({"cfg": {}, "model": {}}, "a state dict was expected"),
        ({"cfg": {}, "model": {"w": 1}}, "w is a int, expected a named tensor"),
        ({"cfg": {}, "model": {"w": torch.ones(2)}}, "found 0 tensors called feature_extractor"),
        ({"cfg": 3, "model": {"feature_extractor.conv_layers.0.0.weight": torch.ones(2)}}, "a part of cfg is a int"),
    ],
)
def test_other_files(tmp_path, value, message):
    with pytest.raises(ValueError, match=rf"w\.pt: .*{message}"):
        import_microsoft(save(value, tmp_path / "w.pt"))


def test_tensors_that_share_numbers_beyond_the_files_size(tmp_path):
    shared = torch.ones(1000)
    value = {"cfg": {}, "model": {str(index): shared[:] for index in range(200)}}
    with pytest.raises(HostileFile, match="look at the same numbers"):
        import_microsoft(save(value, tmp_path / "w.pt"))


@pytest.mark.parametrize("name", ["code_in_config", "code_nested", "code_in_tensor_slot", "code_in_legacy_layout"])
def test_nothing_is_run_on_import(tmp_path, name):
    hostile.CODE[name](tmp_path / "w.pt", tmp_path / "sentinel")
    for importer in (import_microsoft, import_torchaudio):
        with pytest.raises((HostileFile, DamagedFile)):
            importer(tmp_path / "w.pt")
    assert not (tmp_path / "sentinel").exists()


def test_a_head_that_does_not_fit_together(tmp_path):
    checkpoint = checkpoint_of(model_of(), head=True)
    path = save(checkpoint, tmp_path / "w.pt")
    imported = import_microsoft(path)
    for name, shape in (("label_embs_concat", (10, 7)), ("final_proj.weight", (HEAD_WIDTH, 31))):
        state = checkpoint["model"] | {name: torch.ones(shape)}
        with pytest.raises(
            ConversionError, match=rf"do not fit an encoder of width 32: .*{name} \({shape[0]}, {shape[1]}\)"
        ):
            import_microsoft(save(checkpoint | {"model": state}, path))
    imported.head["final_proj"]["bias"] = np.ones(3, np.float32)
    with pytest.raises(ConversionError, match=r"do not fit .*final_proj.bias \(3,\)"):
        export_microsoft(imported, tmp_path / "out.pt")


def test_equal_widths_need_no_projection(tmp_path):
    """Where both are 32 wide the authors' model has no projection: the identity stands for it here."""
    config = small_config(conv_dim=(32,) * 7)
    model = torch_model(config)
    with torch.no_grad():
        model.feature_projection.projection.weight.copy_(torch.eye(32))
        model.feature_projection.projection.bias.zero_()
    checkpoint = checkpoint_of(model)
    del checkpoint["model"]["post_extract_proj.weight"], checkpoint["model"]["post_extract_proj.bias"]
    imported = import_microsoft(save(checkpoint, tmp_path / "w.pt"))
    assert_same_hidden_states(model, imported)
    export_microsoft(imported, tmp_path / "out.pt")
    assert set(torch.load(tmp_path / "out.pt", weights_only=True)["model"]) == set(checkpoint["model"])
    imported.params["feature_projection"]["projection"]["kernel"][0, 0] = 2
    with pytest.raises(ConversionError, match="is not the identity"):
        export_microsoft(imported, tmp_path / "out.pt")


def test_exports_that_have_no_place_in_the_layout(tmp_path):
    _, path = saved(tmp_path)
    imported = import_microsoft(path)
    with pytest.raises(ConversionError, match="layer_norm_eps is 1e-06"):
        export_microsoft(dataclasses.replace(imported, config=small_config(layer_norm_eps=1e-6)), tmp_path / "out.pt")
    with pytest.raises(ConversionError, match="of another shape or not finite: encoder/layers/feed_forward"):
        export_microsoft(dataclasses.replace(imported, config=small_config(intermediate_size=16)), tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


MEASURE = """
import resource, sys
from pathlib import Path
from wavlm_jax.convert.microsoft import import_microsoft
small, big = map(Path, sys.argv[1:])
import_microsoft(small)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
imported = import_microsoft(big)
assert "torch" not in sys.modules
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_of_an_import(tmp_path):
    """The parameters and little more: below 1.3 times the file."""
    _, small = saved(tmp_path)
    model = torch_model(small_config(hidden_size=512, intermediate_size=4096, num_hidden_layers=8))
    big = save(checkpoint_of(model), tmp_path / "big.pt")
    command = [sys.executable, "-c", MEASURE, str(small), str(big)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert big.stat().st_size > 150e6
    assert int(done.stdout) < 1.3 * big.stat().st_size


@pytest.mark.parametrize("kind", ["base", "large", "hubert_large"])
@pytest.mark.parametrize("spelling", ["old", "current"])
def test_torchaudio_becomes_the_model(tmp_path, kind, spelling):
    model = model_of(kind)
    state = torchaudio_state(model)
    if spelling == "old":
        conv = "encoder.transformer.pos_conv_embed.conv"
        for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
            state[f"{conv}.{old}"] = state.pop(f"{conv}.parametrizations.weight.{new}")
    path = save(state, tmp_path / "ta.pt")
    heads = {} if model.config.model_type == "wavlm" else {"num_attention_heads": 2}
    imported = import_torchaudio(path, max_bucket_distance=40, **heads)
    assert imported.origin.dialect == "torchaudio"
    assert imported.config.padding == "huggingface"
    assert any("masked_spec_embed" in note for note in imported.origin.notes)
    assert_same_hidden_states(model, imported)


def test_heads_of_torchaudios_hubert_are_those_of_its_published_size_or_as_asked(tmp_path):
    model = torch_model(
        small_config(hidden_size=1280, num_attention_heads=16, position_bias=False, intermediate_size=8)
    )
    path = save(torchaudio_state(model), tmp_path / "ta.pt")
    assert_same_hidden_states(model, import_torchaudio(path))
    assert load(path, num_attention_heads=8).config.num_attention_heads == 8
    with pytest.raises(ValueError, match="num_attention_heads is for a torchaudio state dict alone"):
        load(tmp_path, num_attention_heads=8)


def test_torchaudios_pre_training_model(tmp_path):
    model = model_of("hubert_base")
    state = {f"wav2vec2.{name}": tensor for name, tensor in torchaudio_state(model).items()}
    state["mask_generator.mask_embedding"] = model.state_dict()["masked_spec_embed"]
    head = microsoft_head(32)
    state["logit_generator.final_proj.weight"] = head["final_proj.weight"]
    state["logit_generator.final_proj.bias"] = head["final_proj.bias"]
    state["logit_generator.label_embeddings"] = head["label_embs_concat"]
    imported = import_torchaudio(save(state, tmp_path / "ta.pt"), num_attention_heads=2)
    assert_equal_trees(imported.params, expected_params(model, imported.config))
    np.testing.assert_array_equal(imported.head["label_embeddings"], head["label_embs_concat"].numpy())
    np.testing.assert_array_equal(imported.head["final_proj"]["kernel"].T, head["final_proj.weight"].numpy())
    del state["logit_generator.final_proj.bias"]
    with pytest.raises(ConversionError, match=r"head is not whole; missing: logit_generator\.final_proj\.bias"):
        import_torchaudio(save(state, tmp_path / "ta.pt"), num_attention_heads=2)


def test_torchaudio_tensors_are_named_in_errors(tmp_path):
    state = torchaudio_state(model_of())
    in_proj = "encoder.transformer.layers.1.attention.attention.in_proj_weight"
    for change, message in (
        ({in_proj: torch.ones(97, 32)}, "in_proj_weight has shape"),
        ({in_proj: torch.ones(96, 31)}, r"layers.1.attention.q_proj.weight \(found \(32, 31\), expected \(32, 32\)\)"),
        ({"surprise": torch.ones(1)}, "not used by this model: surprise"),
    ):
        with pytest.raises(ConversionError, match=message):
            import_torchaudio(save(state | change, tmp_path / "ta.pt"))
    for name in [name for name in state if "layers.1.attention." in name or "projection.projection" in name]:
        rest = {key: tensor for key, tensor in state.items() if key != name}
        part = name.replace("attention.attention.", "attention.").replace("in_proj_", "k_proj.")
        with pytest.raises(ConversionError, match=rf"{re.escape(part)}.*|conv\.weight is missing"):
            import_torchaudio(save(rest, tmp_path / "ta.pt"))


# The notation of conv layers in the configs.

NUMBERS = st.integers(1, 600)
LAYERS = st.lists(st.tuples(NUMBERS, NUMBERS, st.integers(1, 2)), min_size=1, max_size=4)
SPACES = st.sampled_from(["", " ", "  "])


@given(LAYERS)
def test_written_and_read_again(layers):
    assert parse_conv_layers(format_conv_layers(layers)) == tuple(layers)


@given(st.lists(st.tuples(LAYERS, st.integers(1, 2)), min_size=1, max_size=2), SPACES)
def test_sums_of_repeated_lists(terms, space):
    text = f"{space}+{space}".join(f"{layers}{space}*{space}{count}" for layers, count in terms)
    expected = [layer for layers, count in terms for layer in layers * count]
    assert parse_conv_layers(text) == tuple(expected)


@given(LAYERS)
def test_a_plain_list_is_read_as_python_reads_it(layers):
    assert list(parse_conv_layers(str(layers))) == ast.literal_eval(str(layers))


def test_the_released_models():
    layers = parse_conv_layers("[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2")
    assert [kernel for _, kernel, _ in layers] == [10, 3, 3, 3, 3, 2, 2]
    assert format_conv_layers(layers) == "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"
    assert parse_conv_layers("[(512, 10, 5,),]") == ((512, 10, 5),)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "()", "[(1,2)]", "[(1,2,3,4)]", "[(1,2,3)] +", "+ [(1,2,3)]", "[(1,2,3)] [(1,2,3)]"),
        *(
            "[(1,2,3)] * 0",
            "[(0,2,3)]",
            "[(1,2,-3)]",
            "[(1,2,3.5)]",
            "[(1 2,2,3)]",
            "[(1,2,3)] * 33",
            "[(1,2,3)] * 999999",
        ),
        *("2 * [(1,2,3)]", "[(1,2,3)] ** 2", "[(99999,2,3)]", "[(1,2,60000)] * 8", "[(1,2,3)]" + " " * 5000),
        *("__import__('os').system('true')", "[(1,2,3)] if open('x') else []", "[(1,2,3)\n# x\n]", "[(1,2,٣)]"),
        "(" * 4000,
    ],
)
def test_everything_else_is_refused(text):
    with pytest.raises(ValueError, match="conv_feature_layers: "):
        parse_conv_layers(text)


@given(st.text(alphabet="[](),+* 123", max_size=60))
def test_any_text_is_a_list_of_layers_or_an_error(text):
    try:
        layers = parse_conv_layers(text)
    except ValueError:
        return
    assert all(number > 0 for layer in layers for number in layer)
