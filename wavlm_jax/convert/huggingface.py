"""What a Hugging Face folder says about a model in JSON: config.json, preprocessor_config.json, and our wavlm_jax.json.

The last one holds what Hugging Face has no place for; whoever does not know it loses nothing that transformers has.

The pre-training head in a safetensors file of its own, beside a Hugging Face folder, which has no place for it.

Tensors are named and laid out as in the authors' checkpoints: `final_proj.weight`, `final_proj.bias`,
`label_embs_concat` (clusters x final_dim, with fairseq's four special rows where the model has them).

Hugging Face folders, in and out, without torch: models alone and with any head, tensor by tensor.

What is written loads with transformers' class of the same name. What such a folder has no place for stands beside it:
conventions in wavlm_jax.json, the pre-training head in pretraining_head.safetensors.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from wavlm_jax.config import Compat, HeadConfig, Padding, States, TaskHead, WavLMConfig
from wavlm_jax.convert.huggingface_files import WEIGHTS, open_safetensors, open_weights, write_safetensors
from wavlm_jax.convert.state_dict import (
    ConversionError,
    Precision,
    Source,
    Sources,
    as_in_torch,
    fill,
    match,
    places,
    read_head,
)
from wavlm_jax.files import read_json, write_bytes, write_json
from wavlm_jax.model.heads import HEADS, recognise, tree_shapes
from wavlm_jax.settings import SettingsError, convert, read
from wavlm_jax.shapes import SAMPLE_RATE, Params
from wavlm_jax.text.vocabulary import tokenizer_files
from wavlm_jax.weights import Origin, Weights

CONFIG, PREPROCESSOR, CONVENTIONS = "config.json", "preprocessor_config.json", "wavlm_jax.json"
FORMAT = 1
_MAX_SIZE = 2**20
"""No size in a config is larger; what is, would only fill the memory."""

_OURS = ("compat", "layer_sum_states")
"""Fields of HeadConfig that transformers does not have."""
_UNKNOWN_THERE = ("ecapa_dim", "ecapa_output_dim")
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
        values | _typed(values, WavLMConfig, path), do_normalize=_do_normalize(preprocessor, folder / PREPROCESSOR)
    )
    if conventions is None:
        return config
    names = ("padding", "normalize_eps", "feature_grad_mult", "layerdrop_first")
    return dataclasses.replace(config, **{name: getattr(conventions, name) for name in names})


def read_head_config(folder: Path, num_labels: int | None, conventions: Conventions | None) -> HeadConfig:
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
    values = {**_HEAD_DEFAULTS, **_typed(stored, HeadConfig, path)}
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
    config, head = weights.config, weights.task.config if weights.task else HeadConfig()
    conventions = Conventions(
        format=FORMAT,
        padding=config.padding,
        normalize_eps=config.normalize_eps,
        feature_grad_mult=config.feature_grad_mult,
        layerdrop_first=config.layerdrop_first,
        compat=head.compat,
        layer_sum_states=head.layer_sum_states,
        source=weights.origin.dialect,
        notes=weights.origin.notes,
    )
    return dataclasses.asdict(conventions)


def _head_values(task: TaskHead, config: WavLMConfig) -> dict[str, Any]:
    head = {key: value for key, value in dataclasses.asdict(task.config).items() if key not in _NOT_STORED}
    head["output_hidden_size"] = head["output_hidden_size"] or config.hidden_size
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
        if any(isinstance(number, int) and abs(number) > _MAX_SIZE for number in numbers):
            raise SettingsError(f"{path}: {key} is {str(value)[:80]}, expected at most {_MAX_SIZE}")
    return known


def _do_normalize(preprocessor: Mapping[str, Any], path: Path) -> bool | None:
    if "do_normalize" not in preprocessor:
        return None
    found = preprocessor["do_normalize"]
    if not isinstance(found, bool):
        raise SettingsError(f"{path}: do_normalize is {found!r}, expected true or false")
    return found


PRETRAINING_HEAD = "pretraining_head.safetensors"
NAMES = ("final_proj.weight", "final_proj.bias", "label_embs_concat")


def head_tensors(head: Params, width: int, path: Path) -> dict[str, np.ndarray]:
    """The head in the authors' names and layouts, float32.

    Raises:
        ConversionError: parts that do not fit each other or an encoder of this width, or that are not finite.

    """
    projection = head["final_proj"]
    arrays = (np.asarray(projection["kernel"]).T, projection["bias"], head["label_embeddings"])
    tensors = {name: np.asarray(array, np.float32) for name, array in zip(NAMES, arrays, strict=True)}
    sources = (Source(name, tensor.shape, partial(np.asarray, tensor)) for name, tensor in tensors.items())
    read_head(*sources, width=width, path=path)
    return tensors


def write_pretraining_head(head: Params, folder: Path, width: int, dtype: Precision) -> None:
    """Writes the file into `folder`.

    Raises:
        ConversionError: see `head_tensors`, and numbers that `dtype` has no room for.

    """
    path = folder / PRETRAINING_HEAD
    write_safetensors(path, head_tensors(head, width, path), dtype)


def read_pretraining_head(folder: Path, width: int) -> Mapping[str, Any] | None:
    """The head beside a model of this width; None where there is none.

    Raises:
        DamagedFile, ConversionError: a file that cannot be read, or a head that does not fit.

    """
    path = folder / PRETRAINING_HEAD
    if not path.is_file():
        return None
    found = open_safetensors(path)
    if set(found) != set(NAMES):
        raise ConversionError(f"{path}: has {', '.join(sorted(found))[:200]}, expected {', '.join(NAMES)}")
    return read_head(*(found[name] for name in NAMES), width=width, path=path)


_MASK_VECTOR = "masked_spec_embed"
_PREFIXES = ("wavlm.", "hubert.")


def import_huggingface(folder: Path) -> Weights:
    """The model in a Hugging Face folder, or in one of ours.

    Args:
        folder: holds config.json and the weights (model.safetensors, pytorch_model.bin, or shards of either with their
            index), and may hold preprocessor_config.json, a vocabulary, and what we write beside these.

    Raises:
        FileNotFoundError: no config.json or weights, naming what the folder has instead.
        HostileFile, DamagedFile: a file that is not what it should be.
        ConversionError: weights that do not fit the config; tensors are named.
        ValueError: a config that this model does not do, naming the key.

    """
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder / CONFIG}: no such file; expected the folder of a Hugging Face model")
    path, found = open_weights(folder)
    sources = _our_names(found, path)
    kind = _kind(sources, architecture(folder), path)
    conventions = read_conventions(folder)
    config = read_config(folder, conventions, has_head=kind is not None)
    num_labels = _num_labels(kind, sources, path)
    head = None if kind is None else read_head_config(folder, num_labels, conventions)
    _check_counts(config, head, len(sources), folder / CONFIG)
    tree = _fill(sources, config, kind, tree_shapes(config, kind, head), path)
    task = None
    if kind is not None and head is not None:
        params = tree.pop("wavlm")
        task, tree = TaskHead(kind, head, tree, read_labels(folder, num_labels)), params
    return Weights(
        config,
        tree,
        read_pretraining_head(folder, config.hidden_size),
        task,
        Origin("huggingface", str(folder), _notes(config, task, conventions), files=tokenizer_files(folder)),
    )


def export_huggingface(weights: Weights, folder: Path, dtype: Precision = "float32") -> None:
    """Writes the model as a new Hugging Face folder. Whether it is good is for `verify` to say.

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
        write_pretraining_head(weights.head, folder, config.hidden_size, dtype)
    write_safetensors(folder / WEIGHTS, tensors, dtype)


