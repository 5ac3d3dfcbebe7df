"""Speaker verification by x-vectors: time-delay layers on WavLM, AM-softmax (FACTS B4, Hugging Face's WavLMForXVector).

python -m wavlm_jax.data /data/voxceleb2/dev.tsv --out corpora/voxceleb/train      (columns id, path, speaker)
python -m wavlm_jax.data /data/voxceleb1.tsv --out corpora/voxceleb/test
python train.py --config configs/finetune/speaker_xvector.py --workdir runs/xvector --config.init.path=runs/base \
    --config.trials="('/data/voxceleb1/veri_test2.txt',)"
Each trial list is scored on the evaluation split that has all its recordings: eer, min_dcf (prior 0.01).
Presets: base, large, and `speakers`, which trains the demo's small model in minutes on two cores.
Known: head, margin 0.4 and scale 30 (Hugging Face, s3prl). Not published, chosen here: all else; SUPERB's recipe is
    superb_asv.py.
Expected: base and large are not measured here. `speakers`, 300 updates from a pre-trained body: EER 19 to 23 % and 13
    to 14 % on two lists of unseen voices, from scratch 20 to 38 % (docs/results.md, "Speaker verification").
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs.finetune.sections import CONV_ENCODER, check_preset, fine_tuning, small_speakers
from configs.pretrain import base, large


def _full_size(preset: str) -> ConfigDict:
    """Base or Large, whole but for the conv encoder."""
    config = (base if preset == "base" else large).get_config()
    config.model.update({"feature_grad_mult": 1.0, "mask_time_prob": 0.05, "mask_feature_prob": 0.0})
    config.head = ConfigDict({"use_weighted_layer_sum": True, "layer_sum_states": "raw"})
    config.data.train = "corpora/voxceleb/train"
    config.data.evaluation = ("corpora/voxceleb/test",)
    config.data.evaluation_buckets = (256, 512, 1024, 2048)
    config.batch.buckets = (150,)  # crops of 3 s
    config.batch.seconds_per_update = 768.0
    config.batch.row_multiple = 64
    config.train.num_steps = 100_000
    config.train.eval_every = 5_000
    config.train.eval_splits = ("test",)
    config.optim.learning_rate = 5e-5 if preset == "base" else 2e-5
    config.optim.warmup_steps = 5_000
    config.optim.freeze = ConfigDict(CONV_ENCODER)
    return config


def small(head: dict) -> ConfigDict:
    """The demo's model with a head to match."""
    config = small_speakers((128, 256, 512, 1024))
    config.head = ConfigDict({"use_weighted_layer_sum": True, "layer_sum_states": "raw"} | head)
    return config


def _speakers() -> ConfigDict:
    config = small({"tdnn_dim": (128, 128, 128, 128, 256), "xvector_output_dim": 128})
    config.model.initializer_range = 0.05  # 0.02 is made for wide layers: of five narrow ones hardly a signal comes out
    return config


def get_config(preset: str = "base") -> ConfigDict:
    check_preset(preset, ("base", "large", "speakers"), __file__)
    config = _speakers() if preset == "speakers" else _full_size(preset)
    config.task = "speaker_xvector"
    config.target = ConfigDict({"column": "speaker", "table": placeholder(str), "shown": "crops"})
    config.margin = ConfigDict({"kind": "additive", "scale": 30.0, "margin": 0.4})
    config.trials = ()
    config.optim.adam.update({"eps": 1e-8})
    return fine_tuning(config)
