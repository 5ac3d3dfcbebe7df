"""What a loss returns: sums and counts, never means; in evaluation lists of answers too."""

from dataclasses import field
from typing import Any

from flax import struct

Sum = Any
"""A float32 scalar: a tracer in the step, numpy once fetched, a ShapeDtypeStruct when only shapes are asked for."""


@struct.dataclass
class LossSums:
    """Sums over the rows of a (micro-)batch; the step adds them up over the global batch and divides once."""

    loss: Sum
    """float32: sum of the loss."""
    count: Sum
    """float32: what `loss` is divided by (masked frames, utterances); 0 where a batch has nothing to learn from."""
    metrics: dict[str, tuple[Sum, Sum]]
    """name -> (sum, count), float32: reported as sum / count."""
    histograms: dict[str, Any] = field(default_factory=dict)
    """name -> counts, float32 (bins,): reported as the entropy of the normalised counts, in nats."""
    averages: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Of training: path of a parameter -> (sum, count) of what the batch says about it. Such parameters are not learned
    but follow these means from step to step (running statistics of batch norms)."""
    answers: dict[str, Any] = field(default_factory=dict)
    """Of an evaluation: name -> a value or vector a row (rows, ...), in the order of the batch. Those of a whole
    evaluation reach `Task.score`, which makes of them what is no sum (F1, equal error rate)."""
