"""Hugging Face folders, in and out, without torch: models alone and with any head, tensor by tensor.

What is written loads with transformers' class of the same name. What such a folder has no place for stands beside it,
and is ignored by transformers: conventions in wavlm_jax.json, the pre-training head in pretraining_head.safetensors
(tensors named and laid out as in the authors' checkpoints).
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from wavlm_jax.config import MAX_SIZE, Compat, HeadConfig, Padding, States, TaskHead, WavLMConfig
from wavlm_jax.convert.huggingface_files import WEIGHTS, open_safetensors, open_weights, write_safetensors
from wavlm_jax.convert.state_dict import (
    ENCODER,
    HEAD_NAMES,
    ConversionError,
    Precision,
    StoredTensor,
    Tensors,
    from_torch,
    head_tensors,
    read_float32,
    read_head,
    to_torch,
)
from wavlm_jax.files import read_json, write_bytes, write_json
from wavlm_jax.model.heads import HEADS, recognise, tree_shapes
from wavlm_jax.settings import SettingsError, convert, read
from wavlm_jax.shapes import SAMPLE_RATE
from wavlm_jax.text.vocabulary import tokenizer_files
from wavlm_jax.weights import Origin, Weights

CONFIG, PREPROCESSOR, CONVENTIONS = "config.json", "preprocessor_config.json", "wavlm_jax.json"
_PROCESSOR, _EXTRACTORS = "processor_config.json", ("feature_extractor", "audio_processor")
"""Where transformers 5 writes the feature extractor: a file, and the key in it that holds what PREPROCESSOR held."""
_EXTRACTOR_DEFAULTS = {
    "do_normalize": True,
    "padding_side": "right",
    "padding_value": 0,
    "return_attention_mask": False,
}
_EXTRACTOR_ONLY = {
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "feature_size": 1,
    "sampling_rate": SAMPLE_RATE,
}
"""Of the feature extractor: transformers' defaults, and fields that have one supported value."""
_PRETRAINING_HEAD = "pretraining_head.safetensors"
_FORMAT = 1
_MASK_VECTOR = "masked_spec_embed"
_POSITIONS, _BATCH_NORM_EPS = "encoder.pos_conv_embed.", 1e-5
_PREFIXES = (f"{ENCODER}.", "hubert.")

