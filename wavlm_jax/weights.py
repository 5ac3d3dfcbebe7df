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


class Output(NamedTuple):
    """What a call gives."""

    last_hidden_state: Hidden
    """Output of the last layer; for Large after the encoder's final norm."""
    hidden_states: Float[Array, "states rows frames width"]
    """[0] the input of the first layer, [l] the raw output of layer l."""
    frame_mask: FrameMask
    """True where a frame is speech."""
    logits: Array | None
    """Of the head, as transformers' class of the same name has it; None: no head."""
    embeddings: Float[Array, "rows embedding"] | None
    """Speaker embeddings of `WavLMForXVector`."""


@dataclass(frozen=True)
class Model:
    """Frozen; `dataclasses.replace(model, params=...)` makes another with other parameters."""

    config: WavLMConfig
    params: Params
    """On the device. `module.apply({"params": params}, ...)` is the functional way in."""
    module: WavLM | Headed
    weights: Weights
    """Where the parameters came from: pre-training head, vocabulary files, notes."""

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
        """`weights` with the config and the parameters that the model has now: what is saved."""
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
