"""SUPERB speaker diarisation: LibriMix, frozen WavLM, an average of its layers, one linear map, error rate (FACTS D3).

python -m wavlm_jax.data libri2mix/train --out corpora/libri2mix/train --rttm libri2mix/train.rttm
python train.py --config configs/finetune/superb_sd.py --workdir runs/superb_sd --config.init.path=runs/base
Known from s3prl's downstream/diarization: chunks of 40 s (2,000 frames), 32 of them per update, 30,000 updates of Adam
    at 1e-4 (constant), clip 1, two speakers in any order.
Differs, so numbers are not SUPERB's: the head is the linear map of `WavLMForAudioFrameClassification` (as in Hugging
    Face's wavlm-*-sd models), not an LSTM of 512.
Large: --config.head.layer_sum_states=normed is s3prl's average. Chosen here: shorter chunks for shorter recordings,
    precision.
Expected: not measured here.
"""

from ml_collections import ConfigDict

from configs.finetune import frame_classification
from configs.finetune.sections import without_noise


def get_config() -> ConfigDict:
    config = frame_classification.get_config("base")
    without_noise(config)  # the upstream listens as in use
    config.head = ConfigDict({"num_labels": 2, "use_weighted_layer_sum": True, "layer_sum_states": "raw"})
    config.data.train = "corpora/libri2mix/train"
    config.data.evaluation = ("corpora/libri2mix/dev",)
    config.batch.buckets = (384, 768, 1152, 1536, 2000)
    config.batch.seconds_per_update = 1280.0
    config.train.num_steps = 30_000
    config.train.eval_every = 500
    config.train.eval_splits = ("dev",)
    config.optim.update({"learning_rate": 1e-4, "schedule": "constant", "warmup_steps": 0, "max_grad_norm": 1.0})
    config.optim.adam.update({"b2": 0.999, "eps_added_to": "corrected"})  # torch's
    config.optim.freeze = ConfigDict({"upstream": {"pattern": "^wavlm/", "updates": None}})
    return config
