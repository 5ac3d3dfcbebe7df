"""SUPERB's configs: each is its task's, with a frozen encoder and a learned average of layers in either convention."""

import json

import pytest

from configs.finetune import superb_asr, superb_asv, superb_er, superb_ks, superb_sid
from configs.finetune.superb import PRESETS
from wavlm_jax.config import HeadConfig
from wavlm_jax.settings import read, read_sections
from wavlm_jax.tasks import classification, ctc, speaker
from wavlm_jax.training.start import RunSettings

TASKS = {
    superb_asr: ctc.CTCSettings,
    superb_sid: classification.ClassificationSettings,
    superb_asv: speaker.SpeakerSettings,
    superb_ks: classification.ClassificationSettings,
    superb_er: classification.ClassificationSettings,
}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("recipe", TASKS, ids=lambda recipe: recipe.__name__)
def test_every_preset_is_frozen_and_averages_layers(recipe, preset):
    config = json.loads(recipe.get_config(preset).to_json())
    settings, task = read_sections(config, RunSettings), read_sections(config, TASKS[recipe])
    head = read(task.head, HeadConfig, "head")
    assert head.use_weighted_layer_sum
    assert head.layer_sum_states == ("raw" if preset == "large_raw" else "normed")
    assert task.model.hidden_size == (1024 if preset.startswith("large") else 768)
    assert settings.optim.freeze["encoder"].matches("wavlm/encoder/layer_norm/scale")
    assert not settings.optim.freeze["encoder"].matches("layer_weights")
    assert (task.model.hidden_dropout, task.model.layerdrop, task.model.mask_time_prob) == (0, 0, 0)


@pytest.mark.parametrize("recipe", TASKS, ids=lambda recipe: recipe.__name__)
def test_unknown_presets_get_an_answer(recipe):
    with pytest.raises(ValueError, match=r"superb_.*\.py:huge: no such preset; expected one of base, base_plus, large"):
        recipe.get_config("huge")
