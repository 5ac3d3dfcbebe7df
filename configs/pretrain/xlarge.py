"""A WavLM of HuBERT X-Large's shape, pre-trained like Large (nobody has published one).

python -m wavlm_jax.plan --config configs/pretrain/xlarge.py:v5e-256 --topology v5e:16x16
python train.py --config configs/pretrain/xlarge.py:v5e-256 --workdir runs/xlarge

Known: the shape, from the HuBERT paper (arXiv 2106.07447, Table 1): 48 layers, 1280 wide, 5120 inside, 16 heads.
Chosen here: all else, as in large.py; every layer is recomputed, and 8 devices share the parameters.
Expected: not measured here.
"""

from ml_collections import ConfigDict

from configs.pretrain import large
from configs.pretrain.machines import place

PRESETS = {
    "v5e-16": {"batch.seconds_per_device": 62.0},
    "v4-32": {"batch.seconds_per_device": 62.0},
    "h100-8": {"batch.seconds_per_device": 62.0},
    "v5p-128": {"batch.row_multiple": 256, "batch.seconds_per_device": 125.0, "mesh.fsdp": 4},  # along one axis
    "h100-64": {"batch.row_multiple": 256, "batch.seconds_per_device": 125.0},
    "v5e-256": {"batch.row_multiple": 512, "mixing.group": 2},
    "v6e-256": {"batch.row_multiple": 512, "mixing.group": 2},
}


def get_config(machine: str | None = None) -> ConfigDict:
    config = large.get_config()
    config.model.update(
        {"hidden_size": 1280, "num_hidden_layers": 48, "num_attention_heads": 16, "intermediate_size": 5120}
    )
    config.compute.remat = "full"
    config.mesh.fsdp = 8
    return place(config, machine, PRESETS)
