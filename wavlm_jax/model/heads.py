"""Models with a head on the encoder, and `HEADS`, the one table of them (FACTS B).

CTC, classes of whole recordings, labels of every frame, x-vectors, ECAPA-TDNN. Parameters are named as in Hugging
Face's classes: the encoder under `wavlm`, the rest beside it. Only the adapter, which Hugging Face has inside of the
encoder, stands beside it too (`adapter/...`), so that `wavlm` is the same tree under every head. Heads compute in
float32 and return scores; losses are the tasks' business.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from wavlm_jax.config import Compute, HeadConfig, WavLMConfig
from wavlm_jax.model.ecapa import ECAPA
from wavlm_jax.model.frontend import Convolution
from wavlm_jax.model.layers import Keys, Masks, Site, dropout, keep_where, linear, prefix_mask
from wavlm_jax.model.wavlm import WavLM, WavLMOutput
from wavlm_jax.shapes import FrameMask, Hidden, NumSamples, Params, Waveform, num_frames, samples_for

Embeddings = Float[Array, "rows embedding"]


class CTCOutput(NamedTuple):
    """Scores of every character in every frame."""

    logits: Float[Array, "rows frames vocabulary"]
    """float32, before the softmax."""
    num_frames: NumSamples
    """Frames of each row that are speech, behind the adapter if there is one."""
    encoder: WavLMOutput


class ClassOutput(NamedTuple):
    """Scores of every class for each row."""

    logits: Float[Array, "rows classes"]
    encoder: WavLMOutput


class FrameOutput(NamedTuple):
    """Scores of every label in every frame."""

    logits: Float[Array, "rows frames labels"]
    """float32; of independent labels (speakers), before the logistic function."""
    frame_mask: FrameMask
    encoder: WavLMOutput


class XVectorOutput(NamedTuple):
    """Speaker embeddings."""

    embeddings: Embeddings
    """The speaker embedding: compare by cosine."""
    logits: Embeddings
    """One more linear map on top: what the margin loss is trained on. transformers' name; no class scores."""
    cosines: Float[Array, "rows speakers"]
    """Between `logits` and the vector of every training speaker."""
    encoder: WavLMOutput


class AdapterLayer(nn.Module):
    """A strided convolution to twice the width, half of which gates the other half (FACTS B5)."""

    config: WavLMConfig
    head: HeadConfig
    compute: Compute

    def setup(self) -> None:
        """The convolution, named as Hugging Face's."""
        width = self.head.output_hidden_size or self.config.hidden_size
        taps, stride = self.head.adapter_kernel_size, self.head.adapter_stride
        self.conv = Convolution(2 * width, taps, stride, use_bias=True, dtype=jnp.dtype(self.compute.dtype))

    def __call__(self, hidden: Float[Array, "rows frames width"]) -> Float[Array, "rows fewer width"]:
        """Fewer frames of the same width."""
        padded = jnp.pad(hidden, ((0, 0), (_ADAPTER_PADDING, _ADAPTER_PADDING), (0, 0)))
        values, gate = jnp.split(self.conv(padded), 2, axis=-1)
        return values * jax.nn.sigmoid(gate)


_ADAPTER_PADDING = 1
"""Zeros before and after a sequence, whatever the kernel, as in transformers."""


class Adapter(nn.Module):
    """Between encoder and head: a change of width where asked for, then gated convolutions that halve the frame rate.

    No layer is dropped in training: transformers drops one with probability `layerdrop`, and then has twice the frames.
    """

    config: WavLMConfig
    head: HeadConfig
    compute: Compute

    def setup(self) -> None:
        """Linear map, norm and layers, named as Hugging Face's."""
        width = self.head.output_hidden_size
        self.changes_width = width is not None and width != self.config.hidden_size
        if width is not None and self.changes_width:
            spread = nn.initializers.normal(self.config.initializer_range)
            self.proj = nn.Dense(width, dtype=jnp.dtype(self.compute.dtype), kernel_init=spread)
            # transformers builds this norm with torch's own epsilon, whatever the config says
            self.proj_layer_norm = nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False)
        self.layers = [AdapterLayer(self.config, self.head, self.compute) for _ in range(self.head.num_adapter_layers)]

    def __call__(
        self, hidden: Float[Array, "rows frames width"], num_frames: NumSamples
    ) -> tuple[Float[Array, "rows fewer features"], NumSamples]:
        """Frames behind the adapter, and how many of each row are speech.

        In "exact" mode what lies behind a row's end is 0 before every layer, so that no frame depends on it.
        """
        if self.changes_width:
            hidden = self.proj_layer_norm(self.proj(hidden)).astype(hidden.dtype)
        for layer in self.layers:
            if self.head.compat == "exact":
                hidden = keep_where(prefix_mask(num_frames, hidden.shape[1]), hidden)
            hidden, num_frames = layer(hidden), _frames_behind_layer(num_frames, self.head)
        return hidden, num_frames


