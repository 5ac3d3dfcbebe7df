"""transformers' own torch classes with a head, random weights, and the same weights in our tree."""

import dataclasses

import jax
import jax.numpy as jnp
import torch
import transformers

from tests.support.torch_twins import Twins, shake, small_config
from wavlm_jax.config import HeadConfig
from wavlm_jax.convert.state_dict import from_torch


def small_head(**changes) -> HeadConfig:
    """Every part of the real heads, narrow."""
    values = {
        "compat": "huggingface",
        "vocab_size": 11,
        "num_labels": 5,
        "classifier_proj_size": 12,
        "tdnn_dim": (14, 14, 14, 14, 20),
        "xvector_output_dim": 10,
    }
    return HeadConfig(**(values | changes))


def huggingface_values(config, head) -> dict:
    """`config.json` of a model with a head, spelled out here so that no code of ours can be wrong twice."""
    values = {key: value for key, value in config.to_huggingface().items() if key != "architectures"}
    ours = {"compat", "layer_sum_states", "ecapa_dim", "ecapa_output_dim"}
    heads = {key: value for key, value in dataclasses.asdict(head).items() if key not in ours and value is not None}
    return values | heads | {"add_adapter": head.add_adapter}


def torch_head(kind, config, head, seed: int = 0) -> torch.nn.Module:
    """transformers' class of the same name in eval mode, every weight random."""
    torch.manual_seed(seed)
    model = getattr(transformers, kind.__name__)(transformers.WavLMConfig(**huggingface_values(config, head)))
    shake(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and (not name.startswith("wavlm.") or "adapter" in name):
                # transformers starts heads near 0: what they read would be lost in their biases
                parameter.copy_(torch.randn_like(parameter) * (parameter[0].numel() ** -0.5))
    return model.eval()


def parameter_shapes(model):
    """The parameter tree of a model with a head, as shapes."""
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 16000))))["params"]


def head_twins(kind, config=None, head=None, seed: int = 0) -> Twins:
    """transformers' model and ours with the same random weights."""
    config, head = config or small_config(), head or small_head()
    theirs, ours = torch_head(kind, config, head, seed), kind(config, head)
    tensors = {name: tensor.detach().numpy() for name, tensor in theirs.state_dict().items()}
    return Twins(theirs, ours, jax.tree.map(jnp.asarray, from_torch(tensors, parameter_shapes(ours))))
