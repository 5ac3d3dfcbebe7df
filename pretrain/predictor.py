"""Masked prediction: cosine scores against label embeddings, cross entropy on masked frames (FACTS C2).

From int16 waveforms and labels to loss sums: normalise, mix, mask, predict, compare. One pure function.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pretrain.mixing import MixingSettings, Provenance, WholeClips, mix
from wavlm_jax.config import Compute, WavLMConfig
from wavlm_jax.model.frontend import INT16_SCALE, model_waveform, normalize_waveform, uniform
from wavlm_jax.model.layers import channel_mask, span_mask, torn
from wavlm_jax.model.wavlm import WavLM, WavLMOutput
from wavlm_jax.settings import check_sizes
from wavlm_jax.shapes import (
    Batch,
    ChannelMask,
    ConvFeatures,
    FrameMask,
    Hidden,
    NumSamples,
    Params,
    RowKeys,
    Scalar,
    StepKey,
    TimeMask,
    Waveform,
    num_frames,
)
from wavlm_jax.training.task import LossSums

NO_LABEL = -1
"""In a batch's `labels`: this frame has none and counts nowhere."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """The config section `objective`."""

    final_dim: int
    """Width of the space in which frames meet label embeddings (256 for Base, 768 for Large)."""
    logit_temp: float
    """Divides the cosine scores (0.1)."""
    masked_weight: float
    """Weight of masked frames (1)."""
    unmasked_weight: float
    """Weight of unmasked frames (0 in the paper; 1 helps very short runs off the unigram plateau)."""
    penalty_weight: float
    """Weight of the mean square of the conv encoder's output (10)."""
    special_rows: int
    """Label embeddings before the clusters that are never a target: 0, or 4 as in fairseq's checkpoints (FACTS E20)."""
    mask_tearing: bool = False
    """The authors' form: in training, single masked frames are dropped at random until the rows of a group (of
    `mixing.group`) have equally many (FACTS C3, E18), which tears spans."""

    def __post_init__(self) -> None:
        check_sizes(self, "final_dim")
        if self.masked_weight < 0 or self.unmasked_weight < 0 or self.masked_weight + self.unmasked_weight == 0:
            raise ValueError(
                f"masked_weight, unmasked_weight: found {self.masked_weight} and {self.unmasked_weight}, "
                "expected none below 0 and one above"
            )
        if self.logit_temp <= 0:
            raise ValueError(f"logit_temp: found {self.logit_temp}, expected more than 0")
        if self.special_rows not in (0, 4):
            raise ValueError(f"special_rows: found {self.special_rows}, expected 0 or 4 (fairseq's dictionary)")


class PredictionHead(nn.Module):
    """Scores of every label for every frame: cos(projected frame, label embedding) / temperature."""

    settings: ObjectiveSettings
    num_clusters: int

    @nn.compact
    def __call__(self, hidden: Hidden) -> Float[Array, "rows frames labels"]:
        """Float32 scores over `special_rows + num_clusters` labels.

        Initialised as the authors do (FACTS A9): projection uniform in +-1/sqrt(fan_in), label embeddings in [0, 1).
        """
        bound = hidden.shape[-1] ** -0.5
        init = uniform(bound)
        projected = nn.Dense(
            self.settings.final_dim, dtype=hidden.dtype, kernel_init=init, bias_init=init, name="final_proj"
        )(hidden)
        rows = self.settings.special_rows + self.num_clusters
        embeddings = self.param("label_embeddings", nn.initializers.uniform(1.0), (rows, self.settings.final_dim))
        scores: Float[Array, "rows frames labels"] = jnp.einsum("rfd,ld->rfl", _unit(projected), _unit(embeddings))
        return scores / self.settings.logit_temp


def _unit(vectors: Float[Array, "*some dim"]) -> Float[Array, "*some dim"]:
    """Vectors of length 1, float32. Norms below 1e-8 count as 1e-8, as in torch, and have a finite slope at 0."""
    vectors = vectors.astype(jnp.float32)
    square = jnp.sum(vectors**2, axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(square, 1e-16))


