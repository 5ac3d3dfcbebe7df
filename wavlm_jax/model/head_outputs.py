"""What the heads give: scores, never losses (FACTS B)."""

from typing import NamedTuple

from jaxtyping import Array, Float

from wavlm_jax.shapes import FrameMask, NumSamples


class CTCOutput(NamedTuple):
    """Scores of every character in every frame."""

    logits: Float[Array, "rows frames vocabulary"]
    """float32, before the softmax."""
    num_frames: NumSamples
    """Frames of each row that count, adapter included."""


class ClassOutput(NamedTuple):
    """Scores of every class for each row."""

    logits: Float[Array, "rows classes"]


class FrameOutput(NamedTuple):
    """Scores of every label in every frame."""

    logits: Float[Array, "rows frames labels"]
    """float32; of independent labels (speakers), before the logistic function."""
    frame_mask: FrameMask
