"""Compares our model with transformers' own, on a clip and a padded batch: python -m wavlm_jax.convert.compare X.

X is a Hugging Face folder of ours, or a `.pt` in the authors' layout. Prints one line of JSON. This is the only module
that imports torch and transformers: `wavlm_jax.export` runs it in a process of its own.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from wavlm_jax.convert.huggingface import CONFIG, import_huggingface
from wavlm_jax.convert.microsoft import identity, import_microsoft, microsoft_name
from wavlm_jax.convert.state_dict import ConversionError
from wavlm_jax.extras import extra
from wavlm_jax.files import read_json
from wavlm_jax.shapes import samples_for
from wavlm_jax.weights import Model, Output, ready

with extra("torch", "the comparison with transformers"):
    import torch
    import transformers

_SHORTEST = 7000
_SHARES = (2.3, 1.6, 1.0)
"""Lengths of the rows of the ragged batch, in shortest rows; the clip is at least as long as the first."""
_MOST_FRAMES = 2048
"""Of the clip: longer ones would take minutes; a bias that reaches further is compared up to here."""
_SEED = 2110_13900


def compare(path: Path) -> dict[str, Any]:
    """The largest error and what was compared, as JSON values.

    Raises:
        ConversionError: transformers finds tensors missing, left over or of another shape.

    """
    weights = import_huggingface(path) if path.is_dir() else import_microsoft(path)
    config, task = dataclasses.replace(weights.config, padding="huggingface"), weights.task
    if task is not None:
        head = dataclasses.replace(task.config, compat="huggingface", layer_sum_states="raw")
        task = dataclasses.replace(task, config=head)
    ours = ready(dataclasses.replace(weights, config=config, task=task))
    theirs = _load_folder(path) if path.is_dir() else _load_pt(path, ours)
    errors = dict[str, float]()
    for waveform, num_samples in probes(ours):
        given, expected = ours(waveform, num_samples), _run(theirs, waveform, num_samples)
        for name, found, wanted in _pairs(given, expected):
            errors[name] = float(np.maximum(errors.get(name, 0.0), error(found, wanted)))  # NaN stays NaN
    names = ", ".join(["all hidden states", *(name for name in errors if not name.startswith("hidden state"))])
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return {
        "max_error": float(np.max(list(errors.values()))),
        "against": f"{type(theirs).__name__} of {versions}: {names} of a clip and of a ragged padded batch",
    }


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference; of numbers whose root mean square is above 1, as a share of it."""
    if found.shape != wanted.shape:
        return float("inf")
    scale = max(1.0, float(np.sqrt(np.mean(np.square(wanted, dtype=np.float64)))))
    return float(np.abs(found - wanted).max(initial=0.0)) / scale


def probes(model: Model) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """(waveform, num_samples): a clip alone, then three rows of different lengths padded to the longest.

    The clip is so long that every bucket of the position bias is reached.
    """
    shortest, geometry = _SHORTEST, model.config.geometry
    if model.weights.task is not None:
        head = model.weights.task.config
        frames = head.tdnn_context + 4
        frames *= head.adapter_stride**head.num_adapter_layers if head.add_adapter else 1
        shortest = max(shortest, samples_for(frames, geometry))
    reach = min(model.config.max_bucket_distance + 1, _MOST_FRAMES) if model.config.position_bias else 1
    lengths = [max(int(shortest * _SHARES[0]), samples_for(reach, geometry)), *(int(shortest * s) for s in _SHARES)]
    random = np.random.default_rng(_SEED)
    waves = []
    for length in lengths:
        time = np.arange(length)
        swell = 0.2 + np.sin(time / 3000) ** 2
        waves.append((0.3 * swell * random.standard_normal(len(time))).astype(np.float32))
    yield model.inputs(waves[:1]).waveform, None
    batch = model.inputs(waves[1:])
    yield batch.waveform, batch.num_samples


def _load_folder(folder: Path) -> torch.nn.Module:
    (name,) = read_json(folder / CONFIG)["architectures"]
    model, report = getattr(transformers, name).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    # a batch norm's counter is not weights, and only training reads it
    report = {
        key: [n for n in map(str, found) if not n.endswith("num_batches_tracked")] for key, found in report.items()
    }
    problems = {key: sorted(found)[:4] for key, found in report.items() if found}
    if problems:
        raise ConversionError(f"{name}.from_pretrained reports {problems}")
    return model.eval()


def _load_pt(path: Path, ours: Model) -> torch.nn.Module:
    """Transformers' model filled from what torch itself reads in the authors' file."""
    state = torch.load(path, map_location="cpu", weights_only=True)["model"]
    values = {key: value for key, value in ours.config.to_huggingface().items() if key != "architectures"}
    kind = "WavLM" if ours.config.position_bias else "Hubert"
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**values))
    absent = {name: torch.from_numpy(array) for name, array in identity(ours.config).items()}
    names = model.state_dict().keys()
    found = {name: absent[name] if name in absent else state[microsoft_name(name, ours.config)] for name in names}
    model.load_state_dict({name: tensor.float() for name, tensor in found.items()}, strict=True)
    return model.eval()


def _run(model: torch.nn.Module, waveform: np.ndarray, num_samples: np.ndarray | None) -> Any:
    mask = None
    if num_samples is not None:
        mask = (torch.arange(waveform.shape[1])[None] < torch.from_numpy(num_samples)[:, None]).long()
    with torch.no_grad():
        return model(torch.from_numpy(waveform), attention_mask=mask, output_hidden_states=True)


def _pairs(ours: Output, theirs: Any) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name, ours, theirs) of every output that both models have."""
    if len(theirs.hidden_states) != len(ours.hidden_states):
        raise ConversionError(
            f"transformers has {len(theirs.hidden_states)} hidden states, {len(ours.hidden_states)} here"
        )
    for index, states in enumerate(theirs.hidden_states):
        yield f"hidden state {index}", np.asarray(ours.hidden_states[index]), states.numpy()
    for name in ("last_hidden_state", "logits", "embeddings"):
        wanted, found = getattr(theirs, name, None), getattr(ours, name)
        if wanted is not None and found is not None:
            yield name, np.asarray(found), wanted.numpy()


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    print(json.dumps(compare(Path(sys.argv[1]))))
