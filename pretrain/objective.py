"""Masked prediction: cosine scores against label embeddings, cross entropy on masked frames (FACTS C2)."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from wavlm_jax.model.frontend import uniform
from wavlm_jax.shapes import ConvFeatures, FrameMask, Hidden, Scalar, TimeMask
from wavlm_jax.training.loss_sums import LossSums

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

    def __post_init__(self) -> None:
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
