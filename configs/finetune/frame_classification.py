"""Diarisation by frame classification: who speaks in which 20 ms, speakers in any order (FACTS B3, E31).

python -m wavlm_jax.data meetings/ --out corpora/meetings/train --rttm train.rttm
python train.py --config configs/finetune/frame_classification.py --workdir runs/sd --config.init.path=runs/base
python -m wavlm_jax diarize test/*.flac --model runs/sd --reference test.rttm > found.rttm
Presets: base, and `demo`, which trains the demo's small model in minutes on two cores.
Known: nothing; nobody has published a recipe for this head alone (SUPERB's is configs/finetune/superb_sd.py; the
    paper's CALLHOME system clusters speakers over chunks of 15 s with 3 local speakers, FACTS D5).
Chosen here: all of it. Crops of 15 s with up to 3 speakers, 400 s of audio per update, CTC's learning rate for 100 h.
Expected: base is not measured here. `demo`, 400 updates of 15 s from a pre-trained body: error rate 35 to 36 % in
    windows of 3.84 s of meetings, 61 % over whole files (docs/results.md, "Diarisation").
"""

from ml_collections import ConfigDict

from configs.finetune.sections import CONV_ENCODER, check_preset, fine_tuning
from configs.pretrain import base, demo


def _base() -> ConfigDict:
    """WavLM Base, the conv encoder frozen."""
    config = base.get_config()
    config.model.update({"mask_time_prob": 0.05, "mask_time_length": 10, "feature_grad_mult": 1.0})
    config.head = ConfigDict({"num_labels": 3})
    config.data.train = "corpora/meetings/train"
    config.data.evaluation = ("corpora/meetings/valid",)
    config.data.evaluation_buckets = (768, 1536, 3072)
    config.batch.buckets = (256, 768)
    config.batch.seconds_per_update = 400.0
    config.batch.row_multiple = 8
    config.train.num_steps = 20_000
    config.train.eval_every = 1_000
    config.optim.learning_rate = 3e-5
    config.optim.warmup_steps = 2_000
    config.optim.freeze = ConfigDict(CONV_ENCODER)
    return config


def _demo() -> ConfigDict:
    """The demo's model, all of it from the start."""
    config = demo.get_config()
    config.model.update({"mask_time_prob": 0.05, "mask_time_length": 10, "mask_time_min_masks": 0})
    config.head = ConfigDict({"num_labels": 4})
    config.data.train = "runs/diarisation/corpus/train"
    config.data.evaluation = ("runs/diarisation/corpus/valid",)
    config.data.evaluation_buckets = (512, 1536)
    config.batch.buckets = (256, 512)
    config.batch.seconds_per_update = 40.0
    config.batch.row_multiple = 4
    config.train.num_steps = 600
    config.train.eval_every = 200
    config.train.eval_splits = ("valid",)
    config.optim.learning_rate = 1e-3
    return config


def get_config(preset: str = "base") -> ConfigDict:
    check_preset(preset, ("base", "demo"), __file__)
    config = _base() if preset == "base" else _demo()
    config.task = "frame_classification"
    config.optim.adam.update({"eps": 1e-8, "weight_decay": 0.0})
    fine_tuning(config)
    config.objective = ConfigDict({"compat": "exact"})  # "huggingface": transformers' loss
    return config