def _frames_behind_layer(num_frames: Any, head: HeadConfig) -> Any:
    """Frames behind one layer of the adapter (int or array); 0 stays 0.

    "huggingface" counts as for a kernel of 1 without padding, which is the same for the standard kernel of 3.
    """
    reach = 0 if head.compat == "huggingface" else head.adapter_kernel_size - 1 - 2 * _ADAPTER_PADDING
    shorter = (num_frames - 1 - reach) // head.adapter_stride + 1
    some = num_frames > 0
    return max(shorter, 0) * some if isinstance(shorter, int) else jnp.maximum(shorter, 0) * some


def head_num_frames(num_samples: Any, config: WavLMConfig, head: HeadConfig) -> Any:
    """Frames that a head reads of so many samples (int or array): behind the adapter, if there is one."""
    frames = num_frames(num_samples, config.geometry)
    for _ in range(head.num_adapter_layers if head.add_adapter else 0):
        frames = _frames_behind_layer(frames, head)
    return frames


class Encoded(NamedTuple):
    """What a head reads."""

    hidden: Float[Array, "rows frames features"]
    """float32."""
    num_frames: NumSamples
    """Frames of each row that are speech; they come first."""
    frame_mask: FrameMask
    """True at those frames."""
    encoder: WavLMOutput
    """Handed through to the head's output."""


class Headed(nn.Module):
    """What all models with a head share: the encoder, the average of its layers, the adapter.

    A kind of head is a subclass with its modules in `setup`, its output in `scores`, and a row in `HEADS`. Apply with
    `model.apply({"params": params}, waveform, num_samples, masks, keys)`.
    """

    config: WavLMConfig
    head: HeadConfig
    compute: Compute = Compute()

    has_adapter = False
    """Whether this kind of head can stand behind an adapter."""
    averages_in_transformers = True
    """Whether transformers' class knows `use_weighted_layer_sum` too."""

    def setup(self) -> None:
        """The encoder; weights of its hidden states and the adapter, where the config asks for them."""
        self.wavlm = WavLM(self.config, self.compute)
        if self.head.add_adapter:
            if not self.has_adapter:
                raise ValueError(f"head.add_adapter: found True for a {type(self).__name__}, which takes no adapter")
            self.adapter = Adapter(self.config, self.head, self.compute)
        if self.averages_layers:
            num_states = self.config.num_hidden_layers + 1
            self.layer_weights = self.param("layer_weights", nn.initializers.constant(1 / num_states), (num_states,))

    @property
    def averages_layers(self) -> bool:
        """Whether the head reads a weighted average of all hidden states."""
        possible = self.averages_in_transformers or self.head.compat != "huggingface"
        return self.head.use_weighted_layer_sum and possible

    def __call__(
        self,
        waveform: Waveform,
        num_samples: NumSamples | None = None,
        masks: Masks | None = None,
        keys: Keys | None = None,
        *,
        output_hidden_states: bool = False,
    ) -> Any:
        """The output of `scores`.

        Args:
            waveform: float32 (rows, samples) at 16 kHz, normalised already where `config.do_normalize` says so.
            num_samples: (rows,) real samples of each row; None: no row is padded.
            masks: SpecAugment.
            keys: randomness of training; None: a deterministic pass.
            output_hidden_states: whether `encoder.hidden_states` of the output holds those of all layers.

        """
        masks = masks or Masks()
        output = self.wavlm(
            waveform,
            num_samples,
            time_mask=masks.time,
            channel_mask=masks.channel,
            step_key=None if keys is None else keys.step,
            row_keys=None if keys is None else keys.rows,
            output_hidden_states=output_hidden_states or self.averages_layers,
        )
        hidden = self._layer_average(output) if self.averages_layers else output.last_hidden_state
        count, mask = output.frame_mask.sum(axis=1), output.frame_mask
        if self.head.add_adapter:
            hidden, count = self.adapter(hidden, count)
            mask = prefix_mask(count, hidden.shape[1])
        return self.scores(Encoded(hidden.astype(jnp.float32), count, mask, output), keys)

    def scores(self, encoded: Encoded, keys: Keys | None) -> Any:
        """What this kind of head makes of the encoded frames: a named tuple with `logits` and `encoder`."""
        raise NotImplementedError

    def _layer_average(self, output: WavLMOutput) -> Hidden:
        """Sum over l of softmax(layer_weights)_l * hidden state l, in float32."""
        states = output.hidden_states
        if states is None:
            raise ValueError("the layer average needs all hidden states")
        if self.head.layer_sum_states == "normed":
            states = states.at[-1].set(output.last_hidden_state)
        weights = jax.nn.softmax(self.layer_weights)
        return jnp.einsum("l,lrfw->rfw", weights, states, preferred_element_type=jnp.float32)


