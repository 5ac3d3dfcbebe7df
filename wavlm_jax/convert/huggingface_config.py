"""What a Hugging Face folder says about a model in JSON: config.json, preprocessor_config.json, and our wavlm_jax.json.

The last one holds what Hugging Face has no place for; whoever does not know it loses nothing that transformers has.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wavlm_jax.config import Padding, WavLMConfig
from wavlm_jax.convert.json_files import read_json, to_json, typed
from wavlm_jax.model.head_config import Compat, HeadConfig, States, TaskHead
from wavlm_jax.settings import SettingsError, read
from wavlm_jax.shapes import SAMPLE_RATE

CONFIG, PREPROCESSOR, CONVENTIONS = "config.json", "preprocessor_config.json", "wavlm_jax.json"
FORMAT = 1

_CTC = "WavLMForCTC"
_OURS = ("compat", "layer_sum_states")
"""Fields of HeadConfig that transformers does not have."""
_UNKNOWN_THERE = ("ecapa_dim", "ecapa_output_dim", "ecapa_global_context")
"""Fields of a head that transformers has no class for."""
_NOT_STORED = (*_OURS, *_UNKNOWN_THERE, "num_labels")
"""Fields of HeadConfig that are neither written to a config.json nor read from one; the labels tell their number."""
_HEAD_DEFAULTS: Mapping[str, Any] = {"compat": "huggingface", "ctc_loss_reduction": "mean"}
"""What transformers assumes, where that is not our own default."""


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """The content of wavlm_jax.json."""

    format: int
    padding: Padding
    normalize_eps: float
    feature_grad_mult: float
    layerdrop_first: bool
    compat: Compat
    """Of the head, if there is one; as the next field."""
    layer_sum_states: States
    source: str
    """Whose layout the weights came from."""
    notes: tuple[str, ...]
    """What was left out, filled in or assumed."""

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format: found {self.format}, this version reads {FORMAT}; install a newer wavlm_jax")


def read_conventions(folder: Path) -> Conventions | None:
    """wavlm_jax.json, where the folder has one.

    Raises:
        ValueError: damaged, or with unknown or mistyped keys.

    """
    path = folder / CONVENTIONS
    return read(read_json(path), Conventions, str(path)) if path.is_file() else None


def architecture(folder: Path) -> str | None:
    """Which class config.json names, HuBERT's as WavLM's; None: none, or several."""
    named = read_json(folder / CONFIG).get("architectures")
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        return None
    return named[0].replace("Hubert", "WavLM", 1)


def read_config(folder: Path, conventions: Conventions | None, *, has_head: bool) -> WavLMConfig:
    """The encoder that a folder describes; without `conventions` it follows transformers' own.

    Raises:
        ValueError: damaged files, or a model that this is not; the key is named.

    """
    values, path = read_json(folder / CONFIG), folder / CONFIG
    if has_head:
        values.pop("add_adapter", None)  # the head's business; an encoder alone has none here
    preprocessor = read_json(folder / PREPROCESSOR) if (folder / PREPROCESSOR).is_file() else {}
    config = WavLMConfig.from_huggingface(
        values | typed(values, WavLMConfig, path), do_normalize=_do_normalize(preprocessor, folder / PREPROCESSOR)
    )
    if conventions is None:
        return config
    names = ("padding", "normalize_eps", "feature_grad_mult", "layerdrop_first")
    return dataclasses.replace(config, **{name: getattr(conventions, name) for name in names})


def read_head(folder: Path, num_labels: int | None, conventions: Conventions | None) -> HeadConfig:
    """The head that config.json describes.

    Args:
        folder: holds it.
        num_labels: as the weights have it; None: the head has no classes (CTC).
        conventions: of wavlm_jax.json.

    Raises:
        ValueError: damaged, or a head that this is not; the key is named.

    """
    path = folder / CONFIG
    stored = {key: value for key, value in read_json(path).items() if key not in _NOT_STORED}
    values = {**_HEAD_DEFAULTS, **typed(stored, HeadConfig, path)}
    if num_labels is not None:
        values["num_labels"] = num_labels
    if conventions is not None:
        values |= {name: getattr(conventions, name) for name in _OURS}
    try:
        return HeadConfig(**values)
    except ValueError as error:
        raise SettingsError(f"{path}: {error}") from error


def read_labels(folder: Path, num_labels: int | None) -> tuple[str, ...] | None:
    """Names of the classes, where config.json has one for each.

    Raises:
        SettingsError: `id2label` that is no map from numbers to names.

    """
    stored = read_json(folder / CONFIG).get("id2label")
    if stored is None or num_labels is None:
        return None
    if not isinstance(stored, dict) or not all(isinstance(name, str) for name in stored.values()):
        raise SettingsError(f"{folder / CONFIG}: id2label is no map from numbers to names")
    if set(stored) != {str(number) for number in range(num_labels)}:
        return None
    return tuple(stored[str(number)] for number in range(num_labels))


def config_json(config: WavLMConfig, task: TaskHead | None, dtype: str) -> bytes:
    """The config.json that transformers reads as this model."""
    values = config.to_huggingface() | {"dtype": dtype}
    if task is not None:
        values |= _head_values(task, config)
    return to_json(values)


def preprocessor_json(config: WavLMConfig) -> bytes:
    """The preprocessor_config.json of transformers' feature extractor, which normalises as training did."""
    return to_json(
        {
            "feature_extractor_type": "Wav2Vec2FeatureExtractor",
            "do_normalize": config.do_normalize,
            "feature_size": 1,
            "padding_side": "right",
            "padding_value": 0.0,
            "return_attention_mask": True,
            "sampling_rate": SAMPLE_RATE,
        }
    )


def conventions_json(config: WavLMConfig, task: TaskHead | None, source: str, notes: tuple[str, ...]) -> bytes:
    """The wavlm_jax.json of a model."""
    head = task.config if task else HeadConfig()
    conventions = Conventions(
        format=FORMAT,
        padding=config.padding,
        normalize_eps=config.normalize_eps,
        feature_grad_mult=config.feature_grad_mult,
        layerdrop_first=config.layerdrop_first,
        compat=head.compat,
        layer_sum_states=head.layer_sum_states,
        source=source,
        notes=notes,
    )
    return to_json(dataclasses.asdict(conventions))


def _head_values(task: TaskHead, config: WavLMConfig) -> dict[str, Any]:
    head = {key: value for key, value in dataclasses.asdict(task.config).items() if key not in _NOT_STORED}
    head["output_hidden_size"] = head["output_hidden_size"] or config.hidden_size
    if not config.position_bias:  # transformers' HuBERT has neither
        head = {key: value for key, value in head.items() if "adapter" not in key and key != "output_hidden_size"}
    values = head | {"architectures": [task.kind if config.position_bias else task.kind.replace("WavLM", "Hubert")]}
    if task.kind == _CTC:
        return values
    labels = task.labels or tuple(f"LABEL_{number}" for number in range(task.config.num_labels))
    return values | {
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
    }


def _do_normalize(preprocessor: Mapping[str, Any], path: Path) -> bool | None:
    if "do_normalize" not in preprocessor:
        return None
    found = preprocessor["do_normalize"]
    if not isinstance(found, bool):
        raise SettingsError(f"{path}: do_normalize is {found!r}, expected true or false")
    return found
