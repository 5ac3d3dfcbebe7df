"""SUPERB speaker verification: VoxCeleb1, frozen WavLM, x-vectors with AM-softmax, equal error rate (FACTS D3).

python train.py --config configs/finetune/superb_asv.py:large --workdir runs/asv --config.init.path=runs/large \
    --config.trials="('/data/voxceleb1/veri_test2.txt',)"
Presets: see superb.py. Known from s3prl: time-delay layers of 512 and 1,500, scale 30, margin 0.4, 10 x 5 crops of 8 s
    per update, 200k updates, rate 1e-4.
Differs: 48 crops (a multiple of 8), and the embedding is the first linear map without the ReLU behind it, as in Hugging
    Face's class.
Expected: EER 4.69 % (Base), 4.04 % (Large), by the authors' README; not measured here.
"""

from ml_collections import ConfigDict

from configs.finetune import speaker_xvector
from configs.finetune.superb import size, superb


def get_config(preset: str = "base") -> ConfigDict:
    config = speaker_xvector.get_config(size(preset, __file__))
    config.data.train = "corpora/voxceleb1/train"
    config.data.evaluation = ("corpora/voxceleb1/test",)
    config.batch.buckets = (128, 256, 400)  # whole seconds up to 8
    config = superb(config, preset, rows=48, row_seconds=8.0, updates=200_000, rate=1e-4)
    config.optim.adam.weight_decay = 0.01  # AdamW's own
    return config