_CONVENTIONS = ("padding", "normalize_eps", "feature_grad_mult", "layerdrop_first")
"""Fields of WavLMConfig that transformers does not have; those of HeadConfig are the next."""
_HEAD_CONVENTIONS = ("compat", "layer_sum_states")
_UNKNOWN_THERE = ("ecapa_dim", "ecapa_output_dim")
"""Fields of a head that transformers has no class for."""
_NOT_STORED = (*_HEAD_CONVENTIONS, *_UNKNOWN_THERE, "num_labels")
"""Fields of HeadConfig that are neither written to a config.json nor read from one; the labels tell their number."""
_CONCERNS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("pad_token_id", "final_dropout", "ctc_loss_reduction"), ("WavLMForCTC",)),
    **dict.fromkeys(("tdnn_dim", "tdnn_kernel", "tdnn_dilation", "xvector_output_dim"), ("WavLMForXVector",)),
    "classifier_proj_size": ("WavLMForSequenceClassification",),
}
"""Fields of HeadConfig that only some kinds of heads read; in a config.json of others they may be anything."""
_HEAD_DEFAULTS: dict[str, Any] = {"compat": "huggingface", "ctc_loss_reduction": "mean"}
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
        if self.format != _FORMAT:
            raise ValueError(f"format: found {self.format}, this version reads {_FORMAT}; install a newer wavlm_jax")

    def chosen(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Some of the fields."""
        return {name: getattr(self, name) for name in names}


def import_huggingface(folder: Path, file: Path | None = None) -> Weights:
    """The model in a Hugging Face folder, or in one of ours.

    Args:
        folder: holds config.json and the weights (model.safetensors, pytorch_model.bin, or shards of either with their
            index), and may hold processor_config.json or preprocessor_config.json, a vocabulary, and what we write
            beside these.
        file: the weights that are wanted, where the folder has several; None: as transformers chooses.

    Raises:
        FileNotFoundError: no config.json or weights, naming what the folder has instead.
        HostileFile, DamagedFile: a file that is not what it should be.
        ConversionError: weights that do not fit the config; tensors are named.
        ValueError: a config that this model does not do, naming the key.

    """
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder / CONFIG}: no such file; expected the folder of a Hugging Face model")
    left_out: list[str] = []
    path, found = open_weights(folder, file, left_out)
    found = _our_names(found, path)
    values = read_json(folder / CONFIG)
    kind = _kind(found, values, path)
    conventions = None
    if (folder / CONVENTIONS).is_file():
        conventions = read(read_json(folder / CONVENTIONS), Conventions, str(folder / CONVENTIONS))
    config = _config(values, folder, conventions, has_head=kind is not None)
    num_labels = _num_labels(kind, found, path)
    head = None if kind is None else _head_config(values, folder / CONFIG, kind, num_labels, conventions)
    _check_counts(config, head, len(found), folder / CONFIG)
    absent = {}
    if (name := _prefix(kind) + _MASK_VECTOR) not in found:
        # transformers does not make the vector where the config never masks; else it draws a new one
        absent[name] = np.zeros(config.hidden_size, np.float32)
        if _has_mask_vector(config):
            left_out.append(f"filled with zeros: {_MASK_VECTOR}, which the file does not have; only masking reads it")
    if config.conv_pos_batch_norm:
        tensors: Tensors = _folded(found, _prefix(kind) + _POSITIONS, path)
    else:
        tensors = found
    tree = from_torch(tensors, tree_shapes(config, kind, head), path, absent=absent)
    task = None
    if kind is not None and head is not None:
        params = tree.pop(ENCODER)
        task, tree = TaskHead(kind, head, tree, _labels(values, num_labels, folder / CONFIG)), params
    origin = Origin(
        "huggingface",
        str(folder),
        (*_notes(config, task, conventions), *_extractor_notes(folder), *left_out),
        files=tokenizer_files(folder),
    )
    return Weights(config, tree, _pretraining_head(folder, config.hidden_size), task, origin)


def _our_names(found: Mapping[str, StoredTensor], path: Path) -> dict[str, StoredTensor]:
    """The tensors under the names that `places` gives: the encoder's have the prefix `wavlm.` where there is a head."""
    prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in found)), "")
    if not prefix:
        return dict(found)
    ours = _PREFIXES[0] if any(not name.startswith(prefix) for name in found) else ""
    named = {re.sub(f"^{prefix}", ours, name): tensor for name, tensor in found.items()}
    if len(named) != len(found):
        raise ConversionError(f"{path}: has tensors with and without {prefix} before the same name")
    return named


def _folded(found: Mapping[str, StoredTensor], prefix: str, path: Path) -> dict[str, StoredTensor | np.ndarray]:
    """The tensors of a HuBERT with batch norm as ours: a scale and a shift, and a convolution that is weight-normed."""
    names = ("conv.weight", *(f"batch_norm.{name}" for name in ("weight", "bias", "running_mean", "running_var")))
    if missing := [prefix + name for name in names if prefix + name not in found]:
        raise ConversionError(f"{path}: conv_pos_batch_norm is true in {CONFIG}; missing: {', '.join(missing)}")
    kernel, weight, bias, mean, variance = (read_float32(name, found[prefix + name], path) for name in names)
    scale = weight / np.sqrt(variance + np.float32(_BATCH_NORM_EPS))
    made = {
        "batch_norm.weight": scale,
        "batch_norm.bias": bias - mean * scale,
        "conv.parametrizations.weight.original1": kernel,
    }
    made["conv.parametrizations.weight.original0"] = _tap_norms(kernel)
    others = {name: tensor for name, tensor in found.items() if name.removeprefix(prefix) not in names}
    return others | {prefix + name: tensor for name, tensor in made.items()}


