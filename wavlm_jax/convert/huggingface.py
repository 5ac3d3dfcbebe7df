"""Hugging Face folders, in and out, without torch: config.json, model.safetensors, preprocessor_config.json.

What is written loads with `transformers.WavLMModel.from_pretrained(folder)` (HubertModel without position bias). What
has no place in such a folder is not kept: gradient multiplier, padding convention, `layerdrop_first`, `normalize_eps`.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from wavlm_jax import settings
from wavlm_jax.config import WavLMConfig
from wavlm_jax.convert.names import ConversionError, from_torch, to_torch
from wavlm_jax.model.wavlm import parameter_shapes
from wavlm_jax.shapes import SAMPLE_RATE, Params

CONFIG, WEIGHTS, PREPROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"
_MASK_VECTOR = "masked_spec_embed"


def export_huggingface(config: WavLMConfig, params: Params, folder: Path) -> None:
    """Write the model as a Hugging Face folder; files of the same names are replaced, each at once.

    Args:
        config: what the model is.
        params: its parameters (the tree under "params"), stored as float32.
        folder: made if it does not exist.

    Raises:
        ConversionError: if `params` are not those of `config`.

    """
    tensors = to_torch(params)
    from_torch(tensors, parameter_shapes(config))
    if not _has_mask_vector(config):
        del tensors[_MASK_VECTOR]
    folder.mkdir(parents=True, exist_ok=True)
    preprocessor = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "do_normalize": config.do_normalize,
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
        "sampling_rate": SAMPLE_RATE,
    }
    _replace(folder / CONFIG, _json(config.to_huggingface() | {"dtype": "float32"}))
    _replace(folder / PREPROCESSOR, _json(preprocessor))
    _replace(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))


def import_huggingface(folder: Path, *, without_head: bool = False) -> tuple[WavLMConfig, dict[str, Any]]:
    """The model in a Hugging Face folder: its config and its parameters, float32 numpy arrays in our tree.

    Args:
        folder: holds config.json, model.safetensors and, if there is one, preprocessor_config.json.
        without_head: read the encoder of a model with a head (WavLMForCTC ...) and leave the head's tensors out.

    Raises:
        FileNotFoundError: no config.json or model.safetensors, naming what the folder has instead.
        ConversionError: a damaged file, or weights that do not fit the config; files and tensors are named.
        ValueError: a config that this model does not do, naming the key.

    """
    values = _read_json(folder / CONFIG)
    preprocessor = _read_json(folder / PREPROCESSOR) if (folder / PREPROCESSOR).exists() else {}
    config = WavLMConfig.from_huggingface(
        _typed(values, WavLMConfig, CONFIG), do_normalize=_do_normalize(preprocessor, folder / PREPROCESSOR)
    )
    tensors = _encoder_tensors(_read_weights(folder / WEIGHTS), without_head)
    if not _has_mask_vector(config) and _MASK_VECTOR not in tensors:
        # transformers does not make the vector where the config never masks; neither will anyone read it here.
        tensors[_MASK_VECTOR] = np.zeros((config.hidden_size,), np.float32)
    try:
        return config, from_torch(tensors, parameter_shapes(config))
    except ConversionError as error:
        raise ConversionError(f"{folder / WEIGHTS}: {error}") from error


def _has_mask_vector(config: WavLMConfig) -> bool:
    return config.mask_time_prob > 0 or config.mask_feature_prob > 0


def _encoder_tensors(tensors: dict[str, np.ndarray], without_head: bool) -> dict[str, np.ndarray]:
    """The tensors of the bare encoder: the prefix that models with a head put before its names removed."""
    prefix = next((p for p in ("wavlm.", "hubert.") if any(name.startswith(p) for name in tensors)), "")
    head = sorted(name for name in tensors if not name.startswith(prefix))
    if head and not without_head:
        raise ConversionError(
            f"weights: found {len(head)} tensors of a head ({', '.join(head[:8])}), expected a bare encoder; "
            "pass without_head=True to leave them out"
        )
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _read_weights(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        others = sorted(p.name for p in path.parent.iterdir() if p.suffix in (".bin", ".pt", ".safetensors"))
        raise FileNotFoundError(f"{path}: no such file; the folder has {', '.join(others) or 'no weights'}")
    try:
        return load(path.read_bytes())
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ConversionError(
            f"{path}: not a readable safetensors file ({error}); copy or download it again"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConversionError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(values, dict):
        raise ConversionError(f"{path}: found a {type(values).__name__}, expected an object")
    return values


def _typed(values: Mapping[str, Any], kind: type, file: str) -> dict[str, Any]:
    """`values`, with those that are fields of `kind` checked against the field's type."""
    hints = get_type_hints(kind)
    where = file.removeprefix("config.")  # settings' messages begin with "config."
    return {
        key: settings.convert(value, hints[key], f"{where}.{key}") if key in hints else value
        for key, value in values.items()
    }


def _do_normalize(preprocessor: Mapping[str, Any], path: Path) -> bool | None:
    if "do_normalize" not in preprocessor:
        return None
    found = preprocessor["do_normalize"]
    if not isinstance(found, bool):
        raise ConversionError(f"{path}: do_normalize is {found!r}, expected true or false")
    return found


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def _replace(path: Path, content: bytes) -> None:
    """Write the whole file or leave the old one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
