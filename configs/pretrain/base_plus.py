"""WavLM Base+ pre-training on 94,000 h (arXiv 2110.13900, FACTS C1): Base's model, more data, noise.

python train.py --config configs/pretrain/base_plus.py --workdir runs/base_plus
Known from third-party notes on the paper: Libri-Light 60k h + GigaSpeech 10k h + VoxPopuli 24k h, 1 M updates with 32k
    of warm-up (another note: 1.2 M with 96k), labels = 500 clusters of the released HuBERT Base's layer 9, 10 % of the
    mixed rows get noise (DNS challenge) at -5 to 20 dB.
Not published, chosen here: all that is marked so in base.py.
Expected: not measured here.
"""

from ml_collections import ConfigDict

from configs.pretrain import base
from configs.pretrain.machines import place

_UPDATES = 356_000  # on 256 chips; see base.py
PRESETS = base.PRESETS | {
    machine: base.PRESETS[machine] | {"train.num_steps": _UPDATES} for machine in ("v5e-256", "v6e-256")
}


def get_config(machine: str | None = None) -> ConfigDict:
    config = base.get_config()
    config.data.train = "corpora/mix94k/train"
    config.data.evaluation = ("corpora/mix94k/valid",)
    config.mixing.noise_corpus = "corpora/dns-noise"
    config.mixing.noise_prob_given_mix = 0.1
    config.labels.path = "labels/mix94k-hubert-base-layer9"
    config.labels.num_clusters = 500
    config.labels.rate_hz = 50
    config.labels.teacher = "layer"
    config.labels.run = "models/hubert-base-ls960"
    config.labels.layer = 9
    config.train.num_steps = 1_000_000
    return place(config, machine, PRESETS)
