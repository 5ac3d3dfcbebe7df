"""What the fine-tuning configs share; no config itself."""

from collections.abc import Iterable
from pathlib import Path

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs.pretrain import demo


def fine_tuning(config: ConfigDict) -> ConfigDict:
    """`config`, of pre-training, with the sections of fine-tuning in the place of those that are pre-training's own."""
    for section in ("mixing", "objective", "labels"):
        del config[section]
    config.init = ConfigDict(
        {
            "path": placeholder(str),  # None, from scratch; --config.init.path=RUN, or a Hugging Face folder, a .pt ...
            "step": placeholder(int),
            "head": False,  # True: the head comes from there too, for a further stage of the same task
        }
    )
    config.lora = ConfigDict(
        {
            "pattern": placeholder(str),  # None, the whole model; "attention/(q|v)_proj": adapters there and the head
            "rank": 8,
            "alpha": 16.0,
        }
    )
    config.augmentation = ConfigDict(
        {
            "noise_corpus": placeholder(str),  # prepared by python -m wavlm_jax.data, like any other
            "noise_prob": 0.0,
            "noise_snr_db": (0.0, 15.0),
            "room_corpus": placeholder(str),  # of impulse responses
            "room_prob": 0.0,
            "speeds": (),  # (0.9, 1.0, 1.1)
            "speed_makes_speakers": False,  # of the speaker tasks
        }
    )
    return config


def check_preset(preset: str, known: Iterable[str], file: str) -> None:
    """Whether a config file (`__file__`) has this preset.

    Raises:
        ValueError: it has not; the message names those that it has.

    """
    names = list(known)
    if preset not in names:
        where = f"configs/finetune/{Path(file).name}:{preset}"
        raise ValueError(f"{where}: no such preset; expected one of {', '.join(names)}")


def without_noise(config: ConfigDict) -> None:
    """Dropout, layer drop and masks off: what a frozen or a very small model wants."""
    names = ("feat_proj_dropout", "hidden_dropout", "attention_dropout", "activation_dropout", "layerdrop")
    config.model.update(dict.fromkeys((*names, "mask_time_prob", "mask_feature_prob"), 0.0))


def small_speakers(evaluation_buckets: tuple[int, ...]) -> ConfigDict:
    """The demo's model on crops of one to three seconds of a corpus of speakers, minutes on two cores."""
    config = demo.get_config()
    config.model.update({"mask_time_prob": 0.1, "mask_time_length": 4, "mask_time_min_masks": 0})
    config.data.train = "runs/speakers/corpus/train"
    config.data.evaluation = ("runs/speakers/corpus/valid", "runs/speakers/corpus/test")
    config.data.evaluation_buckets = evaluation_buckets
    config.batch.buckets = (48, 96, 144)
    config.batch.seconds_per_update = 24.0
    config.train.num_steps = 400
    config.train.eval_every = 100
    config.train.eval_splits = ("valid", "test")
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 40
    return config


CONV_ENCODER = {"conv_encoder": {"pattern": "^wavlm/feature_extractor/", "updates": None}}
"""`optim.freeze` of nearly every recipe: the convolutions stay as they were pre-trained."""
