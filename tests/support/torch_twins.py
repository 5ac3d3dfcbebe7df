"""transformers' own torch models with random weights, and the same weights in our tree: the measure of parity."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from wavlm_jax.config import WavLMConfig
from wavlm_jax.convert.state_dict import from_torch
from wavlm_jax.model.heads import tree_shapes
from wavlm_jax.model.wavlm import WavLM


@dataclass(frozen=True)
class Twins:
    """One model, twice."""

    torch: torch.nn.Module
    model: WavLM
    params: dict


def small_config(**changes):
    """Small enough for a test, with every part of the real one; distances reach the logarithmic buckets."""
    values = {
        "conv_dim": (16,) * 7,
        "hidden_size": 32,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "num_buckets": 32,
        "max_bucket_distance": 40,
        "padding": "huggingface",
        "feature_grad_mult": 1.0,
    }
    return WavLMConfig.tiny(**(values | changes))


def torch_model(config: WavLMConfig, seed: int = 0) -> torch.nn.Module:
    """transformers' model in eval mode; every weight random, so that no part of it is close to the identity."""
    torch.manual_seed(seed)
    values = {key: value for key, value in config.to_huggingface().items() if key != "architectures"}
    if config.position_bias:
        model = transformers.WavLMModel(transformers.WavLMConfig(**values))
    else:
        model = transformers.HubertModel(transformers.HubertConfig(**values))
    shake(model)
    return model.eval()


def shake(model: torch.nn.Module) -> None:
    """Makes every weight random that starts as a constant or nearly so."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rel_attn_embed" in name or "gru_rel_pos" in name:
                parameter.add_(0.5 * torch.randn_like(parameter))
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))


def our_parameters(model: torch.nn.Module, config: WavLMConfig) -> dict:
    """The weights of `torch_model` as our tree, numpy arrays."""
    tensors = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    return from_torch(tensors, tree_shapes(config))


def twins(config: WavLMConfig, seed: int = 0) -> Twins:
    """transformers' model and ours with the same random weights."""
    model = torch_model(config, seed)
    return Twins(model, WavLM(config), jax.tree.map(jnp.asarray, our_parameters(model, config)))


def waveforms(num_samples, padded=None, seed: int = 0) -> np.ndarray:
    """Noise with a slow swell, one row a length, zeros after the end: float32 (rows, samples)."""
    generator = np.random.default_rng(seed)
    padded = padded or max(num_samples)
    result = np.zeros((len(num_samples), padded), np.float32)
    for row, length in enumerate(num_samples):
        swell = 0.2 + np.sin(np.arange(length) / 3000) ** 2
        result[row, :length] = 0.3 * swell * generator.standard_normal(length)
    return result


def attention_mask(num_samples, padded: int) -> torch.Tensor:
    """transformers' sample mask: 1 for real samples."""
    return torch.arange(padded)[None] < torch.as_tensor(num_samples)[:, None]
