"""SUPERB emotion recognition: IEMOCAP, 4 classes, frozen WavLM, one fold of five, accuracy (FACTS D3).

python train.py --config configs/finetune/superb_er.py --workdir runs/er --config.init.path=runs/base \
    --config.target.table=/data/IEMOCAP/emotions.tsv
The table has a line `utterance id TAB emotion` for each utterance that takes part. Presets: see superb.py.
Known from s3prl: head, 4 x 8 utterances per update, 30k updates, rate 1e-4 (tuned per model when published).
Expected: accuracy 65.9 % (Base), 70.0 % (Large) over five folds, by the authors' README; not measured here.
"""

from ml_collections import ConfigDict

from configs.finetune import classification
from configs.finetune.superb import size, superb


def get_config(preset: str = "base") -> ConfigDict:
    config = classification.get_config(size(preset, __file__))
    config.data.train = "corpora/iemocap/fold1/train"
    config.data.evaluation = ("corpora/iemocap/fold1/valid", "corpora/iemocap/fold1/test")
    config.data.evaluation_buckets = (256, 512, 1024, 1792)
    config.train.eval_splits = ("valid", "test")
    config.target.update({"column": "id", "table": "corpora/iemocap/emotions.tsv", "shown": "utterances"})
    config.batch.buckets = (256, 512, 1024, 1792)
    return superb(config, preset, rows=32, row_seconds=5.0, updates=30_000, rate=1e-4)
