"""Random models of every class: transformers -> ours -> the same numbers -> transformers, not one bit changed."""

import copy
import logging
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from tests.support.head_twins import huggingface_values, small_head
from tests.support.torch_twins import attention_mask, shake, small_config, waveforms
from wavlm_jax.convert.huggingface import export_huggingface, import_huggingface
from wavlm_jax.convert.state_dict import ConversionError, from_torch
from wavlm_jax.model.heads import module_of
from wavlm_jax.model.layers import Masks
from wavlm_jax.weights import ready

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # transformers' own call
LENGTHS = (6000, 4100)
LONG = tuple(3 * length for length in LENGTHS)
"""For x-vectors, whose adapter and TDNN eat frames, where torch refuses to run out of them."""
LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "do_normalize": True, "conv_bias": True}
SAMPLED = st.sampled_from


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    transformers.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)


@st.composite
def models(draw) -> tuple[str, dict, dict]:
    """(transformers' class, changes of the config, changes of the head)."""
    kind = draw(SAMPLED(["", "", "ForCTC", "ForSequenceClassification", "ForAudioFrameClassification", "ForXVector"]))
    hubert = kind in ("", "ForCTC", "ForSequenceClassification") and draw(st.integers(0, 3)) == 0
    heads, groups = draw(SAMPLED([1, 2, 4])), draw(SAMPLED([1, 2, 4]))
    width = 8 * draw(st.integers(1, 2)) * max(heads, groups)
    convs = draw(st.integers(2, 4))
    config = {
        "position_bias": not hubert,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "intermediate_size": draw(st.integers(3, 40)),
        "feat_extract_norm": draw(SAMPLED(["group", "layer"])),
        "do_stable_layer_norm": draw(st.booleans()),
        "conv_bias": draw(st.booleans()),
        "conv_dim": tuple(draw(st.integers(6, 12)) for _ in range(convs)),  # a norm over two channels is all rounding
        "conv_kernel": (10, *(draw(st.integers(2, 4)) for _ in range(convs - 1))),
        "conv_stride": (20, *(draw(SAMPLED([2, 3])) for _ in range(convs - 1))),
        "num_conv_pos_embeddings": draw(st.integers(1, 20)),
        "num_conv_pos_embedding_groups": groups,
        "num_buckets": 4 * draw(st.integers(2, 9)),
        "max_bucket_distance": draw(st.integers(40, 90)),
        "layer_norm_eps": draw(SAMPLED([1e-5, 1e-4])),
        "mask_time_prob": draw(SAMPLED([0.0, 0.05])),
    }
    adapter = not hubert and kind in ("ForCTC", "ForXVector") and draw(st.booleans())
    head = {
        "vocab_size": draw(st.integers(2, 40)),
        "num_labels": draw(st.integers(1, 6)),
        "classifier_proj_size": draw(st.integers(2, 20)),
        "tdnn_dim": (6, 7, 8),
        "tdnn_kernel": (3, draw(SAMPLED([1, 2])), 1),
        "tdnn_dilation": (1, draw(SAMPLED([1, 2])), 1),
        "xvector_output_dim": draw(st.integers(2, 9)),
        "use_weighted_layer_sum": not adapter and kind not in ("", "ForCTC") and draw(st.booleans()),
        "add_adapter": adapter,
        "num_adapter_layers": draw(st.integers(1, 2)),
        # behind an adapter of another width transformers' own WavLMForXVector does not run
        "output_hidden_size": draw(SAMPLED([None, width] if kind == "ForXVector" else [None, 6, width])),
    }
    return ("Hubert" if hubert else "WavLM") + (kind or "Model"), config, head


def random_model(name: str, config: dict, head: dict, seed: int = 0) -> torch.nn.Module:
    """A random model of transformers' class; heads far enough from 0 to be seen."""
    torch.manual_seed(seed)
    ours = small_config(**config)
    values = huggingface_values(ours, small_head(**head)) if "For" in name else ours.to_huggingface()
    values.pop("architectures", None)
    if name.startswith("Hubert"):
        values = {key: value for key, value in values.items() if "adapter" not in key and key != "output_hidden_size"}
    kind = transformers.HubertConfig if name.startswith("Hubert") else transformers.WavLMConfig
    model = getattr(transformers, name)(kind(**values))
    shake(model)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1 and (not key.startswith(("wavlm.", "hubert.")) or "adapter" in key):
                parameter.copy_(torch.randn_like(parameter) * (parameter[0].numel() ** -0.5))
    return model.eval()


