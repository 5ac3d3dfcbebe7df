"""What a model with a head is applied to: a batch normalised and masked as the config says, from one key a row."""

from typing import NamedTuple

import jax

from wavlm_jax.config import WavLMConfig
from wavlm_jax.model.masking import channel_mask, span_mask
from wavlm_jax.model.randomness import Keys, Masks
from wavlm_jax.model.waveform import model_waveform
from wavlm_jax.shapes import Batch, NumSamples, RowKeys, StepKey, Waveform, num_frames


class Arguments(NamedTuple):
    """Of every model with a head, in order (`model.heads.Headed`)."""

    waveform: Waveform
    num_samples: NumSamples
    masks: Masks | None
    keys: Keys | None


def arguments(config: WavLMConfig, batch: Batch, key: StepKey | None) -> Arguments:
    """What the model hears of a batch of the loader: `model.apply({"params": params}, *arguments(...))`.

    Args:
        config: of the encoder.
        batch: `waveform` int16, `num_samples`, `mean`, `variance`; in training `row`, the number in the global batch.
        key: of the step: decides masks (SpecAugment), dropout and layer drop. None: evaluation, nothing is random.

    """
    waveform = model_waveform(batch, config)
    keys, masks = None, None
    if key is not None:
        rows = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, batch["row"])
        keys, masks = Keys(key, rows), spec_augment(config, rows, waveform, batch["num_samples"])
    return Arguments(waveform, batch["num_samples"], masks, keys)


def spec_augment(config: WavLMConfig, row_keys: RowKeys, waveform: Waveform, num_samples: NumSamples) -> Masks:
    """Spans of frames that become the mask vector, spans of channels that become 0 (FACTS D1, E45)."""
    time, channels = None, None
    if config.mask_time_prob > 0:
        time = span_mask(
            row_keys,
            num_frames(num_samples),
            num_frames(waveform.shape[1]),
            prob=config.mask_time_prob,
            length=config.mask_time_length,
            min_masks=config.mask_time_min_masks,
        )
    if config.mask_feature_prob > 0:
        channels = channel_mask(
            row_keys,
            config.hidden_size,
            prob=config.mask_feature_prob,
            length=config.mask_feature_length,
            min_masks=config.mask_feature_min_masks,
        )
    return Masks(time, channels)
