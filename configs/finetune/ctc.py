"""Speech recognition by CTC (arXiv 2110.13900, FACTS D1); presets are named after model and hours of labelled speech.

python -m wavlm_jax.data /data/LibriSpeech/train-clean-100 --out corpora/librispeech/train_100h
python -m wavlm_jax.data /data/LibriSpeech/dev-other --out corpora/librispeech/dev_other
python train.py --config configs/finetune/ctc.py:base_100h --workdir runs/ctc --config.init.path=runs/base
Presets: base_1h base_10h base_100h base_960h large_1h large_10h large_100h large_960h, and three that train the demo's
    small model in minutes on two cores: `digits` (spoken digits), `sentences` (an hour of read sentences of several
    speakers), `demo` (the demo's synthetic sentences, in `make demo`).
Known: base_100h is the WavLM authors' own recipe (UniSpeech, finetune.sh). The paper's values for the other splits are
    not published; they come from the sources named beside them (HuBERT, mr_hubert, wav2vec 2.0).
Chosen here: buckets, 1,600 s of audio per update for all (3.2 M samples x 8 GPUs, as all sources but one), precision,
    gradients clipped as in pre-training.
Expected: WER on test-clean/test-other without a language model after 1 h, 10 h, 100 h: Base 24.5/29.2, 9.8/16.0,
    5.7/12.0 (the authors' README; not measured here). `digits` from a pre-trained body: WER 0.46 to 0.62 and 0.64 to
    0.68 on two unseen voices, from scratch 0.97 to 1.00; `sentences`: CER 0.74 and 0.71 (docs/results.md).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs.finetune.sections import CONV_ENCODER, check_preset, fine_tuning
from configs.pretrain import base, demo, large

_HUBERT = {"hidden_dropout": 0.0, "activation_dropout": 0.1, "attention_dropout": 0.0, "final_dropout": 0.0}
_ALL = {"hidden_dropout": 0.1, "activation_dropout": 0.1, "attention_dropout": 0.1, "final_dropout": 0.1}
_W2V = _HUBERT | {"layerdrop": 0.1}

# learning rate, updates, (warm-up, level, fall) updates, time mask, channel mask, updates of the head alone, dropouts
_PRESETS = {
    "base_1h": (5e-5, 13_000, (1_300, 5_200, 6_500), 0.75, 0.5, 10_000, _HUBERT),  # mr_hubert base 1 h
    "base_10h": (2e-5, 25_000, (8_000, 0, 72_000), 0.75, 0.5, 10_000, _HUBERT),  # HuBERT base_10h
    "base_100h": (3e-5, 80_000, (8_000, 32_000, 40_000), 0.65, 0.5, 0, _ALL),  # WavLM, finetune.sh
    "base_960h": (1e-4, 320_000, (32_000, 128_000, 160_000), 0.5, 0.1, 0, _W2V),  # wav2vec 2.0 base 960 h
    "large_1h": (3e-4, 25_000, (2_500, 10_000, 12_500), 0.75, 0.5, 10_000, _HUBERT),  # mr_hubert large 1 h
    "large_10h": (2e-5, 25_000, (8_000, 0, 72_000), 0.75, 0.5, 10_000, _HUBERT),  # mr_hubert large 10 h
    "large_100h": (3e-5, 80_000, (8_000, 32_000, 40_000), 0.75, 0.5, 10_000, _HUBERT),  # mr_hubert large 100 h
    "large_960h": (3e-5, 320_000, (32_000, 128_000, 160_000), 0.5, 0.25, 10_000, _W2V),  # wav2vec 2.0 large 960 h
}


def layer_groups(num_layers: int, decay: float, head_rate: float = 1.0) -> ConfigDict:
    """`optim.groups` for layer-wise decay: the last layer at the full rate, each below at `decay` of the one above it.

    What stands before the layers has the rate below the first; what is not the encoder has `head_rate`.
    """
    below = r"^wavlm/(?!encoder/layers/)"
    return ConfigDict(
        {
            "head": {"pattern": "^(?!wavlm/)", "learning_rate": head_rate},
            "layers": {"pattern": "^wavlm/encoder/layers/", "learning_rate": 1.0, "layer_decay": decay},
            "below": {"pattern": below, "learning_rate": decay**num_layers},
        }
    )


def _recipe(preset: str) -> ConfigDict:
    """One line of the table on Base or Large."""
    rate, updates, (rise, level, fall), time_mask, channel_mask, head_alone, dropouts = _PRESETS[preset]
    config = (base if preset.startswith("base") else large).get_config()
    final_dropout = dropouts["final_dropout"]
    config.model.update({name: value for name, value in dropouts.items() if name != "final_dropout"})
    config.model.update(
        {
            "feat_proj_dropout": 0.1 if dropouts is _ALL else 0.0,
            "layerdrop": 0.1,
            "feature_grad_mult": 1.0,  # the conv encoder is frozen instead (optim.freeze)
            "mask_time_prob": time_mask,
            "mask_time_length": 10,
            "mask_feature_prob": channel_mask,
            "mask_feature_length": 64,
        }
    )
    config.head = ConfigDict({"final_dropout": final_dropout, "ctc_loss_reduction": "sum"})
    config.data.train = "corpora/librispeech/train_" + preset.partition("_")[2]
    config.data.evaluation = ("corpora/librispeech/dev_other",)
    config.train.eval_splits = ("dev_other",)
    config.batch.buckets = (256, 384, 512, 640, 768, 896, 1280, 1792)
    config.batch.seconds_per_update = 1600.0
    config.train.num_steps = updates
    config.optim.learning_rate = rate
    config.optim.warmup_steps = rise
    config.optim.tri_stage = ConfigDict({"initial": 0.01, "hold_steps": level, "decay_steps": fall, "final": 0.05})
    config.optim.freeze = ConfigDict(CONV_ENCODER)
    if head_alone:
        config.optim.freeze.body = ConfigDict({"pattern": "^wavlm/", "updates": head_alone})
    config.optim.adam.update({"eps": 1e-8, "weight_decay": 0.0})
    return config


def _small() -> ConfigDict:
    """The demo's model on little speech: short masks, the whole model from the start."""
    config = demo.get_config()
    config.model.update({"mask_time_prob": 0.1, "mask_time_length": 4, "mask_time_min_masks": 0})
    config.head = ConfigDict({"final_dropout": 0.1, "ctc_loss_reduction": "sum"})
    config.batch.seconds_per_update = 24.0
    config.batch.row_multiple = 4
    config.train.num_steps = 400
    config.train.eval_every = 100
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 40
    config.optim.tri_stage = ConfigDict({"initial": 0.01, "hold_steps": 160, "decay_steps": 200, "final": 0.05})
    config.optim.adam.update({"eps": 1e-8, "weight_decay": 0.0})
    return config


