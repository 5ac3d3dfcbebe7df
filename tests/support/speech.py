"""Real corpora from generated sound, made through the public commands' own functions."""

import json
from pathlib import Path

import numpy as np
import soundfile

from configs.pretrain import demo
from wavlm_jax.data.prepare import Preparation, prepare
from wavlm_jax.data.sources import from_folder

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "conv_dim": (32,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_buckets": 32,
    "max_bucket_distance": 80,
}
NOISY = {
    "feat_proj_dropout": 0.1,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
    "layerdrop": 0.3,
    "feature_grad_mult": 0.1,
}
"""Everything that is random in training."""


def write_audio(folder: Path, count: int, seed: int, low: float = 1.1, high: float = 2.8) -> None:
    """FLAC files of a chirping voice in noise, `low` to `high` seconds long."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for number in range(count):
        time = np.arange(int(16_000 * rng.uniform(low, high))) / 16_000
        pitch = np.repeat(rng.uniform(100, 800, len(time) // 1600 + 1), 1600)[: len(time)]
        wave = 0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / 16_000) + rng.normal(0, 0.02, len(time))
        soundfile.write(folder / f"utterance-{number:03d}.flac", wave, 16_000)


def make_corpora(root: Path, train: int = 24, valid: int = 7) -> dict[str, Path]:
    """Prepared corpora `train` and `valid` under `root`."""
    folders = {}
    for seed, (split, count) in enumerate({"train": train, "valid": valid}.items()):
        write_audio(root / "audio" / split, count, seed)
        prepare(from_folder(root / "audio" / split), root / "corpus" / split, Preparation(name=split))
        folders[split] = root / "corpus" / split
    return folders


def tiny_flags(root: Path, folders: dict[str, Path], changes: dict[str, object]) -> list[str]:
    """Flags that make the demo's config a run of seconds, with all that is random; its labels are made in `root`."""
    values = {
        "data.train": folders["train"],
        "data.evaluation": (str(folders["valid"]),),
        "data.evaluation_buckets": (160,),
        "train.eval_splits": ("valid",),
        "metrics.log_every": 1,
        "optim.warmup_steps": 4,
        "batch.buckets": (48,),
        "batch.seconds_per_update": 7.7,
        "batch.row_multiple": 8,
        "mixing.prob": 0.5,
        "labels.path": root / "labels",
        "labels.num_clusters": 8,
        "labels.min_entropy": 0.05,
        "labels.kmeans.passes": 2,
        **{f"model.{name}": value for name, value in (TINY | NOISY).items()},
    }
    return [f"--config.{name}={value}" for name, value in (values | changes).items()]


def tiny_config(root: Path, folders: dict[str, Path], **model) -> dict:
    """The demo's config for a tiny model on these corpora, resolved to JSON values."""
    config = demo.get_config()
    config.model.update(TINY | model)
    config.data.update({"train": str(folders["train"]), "evaluation": (str(folders["valid"]),)})
    config.train.eval_splits = ("valid",)
    config.batch.update({"buckets": (48, 96), "seconds_per_update": 7.7, "row_multiple": 8})
    config.data.evaluation_buckets = (160,)
    config.mixing.update({"group": 2, "prob": 0.5})
    config.labels.path = str(root / "labels")
    config.labels.num_clusters = 8
    config.labels.min_entropy = 0.05
    config.labels.kmeans.update({"passes": 2, "sample_frames": 2000, "batch_frames": 500})
    return json.loads(config.to_json())