@pytest.mark.parametrize("count", [15, pytest.param(40, marks=pytest.mark.slow)])
def test_there_and_back(count):
    """As many different models, the same ones every time."""
    options = {
        "max_examples": count,
        "deadline": None,
        "derandomize": True,
        "phases": [Phase.generate],
        "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    }
    settings(**options)(given(models())(there_and_back))()


def there_and_back(model):
    name, config, head = model
    theirs = random_model(name, config, head)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(Path(folder) / "theirs")
        weights = import_huggingface(Path(folder) / "theirs")
        assert (weights.task.kind if weights.task else "WavLMModel") == name.replace("Hubert", "WavLM").replace(
            "HubertModel", "WavLMModel"
        )
        lengths = LONG if name == "WavLMForXVector" else LENGTHS
        waveform = waveforms(lengths)
        with torch.no_grad():
            mask = attention_mask(lengths, waveform.shape[1]).long()
            exact = copy.deepcopy(theirs).double()  # in float32 its group norm is further off than ours
            expected = exact(torch.tensor(waveform).double(), attention_mask=mask, output_hidden_states=True)
        model = ready(weights)
        found = model(waveform, np.array(lengths, np.int32))
        tolerance = 1e-5 if config["num_hidden_layers"] == 1 else 1e-4
        for ours, states in zip(found.hidden_states, expected.hidden_states, strict=True):
            np.testing.assert_allclose(ours, states.numpy(), atol=tolerance, rtol=0)
        wanted = expected.logits if weights.task else expected.last_hidden_state
        np.testing.assert_allclose(
            found.logits if weights.task else found.last_hidden_state, wanted.numpy(), atol=tolerance, rtol=0
        )
        export_huggingface(weights, Path(folder) / "ours")
        before, after = (load_file(Path(folder) / side / "model.safetensors") for side in ("theirs", "ours"))
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            np.testing.assert_array_equal(tensor.view(np.uint32), after[key].view(np.uint32), err_msg=key)
        again, report = getattr(transformers, name).from_pretrained(Path(folder) / "ours", output_loading_info=True)
        assert not {key: found for key, found in report.items() if found}
        assert not differences(again.config.to_dict(), theirs.config.to_dict())


def differences(ours: dict, theirs: dict) -> dict:
    """Of two configs, but for what says nothing about the model."""
    bookkeeping = {"transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype"}
    unused = {"output_hidden_size"} if not theirs.get("add_adapter") else set()
    unused |= {"id2label", "label2id"} if theirs["architectures"][0].endswith("CTC") else set()
    keys = (ours.keys() | theirs.keys()) - bookkeeping - unused
    return {key: (ours.get(key), theirs.get(key)) for key in keys if ours.get(key) != theirs.get(key)}


CASES = {
    "base": ("WavLMModel", {}, {}),
    "hubert large": ("HubertModel", LARGE | {"position_bias": False}, {}),
    "ctc large adapter": ("WavLMForCTC", LARGE, {"add_adapter": True, "output_hidden_size": 20}),
    "sequence": ("WavLMForSequenceClassification", {}, {"use_weighted_layer_sum": True}),
    "frames": ("WavLMForAudioFrameClassification", LARGE, {"use_weighted_layer_sum": True}),
    "xvector": ("WavLMForXVector", {}, {"use_weighted_layer_sum": True}),
}


def without_effect(name: str, config: dict, head: dict) -> bool:
    """Tensors that no output depends on, by mathematics: what a softmax or a norm over time takes out again, and the
    last norm of a model whose head reads the raw states."""
    grouped = config.get("feat_extract_norm", "group") == "group"
    raw = config.get("do_stable_layer_norm", False) and head.get("use_weighted_layer_sum", False)
    return (
        name.endswith("k_proj.bias")
        or (grouped and name.endswith("conv_layers.0.conv.bias"))
        or (raw and "encoder.layer_norm." in name)
    )


@pytest.mark.parametrize("case", CASES)
def test_each_tensor_alone_changes_the_output(case, tmp_path):
    name, config, head = CASES[case]
    random_model(name, config, head).save_pretrained(tmp_path)
    weights = import_huggingface(tmp_path)
    task = weights.task
    module = module_of(weights.config, task and task.kind, task and task.config)
    waveform, masked = jnp.asarray(waveforms((9000,))), jnp.arange(27)[None] % 5 == 1

    @jax.jit
    def outputs(params):
        if task is None:
            return module.apply({"params": params}, waveform, time_mask=masked).last_hidden_state
        return module.apply({"params": params}, waveform, None, Masks(time=masked))[:-1]

    def flat(params):
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(outputs(params))])

    tensors = {
        key.replace("hubert.", "wavlm."): value for key, value in load_file(tmp_path / "model.safetensors").items()
    }
    shapes = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), dict(weights.tree))
    before, random = flat(weights.tree), np.random.default_rng(0)
    for key, tensor in tensors.items():
        noise = random.standard_normal(tensor.shape).astype(np.float32)
        weak = ("gru_rel_pos", "rel_attn", "q_proj.bias")  # a small part of a score
        scale = 5.0 if any(name in key for name in weak) else 0.3
        tree = from_torch({**tensors, key: tensor + scale * noise}, shapes)
        moved = np.abs(flat(tree) - before).max()
        assert (moved > 1e-5) != without_effect(key, config, head), f"{key}: {moved}"


@pytest.mark.parametrize("case", ["ctc large adapter", "xvector"])
def test_every_deleted_extra_or_misshapen_tensor_is_named(case, tmp_path):
    name, config, head = CASES[case]
    random_model(name, config, head).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")

    def refused(changed: dict) -> str:
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConversionError) as caught:
            import_huggingface(tmp_path)
        return str(caught.value)

    vector = "wavlm.masked_spec_embed"  # nothing but masking reads it: zeros take its place, and a note names it
    save_file({k: v for k, v in tensors.items() if k != vector}, tmp_path / "model.safetensors", {"format": "pt"})
    assert any("filled with zeros: masked_spec_embed" in note for note in import_huggingface(tmp_path).origin.notes)
    for key, tensor in tensors.items():
        assert key == vector or key in refused({other: value for other, value in tensors.items() if other != key})
        assert key in refused({**tensors, key: np.zeros((*tensor.shape, 1), np.float32)})
    extra = "wavlm.encoder.layers.0.attention.extra.weight"
    assert f"1 not used by this model: {extra}" in refused({**tensors, extra: np.zeros(3, np.float32)})