def _digits() -> ConfigDict:
    """Single words of human speakers (docs/results.md); the head alone at first, or some seeds stay with the blank."""
    config = _small()
    config.optim.freeze = ConfigDict({"body": {"pattern": "^wavlm/", "updates": 100}})
    config.data.train = "runs/digits/corpus/train"
    config.data.evaluation = ("runs/digits/corpus/valid", "runs/digits/corpus/test")
    config.data.evaluation_buckets = (128,)
    config.batch.buckets = (40, 128)
    config.train.eval_splits = ("valid", "test")
    return config


def _demo() -> ConfigDict:
    """The embedded sentences: no masks, a lower rate, small batches, or it stays with the blank (docs/LOG.md)."""
    config = _small()
    config.model.mask_time_prob = 0.0
    config.head.final_dropout = 0.0
    config.batch.buckets = (128, 208)
    config.data.evaluation_buckets = (208,)
    config.batch.seconds_per_update = 10.5
    config.train.num_steps = 700
    config.train.eval_every = 700
    config.checkpoint.every = 700
    config.optim.learning_rate = 5e-4
    config.optim.warmup_steps = 100
    config.optim.tri_stage.update({"hold_steps": 350, "decay_steps": 250})
    return config


def _sentences() -> ConfigDict:
    """Read sentences of human speakers: the demo's way, longer, and the conv encoder stays as it was pre-trained."""
    config = _demo()
    config.data.train = "runs/sentences/corpus/train"
    config.data.evaluation = ("runs/sentences/corpus/valid", "runs/sentences/corpus/test")
    config.data.evaluation_buckets = (280, 800)
    config.batch.buckets = (168, 280, 400)
    config.batch.seconds_per_update = 13.5
    config.batch.seconds_per_device = 40.0
    config.batch.row_multiple = 2
    config.train.num_steps = 3_000
    config.train.eval_every = 1_000
    config.train.eval_splits = ("valid", "test")
    config.checkpoint.every = 1_000
    config.optim.tri_stage.update({"hold_steps": 1_500, "decay_steps": 1_400})
    config.optim.freeze = ConfigDict(CONV_ENCODER)
    return config


_SMALL = {"digits": _digits, "sentences": _sentences, "demo": _demo}


def get_config(preset: str = "base_100h") -> ConfigDict:
    check_preset(preset, (*_PRESETS, *_SMALL), __file__)
    config = _SMALL[preset]() if preset in _SMALL else _recipe(preset)
    config.task = "ctc"
    config.text = ConfigDict(
        {
            "vocabulary": placeholder(str),  # None; a Hugging Face folder, or made from the training text
            "min_count": 1,
            "do_lower_case": False,
            "replace_unknown": False,
        }
    )
    config.optim.schedule = "tri_stage"
    config.optim.groups = ConfigDict({})  # layer_groups(12, 0.9) for layer-wise decay
    return fine_tuning(config)
