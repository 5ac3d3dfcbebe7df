"""What the heads give: scores, never losses (FACTS B).

The adapter between encoder and head: gated convolutions that halve the frame rate each (FACTS B5).

The parts of an x-vector: time-delay layers, statistics over time, vectors of the training speakers (FACTS B4).

Models with a head: CTC, sequence and audio-frame classification, x-vectors (FACTS B).

Parameters are named as in Hugging Face's classes: the encoder under `wavlm`, the rest beside it; only the adapter
stands beside the encoder too (`adapter/...`) and not inside, so that `wavlm` is the same tree under every head. Heads
compute in float32.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from wavlm_jax.config import Compute, HeadConfig, WavLMConfig
from wavlm_jax.model.ecapa import ECAPA
from wavlm_jax.model.frontend import Convolution, prefix_mask
from wavlm_jax.model.layers import Keys, Masks, Site, dropout, keep_where, linear
from wavlm_jax.model.wavlm import WavLM, WavLMOutput
from wavlm_jax.shapes import FrameMask, Geometry, Hidden, NumSamples, Params, Waveform, num_frames, samples_for


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


_PADDING = 1
"""Zeros before and after a sequence, whatever the kernel, as in transformers."""


def adapter_num_frames(frames: Any, head: HeadConfig) -> Any:
    """Frames that the adapter makes of `frames` (int or array); 0 stays 0.

    "huggingface" counts as if the kernel were 1, which is the same for the standard kernel of 3.
    """
    for _ in range(head.num_adapter_layers):
        frames = _shortened(frames, head)
    return frames


def head_num_frames(num_samples: Any, config: WavLMConfig, head: HeadConfig) -> Any:
    """Frames that a head reads of so many samples (int or array): behind the adapter, if there is one."""
    frames = num_frames(num_samples, Geometry(config.conv_kernel, config.conv_stride))
    return adapter_num_frames(frames, head) if head.add_adapter else frames


def _shortened(num_frames: Any, head: HeadConfig) -> Any:
    """Frames behind one layer."""
    reach = 0 if head.compat == "huggingface" else head.adapter_kernel_size - 1 - 2 * _PADDING
    shorter = (num_frames - 1 - reach) // head.adapter_stride + 1
    some = num_frames > 0
    return max(shorter, 0) * some if isinstance(shorter, int) else jnp.maximum(shorter, 0) * some


class AdapterLayer(nn.Module):
    """A strided convolution to twice the width, half of which gates the other half."""

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
        padded = jnp.pad(hidden, ((0, 0), (_PADDING, _PADDING), (0, 0)))
        values, gate = jnp.split(self.conv(padded), 2, axis=-1)
        return values * jax.nn.sigmoid(gate)


class Adapter(nn.Module):
    """A change of width where one is asked for, then the gated convolutions.

    Never dropped in training: transformers drops a layer with probability `layerdrop`, and then has twice the frames.
    """

    config: WavLMConfig
    head: HeadConfig
    compute: Compute

    def setup(self) -> None:
        """Map, norm and layers, named as Hugging Face's."""
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
                hidden = jnp.where(prefix_mask(num_frames, hidden.shape[1])[:, :, None], hidden, 0)
            hidden, num_frames = layer(hidden), _shortened(num_frames, self.head)
        return hidden, num_frames


Embeddings = Float[Array, "rows embedding"]

_SMALLEST_NORM = 1e-12
"""Below it a vector is not scaled up to length 1, as in torch's `normalize`."""


class XVectorOutput(NamedTuple):
    """What an utterance sounds like."""

    embeddings: Embeddings
    """The speaker embedding: compare by cosine."""
    logits: Embeddings
    """One more linear map on top: what the margin loss is trained on. transformers' name; no class scores."""
    cosines: Float[Array, "rows speakers"]
    """Between `logits` and the vector of every training speaker."""


class TDNNLayer(nn.Module):
    """A convolution over `taps` frames, `dilation` apart, without padding, and ReLU.

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
    """The margin loss's own parameters: one vector a training speaker, in columns (`objective/weight`)."""

    num_speakers: int

    @nn.compact
    def __call__(self, embeddings: Embeddings) -> Float[Array, "rows speakers"]:
        """Cosines between every row and every speaker, in [-1, 1]."""
        shape = (embeddings.shape[-1], self.num_speakers)
        weight = self.param("weight", nn.initializers.normal(1.0), shape)
        return unit_length(embeddings, axis=1) @ unit_length(weight, axis=0)


