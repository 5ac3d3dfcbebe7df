"""From int16 waveforms and labels to loss sums: normalise, mix, mask, predict, compare. One pure function."""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pretrain.mixing import MixingSettings, Provenance, mix
from pretrain.objective import ObjectiveSettings, PredictionHead, masked_prediction
from wavlm_jax.config import Compute, WavLMConfig
from wavlm_jax.model.frontend import normalize_waveform
from wavlm_jax.model.masking import channel_mask, span_mask
from wavlm_jax.model.waveform import INT16_SCALE, model_waveform
from wavlm_jax.model.wavlm import WavLM, WavLMOutput
from wavlm_jax.shapes import Batch, ChannelMask, NumSamples, Params, RowKeys, StepKey, TimeMask, Waveform, num_frames
from wavlm_jax.training.loss_sums import LossSums


class MaskedPredictor(nn.Module):
    """A WavLM with the head that scores the label of every frame."""

    config: WavLMConfig
    compute: Compute
    objective: ObjectiveSettings
    num_clusters: int

    def setup(self) -> None:
        """Parameters: `wavlm/...`, `head/final_proj/...`, `head/label_embeddings`."""
        self.wavlm = WavLM(self.config, self.compute)
        self.head = PredictionHead(self.objective, self.num_clusters)

    def __call__(
        self,
        waveform: Waveform,
        num_samples: NumSamples,
        time_mask: TimeMask | None = None,
        channel_mask: ChannelMask | None = None,
        step_key: StepKey | None = None,
        row_keys: RowKeys | None = None,
    ) -> tuple[Float[Array, "rows frames labels"], WavLMOutput]:
        """Scores of every label for every frame, and what the model gave."""
        output = self.wavlm(
            waveform,
            num_samples,
            time_mask=time_mask,
            channel_mask=channel_mask,
            step_key=step_key,
            row_keys=row_keys,
        )
        return self.head(output.last_hidden_state), output


class _Keys(NamedTuple):
    """One key a row and purpose, so that no purpose sees another's draws."""

    mixing: RowKeys
    masks: RowKeys
    channels: RowKeys
    dropout: RowKeys


@dataclass(frozen=True)
class MaskedPredictionLoss:
    """The loss of a batch: a pure function of (params, batch, key), the same on any number of devices."""

    predictor: MaskedPredictor
    mixing: MixingSettings

    def __call__(self, params: Params, batch: Batch, key: StepKey | None) -> LossSums:
        """Sums of loss and metrics.

        Args:
            params: of `MaskedPredictor`.
            batch: `waveform` int16 (rows, samples), `num_samples`, `labels` (rows, frames), `id`, `weight`, `mean` and
                `variance` of the whole utterance, `row` number in the global batch; `noise` and `num_noise_samples`
                where a noise corpus is mixed in.
            key: of the step. None: evaluation; masks then depend on the utterance alone, nothing is mixed or dropped.

        """
        config = self.predictor.config
        keys = _row_keys(batch, key)
        num_samples = batch["num_samples"]
        waveform = self.clean_waveform(batch)
        mixed_rows = jnp.zeros(waveform.shape[0], bool)
        if key is not None and self.mixing.prob > 0:
            waveform, did = self.mixed_waveform(batch, waveform, keys.mixing)
            mixed_rows = did.mixed
        frames = num_frames(waveform.shape[1])
        time_mask = span_mask(
            keys.masks,
            num_frames(num_samples),
            frames,
            prob=config.mask_time_prob,
            length=config.mask_time_length,
            min_masks=config.mask_time_min_masks,
        )
        output: WavLMOutput
        applied: Any = self.predictor.apply(
            {"params": params},
            waveform,
            num_samples,
            time_mask,
            self._channel_mask(keys.channels, key),
            key,
            None if key is None else keys.dropout,
        )
        scores, output = applied
        counts = batch["weight"] > 0
        valid = output.frame_mask & counts[:, None]
        sums = masked_prediction(
            scores, batch["labels"], time_mask, valid, output.conv_features, self.predictor.objective
        )
        rows = jnp.sum(counts.astype(jnp.float32))
        mixed = jnp.sum((mixed_rows & counts).astype(jnp.float32))
        return dataclasses.replace(sums, metrics=sums.metrics | {"mixed_share": (mixed, rows)})

    def clean_waveform(self, batch: Batch) -> Waveform:
        """float32 rows; where the model wants it, normalised by the statistics of the *whole* utterance (FACTS C4)."""
        return model_waveform(batch, self.predictor.config)

    def mixed_waveform(self, batch: Batch, waveform: Waveform, keys: RowKeys) -> tuple[Waveform, Provenance]:
        """Mixed rows; a mixed row is normalised again where the model wants normalised waves (FACTS E29)."""
        noise = None
        if "noise" in batch:
            noise = batch["noise"].astype(jnp.float32) / INT16_SCALE
        waveform, did = mix(
            waveform,
            batch["num_samples"],
            keys,
            self.mixing,
            noise,
            batch["num_noise_samples"] if noise is not None else None,
        )
        config = self.predictor.config
        if config.do_normalize:
            again = normalize_waveform(waveform, batch["num_samples"], config.normalize_eps)
            waveform = jnp.where(did.mixed[:, None], again, waveform)
        return waveform, did

    def _channel_mask(self, keys: RowKeys, key: StepKey | None) -> ChannelMask | None:
        config = self.predictor.config
        if key is None or config.mask_feature_prob == 0:
            return None
        return channel_mask(
            keys,
            config.hidden_size,
            prob=config.mask_feature_prob,
            length=config.mask_feature_length,
            min_masks=config.mask_feature_min_masks,
        )


def _row_keys(batch: Batch, key: StepKey | None) -> _Keys:
    base, number = (jax.random.key(0), batch["id"]) if key is None else (key, batch["row"])
    rows = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(base, number)
    return _Keys(
        *(jax.vmap(jax.random.fold_in, in_axes=(0, None))(rows, purpose) for purpose in range(len(_Keys._fields)))
    )
