"""Fine-tuning: the tasks that train a head of `model.heads.HEADS`, by `config.task`."""

from wavlm_jax.tasks import classification, ctc, diarization, speaker
from wavlm_jax.training.task import TaskKind

FINE_TUNING = {
    "ctc": TaskKind(ctc.build, ctc.outline),
    "classification": TaskKind(classification.build, classification.outline),
    "frame_classification": TaskKind(diarization.build, diarization.outline),
    "speaker_xvector": TaskKind(speaker.build, speaker.outline),
    "speaker_ecapa": TaskKind(speaker.build, speaker.outline),
}
"""Each is a row of `pretrain.task.TASKS`, which has pre-training besides."""
