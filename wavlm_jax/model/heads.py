"""Models with a head: CTC, sequence and audio-frame classification, x-vectors (FACTS B).

Parameters are named as in Hugging Face's classes: the encoder under `wavlm`, the rest beside it; only the adapter
stands beside the encoder too (`adapter/...`) and not inside, so that `wavlm` is the same tree under every head. Heads
compute in float32.
"""

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from wavlm_jax.config import Compute, WavLMConfig
from wavlm_jax.model.adapter import Adapter
from wavlm_jax.model.ecapa import ECAPA
from wavlm_jax.model.elements import Site, dropout, keep_where, linear
from wavlm_jax.model.frontend import prefix_mask
from wavlm_jax.model.head_config import HeadConfig
from wavlm_jax.model.head_outputs import ClassOutput, CTCOutput, FrameOutput
from wavlm_jax.model.randomness import Keys, Masks
from wavlm_jax.model.wavlm import WavLM, WavLMOutput
from wavlm_jax.model.xvector import SpeakerVectors, TDNNLayer, XVectorOutput, pooled_frames, statistics_pooling
from wavlm_jax.shapes import FrameMask, Geometry, Hidden, NumSamples, Params, Waveform, samples_for

__all__ = [
    "KINDS",
    "CTCOutput",
    "ClassOutput",
    "FrameOutput",
    "Headed",
    "WavLMForAudioFrameClassification",
    "WavLMForCTC",
    "WavLMForECAPA",
    "WavLMForSequenceClassification",
    "WavLMForXVector",
    "XVectorOutput",
    "module_of",
    "tree_shapes",
]


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