def _unfolded(tensors: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The other way round: a batch norm whose statistics are 0 and 1."""
    gain, kernel = (tensors.pop(f"{prefix}conv.parametrizations.weight.original{part}") for part in (0, 1))
    width = np.zeros(len(kernel), np.float32)
    return tensors | {
        f"{prefix}conv.weight": kernel * (gain / _tap_norms(kernel)),
        f"{prefix}batch_norm.running_mean": width,
        f"{prefix}batch_norm.running_var": width + np.float32(1 - _BATCH_NORM_EPS),
    }


def _tap_norms(kernel: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(kernel).sum(axis=(0, 1), keepdims=True))


def _kind(names: Tensors, values: Mapping[str, Any], path: Path) -> str | None:
    """The class of the model; None: an encoder alone.

    Where the tensors show that there is a head, the class that config.json names is taken, or else the one whose head
    has tensors of these names.
    """
    modules = {name.split(".")[0] for name in names}
    if ENCODER not in modules or modules == {ENCODER}:
        return None
    match values.get("architectures"):
        case [str(name)] if (kind := name.replace("Hubert", "WavLM", 1)) in HEADS and HEADS[kind].transformers:
            return kind
    return recognise(modules - {ENCODER}, str(path))


def _num_labels(kind: str | None, found: Tensors, path: Path) -> int | None:
    """Number of classes, from the shapes of the weights; None for CTC, whose characters are in the config."""
    if kind is None or HEADS[kind].size[0] != "num_labels":
        return None
    name = HEADS[kind].size[1].replace("/", ".")
    name, axis = (name.replace(".kernel", ".weight"), 0) if name.endswith(".kernel") else (name, 1)
    if name not in found or len(found[name].shape) != 2:  # noqa: PLR2004
        raise ConversionError(f"{path}: {name} is missing or no matrix; it tells the number of classes")
    return found[name].shape[axis]


def _config(values: dict[str, Any], folder: Path, conventions: Conventions | None, *, has_head: bool) -> WavLMConfig:
    """The encoder that config.json describes; without `conventions` it follows transformers' own."""
    if has_head:  # the adapter is the head's business; an encoder alone has none here
        values = {key: value for key, value in values.items() if key != "add_adapter"}
    path, extractor = _feature_extractor(folder)
    do_normalize = None if path is None else extractor.get("do_normalize", True)
    if do_normalize is not None and not isinstance(do_normalize, bool):
        raise SettingsError(f"{path}: do_normalize is {do_normalize!r}, expected true or false")
    for key, allowed in _EXTRACTOR_ONLY.items():
        if (found := extractor.get(key, allowed)) != allowed:
            raise SettingsError(f"{path}: {key} is {found!r}; this model only takes {allowed!r}")
    typed = _typed(values, WavLMConfig, folder / CONFIG)
    config = WavLMConfig.from_huggingface(values | typed, do_normalize=do_normalize)
    return config if conventions is None else dataclasses.replace(config, **conventions.chosen(_CONVENTIONS))


def config_of(folder: Path) -> WavLMConfig:
    """The encoder that a folder's config.json describes, for weights that are somewhere else.

    Raises:
        ValueError: see `import_huggingface`.

    """
    return _config(read_json(folder / CONFIG), folder, None, has_head=True)


def _feature_extractor(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """The file that describes the feature extractor, and its fields; (None, {}): no file does.

    As in transformers 5: what processor_config.json holds is taken where both files have it, missing fields have the
    defaults of `Wav2Vec2FeatureExtractor`, so `do_normalize` is true.
    """
    if (path := folder / _PROCESSOR).is_file():
        values = read_json(path)
        key = next((key for key in _EXTRACTORS if key in values), None)
        found = None if key is None else values[key]
        if found is not None and not isinstance(found, dict):
            raise SettingsError(f"{path}: {key} is a {type(found).__name__}, expected an object")
        if found is not None:
            return path, found
    path = folder / PREPROCESSOR
    return (path, read_json(path)) if path.is_file() else (None, {})


def _extractor_notes(folder: Path) -> list[str]:
    """Where the two files of the feature extractor contradict each other, or ask for what is done otherwise here."""
    path, taken = _feature_extractor(folder)
    notes, older = [], folder / PREPROCESSOR
    if path is not None and path != older and older.is_file():
        other = read_json(older)
        notes += [
            f"{key} is {taken.get(key, default)!r} in {path.name} and {other.get(key, default)!r} in {older.name}; the "
            "first is taken, as in transformers 5 (transformers 4 takes the second)"
            for key, default in _EXTRACTOR_DEFAULTS.items()
            if taken.get(key, default) != other.get(key, default)
        ]
    if path is None:
        notes.append(f"no {PREPROCESSOR}: waves are normalised where the conv encoder has layer norms, else not")
    if taken.get("padding_side", "right") != "right" or taken.get("padding_value", 0) != 0:
        notes.append("rows of a batch are padded on the right with zeros, whatever padding_side and padding_value say")
    return notes


def _head_config(
    values: Mapping[str, Any], path: Path, kind: str, num_labels: int | None, conventions: Conventions | None
) -> HeadConfig:
    """The head that config.json describes; `num_labels` None: no classes (CTC).

    Fields of other kinds of heads are kept for an export where all of them are sound, and left out else.
    """
    foreign = {key for key, kinds in _CONCERNS.items() if kind not in kinds}
    stored = {key: value for key, value in values.items() if key not in _NOT_STORED}
    if stored.get("ctc_loss_reduction") == "none":  # torch's third kind, one loss per row; only training asks
        del stored["ctc_loss_reduction"]
    fixed: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
    if conventions is not None:
        fixed |= conventions.chosen(_HEAD_CONVENTIONS)
    try:
        return HeadConfig(**(_HEAD_DEFAULTS | _typed(stored, HeadConfig, path) | fixed))
    except ValueError:
        own = {key: value for key, value in stored.items() if key not in foreign}
    fields = _HEAD_DEFAULTS | _typed(own, HeadConfig, path) | fixed
    try:
        return HeadConfig(**fields)
    except ValueError as error:
        raise SettingsError(f"{path}: {error}") from error


def _labels(values: Mapping[str, Any], num_labels: int | None, path: Path) -> tuple[str, ...] | None:
    """Names of the classes, where config.json has one for each."""
    stored = values.get("id2label")
    if stored is None or num_labels is None:
        return None
    if not isinstance(stored, dict) or not all(isinstance(name, str) for name in stored.values()):
        raise SettingsError(f"{path}: id2label is no map from numbers to names")
    if set(stored) != {str(number) for number in range(num_labels)}:
        return None
    return tuple(stored[str(number)] for number in range(num_labels))


def _typed(values: Mapping[str, Any], kind: type, path: Path) -> dict[str, Any]:
    """Those of `values` that are fields of the dataclass `kind`, of the field's type and of sane size.

    Raises:
        SettingsError: another type, or a number above a million; the key is named.

    """
    hints = get_type_hints(kind)
    where = path.name.removeprefix("config.")  # settings' messages begin with "config."
    known = {key: convert(value, hints[key], f"{where}.{key}") for key, value in values.items() if key in hints}
    for key, value in known.items():
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, int) and abs(number) > MAX_SIZE for number in numbers):
            raise SettingsError(f"{path}: {key} is {str(value)[:80]}, expected at most {MAX_SIZE}")
    return known


