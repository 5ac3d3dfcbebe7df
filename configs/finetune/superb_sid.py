"""SUPERB speaker identification: VoxCeleb1 speakers, frozen WavLM, mean of 256 features, accuracy (FACTS D3).

python train.py --config configs/finetune/superb_sid.py:large --workdir runs/sid --config.init.path=runs/large
Presets: see superb.py. Known from s3prl: head, 8 x 4 crops of 8 s per update, 200k updates, rate 1e-4 (tuned per model
    when published).
Expected: accuracy 84.5 % (Base), 95.3 % (Large), by the authors' README; not measured here.
"""

from ml_collections import ConfigDict

from configs.finetune import classification
from configs.finetune.superb import size, superb


def get_config(preset: str = "base") -> ConfigDict:
    config = classification.get_config(size(preset, __file__))
    config.data.train = "corpora/voxceleb1/train"
    config.data.evaluation = ("corpora/voxceleb1/valid", "corpora/voxceleb1/test")
    config.train.eval_splits = ("valid", "test")
    config.batch.buckets = (128, 256, 400)  # whole seconds up to 8
    return superb(config, preset, rows=32, row_seconds=8.0, updates=200_000, rate=1e-4)
