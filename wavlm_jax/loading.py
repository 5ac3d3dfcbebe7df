"""Loading of weights: the one module that knows every kind of source and finds out which one a path is.

`load_weights` returns numpy arrays, `load` a model that can be called, `fitting_weights` what a training starts from.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from wavlm_jax.config import HeadConfig, Padding, TaskHead, WavLMConfig
from wavlm_jax.convert.bare import LIKE, import_bare, is_named_as
from wavlm_jax.convert.huggingface import import_huggingface
from wavlm_jax.convert.huggingface_files import fetch, is_hub_name
from wavlm_jax.convert.microsoft import import_microsoft
from wavlm_jax.convert.state_dict import state_in
from wavlm_jax.convert.torch_file import read_torch_file
from wavlm_jax.convert.torchaudio import import_torchaudio, is_torchaudio
from wavlm_jax.files import named
from wavlm_jax.lora import BRANCH, LoRASettings, merged
from wavlm_jax.model.heads import HEADS, recognise
from wavlm_jax.model.wavlm import WavLM
from wavlm_jax.settings import SettingsError, read
from wavlm_jax.shapes import SAMPLE_RATE, Params, samples_for
from wavlm_jax.text.vocabulary import files_of_record
from wavlm_jax.training.checkpoint import FOLDER, Manifest, load_stored
from wavlm_jax.training.workdir import absolute, address, exists, list_names, read_bytes
from wavlm_jax.weights import Model, Origin, Weights, ready

_CONFIG = "config.json"
_MAX_LOG = 2**30
_PRETRAINING_HEAD = "head"


def load_weights(
    path: Path | str, step: int | None = None, *, num_attention_heads: int | None = None, like: str | None = None
) -> Weights:
    """The weights in `path`, as numpy arrays on the host.

    Args:
        path: the workdir of one of our runs (a folder or a gs:// address) or one checkpoint in it, LoRA adapters merged
            into the weights; a Hugging Face folder (safetensors or pytorch_model.bin, whole or in shards; WavLM or
            HuBERT, with or without a head); a `.pt` of the authors, of fairseq or UniSpeech; a torchaudio state dict;
            or the name of a model on the Hugging Face hub.
        step: checkpoint of the run; None: the newest that verifies.
        num_attention_heads: of a torchaudio HuBERT, which no tensor tells; None: as in the published model of its
            width.
        like: "base" or "large": the sizes of a state dict that has no config in it or beside it.

    Raises:
        ValueError: none of these, a step of something that has none, a head that `model.heads.HEADS` does not have, or
            a damaged source.
        OSError: files that are missing or cannot be read.

    """
    if like is not None and like not in LIKE:
        raise ValueError(f"like: found {like!r}, expected {' or '.join(LIKE)}")
    if step is None and address(path) is None and (file := named(str(path))).is_file():
        return _from_file(file, num_attention_heads, like)
    if num_attention_heads is not None or like is not None:
        name, kind = (
            ("like", "state dict without a config") if like else ("num_attention_heads", "torchaudio state dict")
        )
        raise ValueError(f"{path}: {name} is for a {kind} alone; other sources tell it")
    return _found(path, step)


def _found(path: Path | str, step: int | None) -> Weights:
    """The weights in anything but a file."""
    if (place := address(path)) is not None:
        return _from_bucket(place, step)
    path = named(str(path))
    if path.is_dir():
        if path.parent.name == FOLDER and path.name.isdecimal() and step is None:
            return _from_run(path.parent.parent, int(path.name))
        if (path / FOLDER).is_dir():
            return _from_run(path, step)
    if step is not None:
        raise ValueError(
            f"{path}: found step {step} for a Hugging Face folder or a file, which has none; expected None"
        )
    if path.is_dir():
        return _from_folder(path)
    if is_hub_name(str(path)):
        return import_huggingface(fetch(str(path)))
    raise ValueError(f"{path}: no such file or folder; {_EXPECTED}")


_EXPECTED = (
    f"no model here; expected the workdir of a run ({FOLDER}/), a Hugging Face folder ({_CONFIG}) or its name on the "
    "hub (organisation/model), or a .pt of the authors', of fairseq or of torchaudio"
)


def _from_folder(path: Path) -> Weights:
    if not (path / _CONFIG).is_file():
        some = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise ValueError(f"{path}: {_EXPECTED}; the folder has {some}")
    return import_huggingface(path)


def _from_file(path: Path, num_attention_heads: int | None, like: str | None) -> Weights:
    value = None if path.suffix == ".safetensors" else read_torch_file(path)
    if is_torchaudio(value) and like is None:
        heads = {} if num_attention_heads is None else {"num_attention_heads": num_attention_heads}
        return import_torchaudio(path, value, **heads)
    if num_attention_heads is not None:
        raise ValueError(f"{path}: num_attention_heads is for a torchaudio state dict alone; other sources tell it")
    state = state_in(value)
    if like is None and not is_named_as("huggingface", state) and _has_config(value):
        return import_microsoft(path, value)
    if like is None and (path.parent / _CONFIG).is_file() and (value is None or is_named_as("huggingface", state)):
        return import_huggingface(path.parent, path)
    return import_bare(path, value, like)


def _has_config(value: Any) -> bool:
    return isinstance(value, dict) and any(value.get(name) is not None for name in ("cfg", "args"))


def _from_bucket(place: str, step: int | None) -> Weights:
    """A run of ours, read from the bucket. Models of other kinds can be read from local files only."""
    workdir, _, last = place.rpartition("/")
    if step is None and last.isdecimal() and workdir.endswith(f"/{FOLDER}"):
        return _from_run(workdir.removesuffix(f"/{FOLDER}"), int(last))
    if FOLDER not in list_names(place):
        raise ValueError(
            f"{place}: no run here (no {FOLDER}/); anything else has to be on this machine: "
            f"gcloud storage cp -r {place} ."
        )
    return _from_run(place, step)


def _from_run(workdir: Path | str, step: int | None) -> Weights:
    manifest, params = load_stored(workdir, step)
    try:
        return _weights_of_run(workdir, manifest, params)
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError, MemoryError) as error:
        raise ValueError(
            f"{workdir}: checkpoint {manifest.step} describes no model ({type(error).__name__}: {error!s:.200}); it is "
            "of another program, or was altered"
        ) from error


def _weights_of_run(workdir: Path | str, manifest: Manifest, params: Mapping[str, Any]) -> Weights:
    if BRANCH in params:
        params = merged(params, read(manifest.config["lora"], LoRASettings, "lora"), np.matmul)
    config = read(manifest.config["model"], WavLMConfig, "model")
    _check_body(config, params["wavlm"], str(workdir))
    beside = {name: part for name, part in params.items() if name not in ("wavlm", _PRETRAINING_HEAD)}
    task = _task_head(manifest.config, beside, str(workdir)) if beside else None
    notes = (f"step {manifest.step} of run {manifest.run_id}",)
    files = {}
    if "vocabulary" in manifest.config:
        files = files_of_record(manifest.config["vocabulary"])
    origin = Origin("run", str(workdir), notes, _facts(workdir, manifest), files, _longest_row(manifest.config))
    return Weights(config, params["wavlm"], params.get(_PRETRAINING_HEAD), task, origin)


def _check_body(config: WavLMConfig, body: Params, where: str) -> None:
    """Whether the parameters are those of the config, found without computing anything."""
    found, geometry = shapes_of(body), config.geometry
    if len(config.conv_dim) > len(found):
        raise ValueError(
            f"{where}: config.model asks for {len(config.conv_dim)} conv layers, it has {len(found)} arrays"
        )
    wave = jax.ShapeDtypeStruct((1, samples_for(1, geometry)), np.float32)
    expected = shapes_of(jax.eval_shape(WavLM(config).init, jax.random.key(0), wave)["params"])
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{where}: {name} has the shape {found.get(name)}, but its config.model asks for {expected.get(name)}; "
                "the run was altered"
            )


def _task_head(config: Mapping[str, Any], params: Mapping[str, Any], where: str) -> TaskHead:
    """The head of a fine-tuned run, whose parameters stand beside the encoder's.

    Raises:
        ValueError: a head that no row of `model.heads.HEADS` describes, or one of an earlier version that is gone.

    """
    kind = recognise(params, where)
    section = {key: value for key, value in config["head"].items() if key not in _FORMER_FIELDS}
    for key, value in _FORMER_FIELDS.items():
        if (found := config["head"].get(key, value)) != value:
            raise ValueError(f"{where}: config.head.{key} is {found!r}, which this version no longer computes")
    field, path = HEADS[kind].size  # what the data decide is not in the config of every run: the parameters tell it
    sized: Any = params
    for name in path.split("/"):
        sized = sized[name]
    labels = tuple(config["classes"]) if "classes" in config else None
    return TaskHead(kind, read({**section, field: sized.shape[-1]}, HeadConfig, "head"), params, labels)


_FORMER_FIELDS = {"ecapa_global_context": False}
"""Fields of HeadConfig in the configs of older runs -> the one value that still means something."""


def _facts(workdir: Path | str, manifest: Manifest) -> dict[str, str]:
    """For the model card: what was trained, how long, on what, and the last evaluation up to this step."""
    facts = {"updates": f"{manifest.step} of {_at(manifest.config, 'train', 'num_steps')}"}
    facts |= {"task": _at(manifest.config, "task"), "training data": _at(manifest.config, "data", "train")}
    for name, fingerprint in manifest.fingerprints.items():
        facts[f"fingerprint of {name}"] = fingerprint
    log = f"{absolute(workdir)}/metrics.jsonl"
    if exists(log):
        for line in read_bytes(log, _MAX_LOG).decode(errors="replace").splitlines():
            values = _line(line)
            kind, step = str(values.pop("kind", "")), values.pop("step", None)
            if kind.startswith("eval/") and isinstance(step, int) and step <= manifest.step:
                values = {"step": step, **values}
                facts["last evaluation"] = ", ".join(f"{key} {value!s:.80}" for key, value in values.items())
    return facts


def _longest_row(stored: Mapping[str, Any]) -> float | None:
    """Seconds of the training's largest bucket, which counts standard frames (`data.batches`); None: unknown."""
    buckets = stored["batch"].get("buckets") if isinstance(stored.get("batch"), dict) else None
    if not buckets:
        return None
    return samples_for(max(buckets)) / SAMPLE_RATE


def _at(config: Any, *keys: str) -> str:
    """A value of a stored config as text; "unknown" where an older version had none."""
    for key in keys:
        config = config[key] if isinstance(config, dict) and key in config else "unknown"
    return str(config)


def _line(text: str) -> dict[str, Any]:
    """A line of metrics.jsonl; {} for one that a running training has not finished writing."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def fitting_weights(path: str, step: int | None, model: WavLMConfig, body: Params) -> Weights:
    """What `config.init.path` holds.

    Args:
        path: workdir of an earlier run, or a checkpoint of any kind that `load_weights` reads.
        step: checkpoint of the run; None: its newest.
        model: `config.model`.
        body: fresh parameters of it, or their shapes.

    Raises:
        SettingsError: it computes another function, or has other parameters; the first that differ are named.

    """
    weights = load_weights(Path(path), step)
    if lines := model.another_function(weights.config):
        raise SettingsError(f"config.init.path: {path} is another model: {'; '.join(lines)}")
    expected, given = shapes_of(body), shapes_of(weights.params)
    differing = [name for name in sorted({*expected, *given}) if expected.get(name) != given.get(name)]
    if differing:
        found = [f"{name}: found {given.get(name)}, expected {expected.get(name)}" for name in differing[:8]]
        raise SettingsError(
            f"config.init.path: {path} is no model of config.model; {len(differing)} parameters differ:\n  "
            + "\n  ".join(found)
        )
    return weights


def shapes_of(tree: Params) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every array."""
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def load(
    path: Path | str,
    padding: Padding | None = None,
    *,
    step: int | None = None,
    num_attention_heads: int | None = None,
    like: str | None = None,
) -> Model:
    """The model in `path`, on the default device and ready to be called.

    Args:
        path: see `loading.load_weights`.
        padding: overrides the source's convention: "exact", "huggingface" or "microsoft" (docs/parity.md).
        step: checkpoint of a run; None: the newest that verifies.
        num_attention_heads: see `loading.load_weights`.
        like: see `loading.load_weights`.

    Raises:
        ValueError: see `loading.load_weights`; a padding that there is not; heads of a source that tells them itself.

    """
    weights = load_weights(path, step, num_attention_heads=num_attention_heads, like=like)
    if padding is not None:
        weights = dataclasses.replace(weights, config=dataclasses.replace(weights.config, padding=padding))
    return ready(weights)