def _check_counts(config: WavLMConfig, head: HeadConfig | None, num_tensors: int, path: Path) -> None:
    """Refuses a config with more layers than there are tensors, before any memory is reserved."""
    counts = {"num_hidden_layers": config.num_hidden_layers, "conv_dim": len(config.conv_dim)}
    if head is not None:
        counts |= {"num_adapter_layers": head.num_adapter_layers * head.add_adapter, "tdnn_dim": len(head.tdnn_dim)}
    for key, count in counts.items():
        if count > num_tensors:
            raise ConversionError(f"{path}: {key} asks for {count} layers, the weights have {num_tensors} tensors")


def _pretraining_head(folder: Path, width: int) -> dict[str, Any] | None:
    path = folder / _PRETRAINING_HEAD
    if not path.is_file():
        return None
    found = open_safetensors(path)
    if set(found) != set(HEAD_NAMES):
        raise ConversionError(f"{path}: has {', '.join(sorted(found))[:200]}, expected {', '.join(HEAD_NAMES)}")
    return read_head({name: found[name] for name in HEAD_NAMES}, width, path)


def _notes(config: WavLMConfig, task: TaskHead | None, conventions: Conventions | None) -> tuple[str, ...]:
    if conventions is not None:
        return conventions.notes
    notes = ["conventions are transformers', as the folder says nothing else"]
    if task is not None and task.config.use_weighted_layer_sum and config.do_stable_layer_norm:
        notes.append(
            "the average of layers takes the last state raw, as transformers 5 does; a head that was trained with "
            "transformers 4 or s3prl wants head.layer_sum_states = 'normed'"
        )
    return tuple(notes)


