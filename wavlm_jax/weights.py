"""Weights as every reader returns and every writer takes them, and the model that can be called with them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from wavlm_jax.audio.recordings import Inputs, normalize, pad
from wavlm_jax.config import TaskHead, WavLMConfig
from wavlm_jax.model.heads import Headed, module_of
from wavlm_jax.model.wavlm import WavLM
from wavlm_jax.shapes import FrameMask, Hidden, NumSamples, Params, Waveform


@dataclass(frozen=True)
class Origin:
    """Where weights come from, for messages and for the model card."""

    dialect: str = "none"
    """Layout of the source: "run", "huggingface", "microsoft", "torchaudio"."""
    path: str = ""
    notes: tuple[str, ...] = ()
    """What was left out, filled in or assumed, in sentences."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Name -> text, for the model card: step, data, metrics."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Name -> content: vocabulary and tokenizer files that are copied unchanged with a CTC model."""
    trained_seconds: float | None = None
    """The longest rows that it was trained on; None: unknown, as for everything but our own runs."""


@dataclass(frozen=True)
class Weights:
    """Config and parameters of a model; arrays are numpy, on the host."""

    config: WavLMConfig
    """With the conventions of the source (`padding`, `do_normalize`, `normalize_eps`)."""
    params: Params
    """Parameters of `wavlm_jax.model.wavlm.WavLM`, float32."""
    head: Params | None
    """The pre-training head: {"final_proj": {"kernel", "bias"}, "label_embeddings": (rows, final_dim)}; None: none."""
    task: TaskHead | None = None
    """The head of a fine-tuned model; None: none."""
    origin: Origin = Origin()

    @property
    def tree(self) -> dict[str, Any] | Params:
        """The parameters of the whole module: the encoder's, or those of a model with a head around it."""
        return self.params if self.task is None else {"wavlm": self.params, **self.task.params}


class Output(NamedTuple):
    """Result of a call."""

    last_hidden_state: Hidden
    """Output of the last layer; for Large after the encoder's final norm."""
    hidden_states: Float[Array, "states rows frames width"]
    """[0] the input of the first layer, [l] the raw output of layer l."""
    frame_mask: FrameMask
    """True where a frame is speech."""
    logits: Array | None
    """Scores of the head, as transformers' class of the same name returns them; None: no head."""
    embeddings: Float[Array, "rows embedding"] | None
    """Speaker embeddings; None: the head computes none."""


@dataclass(frozen=True)
class Model:
    """A model that can be called. Frozen; `dataclasses.replace(model, params=...)` gives one with other parameters."""

    config: WavLMConfig
    params: Params
    """On the device. `module.apply({"params": params}, ...)` is the functional interface."""
    module: WavLM | Headed
    weights: Weights
    """What the model was made from, with pre-training head, vocabulary files and notes."""

    def __call__(self, waveform: Waveform | np.ndarray, num_samples: NumSamples | np.ndarray | None = None) -> Output:
        """One deterministic, compiled forward pass; each shape is compiled once.

        Args:
            waveform: (rows, samples) at 16 kHz, normalised already where `config.do_normalize` says so, as
                transformers' feature extractor does, and `inputs` too.
            num_samples: (rows,) real samples a row; None: no row is padded.

        Raises:
            ValueError: no matrix, or rows shorter than one frame.

        """
        wave = jnp.asarray(waveform, jnp.float32)
        if wave.ndim != 2:  # noqa: PLR2004
            raise ValueError(f"waveform: found shape {wave.shape}, expected (rows, samples); one wave is wave[None]")
        given = None if num_samples is None else jnp.asarray(num_samples, jnp.int32)
        return _forward(self.module, self.params, wave, given)

    @property
    def current(self) -> Weights:
        """`weights` with the model's present config and parameters: what is saved."""
        task = self.weights.task
        if task is None:
            return replace(self.weights, config=self.config, params=self.params)
        beside = {name: part for name, part in self.params.items() if name != "wavlm"}
        changed = replace(task, params=beside)
        return replace(self.weights, config=self.config, params=self.params["wavlm"], task=changed)

    def inputs(self, waves: Sequence[Float32[np.ndarray, "_"]]) -> Inputs:
        """Waves of any length as the arguments of a call: normalised where the model wants it, then padded."""
        return pad([normalize(wave, self.config) for wave in waves])


def ready(weights: Weights) -> Model:
    """The model, on the default device; on a CPU its parameters are views of those of `weights`, not copies."""
    task = weights.task
    module = module_of(weights.config, None if task is None else task.kind, None if task is None else task.config)
    return Model(weights.config, jax.tree.map(jax.device_put, dict(weights.tree)), module, weights)


@partial(jax.jit, static_argnames="module")
def _forward(module: WavLM | Headed, params: Params, waveform: Waveform, num_samples: NumSamples | None) -> Output:
    found: Any = module.apply({"params": params}, waveform, num_samples, output_hidden_states=True)
    encoder = found if isinstance(module, WavLM) else found.encoder
    logits, embeddings = (getattr(found, name, None) for name in ("logits", "embeddings"))
    return Output(encoder.last_hidden_state, encoder.hidden_states, encoder.frame_mask, logits, embeddings)
