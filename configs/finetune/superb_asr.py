"""SUPERB speech recognition: 100 h of LibriSpeech, frozen WavLM, characters by CTC, word error rate (FACTS D3).

python train.py --config configs/finetune/superb_asr.py --workdir runs/asr --config.init.path=runs/base
Presets: see superb.py. Known from s3prl: 32 utterances per update, 200k updates, rate 1e-4.
Differs, so numbers are not SUPERB's: a linear map takes the place of the two bidirectional LSTM layers (SUPERB's phone
    recognition is such a map), and there is no SpecAugment on features.
Expected: not measured here.
"""

from ml_collections import ConfigDict

from configs.finetune import ctc
from configs.finetune.superb import size, superb


def get_config(preset: str = "base") -> ConfigDict:
    config = ctc.get_config(f"{size(preset, __file__)}_100h")
    return superb(config, preset, rows=32, row_seconds=12.0, updates=200_000, rate=1e-4)