def pooled_frames(num_frames: NumSamples | None, shape: tuple[int, ...], head: HeadConfig) -> FrameMask:
    """Which frames behind the time-delay layers are pooled over: those that saw speech alone, and at least one.

    transformers counts as if no layer were dilated, so it pools over up to 6 frames that saw padding (FACTS E30).

    Args:
        num_frames: (rows,) real frames before the layers; None: no row is padded.
        shape: (rows, frames) behind the layers.
        head: kernels, dilations, and whose convention.

    """
    if num_frames is None:
        return jnp.ones(shape, bool)
    if head.compat == "huggingface":
        return prefix_mask(num_frames - sum(taps - 1 for taps in head.tdnn_kernel), shape[1])
    return prefix_mask(jnp.maximum(num_frames - head.tdnn_context, 1), shape[1])


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


class Encoded(NamedTuple):
    """What a head reads."""

    hidden: Float[Array, "rows frames features"]
    """float32."""
    num_frames: NumSamples
    """Frames of each row that are speech; they come first."""
    frame_mask: FrameMask
    """True at those frames."""


class Headed(nn.Module):
    """The encoder and the layer average that all heads share. The arguments of every model with a head.

    Apply with `model.apply({"params": params}, waveform, num_samples, masks, keys)`: waveform float32 (rows, samples)
    at 16 kHz, normalised already where `config.do_normalize` says so; `num_samples` (rows,) real samples a row, None:
    no row is padded; `masks` SpecAugment; `keys` None: a deterministic pass.
    """

    config: WavLMConfig
    head: HeadConfig
    compute: Compute = Compute()

    has_adapter = False
    """Whether this kind of head can stand behind an adapter."""

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
        return self.head.use_weighted_layer_sum

    def encode(
        self, waveform: Waveform, num_samples: NumSamples | None, masks: Masks | None, keys: Keys | None
    ) -> Encoded:
        """Frames for the head: the last hidden state or the average of all, behind the adapter if there is one."""
        time_mask, channel_mask = masks or Masks()
        output = self.wavlm(
            waveform,
            num_samples,
            time_mask=time_mask,
            channel_mask=channel_mask,
            step_key=None if keys is None else keys.step,
            row_keys=None if keys is None else keys.rows,
            output_hidden_states=self.averages_layers,
        )
        hidden = self._layer_average(output) if self.averages_layers else output.last_hidden_state
        count, mask = output.frame_mask.sum(axis=1), output.frame_mask
        if self.head.add_adapter:
            hidden, count = self.adapter(hidden, count)
            mask = prefix_mask(count, hidden.shape[1])
        return Encoded(hidden.astype(jnp.float32), count, mask)

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

    def setup(self) -> None:
        """Encoder and `lm_head`."""
        super().setup()
        self.lm_head = linear(self.head.vocab_size, self.config, Compute())

    @property
    def averages_layers(self) -> bool:
        """As the config says; transformers' class has no layer weights, whatever its config says."""
        return self.head.use_weighted_layer_sum and self.head.compat != "huggingface"

    def __call__(
        self,
        waveform: Waveform,
        num_samples: NumSamples | None = None,
        masks: Masks | None = None,
        keys: Keys | None = None,
    ) -> CTCOutput:
        """Scores of every character."""
        encoded = self.encode(waveform, num_samples, masks, keys)
        row_keys = None if keys is None else keys.rows
        hidden = dropout(encoded.hidden, self.head.final_dropout, row_keys, Site.FINAL)
        return CTCOutput(self.lm_head(hidden), encoded.num_frames)


class WavLMForSequenceClassification(Headed):
    """One class for a whole row: the mean of its projected frames, and a linear map (FACTS B2)."""

    def setup(self) -> None:
        """Encoder, `projector` and `classifier`."""
        super().setup()
        self.projector = linear(self.head.classifier_proj_size, self.config, Compute())
        self.classifier = linear(self.head.num_labels, self.config, Compute())

    def __call__(
        self,
        waveform: Waveform,
        num_samples: NumSamples | None = None,
        masks: Masks | None = None,
        keys: Keys | None = None,
    ) -> ClassOutput:
        """Scores of every class; a row without a frame gives the classifier's bias."""
        encoded = self.encode(waveform, num_samples, masks, keys)
        frames = keep_where(encoded.frame_mask, self.projector(encoded.hidden))
        count = jnp.maximum(encoded.frame_mask.sum(axis=1), 1)[:, None]
        return ClassOutput(self.classifier(frames.sum(axis=1) / count))


