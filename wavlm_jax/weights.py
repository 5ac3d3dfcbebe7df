"""Weights as every reader returns and every writer takes them, and the model that can be called with them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wavlm_jax.audio.recordings import Inputs, normalize, pad
from wavlm_jax.audio.wave import FULL_SCALE
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


@dataclass(frozen=True, eq=False)
class Weights:
    """Config and parameters of a model; arrays are numpy, on the host. Compared and hashed by identity."""

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


@dataclass(frozen=True, eq=False)
class Model:
    """A model that can be called. Frozen; `dataclasses.replace(model, params=...)` gives one with other parameters.

    Can be pickled and copied, is compared and hashed by identity, and can itself be under `jax.jit`, `jax.grad` and
    `jax.export`; its parameters are constants there (`module.apply` takes them as an argument).
    """

    config: WavLMConfig
    params: Params
    """On the device. `module.apply({"params": params}, ...)` is the functional interface."""
    module: WavLM | Headed
    weights: Weights
    """What the model was made from, with pre-training head, vocabulary files and notes."""

    def __call__(self, waveform: Any, num_samples: Any = None) -> Output:
        """One deterministic, compiled forward pass; each shape is compiled once.

        Args:
            waveform: (rows, samples) at 16 kHz, normalised already where `config.do_normalize` says so, as
                transformers' feature extractor does, and `inputs` too. int16 counts as samples times 32768.
            num_samples: (rows,) real samples a row; None: no row is padded.

        Raises:
            ValueError: no matrix, rows shorter than one frame, NaN or infinities, other integers than int16, int16 for
                a model that wants normalised waves, or `num_samples` that are not those of the rows. Under `jax.jit`
                values cannot be looked at, only shapes and dtypes.

        """
        wave = jnp.asarray(_samples(waveform, "waveform", normalised=self.config.do_normalize))
        if wave.ndim != 2:  # noqa: PLR2004
            raise ValueError(f"waveform: found shape {wave.shape}, expected (rows, samples); one wave is wave[None]")
        given = None if num_samples is None else _counts(num_samples, *wave.shape)
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

    def inputs(self, waves: Iterable[Any]) -> Inputs:
        """Waves of any length as the arguments of a call: normalised where the model wants it, then padded.

        Args:
            waves: one or more mono waves at 16 kHz, each (samples,), of whatever numpy takes for an array: floating
                point in [-1, 1], or int16, which is divided by 32768.

        Raises:
            ValueError: a wave of several channels, shorter than one frame, with NaN or infinities, or of integers whose
                full scale is unknown; the message has its number.

        """
        shortest, found = self.config.geometry.receptive_field, []
        for number, given in enumerate(waves):
            wave = np.asarray(_samples(given, f"wave {number}"))
            if wave.ndim == 0:
                raise ValueError(f"waves: found a number at place {number}, expected waves; one alone is [wave]")
            if wave.ndim > 1:
                cure = "of several channels take one, or the mean over the axis of the channels"
                raise ValueError(f"wave {number}: found shape {wave.shape}, expected (samples,), mono; {cure}")
            if len(wave) < shortest:
                raise ValueError(f"wave {number}: found {len(wave)} samples, expected at least {shortest} (one frame)")
            found.append(normalize(wave, self.config))
        if not found:
            raise ValueError("waves: found none, expected one or more")
        return pad(found)


def _samples(values: Any, name: str, *, normalised: bool = False) -> np.ndarray | Array:
    """Samples as float32, int16 divided by its full scale; arrays of JAX stay on their device, traced ones traced.

    Raises:
        ValueError: no array, other integers or no numbers at all, NaN or infinities; int16 where they have to be
            `normalised` already.

    """
    try:
        array: Any = values if isinstance(values, jax.Array) else np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; tensors of torch with gradients or on a GPU
        raise ValueError(f"{name}: not to be read as an array ({str(error).splitlines()[0]})") from error
    if not normalised and array.dtype.kind == "i" and array.dtype.itemsize == np.dtype(np.int16).itemsize:
        array = array / np.float32(FULL_SCALE)
    elif not jnp.issubdtype(array.dtype, jnp.floating):
        expected = "normalised ones: model.inputs(waves) makes them" if normalised else "in [-1, 1], or int16"
        raise ValueError(f"{name}: found {array.dtype} samples, expected floating point, {expected}")
    with np.errstate(over="ignore"):  # of float64; infinities are refused below
        array = array.astype(np.float32)
    library: Any = jnp if isinstance(array, jax.Array) else np
    if not isinstance(array, jax.core.Tracer) and not library.isfinite(array).all():
        raise ValueError(f"{name}: found NaN or infinite samples, expected finite ones")
    return array


def _counts(values: Any, rows: int, samples: int) -> NumSamples:
    """`num_samples` as int32.

    Raises:
        ValueError: not one whole number for each row, or one outside 0 to `samples`.

    """
    counts = values if isinstance(values, jax.Array) else np.asarray(values)
    if counts.shape != (rows,) or counts.dtype.kind not in "iu":
        raise ValueError(f"num_samples: found {counts.dtype} of shape {counts.shape}, expected ({rows},) whole numbers")
    if not isinstance(counts, jax.core.Tracer) and rows and (counts.min() < 0 or counts.max() > samples):
        raise ValueError(f"num_samples: found {counts.min()} to {counts.max()}, expected 0 to the {samples} of a row")
    return jnp.asarray(counts, jnp.int32)


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
