"""The CTC loss in float32 inside jit: the log-probability of a text, summed over all its alignments (FACTS B1).

Not optax.ctc_loss: that one can round below zero and give NaN (optax#1771), and answers a text that does not fit with a
huge number and its gradient. Here such a row gives 0 and no gradient, as torch's `zero_infinity=True`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Logits = Float[Array, "rows frames vocabulary"]
Labels = Int[Array, "rows labels"]
Counts = Int[Array, "rows"]

_NEVER = -1e30
"""log 0: finite, so that differences and derivatives of impossible paths are numbers."""


class _Reached(NamedTuple):
    """Log-probability of all paths so far that end in each state."""

    on_blank: Float[Array, "rows states"]
    on_label: Float[Array, "rows labels"]
    taken_off: Float[Array, "rows one"]
    """What was subtracted from both to keep them near 0, where float32 is fine; it has no derivative."""


def ctc_loss(
    logits: Logits, num_frames: Counts, labels: Labels, num_labels: Counts, blank_id: int
) -> Float[Array, "rows"]:
    """-log p(labels | logits) of each row, at least 0; 0 without a gradient where no alignment exists.

    A path runs over states "after i labels, on a blank" (i = 0 ... labels) and "on label i"; one step of a scan per
    frame. Equal labels need a blank between them.

    Args:
        logits: float32, before the softmax.
        num_frames: frames of each row that count; they come first.
        labels: ids, none of them the blank; anything behind a row's end.
        num_labels: labels of each row.
        blank_id: of the vocabulary.

    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32)).swapaxes(0, 1)
    of_blank = log_probs[:, :, blank_id, None]
    # a product with 0 and 1 instead of a gather: its gradient is one too, and accelerators like them
    chosen = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32)
    of_label = jnp.einsum("trv,rlv->trl", log_probs, chosen, precision=jax.lax.Precision.HIGHEST)
    doubled = jnp.pad(labels[:, 1:] == labels[:, :-1], ((0, 0), (1, 0)), constant_values=True)[:, : labels.shape[1]]

    def step(reached: _Reached, frame: tuple[Array, Array, Array]) -> tuple[_Reached, None]:
        blank, label, number = frame
        before = jnp.pad(reached.on_label, ((0, 0), (1, 0)), constant_values=_NEVER)
        skipping = jnp.where(doubled, _NEVER, before[:, :-1])
        on_blank = blank + _log_sum(reached.on_blank, before)
        on_label = label + _log_sum(reached.on_label, reached.on_blank[:, :-1], skipping)
        largest = jnp.maximum(on_blank.max(axis=1), on_label.max(axis=1, initial=_NEVER))
        off = jax.lax.stop_gradient(largest)[:, None]
        new = _Reached(on_blank - off, on_label - off, reached.taken_off + off)
        counts = (number < num_frames)[:, None]
        return jax.tree.map(lambda a, b: jnp.where(counts, a, b), new, reached), None

    rows, most = labels.shape
    start = _Reached(
        jnp.full((rows, most + 1), _NEVER).at[:, 0].set(0.0), jnp.full((rows, most), _NEVER), jnp.zeros((rows, 1))
    )
    end, _ = jax.lax.scan(step, start, (of_blank, of_label, jnp.arange(logits.shape[1])))
    last = num_labels[:, None]
    ends_on_blank = jnp.take_along_axis(end.on_blank, last, axis=1)[:, 0]
    labelled = jnp.pad(end.on_label, ((0, 0), (1, 0)), constant_values=_NEVER)
    ends_on_label = jnp.take_along_axis(labelled, last, axis=1)[:, 0]
    loss = -end.taken_off[:, 0] - _log_sum(ends_on_blank, ends_on_label)
    loss = loss - jax.lax.stop_gradient(jnp.minimum(loss, 0.0))  # rounding, when the text is all but certain
    return jnp.where(has_alignment(num_frames, labels, num_labels), loss, 0.0)


def has_alignment(num_frames: Counts, labels: Labels, num_labels: Counts) -> Bool[Array, "rows"]:
    """Whether the labels fit into the frames: one frame each, and one for the blank between two equal ones."""
    inside = jnp.arange(1, labels.shape[1])[None, :] < num_labels[:, None]
    repeats = jnp.sum((labels[:, 1:] == labels[:, :-1]) & inside, axis=1)
    return num_labels + repeats <= num_frames


def _log_sum(*terms: Array) -> Array:
    """log(sum(exp(terms))), element by element; the derivative is the softmax, whatever the terms."""
    largest = jax.lax.stop_gradient(jnp.stack(terms).max(axis=0))
    total = sum(jnp.exp(term - largest) for term in terms)
    return largest + jnp.log(total)