class WavLMForAudioFrameClassification(Headed):
    """Labels that are on or off in every frame, such as who speaks: a linear map (FACTS B3)."""

    def setup(self) -> None:
        """Encoder and `classifier`."""
        super().setup()
        self.classifier = linear(self.head.num_labels, self.config, Compute())

    def __call__(
        self,
        waveform: Waveform,
        num_samples: NumSamples | None = None,
        masks: Masks | None = None,
        keys: Keys | None = None,
    ) -> FrameOutput:
        """Scores of every label in every frame."""
        encoded = self.encode(waveform, num_samples, masks, keys)
        return FrameOutput(self.classifier(encoded.hidden), encoded.frame_mask)


class WavLMForXVector(Headed):
    """X-vectors trained by a margin loss over speakers."""

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

    def __call__(
        self,
        waveform: Waveform,
        num_samples: NumSamples | None = None,
        masks: Masks | None = None,
        keys: Keys | None = None,
    ) -> XVectorOutput:
        """Embeddings, and their cosines with the training speakers.

        Raises:
            ValueError: rows are so short that the time-delay layers have no frame left.

        """
        encoded = self.encode(waveform, num_samples, masks, keys)
        self._check(encoded.hidden.shape[1])
        hidden = self.projector(encoded.hidden)
        if self.head.compat == "exact":
            hidden = keep_where(encoded.frame_mask, hidden)
        for layer in self.tdnn:
            hidden = layer(hidden)
        counted = None if num_samples is None else encoded.num_frames
        pooled = statistics_pooling(hidden, pooled_frames(counted, hidden.shape[:2], self.head))
        embeddings = self.feature_extractor(pooled)
        logits = self.classifier(embeddings)
        return XVectorOutput(embeddings, logits, self.objective(logits))

    def _check(self, num_frames: int) -> None:
        if num_frames <= self.head.tdnn_context:
            raise ValueError(
                f"waveform: found rows of {num_frames} frames, expected at least {self.head.tdnn_context + 1} for the "
                "time-delay layers; pad them with zeros and pass num_samples"
            )


class WavLMForECAPA(Headed):
    """Speaker embeddings by a small ECAPA-TDNN, for a margin loss over speakers (FACTS D4). Not in transformers."""

    def setup(self) -> None:
        """Encoder, `ecapa` and `objective`."""
        super().setup()
        head = self.head
        self.ecapa = ECAPA(head.ecapa_dim, head.ecapa_output_dim, head.ecapa_global_context)
        self.objective = SpeakerVectors(self.head.num_labels)

    def __call__(
        self,
        waveform: Waveform,
        num_samples: NumSamples | None = None,
        masks: Masks | None = None,
        keys: Keys | None = None,
    ) -> XVectorOutput:
        """Embeddings, and their cosines with the training speakers; with `keys` batch norms look at this batch."""
        encoded = self.encode(waveform, num_samples, masks, keys)
        embeddings = self.ecapa(encoded.hidden, encoded.frame_mask, keys is not None)
        return XVectorOutput(embeddings, embeddings, self.objective(embeddings))


KINDS: Mapping[str, type[Headed]] = {
    kind.__name__: kind
    for kind in (
        WavLMForCTC,
        WavLMForSequenceClassification,
        WavLMForAudioFrameClassification,
        WavLMForXVector,
        WavLMForECAPA,
    )
}
"""Every model with a head by its name, which is transformers' too but for ECAPA's."""


def module_of(config: WavLMConfig, kind: str | None, head: HeadConfig | None) -> WavLM | Headed:
    """An encoder alone (`kind` None), or the model with a head that is called `kind`."""
    return WavLM(config) if kind is None or head is None else KINDS[kind](config, head)


@cache
def tree_shapes(config: WavLMConfig, kind: str | None, head: HeadConfig | None) -> Params:
    """The parameters of `module_of` as shapes (`jax.ShapeDtypeStruct`); nothing is computed."""
    module, frames = module_of(config, kind, head), 1
    if head is not None:
        frames = head.tdnn_context + 1
        if head.add_adapter:
            frames = (frames + head.adapter_kernel_size) * 2 * head.adapter_stride**head.num_adapter_layers
    samples = samples_for(frames, Geometry(config.conv_kernel, config.conv_stride))
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, samples))))
    shapes: Params = variables["params"]
    return shapes