def masked_prediction(
    scores: Float[Array, "rows frames labels"],
    labels: Int[Array, "rows frames"],
    time_mask: TimeMask,
    valid: FrameMask,
    conv_features: ConvFeatures,
    settings: ObjectiveSettings,
) -> LossSums:
    """Loss and metrics of a batch as sums and counts.

    Cross entropy is taken over masked (weight `masked_weight`) and unmasked valid frames. The penalty of each row, the
    mean square of `conv_features` over its labelled frames, is weighted by the number of its frames that count.

    Args:
        scores: of `PredictionHead`.
        labels: cluster of each frame, NO_LABEL where there is none.
        time_mask: True where the model had to guess.
        valid: True where the frame is speech of a row that counts.
        conv_features: after the gradient multiplier, before the norm.
        settings: weights.

    """
    known = valid & (labels != NO_LABEL)
    target = jnp.where(known, labels, 0) + settings.special_rows
    log_probs = jax.nn.log_softmax(scores, axis=-1)
    nll = -jnp.take_along_axis(log_probs, target[..., None], axis=-1)[..., 0]
    correct = jnp.argmax(scores, axis=-1) == target
    masked, unmasked = known & time_mask, known & ~time_mask
    counting = (masked & (settings.masked_weight > 0)) | (unmasked & (settings.unmasked_weight > 0))
    penalty = _row_penalty(conv_features, known)
    weighted_penalty = jnp.sum(penalty * jnp.sum(counting, axis=1))
    loss = (
        settings.masked_weight * _total(nll, masked)
        + settings.unmasked_weight * _total(nll, unmasked)
        + settings.penalty_weight * weighted_penalty
    )
    count = _count(counting)
    metrics = {
        "masked_loss": (_total(nll, masked), _count(masked)),
        "masked_accuracy": (_total(correct, masked), _count(masked)),
        "unmasked_loss": (_total(nll, unmasked), _count(unmasked)),
        "unmasked_accuracy": (_total(correct, unmasked), _count(unmasked)),
        "feature_penalty": (weighted_penalty, count),
        "masked_share": (_count(masked), _count(known)),
    }
    histograms = {
        "prediction_entropy": _histogram(jnp.argmax(scores, axis=-1), masked, scores.shape[-1]),
        "label_entropy": _histogram(target, masked, scores.shape[-1]),
    }
    return LossSums(loss, count, metrics, histograms)


def _total(values: Array, where: Bool[Array, "rows frames"]) -> Scalar:
    return jnp.sum(jnp.where(where, values, 0).astype(jnp.float32))


def _count(where: Bool[Array, "rows frames"]) -> Scalar:
    return jnp.sum(where.astype(jnp.float32))


def _row_penalty(features: ConvFeatures, known: FrameMask) -> Float[Array, "rows"]:
    """Mean square over the labelled frames of each row, float32."""
    square = jnp.mean(features.astype(jnp.float32) ** 2, axis=-1)
    return jnp.sum(jnp.where(known, square, 0.0), axis=1) / jnp.maximum(jnp.sum(known, axis=1), 1)


def _histogram(
    index: Int[Array, "rows frames"], where: Bool[Array, "rows frames"], size: int
) -> Float[Array, "labels"]:
    counts: Float[Array, "labels"] = jnp.zeros(size).at[index.ravel()].add(where.ravel().astype(jnp.float32))
    return counts


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
    """One key per row and purpose, so that two purposes never share random numbers."""

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
                `variance` of the whole utterance, `row` number in the global batch; where a noise corpus is mixed in,
                what `pretrain.task.NoiseClips` deals.
            key: of the step. None: evaluation; masks then depend on the utterance alone, nothing is mixed or dropped.

        """
        keys = _row_keys(batch, key)
        num_samples = batch["num_samples"]
        waveform = self.clean_waveform(batch)
        mixed_rows = jnp.zeros(waveform.shape[0], bool)
        if key is not None and self.mixing.prob > 0:
            waveform, did = self.mixed_waveform(batch, waveform, keys.mixing)
            mixed_rows = did.mixed
        time_mask = self.time_mask(num_samples, num_frames(waveform.shape[1]), keys.masks, training=key is not None)
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

    def time_mask(self, num_samples: NumSamples, frames: int, row_keys: RowKeys, *, training: bool) -> TimeMask:
        """The frames to be predicted, (rows, frames); torn in training where the objective says so."""
        config = self.predictor.config
        mask = span_mask(
            row_keys,
            num_frames(num_samples),
            frames,
            prob=config.mask_time_prob,
            length=config.mask_time_length,
            min_masks=config.mask_time_min_masks,
        )
        return torn(mask, row_keys, self.mixing.group) if training and self.predictor.objective.mask_tearing else mask

    def clean_waveform(self, batch: Batch) -> Waveform:
        """float32 rows; where the model wants it, normalised by the statistics of the *whole* utterance (FACTS C4)."""
        return model_waveform(batch, self.predictor.config)

    def mixed_waveform(self, batch: Batch, waveform: Waveform, keys: RowKeys) -> tuple[Waveform, Provenance]:
        """Mixed rows; a mixed row is normalised again where the model wants normalised waves (FACTS E29)."""
        noise, count, whole = None, None, None
        if "noise" in batch:
            noise, count = batch["noise"].astype(jnp.float32) / INT16_SCALE, batch["num_noise_samples"]
            whole = WholeClips(batch["noise_power"], batch["noise_place"])
        config, quirks = self.predictor.config, self.mixing.reference_quirks
        normalize = partial(normalize_waveform, eps=config.normalize_eps) if config.do_normalize else None
        waveform, did = mix(
            waveform, batch["num_samples"], keys, self.mixing, noise, count, whole_clips=whole, normalize=normalize
        )
        if normalize is not None and not quirks:
            again = normalize(waveform, batch["num_samples"])
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
