"""Runs planned with the CPU's compiler: tasks, cures that were compiled, messages that do not grow with the mesh."""

import json

import jax
import pytest

from configs.finetune import classification, frame_classification, speaker_ecapa, speaker_xvector
from configs.finetune import ctc as recipes
from configs.pretrain import demo
from pretrain.task import TASKS
from wavlm_jax.plan.__main__ import plan
from wavlm_jax.plan.program import plan_run
from wavlm_jax.plan.targets import CHIPS, PlanTargetError, Target, with_memory
from wavlm_jax.tasks import ctc
from wavlm_jax.training.task import Topology

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


def machine(devices: int = 8) -> Target:
    """CPU devices in the place of GPUs: another compiler, the same partitioner."""
    return Target(f"h100:{devices}", CHIPS["h100"], 1, "cuda", tuple(jax.devices()[:devices]))


def small(config, rows: int, seconds_per_device: float = 1000.0, **batch) -> dict:
    config.model.update(SMALL)
    config.batch.update({"buckets": (64,), "row_multiple": rows, "seconds_per_update": 1.0} | batch)
    config.batch.seconds_per_device = seconds_per_device
    config.data.evaluation_buckets = (64,)
    return json.loads(config.to_json())


def test_fine_tuning_is_planned_from_its_config_alone():
    """CTC, of which neither corpus nor vocabulary exists."""
    config = small(recipes.get_config("digits"), 16)
    config["train"]["eval_splits"] = []
    made, cures = plan(config, machine())
    assert made.fits
    assert cures == []
    (train,) = made.train
    assert train.name == "train 16x64"
    assert train.memory.aliased >= made.state_bytes - 64  # the state is updated in place
    assert made.hours > 0


@pytest.mark.parametrize("module", [classification, frame_classification, speaker_ecapa, speaker_xvector])
def test_recipes_are_outlined_without_corpora_noise_and_trials(module):
    """Also those whose augmentation reads corpora that are not there."""
    config = json.loads(module.get_config().to_json())
    config["augmentation"] |= {"noise_corpus": "/nowhere", "noise_prob": 0.5}
    task = TASKS[config["task"]].outline(config, Topology(4, 0, 1))
    assert task.stream("train").specs
    assert jax.eval_shape(task.init, jax.random.key(0))["wavlm"]


@pytest.mark.slow
def test_batch_norms_over_devices_are_planned_too():
    """ECAPA-TDNN: the only head with running statistics."""
    config = small(speaker_ecapa.get_config("speakers"), 16)
    made, _ = plan(config | {"train": config["train"] | {"eval_splits": []}}, machine())
    assert [found.name for found in made.train] == ["train 16x64"]


def test_an_outline_has_the_arrays_of_the_real_stream():
    """A planned batch is what the loader will make: the same arrays, with room for every text that it may meet."""
    config = small(recipes.get_config("digits"), 8)
    (spec,) = ctc.outline(config, Topology(8, 0, 1)).stream("train").specs
    assert {name: (array.shape, str(array.dtype)) for name, array in spec.arrays.items()} == {
        "waveform": ((8, 20_560), "int16"),
        "num_samples": ((8,), "int32"),
        "id": ((8,), "int32"),
        "weight": ((8,), "float32"),
        "mean": ((8,), "float32"),
        "variance": ((8,), "float32"),
        "labels": ((8, 32), "int32"),
        "num_labels": ((8,), "int32"),
    }


@pytest.mark.parametrize("devices", [1, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("preset", ["base_1h", "base_100h", "large_100h", "large_960h"])
def test_recipes_of_fine_tuning_cut_their_batches_on_machines_up_to_64_devices(preset, devices):
    config = json.loads(recipes.get_config(preset).to_json())
    task = TASKS[config["task"]].outline(config, Topology(devices, 0, max(devices // 8, 1)))
    for split in ("train", "valid"):
        assert len(task.stream(split).specs) > 1


def test_messages_of_data_parallel_training_do_not_grow_with_the_devices():
    """The same rows a device on 2 and on 8: the same arrays are reduced, none is gathered."""
    payloads = {}
    for devices in (2, 8):
        config = small(demo.get_config(), 2 * devices)
        config["mixing"]["group"] = 2
        made = plan_run(config, TASKS["masked_prediction"], machine(devices), splits=("train",))
        (train,) = made.train
        assert {row.kind for row in train.collectives} == {"all-reduce"}
        assert {row.group for row in train.collectives} == {devices}
        payloads[devices] = sum(row.payload for row in train.collectives)
    assert payloads[8] == pytest.approx(payloads[2], rel=0.01)
    assert payloads[8] == pytest.approx(4 * made.parameters, rel=0.5)  # gradients, once


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
    config = small(demo.get_config(), 16)
    config["mesh"]["fsdp"] = 3
    with pytest.raises(ValueError, match=r"config\.mesh: data -1, fsdp 3, tensor 1 on 4 devices"):
        plan(config, machine(4))


def test_memory_that_is_not_there_is_refused():
    with pytest.raises(PlanTargetError, match=r"--memory_gib: found 99, expected more than 0 and up to 72\.78"):
        with_memory(machine(), 99.0)
