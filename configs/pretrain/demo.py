"""A small WavLM that learns from the embedded corpus in minutes on two cores; `make demo` runs it.

python -m wavlm_jax.data demo --out runs/demo/corpus
python train.py --config configs/pretrain/demo.py --workdir runs/demo/pretraining
Departs from the paper so that a run of minutes leaves the unigram plateau: loss on unmasked frames too
    (unmasked_weight 1), no dropout, a high learning rate, a tenth of the width.
Expected: see docs/results.md.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs.pretrain import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.update(
        {
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 512,
            "conv_dim": (64,) * 7,
            "num_conv_pos_embeddings": 64,
            "num_conv_pos_embedding_groups": 8,
            "feature_grad_mult": 1.0,
            "feat_proj_dropout": 0.0,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "layerdrop": 0.0,
        }
    )
    config.compute.dtype = "float32"
    config.compute.remat = "none"
    config.compute.unroll = 4  # all of them: two thousand steps are worth the compilation
    config.data.train = "runs/demo/corpus/train"
    config.data.evaluation = ("runs/demo/corpus/valid", "runs/demo/corpus/unseen_voices")
    config.data.evaluation_buckets = (128, 256)
    config.batch.buckets = (48, 96, 144)
    config.batch.seconds_per_update = (
        16.0  # half the audio and twice the updates: better for the same time (docs/LOG.md)
    )
    config.batch.seconds_per_device = 64.0
    config.batch.row_multiple = 4
    config.loader.workers = 0
    config.objective.final_dim = 64
    config.objective.unmasked_weight = 1.0
    config.labels.path = "runs/demo/labels/mfcc"
    config.labels.make = True
    config.labels.sample_seconds = placeholder(float)  # all
    config.labels.kmeans.update({"sample_frames": 400_000, "passes": 10, "initialisations": 1})
    config.labels.num_threads = 2
    config.optim.learning_rate = 1.5e-3
    config.optim.warmup_steps = 60
    config.train.num_steps = 1_800
    config.train.eval_every = 600
    config.train.eval_splits = ("valid", "unseen_voices")
    config.checkpoint.update({"every": 600, "keep_last": 2, "keep_every": placeholder(int)})
    config.metrics.log_every = 20
    return config
