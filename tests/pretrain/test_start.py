"""Pre-training goes on from imported weights: a fresh head is warmed up alone, a given one trains on at once."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from pretrain.task import InitSettings, build, head_warmup, initial_params
from tests.support.speech import make_corpora, tiny_config
from wavlm_jax import loading
from wavlm_jax.config import WavLMConfig
from wavlm_jax.convert.huggingface import export_huggingface
from wavlm_jax.model.wavlm import WavLM
from wavlm_jax.settings import SettingsError, read, read_sections
from wavlm_jax.training import checkpoint as stored
from wavlm_jax.training import loop
from wavlm_jax.training.sharding import MESH_AXES
from wavlm_jax.training.start import RunSettings
from wavlm_jax.training.task import Topology
from wavlm_jax.training.workdir import Workdir
from wavlm_jax.weights import Weights

TINY = WavLMConfig.tiny()
BODY = {"kernel": np.ones((3, 2), np.float32)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("start")


@pytest.fixture(scope="module")
def config(root):
    config = tiny_config(root, make_corpora(root, train=12, valid=2))
    config["batch"].update({"buckets": [48], "seconds_per_update": 3.8, "row_multiple": 4})
    config["data"]["evaluation"], config["train"]["eval_splits"] = [], []
    config["train"].update({"num_steps": 3, "compilation_cache": None})
    config["optim"].update({"warmup_steps": 0, "learning_rate": 1e-2})
    config["checkpoint"]["every"] = 1
    config["checkpoint"]["keep_last"] = 9
    return config


@pytest.fixture(scope="module")
def imported(root, config):
    """A Hugging Face folder without a head."""
    model = read(config["model"], WavLMConfig, "model")
    params = jax.jit(WavLM(model).init)(jax.random.key(7), np.zeros((1, 400), np.float32))["params"]
    export_huggingface(Weights(model, jax.device_get(params), None), root / "imported")
    return root / "imported", jax.device_get(params)


@pytest.fixture(scope="module")
def warmed_up(root, config, imported):
    return run(config, root / "warm", path=str(imported[0]), head_warmup_steps=2)


def run(config, workdir: Path, **init) -> dict:
    config = json.loads(json.dumps(config))
    config["init"].update(init)
    settings = read_sections(config, RunSettings)
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    loop.run(build(config, Topology.of(mesh)), settings, mesh, Workdir(workdir), config=config)
    return {step: stored.load_params(workdir, step)[1] for step in stored.steps(workdir)}


def same(one, other) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


def test_the_body_is_bit_equal_while_a_fresh_head_is_warmed_up(imported, warmed_up) -> None:
    assert same(warmed_up[1]["wavlm"], imported[1])
    assert same(warmed_up[2]["wavlm"], imported[1])
    assert not same(warmed_up[3]["wavlm"], imported[1])
    embeddings = [warmed_up[step]["head"]["label_embeddings"] for step in (1, 2, 3)]
    assert not np.array_equal(embeddings[0], embeddings[1])
    assert not np.array_equal(embeddings[1], embeddings[2])


def test_a_run_with_its_head_trains_on_at_once(root, config, warmed_up) -> None:
    again = run(config, root / "again", path=str(root / "warm"), step=3, head_warmup_steps=2)
    assert not same(again[1]["wavlm"], warmed_up[3]["wavlm"])


def test_another_function_with_the_same_shapes_is_refused(config, imported) -> None:
    changed = json.loads(json.dumps(config))
    changed["init"]["path"] = str(imported[0])
    changed["model"].update({"num_attention_heads": 2, "do_normalize": True})
    task = build(changed, Topology(num_devices=1, process_index=0, process_count=1))
    with pytest.raises(SettingsError, match=r"init\.path: .*do_normalize is False, config\.model has True"):
        task.initial_params(jax.eval_shape(task.init, jax.random.key(0)))


def settings_of(**changes) -> InitSettings:
    return InitSettings(**({"path": "somewhere", "step": None, "head_warmup_steps": 0} | changes))


def head_of(rows: int, width: int = 2, seed: int = 0) -> dict:
    random = np.random.default_rng(seed)
    projection = {"kernel": random.random((3, width), np.float32), "bias": random.random(width, np.float32)}
    return {"final_proj": projection, "label_embeddings": random.random((rows, width), np.float32)}


@pytest.mark.parametrize(("found", "wanted"), [(100, 100), (104, 100), (100, 104)])
def test_heads_with_and_without_fairseqs_four_rows(found, wanted, monkeypatch) -> None:
    fresh, given = {"wavlm": BODY, "head": head_of(wanted)}, head_of(found, seed=1)
    monkeypatch.setattr(loading, "load_weights", lambda *_: Weights(TINY, BODY, given))
    head = initial_params(settings_of(), TINY, fresh)["head"]
    assert head["label_embeddings"].shape == (wanted, 2)
    np.testing.assert_array_equal(head["label_embeddings"][-100:], given["label_embeddings"][-100:])
    np.testing.assert_array_equal(head["final_proj"]["kernel"], given["final_proj"]["kernel"])


@pytest.mark.parametrize("found", [None, head_of(99), head_of(100, width=3)])
def test_a_head_of_other_clusters_stays_fresh(found, monkeypatch) -> None:
    fresh = {"wavlm": BODY, "head": head_of(100)}
    monkeypatch.setattr(loading, "load_weights", lambda *_: Weights(TINY, BODY, found))
    head = initial_params(settings_of(), TINY, fresh)["head"]
    assert all(one is other for one, other in zip(*map(jax.tree.leaves, (head, fresh["head"])), strict=True))


def test_warmup_without_a_body_is_refused() -> None:
    assert head_warmup(settings_of()) == {}
    with pytest.raises(ValueError, match=r"head_warmup_steps: found 5 without init\.path"):
        settings_of(path=None, head_warmup_steps=5)
    with pytest.raises(ValueError, match="found -1"):
        settings_of(head_warmup_steps=-1)