def export_huggingface(weights: Weights, folder: Path, dtype: Precision = "float32") -> None:
    """Writes the model as a new Hugging Face folder. `wavlm_jax.export` proves that it is right.

    Args:
        weights: what is written; parameters on any device.
        folder: made; it must not exist, or be empty.
        dtype: of the numbers in the file.

    Raises:
        ConversionError: parameters that do not fit the config or the dtype, or a head that transformers has no place
            for.
        FileExistsError: there is something in `folder`.

    """
    tensors, config = huggingface_tensors(weights), weights.config
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).open("xb").close()
    write_json(folder / CONFIG, config_json(config, weights.task, dtype))
    write_json(folder / PREPROCESSOR, _preprocessor_json(config))
    write_json(folder / CONVENTIONS, _conventions_json(weights))
    if weights.task is not None:
        for name, content in weights.origin.files.items():
            write_bytes(folder / name, content)
    if weights.head is not None:
        path = folder / _PRETRAINING_HEAD
        write_safetensors(path, head_tensors(weights.head, config.hidden_size, path), dtype)
    write_safetensors(folder / WEIGHTS, tensors, dtype)


def huggingface_tensors(weights: Weights) -> dict[str, np.ndarray]:
    """Transformers' state dict of the model: float32 views.

    Raises:
        ConversionError: parameters that do not fit the config, or a head that transformers has no place for.

    """
    config, task = weights.config, weights.task
    kind, head = (task.kind, task.config) if task is not None else (None, None)
    _check_place(kind, head, config)
    tensors = to_torch(weights.tree, tree_shapes(config, kind, head))
    if not _has_mask_vector(config):
        del tensors[_prefix(kind) + _MASK_VECTOR]
    if config.conv_pos_batch_norm:
        tensors = _unfolded(tensors, _prefix(kind) + _POSITIONS)
    if not config.position_bias:
        tensors = {re.sub(r"^wavlm\.", "hubert.", name): tensor for name, tensor in tensors.items()}
    return tensors


def _check_place(kind: str | None, head: HeadConfig | None, config: WavLMConfig) -> None:
    """Refuses a model for which transformers has no class."""
    if kind is None or head is None:
        return
    row = HEADS[kind]
    if not row.transformers:
        raise ConversionError(f"transformers has no class like our {kind}; a run of ours is read as it is")
    if head.use_weighted_layer_sum and head.compat != "huggingface" and not row.module.averages_in_transformers:
        raise ConversionError(f"head.use_weighted_layer_sum: transformers' {kind} has no layer weights")
    if not config.position_bias and ("Hubert" not in row.transformers or head.add_adapter):
        raise ConversionError(f"transformers has no HuBERT that is like our {kind} (adapter: {head.add_adapter})")


def _has_mask_vector(config: WavLMConfig) -> bool:
    return config.mask_time_prob > 0 or config.mask_feature_prob > 0


def _prefix(kind: str | None) -> str:
    return "" if kind is None else _PREFIXES[0]


def config_json(config: WavLMConfig, task: TaskHead | None, dtype: str) -> dict[str, Any]:
    """The config.json that transformers reads as this model."""
    values = config.to_huggingface() | {"dtype": dtype}
    return values if task is None else values | _head_values(task, config)


def _preprocessor_json(config: WavLMConfig) -> dict[str, Any]:
    """The preprocessor_config.json of transformers' feature extractor, which normalises as training did."""
    return {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "do_normalize": config.do_normalize,
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
        "sampling_rate": SAMPLE_RATE,
    }


def _conventions_json(weights: Weights) -> dict[str, Any]:
    """The wavlm_jax.json of a model."""
    config, head, origin = weights.config, weights.task.config if weights.task else HeadConfig(), weights.origin
    fields = {name: getattr(config, name) for name in _CONVENTIONS}
    fields |= {name: getattr(head, name) for name in _HEAD_CONVENTIONS}
    return dataclasses.asdict(Conventions(format=_FORMAT, source=origin.dialect, notes=origin.notes, **fields))


def _head_values(task: TaskHead, config: WavLMConfig) -> dict[str, Any]:
    head = {key: value for key, value in dataclasses.asdict(task.config).items() if key not in _NOT_STORED}
    head["output_hidden_size"] = head["output_hidden_size"] or config.hidden_size
    if head["problem_type"] is None:
        del head["problem_type"]
    if not config.position_bias:  # transformers' HuBERT has neither
        head = {key: value for key, value in head.items() if "adapter" not in key and key != "output_hidden_size"}
    values = head | {"architectures": [task.kind if config.position_bias else task.kind.replace("WavLM", "Hubert")]}
    if HEADS[task.kind].size[0] != "num_labels":
        return values
    labels = task.labels or tuple(f"LABEL_{number}" for number in range(task.config.num_labels))
    return values | {
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
    }
