"""Hidden states of recordings as npy shards on disk: written piece by piece, resumable, with an index.

Layer 0 is the input of the first Transformer layer, layer l the raw output of layer l: transformers' `hidden_states`
(FACTS A10); the final norm of Large is in none of them. Frame i of a recording sees samples 320 i ... 320 i + 399.
A folder holds `features.json` (what was computed, from what), `features-00000.npy` (frames, [layers,] width) and beside
each shard `features-00000.json` with the recordings in it and their frames.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from wavlm_jax.audio.recordings import Inputs, Recording
from wavlm_jax.config import WavLMConfig
from wavlm_jax.files import printable, read_json, write_json
from wavlm_jax.inference.running import Compute, InferenceSettings, digest_of, frames_of, jobs_of, run
from wavlm_jax.model.wavlm import WavLM, WavLMOutput
from wavlm_jax.settings import SettingsError
from wavlm_jax.shapes import SAMPLE_RATE, Params
from wavlm_jax.training.lease import held
from wavlm_jax.weights import Model

HEADER = "features.json"


class FeatureError(ValueError):
    """Features that cannot be written here."""


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """Which hidden states, and how they are stored."""

    layer: int | Literal["all"]
    dtype: Literal["float32", "float16"] = "float32"
    shard_frames: int = 180_000
    """A shard is closed when it has this many frames (an hour); a recording is never split."""


class FeatureShard(NamedTuple):
    """Recordings that share a file."""

    number: int
    recordings: tuple[Recording, ...]
    frames: tuple[int, ...]

    @property
    def starts(self) -> list[int]:
        """The first row of each recording."""
        return [0, *np.cumsum(self.frames[:-1]).tolist()]

    @property
    def entries(self) -> list[dict[str, Any]]:
        """What its index says."""
        return [
            {"name": recording.name, "path": printable(recording.path), "start": start, "frames": frames}
            for recording, start, frames in zip(self.recordings, self.starts, self.frames, strict=True)
        ]

    def path(self, folder: Path, suffix: str) -> Path:
        """Its array (.npy) or its index (.json)."""
        return folder / f"features-{self.number:05d}{suffix}"


def write_features(
    recordings: Sequence[Recording],
    model: Model,
    folder: Path,
    settings: FeatureSettings,
    running: InferenceSettings,
    progress: Callable[[int], Any] = lambda _: None,
) -> list[FeatureShard]:
    """Write the hidden states of `recordings`; shards that are there already are left alone.

    Args:
        recordings: in the order of the shards.
        model: an encoder without a head.
        folder: made if it does not exist.
        settings: which layers.
        running: pieces and batches.
        progress: called with the number of samples that were just done.

    Raises:
        FeatureError: no such layer, the folder holds features of other recordings, models or settings, or a state is
            larger than the dtype holds.
        TakenError: another process writes features there.
        AudioFault: a file that cannot be read to its end, where `running.on_fault` does not take it; what was finished
            stays. One that is taken gets frames of NaN and its `error` in the index.

    """
    config = model.config
    layers = _layers(settings.layer, config)
    if folder.exists() and not folder.is_dir():
        raise FeatureError(f"{folder}: a file, expected a folder or a new name")
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, _header(recordings, model, settings, running))
    shards = list(_shards(recordings, config, settings.shard_frames))
    compute = partial(_hidden_states, model.module, layers, model.params)
    complete = all(shard.path(folder, ".json").exists() for shard in shards)
    with nullcontext() if complete else held(folder):
        for shard in shards:
            if shard.path(folder, ".json").exists():
                progress(sum(recording.num_samples for recording in shard.recordings))
                _tell_again(shard.path(folder, ".json"), running)
                continue
            shape = (sum(shard.frames), *(() if settings.layer != "all" else (len(layers),)), config.hidden_size)
            temporary = shard.path(folder, ".npy.tmp")
            array = np.lib.format.open_memmap(temporary, "w+", np.dtype(settings.dtype), shape)
            faults = _fill(array, shard, compute, config, running, progress)
            del array
            temporary.replace(shard.path(folder, ".npy"))
            told = [{"error": faults[one]} if one in faults else {} for one in shard.recordings]
            entries = [entry | fault for entry, fault in zip(shard.entries, told, strict=True)]
            write_json(shard.path(folder, ".json"), entries)
    return shards


def _tell_again(index: Path, running: InferenceSettings) -> None:
    """Reports again the recordings that an earlier start could not read."""
    for entry in json.loads(index.read_text()):
        if "error" in entry and running.on_fault is not None:
            running.on_fault(entry["name"], Path(entry["path"]), ValueError(entry["error"]))


def _fill(
    array: np.memmap[Any, Any],
    shard: FeatureShard,
    compute: Compute,
    config: WavLMConfig,
    running: InferenceSettings,
    progress: Callable[[int], Any],
) -> dict[Recording, str]:
    """Writes the frames of a shard, short recordings first, each piece to the disk as it comes.

    Recordings that `running.on_fault` takes get frames of NaN; returned with their faults.
    """
    starts, faults = dict(zip(shard.recordings, shard.starts, strict=True)), dict[Path, str]()

    told = running.on_fault

    def on_fault(name: str, path: Path, fault: ValueError) -> None:
        faults[path] = printable(fault)
        if told is not None:
            told(name, path, fault)

    running = replace(running, on_fault=told and on_fault)
    largest = np.finfo(array.dtype).max
    by_length = sorted(shard.recordings, key=lambda recording: recording.num_samples)
    for (recording, piece), values in run(jobs_of(by_length, config, running), compute, config, running):
        start = starts[recording]
        if not np.abs(values).max(initial=0.0) <= largest:  # NaN is none either
            cure = "; take --dtype float32" if array.dtype == np.float16 else ""
            found = f"a hidden state of {np.abs(values).max()}, expected at most {largest:g}, as {array.dtype} holds"
            raise FeatureError(f"{recording.path}: {found}{cure}")
        array[start + piece.keep_from : start + piece.keep_to] = values.reshape(len(values), *array.shape[1:])
        array.flush()
        progress((piece.keep_to - piece.keep_from) * config.geometry.hop)
    failed = {recording: faults[recording.path] for recording in shard.recordings if recording.path in faults}
    for recording in failed:
        array[starts[recording] : starts[recording] + frames_of(recording, config)] = np.nan
    return failed


@partial(jax.jit, static_argnums=(0, 1))
def _hidden_states(module: WavLM, layers: tuple[int, ...], params: Params, inputs: Inputs) -> Any:
    """(rows, frames, layers, width) of a batch; only the layers that are wanted leave the device."""
    output: WavLMOutput
    applied: Any = module.apply({"params": params}, *inputs, output_hidden_states=True)
    output = applied
    if output.hidden_states is None:
        raise FeatureError("the hidden states were asked for")
    return output.hidden_states[np.array(layers)].transpose(1, 2, 0, 3)


def _layers(layer: int | Literal["all"], config: WavLMConfig) -> tuple[int, ...]:
    last = config.num_hidden_layers
    if layer == "all":
        return tuple(range(last + 1))
    if not 0 <= layer <= last:
        raise FeatureError(f"layer: found {layer}, expected 0 (the input of the first layer) to {last}, or all")
    return (layer,)


def _shards(recordings: Sequence[Recording], config: WavLMConfig, most: int) -> Iterator[FeatureShard]:
    number, taken, frames = 0, list[Recording](), list[int]()
    for recording in recordings:
        taken.append(recording)
        frames.append(frames_of(recording, config))
        if sum(frames) >= most:
            yield FeatureShard(number, tuple(taken), tuple(frames))
            number, taken, frames = number + 1, [], []
    if taken:
        yield FeatureShard(number, tuple(taken), tuple(frames))


def _header(
    recordings: Sequence[Recording], model: Model, settings: FeatureSettings, running: InferenceSettings
) -> dict[str, Any]:
    """Everything that the numbers depend on, and how to read them."""
    geometry = model.config.geometry
    files = hashlib.sha256()
    for recording in recordings:
        with recording.path.open("rb") as file:  # by content: a file that was written anew has other features
            content = hashlib.file_digest(file, "sha256").hexdigest()
        files.update(f"{printable(recording.path)}\0{content}\n".encode())
    return {
        "layer": settings.layer,
        "layers": "0 is the input of the first Transformer layer, l the raw output of layer l",
        "hop_samples": geometry.hop,
        "window_samples": geometry.receptive_field,
        "sample_rate": SAMPLE_RATE,
        "dtype": settings.dtype,
        "shard_frames": settings.shard_frames,
        "chunk_seconds": running.chunks.seconds,
        "overlap_seconds": running.chunks.overlap_seconds,
        "model": repr(model.config),
        "weights": digest_of(model),
        "recordings": len(recordings),
        "files": files.hexdigest(),
    }


def _claim(folder: Path, header: dict[str, Any]) -> None:
    """Make the folder ours, or see that it is: the same features, begun earlier."""
    path = folder / HEADER
    if not path.exists():
        if any(folder.iterdir()):
            raise FeatureError(f"{folder}: is not empty and has no {HEADER}; name a new folder")
        write_json(path, header)
        return
    try:
        there = read_json(path)
    except SettingsError as error:
        raise FeatureError(f"{error}; name a new folder") from error
    other = [key for key in header if there.get(key) != header[key]]
    if other:
        raise FeatureError(f"{folder}: holds features with other {', '.join(other)}; name a new folder")
