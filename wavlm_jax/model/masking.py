"""Which frames are speech, and which frames and channels are masked: on device, static shapes, one key a row."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from wavlm_jax.audio.frames import huggingface_num_frames, microsoft_num_frames
from wavlm_jax.config import WavLMConfig
from wavlm_jax.model.elements import Site
from wavlm_jax.shapes import ChannelMask, FrameMask, Geometry, NumSamples, RowKeys, TimeMask
from wavlm_jax.shapes import num_frames as frames_of


def frame_mask(num_samples: NumSamples, num_frames: int, padded_samples: int, config: WavLMConfig) -> FrameMask:
    """The frames that are speech, by the padding convention of `config` (FACTS A7).

    Args:
        num_samples: (rows,) real samples a row.
        num_frames: frames that the conv encoder makes of the padded row.
        padded_samples: samples of a padded row; only "microsoft" asks.
        config: its `padding` and conv geometry.

    Returns:
        (rows, num_frames), True for speech. "exact": conv length formula, all False below the receptive field.
        "huggingface": the same, but a row below the receptive field counts as valid as a whole. "microsoft": often a
        frame or two more.

    """
    geometry = Geometry(config.conv_kernel, config.conv_stride)
    if config.padding == "microsoft":
        valid = microsoft_num_frames(num_samples, padded_samples, geometry)
    elif config.padding == "huggingface":
        valid = huggingface_num_frames(num_samples, padded_samples, geometry)
    else:
        valid = frames_of(num_samples, geometry)
    return jnp.arange(num_frames)[None, :] < valid[:, None]


def span_mask(
    row_keys: RowKeys,
    valid_frames: Int[Array, "rows"],
    num_frames: int,
    *,
    prob: float,
    length: int,
    min_masks: int,
) -> TimeMask:
    """Spans of frames to be predicted, drawn as in fairseq (FACTS C3).

    A row with n valid frames gets floor(prob * n / length + U), at least `min_masks`, spans at distinct uniform starts;
    spans may overlap. The last valid frame is never masked, and no frame after it. Where n is too small for that many
    distinct starts, the starts come from the first frames and the spans are cut before the last valid frame; a row of
    one frame or none has no mask.

    Args:
        row_keys: one key a row.
        valid_frames: (rows,) frames of speech, at most `num_frames`.
        num_frames: frames of the padded row.
        prob: wanted share of masked frames before overlaps (0.8 gives 0.567).
        length: frames a span.
        min_masks: the fewest spans a row gets.

    """

    def one_row(key: Array, valid: Array) -> Array:
        spans = _spans(jax.random.fold_in(key, Site.TIME_MASK), valid, num_frames, prob, length, min_masks)
        return spans & (jnp.arange(num_frames) < valid - 1)

    return jax.vmap(one_row)(row_keys, valid_frames)


def channel_mask(row_keys: RowKeys, width: int, *, prob: float, length: int, min_masks: int) -> ChannelMask:
    """Spans of channels to be set to 0, one mask for all frames of a row; arguments as in `span_mask` (FACTS C3)."""

    def one_row(key: Array) -> Array:
        size = jnp.asarray(width)
        return _spans(jax.random.fold_in(key, Site.CHANNEL_MASK), size, width, prob, length, min_masks)

    return jax.vmap(one_row)(row_keys)


def _spans(key: Array, valid: Array, size: int, prob: float, length: int, min_masks: int) -> Bool[Array, "size"]:
    """The union of the spans of one row of `size` places, the first `valid` of which count."""
    rounding, order = jax.random.split(key)
    wanted = jnp.floor(prob * valid / length + jax.random.uniform(rounding)).astype(jnp.int32)
    wanted = jnp.maximum(wanted, min_masks)
    candidates = jnp.minimum(jnp.where(valid - length <= wanted, wanted + 1, valid - length), valid - 1)
    position = jnp.arange(size)
    score = jnp.where(position < candidates, jax.random.uniform(order, (size,)), 2.0)
    rank = jnp.argsort(jnp.argsort(score))
    started = jnp.cumsum((rank < wanted) & (position < candidates))
    ended = jnp.pad(started, (length, 0))[:size]
    return started > ended
