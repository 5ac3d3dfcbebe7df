"""A model at rest: what every reader of weights gives, and every writer takes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from wavlm_jax.config import WavLMConfig
from wavlm_jax.model.head_config import TaskHead
from wavlm_jax.shapes import Params


@dataclass(frozen=True)
class Origin:
    """Where weights come from, for people and for the model card."""

    dialect: str = "none"
    """Whose layout it was: "run", "huggingface", "microsoft", "torchaudio"."""
    path: str = ""
    notes: tuple[str, ...] = ()
    """What was left out, filled in or assumed, in sentences."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Name -> text, for the model card: step, data, metrics."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Name -> content: vocabulary and tokenizer files that travel with a CTC model as they are."""
    trained_seconds: float | None = None
    """The longest rows that it was trained on; None: not known, as of every file that is no run of ours."""


@dataclass(frozen=True)
class Weights:
    """A model without what computes it; arrays are numpy, on the host."""

    config: WavLMConfig
    """With the conventions of the source (`padding`, `do_normalize`, `normalize_eps`)."""
    params: Params
    """Of `wavlm_jax.model.wavlm.WavLM`, float32."""
    head: Params | None
    """Of the pre-training head: {"final_proj": {"kernel", "bias"}, "label_embeddings": (rows, final_dim)}, if any."""
    task: TaskHead | None = None
    """Of a fine-tuned model."""
    origin: Origin = Origin()

    @property
    def tree(self) -> dict[str, Any] | Params:
        """The parameters of the whole module: the encoder's, or those of a model with a head around it."""
        return self.params if self.task is None else {"wavlm": self.params, **self.task.params}