class WavLMForCTC(Headed):
    """Characters by connectionist temporal classification: dropout and a linear map on every frame (FACTS B1)."""

    has_adapter = True
    averages_in_transformers = False

    def setup(self) -> None:
        """Encoder and `lm_head`."""
        super().setup()
        self.lm_head = linear(self.head.vocab_size, self.config, Compute())

    def scores(self, encoded: Encoded, keys: Keys | None) -> CTCOutput:
        """Scores of every character."""
        row_keys = None if keys is None else keys.rows
        hidden = dropout(encoded.hidden, self.head.final_dropout, row_keys, Site.FINAL)
        return CTCOutput(self.lm_head(hidden), encoded.num_frames, encoded.encoder)


class WavLMForSequenceClassification(Headed):
    """One class for a whole row: the mean of its projected frames, and a linear map (FACTS B2)."""

    def setup(self) -> None:
        """Encoder, `projector` and `classifier`."""
        super().setup()
        self.projector = linear(self.head.classifier_proj_size, self.config, Compute())
        self.classifier = linear(self.head.num_labels, self.config, Compute())

    def scores(self, encoded: Encoded, keys: Keys | None) -> ClassOutput:
        """Scores of every class; a row without a frame gets the classifier's bias."""
        del keys
        frames = keep_where(encoded.frame_mask, self.projector(encoded.hidden))
        count = jnp.maximum(encoded.frame_mask.sum(axis=1), 1)[:, None]
        return ClassOutput(self.classifier(frames.sum(axis=1) / count), encoded.encoder)


class WavLMForAudioFrameClassification(Headed):
    """Labels that are on or off in every frame, such as who speaks: a linear map (FACTS B3)."""

    def setup(self) -> None:
        """Encoder and `classifier`."""
        super().setup()
        self.classifier = linear(self.head.num_labels, self.config, Compute())

    def scores(self, encoded: Encoded, keys: Keys | None) -> FrameOutput:
        """Scores of every label in every frame."""
        del keys
        return FrameOutput(self.classifier(encoded.hidden), encoded.frame_mask, encoded.encoder)


class WavLMForXVector(Headed):
    """X-vectors trained by a margin loss over speakers (FACTS B4)."""

    has_adapter = True

    def setup(self) -> None:
        """Encoder, `projector`, `tdnn`, `feature_extractor` (to the embedding), `classifier`, `objective`."""
        super().setup()
        head = self.head
        self.projector = linear(head.tdnn_dim[0], self.config, Compute())
        sizes = zip(head.tdnn_dim, head.tdnn_kernel, head.tdnn_dilation, strict=True)
        self.tdnn = [TDNNLayer(features, taps, dilation, self.config) for features, taps, dilation in sizes]
        self.feature_extractor = linear(head.xvector_output_dim, self.config, Compute())
        self.classifier = linear(head.xvector_output_dim, self.config, Compute())
        self.objective = SpeakerVectors(head.num_labels)

    def scores(self, encoded: Encoded, keys: Keys | None) -> XVectorOutput:
        """Embeddings, and their cosines with the training speakers.

        Raises:
            ValueError: rows are so short that the time-delay layers have no frame left.

        """
        del keys
        if (found := encoded.hidden.shape[1]) <= self.head.tdnn_context:
            raise ValueError(
                f"waveform: found rows of {found} frames, expected at least {self.head.tdnn_context + 1} for the "
                "time-delay layers; pad them with zeros and pass num_samples"
            )
        hidden = self.projector(encoded.hidden)
        if self.head.compat == "exact":
            hidden = keep_where(encoded.frame_mask, hidden)
        for layer in self.tdnn:
            hidden = layer(hidden)
        pooled = statistics_pooling(hidden, pooled_frames(encoded.num_frames, hidden.shape[1], self.head))
        embeddings = self.feature_extractor(pooled)
        logits = self.classifier(embeddings)
        return XVectorOutput(embeddings, logits, self.objective(logits), encoded.encoder)


