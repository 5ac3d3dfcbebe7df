"""The attention of one Transformer layer: projections, gate, heads; how it is computed is handed in."""

from collections.abc import Callable
from typing import NamedTuple

from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from wavlm_jax.config import Compute, WavLMConfig
from wavlm_jax.model.attention_rules import NO_DROPOUT, AttentionDropout, attention_dropout
from wavlm_jax.model.elements import Site, linear, site_keys
from wavlm_jax.model.kernel_rules import ATTENDED
from wavlm_jax.model.position import Bias, GateProjection, PairBias, Profile, gate
from wavlm_jax.shapes import FrameMask, Heads, Hidden, Probabilities, RowKeys

Attend = Callable[
    [Heads, Heads, Heads, Bias | None, FrameMask | None, AttentionDropout], tuple[Heads, Probabilities | None]
]
"""From query (divided by sqrt(head_dim)), key, value, bias, mask and dropout to mixed values, and maps if wanted."""


class Method(NamedTuple):
    """How the layers of one forward pass compute attention (`attention.method_for`)."""

    attend: Attend
    takes_pairs: bool
    """Whether the position bias is written out once, for all layers, as the matrix of all pairs of frames."""


class Attention(nn.Module):
    """Multi-head self-attention of one layer, with the gate of its position bias."""

    config: WavLMConfig
    compute: Compute
    method: Method

    def setup(self) -> None:
        """The four projections and, with position bias, the gate; names as in Hugging Face's WavLMAttention."""
        config = self.config
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            linear(config.hidden_size, config, self.compute) for _ in range(4)
        )
        if config.position_bias:
            self.gru_rel_pos_linear = GateProjection(config)
            ones = nn.initializers.ones
            self.gru_rel_pos_const = self.param("gru_rel_pos_const", ones, (config.num_attention_heads,))

    def __call__(
        self,
        hidden: Hidden,
        position: Profile | PairBias | None,
        frame_mask: FrameMask | None,
        row_keys: RowKeys | None,
    ) -> tuple[Hidden, Probabilities | None]:
        """The attended states and, where the method gives them, the probabilities of each head before dropout."""
        config = self.config
        query, key, value = (self._heads(projection(hidden)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        query = query * config.head_dim**-0.5
        bias = None
        if position is not None:
            bias = Bias(position, gate(self.gru_rel_pos_linear(hidden), self.gru_rel_pos_const))
        drop = NO_DROPOUT
        if row_keys is not None and config.attention_dropout > 0:
            keys = site_keys(row_keys, Site.ATTENTION)
            drop = attention_dropout(config.attention_dropout, keys, config.num_attention_heads)
        mixed, probabilities = self.method.attend(query, key, value, bias, frame_mask, drop)
        mixed = checkpoint_name(mixed, ATTENDED)
        return self.out_proj(mixed.reshape(hidden.shape)), probabilities

    def _heads(self, x: Hidden) -> Heads:
        return x.reshape(*x.shape[:2], self.config.num_attention_heads, self.config.head_dim)