def huggingface_tensors(weights: Weights) -> dict[str, np.ndarray]:
    """Transformers' state dict of the model: float32 views.

    Raises:
        ConversionError: parameters that do not fit the config, or a head that transformers has no place for.

    """
    kind, head, config = _kind_of(weights), weights.task.config if weights.task else None, weights.config
    _check_place(kind, head, config)
    tensors = as_in_torch(weights.tree, tree_shapes(config, kind, head))
    if not _has_mask_vector(config):
        del tensors[_prefix(kind) + _MASK_VECTOR]
    if not config.position_bias:
        tensors = {re.sub(r"^wavlm\.", "hubert.", name): tensor for name, tensor in tensors.items()}
    return tensors


def _kind_of(weights: Weights) -> str | None:
    return None if weights.task is None else weights.task.kind


def _prefix(kind: str | None) -> str:
    return "" if kind is None else "wavlm."


def _check_place(kind: str | None, head: HeadConfig | None, config: WavLMConfig) -> None:
    """Whether transformers has a class that computes this."""
    if kind is None or head is None:
        return
    row = HEADS[kind]
    if not row.transformers:
        raise ConversionError(f"transformers has no class like our {kind}; a run of ours is read as it is")
    if head.use_weighted_layer_sum and head.compat != "huggingface" and not row.module.averages_in_transformers:
        raise ConversionError(f"head.use_weighted_layer_sum: transformers' {kind} has no layer weights")
    if not config.position_bias and ("Hubert" not in row.transformers or head.add_adapter):
        raise ConversionError(f"transformers has no HuBERT that is like our {kind} (adapter: {head.add_adapter})")