class TDNNLayer(nn.Module):
    """A time-delay layer: a convolution over `taps` frames, `dilation` apart, without padding, and ReLU.

    Its parameters are those of a linear map on the frames side by side, as transformers stores them.
    """

    features: int
    taps: int
    dilation: int
    config: WavLMConfig

    def setup(self) -> None:
        """The linear map; transformers calls it `kernel`."""
        self.kernel = linear(self.features, self.config, Compute())

    def __call__(self, hidden: Float[Array, "rows frames inputs"]) -> Float[Array, "rows fewer features"]:
        """(taps - 1) * dilation frames fewer."""
        num_frames = hidden.shape[1] - (self.taps - 1) * self.dilation
        shifted = [hidden[:, tap * self.dilation :][:, :num_frames] for tap in range(self.taps)]
        return jax.nn.relu(self.kernel(jnp.concatenate(shifted, axis=-1)))


class SpeakerVectors(nn.Module):
    """The margin loss's own parameters: one vector for each training speaker, in columns (`objective/weight`)."""

    num_speakers: int

    @nn.compact
    def __call__(self, embeddings: Embeddings) -> Float[Array, "rows speakers"]:
        """Cosines between every row and every speaker, in [-1, 1]."""
        shape = (embeddings.shape[-1], self.num_speakers)
        weight = self.param("weight", nn.initializers.normal(1.0), shape)
        return unit_length(embeddings, axis=1) @ unit_length(weight, axis=0)


def pooled_frames(num_frames: NumSamples, total: int, head: HeadConfig) -> FrameMask:
    """Which frames behind the time-delay layers are pooled over: those that saw speech alone, and at least one.

    transformers counts as if no layer were dilated, so it pools over up to 6 frames that saw padding (FACTS E30).

    Args:
        num_frames: (rows,) real frames before the layers.
        total: frames behind the layers.
        head: kernels, dilations, and whose convention.

    """
    if head.compat == "huggingface":
        return prefix_mask(num_frames - sum(taps - 1 for taps in head.tdnn_kernel), total)
    return prefix_mask(jnp.maximum(num_frames - head.tdnn_context, 1), total)


def statistics_pooling(frames: Hidden, mask: FrameMask) -> Float[Array, "rows statistics"]:
    """Mean and unbiased standard deviation over the frames of the mask, side by side; deviation 0 for one frame."""
    count = jnp.maximum(mask.sum(axis=1), 1)[:, None]
    mean = keep_where(mask, frames).sum(axis=1) / count
    squares = jnp.square(keep_where(mask, frames - mean[:, None, :])).sum(axis=1)
    variance = squares / jnp.maximum(count - 1, 1)
    varies = variance > 0
    deviation = jnp.where(varies, jnp.sqrt(jnp.where(varies, variance, 1.0)), 0.0)  # no infinite slope at 0
    return jnp.concatenate([mean, deviation], axis=-1)


def unit_length(x: Float[Array, "rows columns"], axis: int) -> Float[Array, "rows columns"]:
    """`x` divided by its Euclidean norm along `axis`; a vector of zeros stays one, with a finite gradient."""
    squares = jnp.square(x).sum(axis=axis, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squares, _SMALLEST_NORM**2))


_SMALLEST_NORM = 1e-12
"""Below it a vector is not scaled up to length 1, as in torch's `normalize`."""


class WavLMForECAPA(Headed):
    """Speaker embeddings by a small ECAPA-TDNN, for a margin loss over speakers (FACTS D4). Not in transformers."""

    def setup(self) -> None:
        """Encoder, `ecapa` and `objective`."""
        super().setup()
        self.ecapa = ECAPA(self.head.ecapa_dim, self.head.ecapa_output_dim)
        self.objective = SpeakerVectors(self.head.num_labels)

    def scores(self, encoded: Encoded, keys: Keys | None) -> XVectorOutput:
        """Embeddings, and their cosines with the training speakers; with `keys` batch norms use this batch."""
        embeddings = self.ecapa(encoded.hidden, encoded.frame_mask, keys is not None)
        return XVectorOutput(embeddings, embeddings, self.objective(embeddings), encoded.encoder)


