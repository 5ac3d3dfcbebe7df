"""One class an utterance (speaker, emotion, command, language): mean of the projected frames, cross entropy (FACTS B2).

python -m wavlm_jax.data /data/manifest.tsv --out corpora/speakers/train      (columns id, path, speaker, text)
python train.py --config configs/finetune/classification.py --workdir runs/speakers --config.init.path=runs/base
Classes are the corpus's speakers; `--config.target.column=text` takes its texts (commands), and `--config.target.table`
    names a file of lines `value TAB class` for everything else (gender by speaker, emotion by id).
Presets: base, large, and `speakers`, which trains the demo's small model in minutes on two cores.
Known: the head (Hugging Face). Not published, chosen here: all else; the frozen recipe of SUPERB is superb_sid.py.
Expected: not measured at this size here; docs/results.md has what `speakers` reaches.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs.finetune.sections import CONV_ENCODER, fine_tuning, small_speakers
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
    if preset not in ("base", "large", "speakers"):
        raise ValueError(f"configs/finetune/classification.py:{preset}: no such preset; expected base, large, speakers")
    config = small_speakers((128, 256, 512)) if preset == "speakers" else _full_size(preset)
    config.task = "classification"
    config.target = ConfigDict({"column": "speaker", "table": placeholder(str), "shown": "crops"})
    config.head = ConfigDict({"classifier_proj_size": 256, "use_weighted_layer_sum": False, "layer_sum_states": "raw"})
    config.optim.adam.update({"eps": 1e-8})
    return fine_tuning(config)
