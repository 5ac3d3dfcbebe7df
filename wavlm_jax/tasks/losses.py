"""Losses of rows: cross entropy, margins for speaker vectors, speakers in any order. Values a row, never means."""

import itertools
import math
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Margin: TypeAlias = Literal["additive", "angular"]
Classes = Float[Array, "rows classes"]
Labels = Int[Array, "rows"]
Activity = Float[Array, "rows frames speakers"]

MOST_SPEAKERS = 6
"""720 orders; beyond that trying them all is no longer cheap."""


class Matched(NamedTuple):
    """The loss of each row in the order of speakers that suits it best."""

    loss: Float[Array, "rows"]
    """Sum over frames that count and speakers."""
    order: Int[Array, "rows speakers"]
    """order[i]: which target output i is compared with."""


def cross_entropy(logits: Classes, labels: Labels) -> Float[Array, "rows"]:
    """-log softmax(logits)[label] in float32; labels outside the classes give a finite number, to be weighted 0."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_probs, labels[:, None], axis=1, mode="clip")[:, 0]


class ClassSums(NamedTuple):
    """Sums over the rows that count."""

    loss: Float[Array, ""]
    rows: Float[Array, ""]
    right: Float[Array, ""]
    """Rows whose highest score is that of their class."""


def class_sums(losses: Float[Array, "rows"], scores: Classes, labels: Labels, counts: Bool[Array, "rows"]) -> ClassSums:
    """What an accuracy and a mean loss are made of; rows that do not count may have any label and loss."""
    right = counts & (jnp.argmax(scores, axis=-1) == labels)
    loss = jnp.sum(jnp.where(counts, losses, 0.0))
    return ClassSums(loss, jnp.sum(counts.astype(jnp.float32)), jnp.sum(right.astype(jnp.float32)))


def margin_loss(cosines: Classes, labels: Labels, kind: Margin, *, scale: float, margin: float) -> Float[Array, "rows"]:
    """Cross entropy of scaled cosines of which the right one is made smaller first.

    Args:
        cosines: of each row's embedding with every speaker's vector, in [-1, 1].
        labels: speakers.
        kind: "additive": cos - margin (AM-softmax, FACTS B4). "angular": cos(angle + margin), AAM-softmax or ArcFace
            (FACTS D4); beyond pi, where that would rise again, cos - margin * sin(margin).
        scale: of all cosines (30).
        margin: in cosine or radians (0.4; 0.2).

    """
    own = jax.nn.one_hot(labels, cosines.shape[1], dtype=jnp.bool_)
    if kind == "additive":
        reduced = cosines - margin
    else:
        sines = jnp.sqrt(jnp.maximum(1 - jnp.square(cosines), 1e-9))  # the slope at 0 and pi is infinite
        turned = cosines * math.cos(margin) - sines * math.sin(margin)
        reduced = jnp.where(cosines > math.cos(math.pi - margin), turned, cosines - margin * math.sin(margin))
    return cross_entropy(scale * jnp.where(own, reduced, cosines), labels)


def speakers_in_any_order(logits: Activity, targets: Activity, mask: Bool[Array, "rows frames"]) -> Matched:
    """Binary cross entropy of who speaks when, in the order of speakers with the smallest loss (PIT, FACTS E31).

    Args:
        logits: of each output in each frame, before the logistic function.
        targets: 1 where a speaker speaks, 0 elsewhere.
        mask: frames that count.

    Raises:
        ValueError: more than six speakers.

    """
    logits, keep = logits.astype(jnp.float32), mask[:, :, None].astype(jnp.float32)
    # -log sigma(x) where on, -log sigma(-x) = x - log sigma(x) where off: softplus(x) - target * x
    silent = (keep * jax.nn.softplus(logits)).sum(axis=1)
    agreement = jnp.einsum("rfi,rfj->rij", keep * logits, targets, precision=jax.lax.Precision.HIGHEST)
    matched = in_best_order(silent[:, :, None] - agreement)
    return Matched(jnp.maximum(matched.loss, 0.0), matched.order)


def in_best_order(costs: Float[Array, "rows speakers speakers"]) -> Matched:
    """The cheapest way to compare outputs with targets one by one, `costs[i, j]` being output i's with target j.

    Raises:
        ValueError: more than six speakers.

    """
    num_speakers = costs.shape[-1]
    if num_speakers > MOST_SPEAKERS:
        raise ValueError(f"speakers: found {num_speakers}, expected {MOST_SPEAKERS} or fewer: all orders are tried")
    orders = np.array(list(itertools.permutations(range(num_speakers))))
    totals = costs[:, np.arange(num_speakers)[None, :], orders].sum(axis=-1)
    best = jnp.argmin(totals, axis=1)
    return Matched(jnp.take_along_axis(totals, best[:, None], axis=1)[:, 0], jnp.asarray(orders)[best])


def one_speaker_a_frame(logits: Activity, targets: Activity) -> Float[Array, "rows"]:
    """Transformers' loss: cross entropy of each frame against the first active speaker, padding included (FACTS B3).

    The sum over frames; a frame in which nobody speaks counts as the first speaker's.
    """
    rows, frames, speakers = logits.shape
    labels = jnp.argmax(targets, axis=-1).reshape(-1)
    return cross_entropy(logits.reshape(-1, speakers), labels).reshape(rows, frames).sum(axis=1)
