"""The Transformer: position embedding, layers stacked on one axis and scanned, layer drop (FACTS A3, A4, A6)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.spmd import with_logical_constraint
from jaxtyping import Array, Bool, Float, Int

from wavlm_jax.config import AttentionImplementation, Compute, WavLMConfig
from wavlm_jax.model.attention import Attention, choose, current_device
from wavlm_jax.model.fused_attention import ATTENDED
from wavlm_jax.model.layers import ACTIVATIONS, Site, dropout, keep_where, layer_norm, linear, site_keys
from wavlm_jax.model.position import PairBias, PositionalConvolution, Profile, RelativePositionTable, toeplitz
from wavlm_jax.shapes import FrameMask, Hidden, RowKeys, StepKey

AXES = ("rows", "frames", "width")
"""Logical axes of the residual stream; `training.sharding.RULES` maps them to mesh axes."""


class Wanted(NamedTuple):
    """What a forward pass returns besides the last hidden state."""

    hidden_states: bool
    attentions: bool


class LayerInput(NamedTuple):
    """Input that each layer has of its own: its number, and whether layer drop keeps it (None: no layer drop)."""

    number: Int[Array, "*layers"]
    keep: Bool[Array, "*layers"] | None


class LayerContext(NamedTuple):
    """Input that all layers share."""

    position: Profile | PairBias | None
    frame_mask: FrameMask | None
    row_keys: RowKeys | None


class EncoderOutput(NamedTuple):
    """Hidden states and attention maps; None where they were not asked for."""

    last_hidden_state: Hidden
    hidden_states: Float[Array, "states rows frames width"] | None
    attentions: Float[Array, "layers rows heads frames frames"] | None


class FeedForward(nn.Module):
    """W2 . GELU(W1 x) (or another activation), each with its dropout."""

    config: WavLMConfig
    compute: Compute

    def setup(self) -> None:
        """The two linear maps, named as Hugging Face's."""
        self.intermediate_dense = linear(self.config.intermediate_size, self.config, self.compute)
        self.output_dense = linear(self.config.hidden_size, self.config, self.compute)

    def __call__(self, x: Hidden, row_keys: RowKeys | None) -> Hidden:
        """(rows, frames, width) in the compute dtype."""
        inner = ACTIVATIONS[self.config.hidden_act](self.intermediate_dense(x))
        inner = dropout(inner, self.config.activation_dropout, row_keys, Site.INTERMEDIATE)
        return dropout(self.output_dense(inner), self.config.hidden_dropout, row_keys, Site.OUTPUT)


class EncoderLayer(nn.Module):
    """One Transformer layer, norm after the residual sum or (`do_stable_layer_norm`) before each block."""

    config: WavLMConfig
    compute: Compute
    wanted: Wanted
    implementation: AttentionImplementation

    def setup(self) -> None:
        """Attention, feed-forward and their norms, named as Hugging Face's."""
        self.attention = Attention(self.config, self.compute, self.implementation, self.wanted.attentions)
        self.layer_norm = layer_norm(self.config)
        self.feed_forward = FeedForward(self.config, self.compute)
        self.final_layer_norm = layer_norm(self.config)

    def __call__(self, hidden: Hidden, layer: LayerInput, context: LayerContext) -> tuple[Hidden, tuple[Any, Any]]:
        """The layer's output as the scan's carry, and the (hidden state, attention map) that the scan stacks."""
        keys = None if context.row_keys is None else site_keys(context.row_keys, layer.number)
        order = self._norm_first if self.config.do_stable_layer_norm else self._norm_last
        output, attention = order(hidden, context._replace(row_keys=keys))
        if layer.keep is not None:
            output = jnp.where(layer.keep, output, hidden)
        output = with_logical_constraint(output, AXES)
        return output, (output if self.wanted.hidden_states else None, attention)

    def _norm_last(self, hidden: Hidden, context: LayerContext) -> tuple[Hidden, Any]:
        attended, attention = self._attend(hidden, context)
        hidden = self.layer_norm(hidden + attended).astype(hidden.dtype)
        transformed = self.feed_forward(hidden, context.row_keys)
        return self.final_layer_norm(hidden + transformed).astype(hidden.dtype), attention

    def _norm_first(self, hidden: Hidden, context: LayerContext) -> tuple[Hidden, Any]:
        attended, attention = self._attend(self.layer_norm(hidden).astype(hidden.dtype), context)
        hidden = hidden + attended
        normed = self.final_layer_norm(hidden).astype(hidden.dtype)
        return hidden + self.feed_forward(normed, context.row_keys), attention

    def _attend(self, hidden: Hidden, context: LayerContext) -> tuple[Hidden, Any]:
        attended, attention = self.attention(hidden, context.position, context.frame_mask, context.row_keys)
        return dropout(attended, self.config.hidden_dropout, context.row_keys, Site.ATTENTION_OUTPUT), attention


