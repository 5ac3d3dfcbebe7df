"""The WavLM model: waveform in, hidden states out (FACTS A1)."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from wavlm_jax.config import Compute, WavLMConfig
from wavlm_jax.model.encoder import Encoder, Wanted
from wavlm_jax.model.frontend import FeatureExtractor, FeatureProjection
from wavlm_jax.model.layers import frame_mask, keep_where, scale_gradient
from wavlm_jax.shapes import (
    ChannelMask,
    ConvFeatures,
    FrameMask,
    Hidden,
    NumSamples,
    RowKeys,
    StepKey,
    TimeMask,
    Waveform,
)


class WavLMOutput(NamedTuple):
    """Result of a forward pass. Axes of layers have the same length whether layer drop skipped some or not."""

    last_hidden_state: Hidden
    """Output of the last layer; for Large (`do_stable_layer_norm`) after the encoder's final norm."""
    hidden_states: Float[Array, "states rows frames width"] | None
    """[0] the input of the first layer, [l] the raw output of layer l (1-based), never the final norm (FACTS A10)."""
    conv_features: ConvFeatures
    """Output of the conv encoder after the gradient multiplier, before its norm: input of the feature penalty."""
    frame_mask: FrameMask
    """True where a frame is speech."""
    attentions: Float[Array, "layers rows heads frames frames"] | None
    """Attention probabilities of each head, before dropout."""


class WavLM(nn.Module):
    """WavLM, or HuBERT where the config has no position bias.

    Parameters are named as in Hugging Face's WavLMModel, layers stacked on axis 0 under `encoder/layers`, the one
    bucket table under `encoder/rel_attn_embed`. Apply with `model.apply({"params": params}, waveform, ...)`.
    """

    config: WavLMConfig
    compute: Compute = Compute()

    def setup(self) -> None:
        """The three parts, and the vector that replaces masked frames (drawn from [0, 1))."""
        self.masked_spec_embed = self.param(
            "masked_spec_embed", nn.initializers.uniform(1.0), (self.config.hidden_size,)
        )
        self.feature_extractor = FeatureExtractor(self.config, self.compute)
        self.feature_projection = FeatureProjection(self.config, self.compute)
        self.encoder = Encoder(self.config, self.compute)

    def __call__(
        self,
        waveform: Waveform,
        num_samples: NumSamples | None = None,
        *,
        time_mask: TimeMask | None = None,
        channel_mask: ChannelMask | None = None,
        step_key: StepKey | None = None,
        row_keys: RowKeys | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> WavLMOutput:
        """One forward pass.

        Args:
            waveform: float32 (rows, samples) at 16 kHz, normalised already where `config.do_normalize` says so.
            num_samples: (rows,) real samples of each row; None: no row is padded.
            time_mask: (rows, frames), True where a frame is replaced by the mask vector.
            channel_mask: (rows, width), True where a channel is set to 0 in all frames.
            step_key: for layer drop, which is one decision for the whole batch.
            row_keys: for dropout, one key per row. Both keys or neither; without them the pass is deterministic.
            output_hidden_states: whether to return the output of every layer.
            output_attentions: whether to return every attention map (rows * heads * frames^2 numbers per layer).

        Raises:
            ValueError: one key without the other, or rows shorter than one frame.

        """
        self._check(waveform, step_key, row_keys)
        zeroed = num_samples if self.config.padding == "exact" else None
        features = scale_gradient(self.feature_extractor(waveform, zeroed), self.config.feature_grad_mult)
        num_frames = features.shape[1]
        mask = None
        if num_samples is not None:
            mask = frame_mask(num_samples, num_frames, waveform.shape[1], self.config)

        hidden = self.feature_projection(features, row_keys)
        if time_mask is not None:
            hidden = jnp.where(
                time_mask[:, :, None], self.masked_spec_embed.astype(hidden.dtype)[None, None, :], hidden
            )
        if channel_mask is not None:
            hidden = jnp.where(channel_mask[:, None, :], jnp.zeros((), hidden.dtype), hidden)
        if mask is not None:
            hidden = keep_where(mask, hidden)

        wanted = Wanted(output_hidden_states, output_attentions)
        encoded = self.encoder(hidden, mask, step_key, row_keys, wanted)
        if mask is None:
            mask = jnp.ones(features.shape[:2], bool)
        return WavLMOutput(
            last_hidden_state=encoded.last_hidden_state,
            hidden_states=encoded.hidden_states,
            conv_features=features,
            frame_mask=mask,
            attentions=encoded.attentions,
        )

    @property
    def receptive_field(self) -> int:
        """Samples of one frame (400): the shortest row that the model takes."""
        return self.config.geometry.receptive_field

    def _check(self, waveform: Waveform, step_key: StepKey | None, row_keys: RowKeys | None) -> None:
        if (step_key is None) != (row_keys is None):
            given = "row_keys" if step_key is None else "step_key"
            raise ValueError(f"WavLM: found {given} alone, expected step_key and row_keys (training) or neither")
        if waveform.shape[1] < self.receptive_field:
            raise ValueError(
                f"waveform: found rows of {waveform.shape[1]} samples, expected at least {self.receptive_field} "
                "(one frame); pad them with zeros and pass num_samples"
            )
