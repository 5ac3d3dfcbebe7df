"""Labels for pre-training: features, k-means, labels, quality.

First iteration, from MFCC:
    python -m pretrain.make_labels --config configs/pretrain/base.py
Later ones, from a layer of an earlier run or of a Hugging Face folder (WavLM or HuBERT):
    python -m pretrain.make_labels --config configs/pretrain/base.py --teacher runs/base --layer 6 --out labels/layer6

Started again, it goes on where it was stopped; when all is done it does nothing. On several hosts give the same command
to each, as for train.py: each labels its share, and all fit the clusters together.
"""

from wavlm_jax.stopping import stop_with_one_line

if __name__ == "__main__":
    stop_with_one_line("make_labels.py", at_once=True)  # the imports take seconds

import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

import wavlm_jax.command_line
from pretrain.distributed import Share
from pretrain.labelling import make_labels
from pretrain.labels import LabelSettings
from wavlm_jax.data.corpus import DataSettings, open_corpora
from wavlm_jax.settings import read
from wavlm_jax.training import hosts
from wavlm_jax.training.hosts import HostsMissing

_CONFIG = config_flags.DEFINE_config_file("config", None, "Pre-training config; its sections data and labels are used.")
_TEACHER = flags.DEFINE_string(
    "teacher", None, "Workdir of a run, or a Hugging Face folder: cluster one of its layers."
)
_LAYER = flags.DEFINE_integer("layer", None, "Which layer of the teacher, 1-based.", lower_bound=1)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint of the teacher's run; its newest if not given.")
_OUT = flags.DEFINE_string("out", None, "Folder of the labels, instead of config.labels.path.")
_CLUSTERS = flags.DEFINE_integer("clusters", None, "Number of clusters, instead of config.labels.num_clusters.")
_LAYER_RATE_HZ = 50


def label_settings(config: ConfigDict) -> LabelSettings:
    """The section `labels` of the config, with what the short flags say."""
    section = dict(config.labels.items())
    if _TEACHER.value is not None:
        section |= {"teacher": "layer", "run": _TEACHER.value, "step": _STEP.value, "rate_hz": _LAYER_RATE_HZ}
    for key, flag in (("layer", _LAYER), ("path", _OUT), ("num_clusters", _CLUSTERS)):
        if flag.value is not None:
            section[key] = flag.value
    if section["teacher"] != "layer" and (_LAYER.value is not None or _STEP.value is not None):
        raise ValueError("--layer, --step: are of a teacher; expected --teacher with a run or a Hugging Face folder")
    return read(section, LabelSettings, "labels")


def main(_: Sequence[str]) -> None:
    """Makes the labels that the flags ask for; what a person can put right is one message."""
    stop_with_one_line("make_labels.py", at_once=False)
    config = _CONFIG.value
    try:
        hosts.join_from_flags()
        settings = label_settings(config)
        header = make_labels(settings, open_corpora(read(config.data, DataSettings, "data")))
    except (ValueError, OSError, HostsMissing) as error:
        print(f"make_labels.py: {error}", file=sys.stderr)
        sys.exit(wavlm_jax.command_line.EXIT_WRONG)
    if Share.here().first:
        print(f"labels: {settings.path} is complete, k-means {header.kmeans}, {', '.join(sorted(header.splits))}")


if __name__ == "__main__":
    wavlm_jax.command_line.run(main, required=["config"])