class Encoder(nn.Module):
    """Position embedding, layers, and the norm that Base has before the layers and Large behind them."""

    config: WavLMConfig
    compute: Compute

    @nn.compact
    def __call__(
        self,
        hidden: Hidden,
        frame_mask: FrameMask | None,
        step_key: StepKey | None,
        row_keys: RowKeys | None,
        wanted: Wanted,
    ) -> EncoderOutput:
        """The encoded frames; padded frames of `hidden` must be 0."""
        config = self.config
        norm = layer_norm(config, name="layer_norm")
        hidden = hidden + PositionalConvolution(config, self.compute, name="pos_conv_embed")(hidden, frame_mask)
        if frame_mask is not None and config.padding == "exact":
            # Base's norm would scale up the rounding errors in empty frames.
            hidden = keep_where(frame_mask, hidden)
        if not config.do_stable_layer_norm:
            hidden = norm(hidden).astype(hidden.dtype)
        hidden = dropout(hidden, config.hidden_dropout, row_keys, Site.ENCODER_INPUT)
        hidden = with_logical_constraint(hidden, AXES)

        implementation: AttentionImplementation = "dense"
        if not wanted.attentions:
            implementation = choose(config, self.compute, hidden.shape[1], current_device()).implementation
        position = None
        if config.position_bias:
            profile = RelativePositionTable(config, name="rel_attn_embed")(hidden.shape[1])
            # Written out once for all layers: in each layer its gradient would cost another pass over the matrix.
            position = toeplitz(profile, hidden.shape[1], hidden.shape[1]) if implementation == "dense" else profile
        layers = LayerInput(jnp.arange(config.num_hidden_layers), kept_layers(config, step_key))
        stack = scanned_layers(self.compute, config)(config, self.compute, wanted, implementation, name="layers")
        last, (states, attentions) = stack(hidden, layers, LayerContext(position, frame_mask, row_keys))

        if states is not None:
            states = jnp.concatenate([hidden[None], states])
        if config.do_stable_layer_norm:
            last = norm(last).astype(last.dtype)
        return EncoderOutput(last, states, attentions)


def kept_layers(config: WavLMConfig, step_key: StepKey | None) -> Bool[Array, "layers"] | None:
    """Which layers this step keeps: one draw per layer for the whole global batch; None: all of them (FACTS A6).

    The position bias is computed outside of the layers, so it is kept when layer 0 is dropped, unlike in the authors'
    code. Without `layerdrop_first` layer 0 is never dropped, as in Hugging Face's.
    """
    if step_key is None or config.layerdrop == 0:
        return None
    key = jax.random.fold_in(step_key, Site.LAYERDROP)
    keep = jax.random.bernoulli(key, 1 - config.layerdrop, (config.num_hidden_layers,))
    return keep if config.layerdrop_first else keep.at[0].set(True)


def scanned_layers(compute: Compute, config: WavLMConfig) -> Any:
    """`EncoderLayer` with parameters stacked on axis 0, recomputed in the backward pass as `compute.remat` says."""
    layer: Any = EncoderLayer
    if compute.remat != "none":
        policy = _POLICIES[compute.remat]
        layer = nn.remat(layer, policy=policy, prevent_cse=False)
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        length=config.num_hidden_layers,
        unroll=compute.unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENDED),
    ),
}
