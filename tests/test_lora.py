"""Low-rank adapters: they start as nothing, they and the head alone move, and an export has them folded in."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import wavlm_jax
from tests.support.tones import ONE, make_corpus, ten_texts, tiny_ctc, train
from wavlm_jax.config import WavLMConfig
from wavlm_jax.lora import LoRASettings, adapted, exact_product, fresh_adapters, merged
from wavlm_jax.model.wavlm import WavLM
from wavlm_jax.settings import SettingsError
from wavlm_jax.tasks import ctc
from wavlm_jax.training import sharding
from wavlm_jax.training.checkpoint import load_params
from wavlm_jax.training.sharding import WAVLM_AXES, MeshSettings, make_mesh, path_name
from wavlm_jax.training.step import init_key

LORA = {"pattern": "attention/(q|v)_proj|feed_forward/output_dense", "rank": 3, "alpha": 6.0}


def names_of(tree) -> dict:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("lora")
    return {name: make_corpus(root, name, ten_texts()) for name in ("train", "same")} | {"root": root}


@pytest.fixture(scope="module")
def run(folders):
    """The workdir of a run of a few updates with adapters."""
    config = tiny_ctc(folders["train"], folders["same"], lora=LORA)
    config["train"] |= {"num_steps": 30, "eval_every": 30}
    train(ctc.build, config, folders["root"] / "run")
    return folders["root"] / "run"


@pytest.fixture(scope="module")
def fresh(folders):
    """The parameters that the run began with."""
    task = ctc.build(tiny_ctc(folders["train"], folders["same"], lora=LORA), ONE)
    return jax.device_get(jax.jit(task.init)(init_key(0)))


def test_the_start_is_the_base_to_the_bit(fresh):
    """Adapters are there, and folded in they change nothing."""
    pairs = fresh["lora"]["wavlm"]["encoder"]["layers"]["attention"]
    assert {*pairs} == {"q_proj", "v_proj"}
    assert np.abs(pairs["q_proj"]["kernel"]["a"]).min() > 0
    folded = jax.jit(lambda params: merged(params, LoRASettings(**LORA), exact_product))(fresh)
    jax.tree.map(np.testing.assert_array_equal, folded, {name: fresh[name] for name in ("wavlm", "lm_head")})


def test_only_adapters_and_head_move(run, fresh):
    config, params = load_params(run)
    before, after = names_of(fresh), names_of(params)
    assert config["lora"] == LORA
    assert before.keys() == after.keys()
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith(("lora/", "lm_head/"))}
    assert sum(name.startswith("lora/") for name in moved) == 6


def test_an_export_is_merged_and_transformers_agrees(run, folders):
    """Its class on the exported folder has the kernels of base and adapters, and the logits of our model on them."""
    config, params = load_params(run)
    model = wavlm_jax.load(run)
    assert {*model.params} == {"wavlm", "lm_head"}
    wavlm_jax.save_huggingface(model, folders["root"] / "export", compared=False)
    exported = transformers.WavLMForCTC.from_pretrained(folders["root"] / "export").eval()
    wave = np.random.default_rng(0).normal(0, 0.1, (1, 9_000)).astype(np.float32)
    with torch.no_grad():
        expected = exported(torch.tensor(wave)).logits.numpy()
    kernels = params["wavlm"]["encoder"]["layers"]["attention"]["v_proj"]["kernel"]
    pair = params["lora"]["wavlm"]["encoder"]["layers"]["attention"]["v_proj"]["kernel"]
    for layer in range(2):
        given = exported.wavlm.encoder.layers[layer].attention.v_proj.weight.detach().numpy().T
        np.testing.assert_allclose(given, kernels[layer] + 2.0 * (pair["a"][layer] @ pair["b"][layer]), atol=1e-6)
        assert np.abs(given - kernels[layer]).max() > 1e-3
    folded = merged(params, LoRASettings(**config["lora"]), exact_product)
    found = jax.jit(lambda tree: model.module.apply({"params": tree}, jnp.asarray(wave)).logits)(folded)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("config", [WavLMConfig.base(), WavLMConfig.large()], ids=["base", "large"])
def test_adapters_are_split_as_their_kernels(config):
    """Every projection of the real models: a has the axis of the kernel's inputs, b that of its outputs."""
    body = jax.eval_shape(lambda key: WavLM(config).init(key, jnp.zeros((1, 800)))["params"], jax.random.key(0))
    wanted = LoRASettings(pattern="", rank=8, alpha=8.0)
    branch = jax.eval_shape(lambda key: fresh_adapters(body, wanted, key), jax.random.key(0))
    tree = {"wavlm": body, "lora": branch}
    axes = sharding.parameter_axes(tree, WAVLM_AXES)
    kernels = adapted(body, wanted)
    assert len(kernels) == 8
    for name, kernel in kernels.items():
        *stack, inputs, outputs = axes[f"wavlm/{name}"]
        assert axes[f"lora/wavlm/{name}/a"] == (*stack, inputs, None)
        assert axes[f"lora/wavlm/{name}/b"] == (*stack, None, outputs)
        shapes = names_of(branch)
        assert shapes[f"wavlm/{name}/a"].shape == (*kernel.shape[:-1], 8)
        assert shapes[f"wavlm/{name}/b"].shape == (*kernel.shape[:-2], 8, kernel.shape[-1])
    mesh = make_mesh(MeshSettings.anywhere(data=-1, fsdp=2, tensor=2))
    placed = sharding.parameter_shardings(tree, WAVLM_AXES, mesh)
    q_proj = "encoder/layers/attention/q_proj/kernel"
    assert placed[f"lora/wavlm/{q_proj}/a"].spec == jax.sharding.PartitionSpec(None, "fsdp", None)
    assert placed[f"lora/wavlm/{q_proj}/b"].spec == jax.sharding.PartitionSpec(None, None, "tensor")


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            {"pattern": "attention/query"},
            r"config\.lora\.pattern: no projection's path contains 'attention/query'.*q_proj",
        ),
        ({"pattern": "feature_extractor"}, "no projection's path contains 'feature_extractor'"),
        ({"pattern": "bias$"}, r"no projection's path contains 'bias\$'"),
        ({"pattern": "("}, "is no regular expression"),
        ({"rank": 0}, "rank: found 0, expected 1 or more"),
        ({"alpha": 0.0}, "alpha: found 0.0, expected more than 0"),
    ],
)
def test_wrong_sections_get_an_answer(folders, lora, message):
    with pytest.raises(SettingsError, match=message):
        jax.eval_shape(
            ctc.build(tiny_ctc(folders["train"], folders["same"], lora={**LORA, **lora}), ONE).init, init_key(0)
        )


def test_old_runs_without_the_section_are_told(folders):
    config = tiny_ctc(folders["train"], folders["same"])
    del config["lora"]
    with pytest.raises(SettingsError, match=r"config\.lora: missing"):
        ctc.build(json.loads(json.dumps(config)), ONE)
