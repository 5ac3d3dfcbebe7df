"""Hidden states of recordings as npy shards on disk: streamed, resumable, with an index.

Layer 0 is the input of the first Transformer layer, layer l the raw output of layer l: transformers' `hidden_states`
(FACTS A10); the final norm of Large is in none of them. Frame i of a recording sees samples 320 i ... 320 i + 399.
A folder holds `features.json` (what was computed, from what), `features-00000.npy` (frames, [layers,] width) and beside
each shard `features-00000.json` with the recordings in it and their frames.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from wavlm_jax.audio.recordings import Inputs, Recording
from wavlm_jax.config import WavLMConfig
from wavlm_jax.files import read_json, write_json
from wavlm_jax.inference.running import RunSettings, frames_of, geometry_of, jobs_of, run
from wavlm_jax.model.wavlm import WavLM, WavLMOutput
from wavlm_jax.settings import SettingsError
from wavlm_jax.shapes import Params

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


class Shard(NamedTuple):
    """Recordings that share a file."""

    number: int
    recordings: tuple[Recording, ...]
    frames: tuple[int, ...]

    def path(self, folder: Path, suffix: str) -> Path:
        """Its array (.npy) or its index (.json)."""
        return folder / f"features-{self.number:05d}{suffix}"


def write_features(
    recordings: Sequence[Recording],
    config: WavLMConfig,
    params: Params,
    folder: Path,
    settings: FeatureSettings,
    running: RunSettings,
    progress: Callable[[int], Any] = lambda _: None,
) -> list[Shard]:
    """Write the hidden states of `recordings`; shards that are there already are left alone.

    Args:
        recordings: in the order of the shards.
        config: of the model.
        params: of `WavLM`.
        folder: made if it does not exist.
        settings: which layers.
        running: batches and chunks.
        progress: told how many samples were just done.

    Raises:
        FeatureError: no such layer, or the folder holds features of other recordings, models or settings.
        AudioFault: a file that cannot be read to its end; what was finished stays.

    """
    layers = _layers(settings.layer, config)
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, _header(recordings, config, params, settings, running))
    shards = list(_shards(recordings, config, settings.shard_frames))
    compute = _hidden_states(config, params, layers)
    for shard in shards:
        if shard.path(folder, ".json").exists():
            progress(sum(recording.num_samples for recording in shard.recordings))
            continue
        shape = (sum(shard.frames), *(() if settings.layer != "all" else (len(layers),)), config.hidden_size)
        _write_shard(shard, folder, np.dtype(settings.dtype), shape, (compute, config, running), progress)
    return shards


def _write_shard(
    shard: Shard,
    folder: Path,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    how: tuple[Callable[[Inputs], Any], WavLMConfig, RunSettings],
    progress: Callable[[int], Any],
) -> None:
    compute, config, running = how
    starts = dict(zip(shard.recordings, np.cumsum([0, *shard.frames]).tolist(), strict=False))
    temporary = shard.path(folder, ".npy.tmp")
    array = np.lib.format.open_memmap(temporary, "w+", dtype, shape)
    by_length = sorted(shard.recordings, key=lambda recording: recording.num_samples)
    for (recording, piece), values in run(jobs_of(by_length, config, running), compute, config, running):
        start = starts[recording]
        array[start + piece.keep_from : start + piece.keep_to] = values.reshape(len(values), *shape[1:])
        array.flush()
        progress((piece.keep_to - piece.keep_from) * geometry_of(config).hop)
    del array
    temporary.replace(shard.path(folder, ".npy"))
    index = [
        {"name": recording.name, "path": str(recording.path), "start": starts[recording], "frames": frames}
        for recording, frames in zip(shard.recordings, shard.frames, strict=True)
    ]
    write_json(shard.path(folder, ".json"), index)


def _hidden_states(config: WavLMConfig, params: Params, layers: Sequence[int]) -> Callable[[Inputs], Any]:
    """(rows, frames, layers, width) of a batch; only the layers that are wanted leave the device."""
    model = WavLM(config)

    @jax.jit
    def states(params: Params, inputs: Inputs) -> Any:
        output: WavLMOutput
        applied: Any = model.apply({"params": params}, *inputs, output_hidden_states=True)
        output = applied
        if output.hidden_states is None:
            raise FeatureError("the hidden states were asked for")
        return output.hidden_states[np.array(layers)].transpose(1, 2, 0, 3)

    on_device = jax.tree.map(jax.device_put, dict(params))
    return lambda inputs: states(on_device, inputs)


def _layers(layer: int | Literal["all"], config: WavLMConfig) -> tuple[int, ...]:
    last = config.num_hidden_layers
    if layer == "all":
        return tuple(range(last + 1))
    if not 0 <= layer <= last:
        raise FeatureError(f"layer: found {layer}, expected 0 (the input of the first layer) to {last}, or all")
    return (layer,)


def _shards(recordings: Sequence[Recording], config: WavLMConfig, most: int) -> Iterator[Shard]:
    number, taken, frames = 0, list[Recording](), list[int]()
    for recording in recordings:
        taken.append(recording)
        frames.append(frames_of(recording, config))
        if sum(frames) >= most:
            yield Shard(number, tuple(taken), tuple(frames))
            number, taken, frames = number + 1, [], []
    if taken:
        yield Shard(number, tuple(taken), tuple(frames))


def _header(
    recordings: Sequence[Recording],
    config: WavLMConfig,
    params: Params,
    settings: FeatureSettings,
    running: RunSettings,
) -> dict[str, Any]:
    """Everything that the numbers depend on, and how to read them."""
    weights = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(dict(params)):
        weights.update(jax.tree_util.keystr(path).encode())
        weights.update(np.ascontiguousarray(leaf).tobytes())
    files = hashlib.sha256()
    for recording in recordings:
        files.update(f"{recording.path}\0{recording.num_samples}\n".encode())
    return {
        "layer": settings.layer,
        "layers": "0 is the input of the first Transformer layer, l the raw output of layer l",
        "hop_samples": geometry_of(config).hop,
        "window_samples": geometry_of(config).receptive_field,
        "sample_rate": 16_000,
        "dtype": settings.dtype,
        "shard_frames": settings.shard_frames,
        "chunk_seconds": running.chunks.seconds,
        "overlap_seconds": running.chunks.overlap_seconds,
        "model": repr(config),
        "weights": weights.hexdigest(),
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