def _our_names(found: Mapping[str, Source], path: Path) -> dict[str, Source]:
    """The tensors under the names of our walk: the encoder of a model with a head under `wavlm.`, alone under none."""
    prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in found)), "")
    if not prefix:
        return dict(found)
    has_head = any(not name.startswith(prefix) for name in found)
    named = {re.sub(f"^{prefix}", "wavlm." if has_head else "", name): source for name, source in found.items()}
    if len(named) != len(found):
        raise ConversionError(f"{path}: has tensors with and without {prefix} before the same name")
    return named


def _kind(names: Mapping[str, Source], said: str | None, path: Path) -> str | None:
    """Which class has tensors of these names; the config's word counts where there are some of a head."""
    modules = {name.split(".")[0] for name in names}
    if "wavlm" not in modules or modules == {"wavlm"}:
        return None
    return said if said in HEADS and HEADS[said].transformers else recognise(modules - {"wavlm"}, str(path))


def _num_labels(kind: str | None, sources: Mapping[str, Source], path: Path) -> int | None:
    """Classes, as the weights have them; None for CTC, whose characters are in the config."""
    if kind is None or HEADS[kind].size[0] != "num_labels":
        return None
    name = HEADS[kind].size[1].replace("/", ".")
    name, axis = (name.replace(".kernel", ".weight"), 0) if name.endswith(".kernel") else (name, 1)
    if name not in sources or len(sources[name].shape) != 2:  # noqa: PLR2004
        raise ConversionError(f"{path}: {name} is missing or no matrix; it tells the number of classes")
    return sources[name].shape[axis]


def _check_counts(config: WavLMConfig, head: HeadConfig | None, num_tensors: int, path: Path) -> None:
    """Nothing is laid out for more layers than there are tensors."""
    counts = {"num_hidden_layers": config.num_hidden_layers, "conv_dim": len(config.conv_dim)}
    if head is not None:
        counts |= {"num_adapter_layers": head.num_adapter_layers * head.add_adapter, "tdnn_dim": len(head.tdnn_dim)}
    for key, count in counts.items():
        if count > num_tensors:
            raise ConversionError(f"{path}: {key} asks for {count} layers, the weights have {num_tensors} tensors")


def _fill(
    sources: Mapping[str, Source], config: WavLMConfig, kind: str | None, shapes: Params, path: Path
) -> dict[str, Any]:
    name, width = _prefix(kind) + _MASK_VECTOR, config.hidden_size
    if not _has_mask_vector(config) and name not in sources:
        # transformers does not make the vector where the config never masks; neither will anyone read it here.
        sources = {**sources, name: Source(name, (width,), lambda: np.zeros(width, np.float32))}
    match(sources, {place.name: place.shape for place in places(shapes)}, path)
    return fill(Sources(sources, path), shapes)


def _has_mask_vector(config: WavLMConfig) -> bool:
    return config.mask_time_prob > 0 or config.mask_feature_prob > 0


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
