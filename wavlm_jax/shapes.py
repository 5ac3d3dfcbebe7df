"""Names of the tensor kinds that cross module borders.

Shapes are jaxtyping strings; they cost nothing in production and are checked in every test (tests/conftest.py
installs the import hook).

Legend of the axes
    rows      utterances of a batch (global batch inside jit, one host's share in the loader)
    samples   16 kHz samples
    frames    20 ms steps of the conv encoder (320 samples; receptive field 400)
    channels  conv encoder width (512)
    width     Transformer width (768 for Base)
    heads     attention heads; head_dim = width / heads
    layers    stacked Transformer layers
"""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Bool, Float, Int, Key

Params = Mapping[str, Any]
"""Nested dict of arrays: the `params` collection of a Flax Linen module."""

Batch = Mapping[str, Any]
"""Named arrays of static shape whose first axis is `rows`."""

Waveform = Float[Array, "rows samples"]
NumSamples = Int[Array, "rows"]
FrameMask = Bool[Array, "rows frames"]
"""True where a frame is speech, False where it is padding (the opposite of fairseq's padding_mask)."""
TimeMask = Bool[Array, "rows frames"]
"""True where a frame is masked, that is, to be predicted."""
ChannelMask = Bool[Array, "rows width"]
ConvFeatures = Float[Array, "rows frames channels"]
Hidden = Float[Array, "rows frames width"]
Scalar = Float[Array, ""]
RowKeys = Key[Array, "rows"]
"""One typed PRNG key a row of the global batch, so that results do not depend on how rows are spread over devices."""
StepKey = Key[Array, ""]
