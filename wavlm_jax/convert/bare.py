"""State dicts without a config of their own: the encoder is taken, and the user says which model it is.

Names are Hugging Face's or the authors', with anything before them, as in UniSpeech's checkpoints of speaker
verification (`feature_extract.model.`). Whatever stands beside the encoder is left out by name.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wavlm_jax.config import WavLMConfig
from wavlm_jax.convert.huggingface import CONFIG, config_of
from wavlm_jax.convert.huggingface_files import open_safetensors
from wavlm_jax.convert.microsoft import identity, microsoft_name, take_head
from wavlm_jax.convert.state_dict import (
    ConversionError,
    StoredTensor,
    current_name,
    from_torch,
    old_name,
    respelled,
    tensors_of,
    unwrapped,
)
from wavlm_jax.model.heads import tree_shapes
from wavlm_jax.weights import Origin, Weights

LIKE: dict[str, Callable[..., WavLMConfig]] = {"base": WavLMConfig.base, "large": WavLMConfig.large}
"""Published sizes that a state dict may be said to have."""
_FIRST_CONV = {
    "huggingface": "feature_extractor.conv_layers.0.conv.weight",
    "microsoft": "feature_extractor.conv_layers.0.0.weight",
}
_BIAS_TABLES = ("rel_attn_embed.weight", "relative_attention_bias.weight")


def import_bare(path: Path, value: Any, like: str | None = None) -> Weights:
    """The encoder in a state dict; its config is the config.json beside the file, or that of `like`.

    Args:
        path: the file.
        value: what `read_torch_file` gives for it; None for safetensors.
        like: "base" or "large".

    Raises:
        ConversionError: no encoder in names that are known, no config, or tensors that do not fit it.

    """
    notes: list[str] = []
    found: Mapping[str, StoredTensor]
    if path.suffix == ".safetensors":
        found = respelled(unwrapped(open_safetensors(path), notes), old_name, path)
    else:
        found = tensors_of(value, path, notes)
    dialect, prefix = _encoder_of(found, path)
    encoder = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
    notes += [f"left out: {name[:160]}, which is beside the encoder" for name in found if not name.startswith(prefix)]
    config = _config(path, like, dialect, any(name.endswith(_BIAS_TABLES) for name in encoder))
    notes.append(f"the file has no config; taken from {CONFIG} beside it" if like is None else f"taken for a {like}")
    if dialect == "huggingface":
        params = from_torch(respelled(encoder, current_name, path), tree_shapes(config), path)
        return Weights(config, params, None, origin=Origin(dialect, str(path), tuple(notes)))
    head = take_head(encoder, config.hidden_size, path, notes)
    absent = identity(config)
    params = from_torch(
        encoder, tree_shapes(config), path, name_of=lambda name: microsoft_name(name, config), absent=absent
    )
    return Weights(config, params, head, origin=Origin(dialect, str(path), tuple(notes)))


def is_named_as(dialect: str, value: Any) -> bool:
    """Whether a state dict has an encoder in the names of "huggingface" or "microsoft"."""
    first = _FIRST_CONV[dialect]
    return isinstance(value, dict) and any(isinstance(name, str) and name.endswith(first) for name in value)


def _encoder_of(found: Mapping[str, StoredTensor], path: Path) -> tuple[str, str]:
    """(dialect, what stands before the encoder's names)."""
    places = [
        (dialect, name.removesuffix(first))
        for dialect, first in _FIRST_CONV.items()
        for name in found
        if name.endswith(first)
    ]
    if len(places) != 1:
        some = ", ".join(name[:80] for name in list(found)[:4])
        raise ConversionError(
            f"{path}: found {len(places)} encoders of WavLM in it, expected one ({', '.join(_FIRST_CONV.values())}); "
            f"it has {some}"
        )
    return places[0]


def _config(path: Path, like: str | None, dialect: Any, position_bias: bool) -> WavLMConfig:
    beside = path.with_name(CONFIG).is_file()
    if (like is None) != beside:
        raise ConversionError(
            f"{path}: the {CONFIG} beside it tells the model; expected no other word on it (like)"
            if beside
            else f"{path}: weights alone, without the model's config (cfg); put the model's {CONFIG} beside the file, "
            f"or say which sizes it has: python -m wavlm_jax.convert import {path} OUT --like {' or '.join(LIKE)}"
        )
    if like is None:
        return config_of(path.parent)
    changes = {"position_bias": position_bias, "padding": dialect}
    if dialect == "huggingface":
        changes |= {"normalize_eps": 1e-7, "layerdrop_first": False}
    return LIKE[like](**changes)
