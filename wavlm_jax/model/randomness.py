"""What is random in a forward pass of a model with a head: masks, and the keys of dropout and layer drop."""

from typing import NamedTuple

from wavlm_jax.shapes import ChannelMask, RowKeys, StepKey, TimeMask


class Masks(NamedTuple):
    """SpecAugment in a forward pass: which frames are replaced, which channels are set to 0; None: none."""

    time: TimeMask | None = None
    channel: ChannelMask | None = None


class Keys(NamedTuple):
    """Randomness of a forward pass in training: of the step (layer drop) and of each row (dropout)."""

    step: StepKey
    rows: RowKeys
