"""Speech for machines: every letter a tone, every speaker a set of overtones; corpora of it for fine-tuning tests."""

import json
from pathlib import Path

import jax
import numpy as np
import soundfile
from ml_collections import ConfigDict

from configs.finetune import classification, ctc
from tests.support.speech import TINY
from wavlm_jax.data.manifests import from_manifest
from wavlm_jax.data.prepare import Preparation, prepare
from wavlm_jax.settings import read_sections
from wavlm_jax.training import loop
from wavlm_jax.training.start import RunSettings
from wavlm_jax.training.task import Topology
from wavlm_jax.training.workdir import Workdir

LETTERS = " ABCDE"
LETTER_SAMPLES = 2560
"""160 ms: eight frames a letter."""
ONE = Topology(num_devices=1, process_index=0, process_count=1)
EASY = dict.fromkeys(("feat_proj_dropout", "hidden_dropout", "attention_dropout", "layerdrop"), 0.0)
EASY |= {"mask_time_prob": 0.0, "mask_feature_prob": 0.0, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}
"""No noise in training, and norms before the blocks: random weights learn without a long warm-up."""

NARROW = {"conv_dim": (16,) * 7}
"""The conv encoder is what a step costs here; tones need no more channels."""


def say(text: str, speaker: int = 0, seed: int = 0) -> np.ndarray:
    """The tones of a text: pitch by letter (a space is silence), timbre by speaker, a little noise."""
    time = np.arange(LETTER_SAMPLES) / 16_000
    parts = []
    for letter in text:
        pitch = 300.0 * 1.5 ** LETTERS.index(letter)
        wave = np.sin(2 * np.pi * pitch * time) + 0.8 * np.sin(2 * np.pi * (600 + 700 * speaker) * time)
        parts.append(wave * (letter != " ") * np.hanning(LETTER_SAMPLES))
    wave = 0.2 * np.concatenate(parts)
    return wave + np.random.default_rng(seed).normal(0, 0.003, len(wave))


def make_corpus(root: Path, name: str, rows: list[tuple[str, int, str]]) -> Path:
    """A prepared corpus: rows of (what is said, who says it, the transcript)."""
    folder = root / "audio" / name
    folder.mkdir(parents=True)
    lines = ["id\tpath\tspeaker\ttext"]
    for number, (spoken, speaker, text) in enumerate(rows):
        soundfile.write(folder / f"{number:03d}.flac", say(spoken, speaker, number), 16_000)
        lines.append(f"{name}-{number:03d}\t{number:03d}.flac\tspeaker{speaker}\t{text}")
    (folder / "rows.tsv").write_text("\n".join(lines) + "\n")
    prepare(from_manifest(folder / "rows.tsv", folder), root / "corpus" / name, Preparation(name=name))
    return root / "corpus" / name


def ten_texts() -> list[tuple[str, int, str]]:
    """Ten utterances of two speakers, of 5 to 8 letters, doubled ones among them."""
    texts = ["AB BA", "CAD EBB", "DEAD BE", "BEE CAB", "ACE AD", "EDDA CE", "BAA DAB", "CEDE A", "DAD ACE", "ABE ED"]
    return [(text, number % 2, text) for number, text in enumerate(texts)]


def tiny(config, train: Path, evaluation: Path, /, **changes) -> dict:
    """A task's config for a tiny model, without dropout and masks, on these corpora; resolved to JSON values."""
    config.model.update(TINY | EASY | NARROW | changes.pop("model", {}))
    config.data.update({"train": str(train), "evaluation": (str(evaluation),), "evaluation_buckets": (64,)})
    config.batch.update({"buckets": (64,), "seconds_per_update": 13.0, "row_multiple": 2})
    config.train.update({"eval_splits": (evaluation.name,), "num_steps": 220, "eval_every": 220})
    config.train.compilation_cache = None
    config.checkpoint.update({"every": 1000, "keep_last": 1})
    config.metrics.update({"progress": False, "tensorboard": False, "log_every": 50})
    for section, values in changes.items():
        config[section].update(values)
    return json.loads(config.to_json())


def tiny_ctc(train: Path, evaluation: Path, **changes) -> dict:
    """The CTC task."""
    config = ctc.get_config("digits")
    config.head.final_dropout = 0.0
    config.optim.freeze = ConfigDict()
    stages = {"initial": 0.01, "hold_steps": 120, "decay_steps": 80, "final": 0.05}
    config.optim.update({"learning_rate": 3e-3, "warmup_steps": 20, "tri_stage": stages})
    return tiny(config, train, evaluation, **changes)


def tiny_classes(train: Path, evaluation: Path, **changes) -> dict:
    """The classification task."""
    config = classification.get_config("speakers")
    config.target.shown = "utterances"
    config.optim.update({"learning_rate": 3e-3, "warmup_steps": 20})
    return tiny(config, train, evaluation, **({"train": {"num_steps": 40, "eval_every": 40}} | changes))


def tiny_speakers(recipe, train: Path, evaluation: Path, **changes) -> dict:
    """A speaker task: `recipe` is the module of its config."""
    config = recipe.get_config("speakers")
    config.target.shown = "utterances"
    heads = {
        "speaker_xvector": {"tdnn_dim": (32, 48), "tdnn_kernel": (3, 1), "tdnn_dilation": (2, 1)},
        "speaker_ecapa": {"ecapa_dim": 16, "ecapa_output_dim": 16},
    }
    config.head.update(heads[config.task])
    if config.task == "speaker_ecapa":
        # 0.2 lets rows of one speaker lie as far apart as rows of two: each is right, a cosine between them is not
        config.margin.margin = 0.5
    config.optim.update({"learning_rate": 3e-3, "warmup_steps": 20})
    config.model.initializer_range = 0.1  # 0.02 is made for wide layers: narrow ones leave nothing of the signal
    config.trials = tuple(changes.pop("trials", ()))
    return tiny(config, train, evaluation, **({"train": {"num_steps": 100, "eval_every": 100}} | changes))


def assert_outlined(outline, build, config: dict) -> None:
    """The batches that are planned are those of the data: the same arrays, for every bucket that the data fill."""
    planned, real = (make(config, ONE) for make in (outline, build))
    for split in ("train", *config["train"]["eval_splits"]):
        there = {spec.name: spec for spec in planned.stream(split).specs}
        for spec in real.stream(split).specs:
            found = there[spec.name]
            assert {name: (one.shape, one.dtype) for name, one in found.arrays.items()} == {
                name: (one.shape, one.dtype) for name, one in spec.arrays.items()
            }
            assert found.microbatches == spec.microbatches
    assert {*planned.freeze} == {*real.freeze}


def one_device() -> jax.sharding.Mesh:
    """A mesh of one of the eight devices that tests have."""
    return jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor"))


def train(build, config: dict, workdir: Path):
    """The one loop on one device, as train.py calls it."""
    settings = read_sections(config, RunSettings)
    task = build(config, ONE)
    workdir.mkdir(parents=True, exist_ok=True)
    return loop.run(task, settings, one_device(), Workdir(workdir), config={**config, **task.resolved})
