"""A head that the package does not know is added here alone: trained by train.py, loaded, exported, called.

As a script this is train.py with the head added: python tests/test_new_head.py --config ... --workdir ...
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pretrain.task
import wavlm_jax
from tests.support.tones import ONE, make_corpus, ten_texts, tiny_classes
from wavlm_jax.config import Compute
from wavlm_jax.convert.huggingface import export_huggingface, import_huggingface
from wavlm_jax.loading import load_weights
from wavlm_jax.model import heads
from wavlm_jax.model.layers import keep_where, linear
from wavlm_jax.tasks import classification
from wavlm_jax.training.checkpoint import load_params
from wavlm_jax.training.task import TaskKind


class WavLMForLoudest(heads.Headed):
    """The class whose features are largest in any frame."""

    def setup(self) -> None:
        super().setup()
        self.feature_extractor = linear(self.head.classifier_proj_size, self.config, Compute())
        self.classifier = linear(self.head.num_labels, self.config, Compute())

    def scores(self, encoded, keys):
        del keys
        features = keep_where(encoded.frame_mask, jax.nn.relu(self.feature_extractor(encoded.hidden)))
        return heads.ClassOutput(self.classifier(features.max(axis=1)), encoded.encoder)


NAME, TASK = "WavLMForLoudest", "loudest"
ROW = heads.HeadKind(
    WavLMForLoudest,
    task=TASK,
    parts=frozenset({"feature_extractor", "classifier"}),
    size=("num_labels", "classifier/kernel"),
    commands=("classify",),
    transformers=("WavLM",),
)
KIND = TaskKind(classification.build, classification.outline)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The config of the classification task with the new head."""
    root = tmp_path_factory.mktemp("loudest")
    folders = [make_corpus(root, split, ten_texts()[:4]) for split in ("train", "same")]
    values = tiny_classes(*folders) | {"task": TASK}
    values["train"] |= {"num_steps": 2, "eval_every": 2}
    values["optim"]["warmup_steps"] = 1
    return values


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """The workdir of a run by train.py."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.json").write_text(json.dumps(config))
    recipe = f"import json\nfrom ml_collections import ConfigDict\nVALUES = {str(folder / 'config.json')!r}\n"
    recipe += "def get_config():\n    return ConfigDict(json.load(open(VALUES)))\n"
    (folder / "recipe.py").write_text(recipe)
    command = [sys.executable, __file__, f"--config={folder / 'recipe.py'}", f"--workdir={folder / 'workdir'}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "workdir"


@pytest.fixture
def added(monkeypatch):
    """The row and the task are there."""
    monkeypatch.setitem(heads.HEADS, NAME, ROW)
    monkeypatch.setitem(pretrain.task.TASKS, TASK, KIND)


@pytest.mark.usefixtures("added")
def test_it_is_planned_without_data(config):
    assert pretrain.task.TASKS[TASK].outline(config, ONE).stream("train").specs


@pytest.mark.usefixtures("added")
def test_its_run_is_loaded_exported_and_called(config, run, tmp_path):
    weights = load_weights(run)
    _, params = load_params(run)
    assert weights.task.kind == NAME
    assert weights.task.config.num_labels == 2
    assert weights.task.labels == ("speaker0", "speaker1")
    jax.tree.map(np.testing.assert_array_equal, {**weights.tree}, {**params})

    export_huggingface(weights, tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["architectures"] == [NAME]
    again = import_huggingface(tmp_path / "exported")
    assert (again.task.kind, again.task.labels) == (NAME, weights.task.labels)
    jax.tree.map(np.testing.assert_array_equal, {**again.task.params}, {**weights.task.params})

    model = wavlm_jax.load(run)
    waveform = jnp.asarray(np.random.default_rng(0).normal(0, 0.1, (1, 9000)), jnp.float32)
    expected = WavLMForLoudest(model.config, model.module.head).apply({"params": model.params}, waveform)
    np.testing.assert_allclose(model(waveform).logits, expected.logits, atol=1e-5)
    (answers,) = wavlm_jax.classify(model, [Path(config["data"]["train"]).parents[1] / "audio" / "train" / "000.flac"])
    assert {answer.label for answer in answers} == {"speaker0", "speaker1"}


def test_without_its_row_its_run_is_refused(run):
    with pytest.raises(ValueError, match="found a head of classifier, feature_extractor, expected one that"):
        load_weights(run)


if __name__ == "__main__":
    import train
    import wavlm_jax.command_line

    heads.HEADS[NAME] = ROW
    train.TASKS[TASK] = KIND
    wavlm_jax.command_line.run(train.main, required=["config", "workdir"])