@dataclass(frozen=True)
class HeadKind:
    """One row of `HEADS`: what the rest of the code knows about a kind of head."""

    module: type[Headed]
    task: str
    """The task that trains it: a key of `pretrain.task.TASKS`, the value of `config.task`."""
    parts: frozenset[str]
    """Names of its modules beside the encoder, by which it is recognised in a checkpoint; "tdnn" for tdnn_0, ..."""
    size: tuple[str, str]
    """The field of HeadConfig that the training data decide, and the path of the parameter whose last axis has it."""
    commands: tuple[str, ...] = ()
    """Commands of `python -m wavlm_jax` that need this head."""
    transformers: tuple[str, ...] = ()
    """Families of transformers that have this class: "WavLM", "Hubert"."""
    running_statistics: str | None = None
    """Pattern of parameters that are not learned but follow the statistics of the batches."""


HEADS: dict[str, HeadKind] = {
    "WavLMForCTC": HeadKind(
        WavLMForCTC,
        task="ctc",
        parts=frozenset({"lm_head"}),
        size=("vocab_size", "lm_head/kernel"),
        commands=("transcribe", "align"),
        transformers=("WavLM", "Hubert"),
    ),
    "WavLMForSequenceClassification": HeadKind(
        WavLMForSequenceClassification,
        task="classification",
        parts=frozenset({"projector", "classifier"}),
        size=("num_labels", "classifier/kernel"),
        commands=("classify",),
        transformers=("WavLM", "Hubert"),
    ),
    "WavLMForAudioFrameClassification": HeadKind(
        WavLMForAudioFrameClassification,
        task="frame_classification",
        parts=frozenset({"classifier"}),
        size=("num_labels", "classifier/kernel"),
        commands=("diarize",),
        transformers=("WavLM",),
    ),
    "WavLMForXVector": HeadKind(
        WavLMForXVector,
        task="speaker_xvector",
        parts=frozenset({"projector", "tdnn", "feature_extractor", "classifier", "objective"}),
        size=("num_labels", "objective/weight"),
        commands=("embed", "verify"),
        transformers=("WavLM",),
    ),
    "WavLMForECAPA": HeadKind(
        WavLMForECAPA,
        task="speaker_ecapa",
        parts=frozenset({"ecapa", "objective"}),
        size=("num_labels", "objective/weight"),
        commands=("embed", "verify"),
        running_statistics="^ecapa/.*bn/(mean|variance)$",
    ),
}
"""Every kind of head by the name of its class, which is transformers' too where `transformers` names a family.

To add one: its class and its row here, its task in `wavlm_jax/tasks`, its config in `configs/finetune`.
"""

_SHARED_PARTS = {"adapter", "layer_weights"}


def recognise(names: Iterable[str], where: str) -> str:
    """The kind of head, a key of `HEADS`, whose modules beside the encoder have these names.

    Raises:
        ValueError: no row of `HEADS` has just these parts; `where` is named.

    """
    found = {re.sub(r"_\d+$", "", name) for name in names} - _SHARED_PARTS
    for kind, row in HEADS.items():
        if row.parts == found:
            return kind
    known = "; ".join(f"{', '.join(sorted(row.parts))} ({kind})" for kind, row in HEADS.items())
    raise ValueError(
        f"{where}: found a head of {', '.join(sorted(found)) or 'no parts'}, expected one that "
        f"wavlm_jax.model.heads.HEADS describes: {known}"
    )


def head_of_task(task: str) -> HeadKind:
    """The row of the head that this task trains."""
    return next(row for row in HEADS.values() if row.task == task)


def module_of(config: WavLMConfig, kind: str | None, head: HeadConfig | None) -> WavLM | Headed:
    """An encoder alone (`kind` None), or the model with the head that `HEADS` calls `kind`."""
    return WavLM(config) if kind is None or head is None else HEADS[kind].module(config, head)


@cache
def tree_shapes(config: WavLMConfig, kind: str | None = None, head: HeadConfig | None = None) -> Params:
    """The parameters of `module_of` as shapes (`jax.ShapeDtypeStruct`); nothing is computed."""
    module, frames = module_of(config, kind, head), 1
    if head is not None:
        frames = head.tdnn_context + 1
        if head.add_adapter:
            frames = (frames + head.adapter_kernel_size) * 2 * head.adapter_stride**head.num_adapter_layers
    samples = samples_for(frames, config.geometry)
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, samples))))
    shapes: Params = variables["params"]
    return shapes
