"""Error counts inside jit: the text that CTC reads off, its words, and how many edits lead to the right one.

So character and word errors are sums like any other: exact over any number of devices and hosts, without a gather.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from wavlm_jax.text.ctc import collapse_greedily

_BASE = np.uint32(1_000_003)


class Sequences(NamedTuple):
    """Ragged rows: the first `length` values of each one."""

    values: Array
    """int32 or uint32 (rows, places)."""
    length: Int[Array, "rows"]


def greedy(logits: Float[Array, "rows frames vocabulary"], num_frames: Int[Array, "rows"], blank_id: int) -> Sequences:
    """The most likely character of each frame; runs collapsed first, then blanks dropped (FACTS E33)."""
    heard = collapse_greedily(logits, num_frames, blank_id)
    return Sequences(heard.ids, heard.num_tokens)


def tidy(text: Sequences, delimiter_id: int | None) -> Sequences:
    """`text` with one delimiter between words and none at its ends, as `vocabulary.encode` spells."""
    if delimiter_id is None:
        return text
    place = jnp.arange(text.values.shape[1])[None, :]
    between = text.values == delimiter_id
    again = jnp.pad(between[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    once = _packed(text.values, (place < text.length[:, None]) & ~(between & again))
    last = (place == once.length[:, None] - 1) & (once.values == delimiter_id)
    return _packed(once.values, (place < once.length[:, None]) & ~last)


def words(text: Sequences, delimiter_id: int) -> Sequences:
    """A 32-bit hash of each word of a tidy text."""
    inside = jnp.arange(text.values.shape[1])[None, :] < text.length[:, None]
    spelling = inside & (text.values != delimiter_id)
    letters = text.values.astype(jnp.uint32) + 1

    def step(word: Array, place: tuple[Array, Array]) -> tuple[Array, UInt32[Array, "rows"]]:
        letter, spells = place
        word = jnp.where(spells, word * _BASE + letter, jnp.uint32(0))
        return word, word

    start = jnp.zeros(text.length.shape, jnp.uint32)
    _, hashes = jax.lax.scan(step, start, (letters.T, spelling.T))
    ends = spelling & ~jnp.pad(spelling[:, 1:], ((0, 0), (0, 1)))
    return _packed(hashes.T, ends)


def edit_distance(found: Sequences, wanted: Sequences) -> Int[Array, "rows"]:
    """The fewest insertions, deletions and substitutions that make `wanted` of `found` (Levenshtein)."""
    place = jnp.arange(wanted.values.shape[1] + 1)[None, :]
    start = jnp.broadcast_to(place, (wanted.values.shape[0], place.shape[1]))

    def step(before: Array, one: tuple[Array, Array]) -> tuple[Array, None]:
        value, number = one
        replaced = before[:, :-1] + (wanted.values != value[:, None])
        cheapest = jnp.minimum(before + 1, jnp.pad(replaced, ((0, 0), (1, 0)), constant_values=1 << 30))
        after = jax.lax.cummin(cheapest - place, axis=1) + place  # and then any number of insertions
        return jnp.where((number < found.length)[:, None], after, before), None

    numbers = jnp.arange(found.values.shape[1])
    end, _ = jax.lax.scan(step, start, (found.values.T, numbers))
    return jnp.take_along_axis(end, wanted.length[:, None], axis=1)[:, 0]


def _packed(values: Array, keep: Bool[Array, "rows places"]) -> Sequences:
    """The values to keep, moved to the front in order."""
    order = jnp.argsort(~keep, axis=1, stable=True)
    return Sequences(jnp.take_along_axis(values, order, axis=1), keep.sum(axis=1))
