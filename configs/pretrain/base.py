"""WavLM Base pre-training on 960 h of speech (arXiv 2110.13900, Table 1 and FACTS C1).

python -m wavlm_jax.data /data/LibriSpeech/train --out corpora/librispeech/train
python -m pretrain.make_labels --config configs/pretrain/base.py      # iteration 1; the next: --teacher RUN --layer 6
python train.py --config configs/pretrain/base.py --workdir runs/base

Known from the authors' code: mixing 0.2, masks 0.8 x 10, dropouts, feature_grad_mult 0.1, betas, eps, weight decay,
    clip 10, 32k warm-up updates.
From third-party notes on the paper: 400k updates, peak 5e-4.
Not published, chosen here (marked below): seconds per update (HuBERT's 2,800), groups of 4 mixing partners, buckets,
    crops on the frame grid, intervals, precision.
Expected: not measured at this size here; docs/results.md has what small models reach on real speech.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs.pretrain.machines import place

# A `placeholder` is None until a flag gives it a value; a plain None would refuse the flag.


def model() -> ConfigDict:
    """WavLM Base (FACTS A4, A11)."""
    return ConfigDict(
        {
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "feat_extract_norm": "group",
            "do_stable_layer_norm": False,
            "do_normalize": False,
            "normalize_eps": 1e-5,
            "conv_dim": (512,) * 7,
            "conv_kernel": (10, 3, 3, 3, 3, 2, 2),
            "conv_stride": (5, 2, 2, 2, 2, 2, 2),
            "conv_bias": False,
            "layer_norm_eps": 1e-5,
            "num_conv_pos_embeddings": 128,
            "num_conv_pos_embedding_groups": 16,
            "position_bias": True,
            "num_buckets": 320,
            "max_bucket_distance": 800,
            "initializer_range": 0.02,
            "feature_grad_mult": 0.1,
            "feat_proj_dropout": 0.1,
            "hidden_dropout": 0.1,
            "attention_dropout": 0.1,
            "activation_dropout": 0.0,
            "layerdrop": 0.05,
            "layerdrop_first": True,  # chosen: the bias outlives a dropped layer 0 here, the authors' does not
            "mask_time_prob": 0.8,
            "mask_time_length": 10,
            "mask_time_min_masks": 2,
            "mask_feature_prob": 0.0,
            "mask_feature_length": 10,
            "mask_feature_min_masks": 0,
            "padding": "exact",
        }
    )


def batch() -> ConfigDict:
    """Seconds of audio, cut into shapes that accelerators like."""
    return ConfigDict(
        {
            "buckets": (128, 256, 384, 512, 640, 768),  # chosen: frames, multiples of 128; 768 = 245,840 samples
            "seconds_per_update": 2800.0,  # HuBERT's; the paper's own is not published
            "seconds_per_device": 87.5,
            "row_multiple": 64,
        }
    )


def mixing() -> ConfigDict:
    """The second voice (FACTS C7)."""
    return ConfigDict(
        {
            "prob": 0.2,
            "group": 4,  # chosen: the authors mix within a device's 3 to 5 rows
            "snr_db": (-5.0, 5.0),
            "noise_corpus": placeholder(str),
            "noise_prob_given_mix": 0.0,
            "noise_snr_db": (-5.0, 20.0),
            "reference_quirks": False,
        }
    )


def objective() -> ConfigDict:
    """Masked prediction (FACTS C2)."""
    return ConfigDict(
        {
            "final_dim": 256,
            "logit_temp": 0.1,
            "masked_weight": 1.0,
            "unmasked_weight": 0.0,
            "penalty_weight": 10.0,
            "special_rows": 0,  # 4 for weights that go to fairseq
            "mask_tearing": False,  # True: as the authors' code thins masks to equal counts (docs/parity.md)
        }
    )


def labels() -> ConfigDict:
    """What is predicted (FACTS C9)."""
    return ConfigDict(
        {
            "path": "labels/librispeech-mfcc",
            "make": False,
            "num_clusters": 100,  # iteration 1; 500 for a layer
            "rate_hz": 100,  # 50 for a layer
            "teacher": "mfcc",
            "run": placeholder(str),
            "step": placeholder(int),
            "layer": placeholder(int),
            "seed": 0,
            "sample_seconds": 360_000.0,  # 10 % of LibriSpeech, as HuBERT
            "kmeans": {
                "sample_frames": 2_000_000,  # chosen
                "batch_frames": 10_000,
                "passes": 100,
                "tolerance": 1e-4,
                "initialisations": 3,
            },
            "piece_seconds": 100.0,
            "batch_seconds": 200.0,
            "num_threads": 16,
            "min_entropy": 0.3,
            "max_constant_share": 0.01,
        }
    )


def optim() -> ConfigDict:
    """Adam as fairseq has it (FACTS C6)."""
    return ConfigDict(
        {
            "name": "adam",  # or one of optax: "adamw", "lion", ... (wavlm_jax/training/optim.py), with `arguments`
            "arguments": {},
            "learning_rate": 5e-4,
            "schedule": "linear",
            "warmup_steps": 32_000,
            "max_grad_norm": 10.0,
            "tri_stage": None,  # a section, for the schedule of that name; see configs/finetune/ctc.py
            "groups": {},  # name -> learning rate and decay of the parameters by path
            "freeze": {},  # name -> {"pattern": regular expression of paths, "updates": how many, None = for ever}
            "adam": {
                "b1": 0.9,
                "b2": 0.98,
                "eps": 1e-6,
                "weight_decay": 0.01,
                "eps_added_to": "uncorrected",
                "no_decay": placeholder(str),
            },
        }
    )


_ON_256 = {  # hold more than the recipe's batch: 2 rows a chip are 7,867 s an update; fewer updates, same audio
    "batch.row_multiple": 512,
    "batch.seconds_per_update": 7867.0,
    "mixing.group": 2,
    "train.num_steps": 142_000,
    "optim.warmup_steps": 11_400,
}
PRESETS = {
    "v5e-16": {"batch.seconds_per_device": 190.0},
    "v4-32": {"batch.seconds_per_device": 190.0},
    "h100-8": {"batch.seconds_per_device": 190.0},
    "v5p-128": {"batch.row_multiple": 192, "mixing.group": 3},  # 3 rows a chip: 2,950 s an update
    "h100-64": {"batch.row_multiple": 192, "mixing.group": 3},
    "v5e-256": _ON_256,
    "v6e-256": _ON_256,
}
"""How the batch is cut on each machine (all chosen)."""


def mesh() -> ConfigDict:
    """Whatever machine there is, all of it for copies of the parameters; presets are in machines.py."""
    return ConfigDict(
        {
            "data": -1,
            "fsdp": 1,
            "tensor": 1,
            "platform": placeholder(str),
            "hosts": placeholder(int),
            "devices": placeholder(int),
        }
    )


def get_config(machine: str | None = None) -> ConfigDict:
    config = ConfigDict()
    config.task = "masked_prediction"
    config.seed = 0
    config.model = model()
    config.compute = ConfigDict(
        {
            "dtype": "bfloat16",  # chosen: float32 parameters and Adam, bf16 activations
            "remat": "dots",
            "unroll": 1,
            "attention": "auto",
        }
    )
    config.data = ConfigDict(
        {
            "train": "corpora/librispeech/train",
            "evaluation": ("corpora/librispeech/valid",),
            "evaluation_buckets": (256, 512, 768, 1280, 1792),
        }
    )
    config.batch = batch()
    config.mixing = mixing()
    config.objective = objective()
    config.loader = ConfigDict(
        {
            "workers": 8,
            "threads": 2,
            "prefetch": 4,
            "crop_alignment": "frame",  # chosen: a frame has exactly its label; "sample" as fairseq
            "fault_cap": 0.001,
        }
    )
    config.labels = labels()
    config.init = ConfigDict(
        {
            "path": placeholder(str),  # a run, or any checkpoint that docs/conversion.md lists
            "step": placeholder(int),
            "head_warmup_steps": 0,  # updates of a fresh head alone, where `path` has none that fits
        }
    )
    config.optim = optim()
    config.train = ConfigDict(
        {
            "num_steps": 400_000,
            "eval_every": 5_000,
            "eval_splits": ("valid",),
            "max_nonfinite_in_a_row": 20,
            "compilation_cache": "compilation_cache",
            "max_step_seconds": 600.0,
        }
    )
    config.checkpoint = ConfigDict({"every": 1_000, "keep_last": 3, "keep_every": 50_000})
    config.mesh = mesh()
    config.metrics = ConfigDict({"log_every": 100, "tensorboard": True, "progress": True})
    # --config.metrics.wandb.project=NAME: at Weights & Biases too, with the extra `wandb`
    config.metrics.wandb = ConfigDict(
        {name: placeholder(str) for name in ("project", "entity", "name", "group", "mode")}
    )
    return place(config, machine, PRESETS)
