"""From a task's config to SUPERB's form of it (FACTS D3, s3prl): frozen encoder, a learned average of its layers.

No config itself; superb_asr.py, superb_sid.py, superb_asv.py, superb_ks.py and superb_er.py use it. Presets of each:
base, base_plus, large, where the last hidden state of Large enters the average after the final norm, as in s3prl and so
in the published numbers; large_raw: before the norm, as in transformers 5 (FACTS E7).
"""

from ml_collections import ConfigDict

from configs.finetune.sections import check_preset, without_noise

PRESETS = ("base", "base_plus", "large", "large_raw")


def superb(config: ConfigDict, preset: str, *, rows: int, row_seconds: float, updates: int, rate: float) -> ConfigDict:
    """`config`, of a task on the model that `preset` names, with what all of SUPERB's tasks share.

    The encoder computes as in evaluation, without dropout and masks, and gets no gradient; only what stands beside it
    (`layer_weights` too) is trained, by Adam at a constant rate. Published rates were tuned (10^-1 ... 10^-5).

    Args:
        config: of the task.
        preset: one of `PRESETS`.
        rows: utterances per update.
        row_seconds: mean length of one, or of a crop.
        updates: number of them.
        rate: s3prl's own default.

    """
    without_noise(config)
    config.head.use_weighted_layer_sum = True
    config.head.layer_sum_states = "raw" if preset.endswith("_raw") else "normed"
    config.batch.seconds_per_update = rows * row_seconds
    config.batch.row_multiple = 8
    config.train.num_steps = updates
    config.train.eval_every = updates // 20
    config.optim.learning_rate = rate
    config.optim.schedule = "constant"
    config.optim.tri_stage = None
    config.optim.warmup_steps = 0
    config.optim.max_grad_norm = 1.0
    config.optim.groups = ConfigDict({})
    config.optim.freeze = ConfigDict({"encoder": {"pattern": "^wavlm/", "updates": None}})
    config.optim.adam.update({"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "eps_added_to": "corrected"})
    return config


def size(preset: str, file: str) -> str:
    """The preset of the task's own config for a preset of SUPERB; `file` is the config's `__file__`."""
    check_preset(preset, PRESETS, file)
    return "large" if preset.startswith("large") else "base"
