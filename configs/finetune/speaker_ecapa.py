"""Speaker verification: a small ECAPA-TDNN on the average of WavLM's layers, AAM-softmax (FACTS D4, the authors' code).

python train.py --config configs/finetune/speaker_ecapa.py:base_frozen --workdir sv1 --config.init.path=runs/base
python train.py --config configs/finetune/speaker_ecapa.py:base_joint --workdir sv2 --config.init.path=sv1
python train.py --config configs/finetune/speaker_ecapa.py:base_large_margin --workdir sv3 --config.init.path=sv2
Corpora and trials as in speaker_xvector.py. Presets: base or large with _frozen (the encoder is frozen), _joint (all of
    it is trained, from the stage before, head included), _large_margin (larger margin and crops of 6 s, from the stage
    before); and `speakers`, which trains the demo's small model, all of it, in minutes on two cores.
Known from the authors' code (UniSpeech): the head. From memory or third-party notes: crops of 3 s, 20 + 5 + 2 epochs of
    VoxCeleb2 dev (1.09 M utterances), scale 30, margin 0.2, then 0.4 and crops of 6 s; noise, rooms and speed.
Not published, chosen here: 512 crops per update (so 42,600, 10,600 and 4,300 updates), learning rates, no dropout.
Expected: EER on Vox1-O 0.84 % (Base+, frozen), 0.59 %, 0.51 % and 0.33 % (Large; frozen, joint, large margin with
    calibration), by the authors' README; not measured here. `speakers`, 300 updates from a pre-trained body: EER 5 to
    12 % and 10 to 12 % on two lists of unseen voices, from scratch 15 to 25 % (docs/results.md).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs.finetune import speaker_xvector
from configs.finetune.sections import CONV_ENCODER, check_preset, fine_tuning, without_noise
from configs.pretrain import base, large

_BODY = {"body": {"pattern": "^wavlm/", "updates": None}}
# updates, learning rate, margin, frames of a crop, what is frozen
_STAGES = {
    "frozen": (42_600, 1e-3, 0.2, 150, _BODY),
    "joint": (10_600, 2e-5, 0.2, 150, CONV_ENCODER),
    "large_margin": (4_300, 1e-5, 0.4, 300, CONV_ENCODER),
}
_PRESETS = [f"{size}_{stage}" for size in ("base", "large") for stage in _STAGES]


def _full_size(preset: str) -> ConfigDict:
    """One stage on Base or Large."""
    size, _, stage = preset.partition("_")
    updates, rate, _, frames, frozen = _STAGES[stage]
    config = (base if size == "base" else large).get_config()
    without_noise(config)
    config.model.feature_grad_mult = 1.0
    config.head = ConfigDict({"use_weighted_layer_sum": True, "layer_sum_states": "normed"})
    config.data.train = "corpora/voxceleb/train"
    config.data.evaluation = ("corpora/voxceleb/test",)
    config.data.evaluation_buckets = (256, 512, 1024, 2048)
    config.batch.buckets = (frames,)
    config.batch.seconds_per_update = 512 * frames / 50
    config.batch.row_multiple = 64
    config.train.num_steps = updates
    config.train.eval_every = 1_000
    config.train.eval_splits = ("test",)
    config.optim.learning_rate = rate
    config.optim.warmup_steps = 1_000
    config.optim.freeze = ConfigDict(frozen)
    return config


def get_config(preset: str = "base_frozen") -> ConfigDict:
    check_preset(preset, (*_PRESETS, "speakers"), __file__)
    small = preset == "speakers"
    config = speaker_xvector.small({"ecapa_dim": 64, "ecapa_output_dim": 64}) if small else _full_size(preset)
    config.task = "speaker_ecapa"
    config.target = ConfigDict({"column": "speaker", "table": placeholder(str), "shown": "crops"})
    margin = 0.2 if small else _STAGES[preset.partition("_")[2]][2]
    config.margin = ConfigDict({"kind": "angular", "scale": 30.0, "margin": margin})
    config.trials = ()
    config.optim.adam.update({"eps": 1e-8})
    fine_tuning(config)
    if not small and not preset.endswith("frozen"):
        config.init.head = True  # and --config.init.path=RUN, of the stage before
    return config
