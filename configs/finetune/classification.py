"""Sequence classification (speaker, emotion, command, language): mean of projected frames, cross entropy (FACTS B2).

python -m wavlm_jax.data /data/manifest.tsv --out corpora/speakers/train      (columns id, path, speaker, text)
python train.py --config configs/finetune/classification.py --workdir runs/speakers --config.init.path=runs/base
The classes are the corpus's speakers. `--config.target.column=text` takes its texts (commands); `--config.target.table`
    names a file with lines `value TAB class` for everything else (gender by speaker, emotion by id).
Presets: base, large, and `speakers`, which trains the demo's small model in minutes on two cores.
Known: the head (Hugging Face). Not published, chosen here: all else; SUPERB's recipe is superb_sid.py.
Expected: base and large are not measured here. `speakers`, 28 speakers, 300 updates from a pre-trained body: accuracy
    0.93 to 0.98 in three seeds, from scratch 0.14 to 0.61 (docs/results.md, "Speaker classification").
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs.finetune.sections import CONV_ENCODER, check_preset, fine_tuning, small_speakers
from configs.pretrain import base, large


def _full_size(preset: str) -> ConfigDict:
    """Base or Large, whole but for the conv encoder."""
    config = (base if preset == "base" else large).get_config()
    config.model.update({"feature_grad_mult": 1.0, "mask_time_prob": 0.05, "mask_feature_prob": 0.0})
    config.data.train = "corpora/speakers/train"
    config.data.evaluation = ("corpora/speakers/valid",)
    config.data.evaluation_buckets = (256, 512, 768, 1280)
    config.batch.buckets = (128, 256, 384)  # crops of up to 7.7 s
    config.batch.seconds_per_update = 256.0
    config.batch.row_multiple = 16
    config.train.num_steps = 20_000
    config.train.eval_every = 1_000
    config.optim.learning_rate = 5e-5 if preset == "base" else 2e-5
    config.optim.warmup_steps = 2_000
    config.optim.freeze = ConfigDict(CONV_ENCODER)
    return config


def get_config(preset: str = "base") -> ConfigDict:
    check_preset(preset, ("base", "large", "speakers"), __file__)
    config = small_speakers((128, 256, 512)) if preset == "speakers" else _full_size(preset)
    config.task = "classification"
    config.target = ConfigDict({"column": "speaker", "table": placeholder(str), "shown": "crops"})
    config.head = ConfigDict({"classifier_proj_size": 256, "use_weighted_layer_sum": False, "layer_sum_states": "raw"})
    config.optim.adam.update({"eps": 1e-8})
    return fine_tuning(config)
