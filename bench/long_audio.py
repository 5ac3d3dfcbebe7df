"""How far the hidden states of a cut file are from those of the whole file, by overlap; and memory by length.

    python -m bench.long_audio [--model FOLDER --audio FILE] [--seconds S]

Without a model and a file: random weights in the shape of Base with 4 layers, and noise whose loudness varies like that
of speech. The deviation of a frame is the distance between its last hidden states of the cut and of the whole file,
relative to the length of the latter. Printed are the median and the largest deviation, and the share of frames whose
nearest neighbour among the frames of the whole file within a second is still the right one, which decoding depends on.
"""

import argparse
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import soundfile

from wavlm_jax.audio.recordings import ChunkSettings, open_recordings
from wavlm_jax.config import WavLMConfig
from wavlm_jax.inference.running import InferenceSettings, by_recording, model_for
from wavlm_jax.loading import load
from wavlm_jax.model.wavlm import WavLM, WavLMOutput
from wavlm_jax.weights import Model, Weights, ready

OVERLAPS = (0.0, 1.0, 2.0, 4.0, 6.0)
NEAR = 50
"""Frames on each side in which a frame could be mistaken for another."""


def main() -> None:
    """Prints one JSON line per overlap."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--audio", type=Path)
    parser.add_argument("--seconds", type=float, default=45.0)
    parser.add_argument("--chunk-seconds", type=float, default=15.0)
    options = parser.parse_args()
    model = _model(options.model)
    with tempfile.TemporaryDirectory() as folder:
        path = options.audio or _noise(Path(folder) / "noise.wav", options.seconds)
        whole = _states(model, path, ChunkSettings(seconds=1e5, overlap_seconds=0.0))
        for overlap in OVERLAPS:
            cut = _states(model, path, ChunkSettings(seconds=options.chunk_seconds, overlap_seconds=overlap))
            print(json.dumps({"bench": "long_audio", "overlap_s": overlap, **_compared(whole, cut)}), flush=True)


def _model(folder: Path | None) -> Model:
    if folder is not None:
        return model_for(load(folder), "features")
    config = WavLMConfig.base(num_hidden_layers=4)
    return ready(Weights(config, WavLM(config).init(jax.random.key(0), jnp.zeros((1, 400)))["params"], None))


def _noise(path: Path, seconds: float) -> Path:
    random = np.random.default_rng(0)
    samples = int(seconds * 16_000)
    loudness = np.repeat(random.uniform(0, 0.2, samples // 1_600 + 1), 1_600)[:samples]
    soundfile.write(path, random.normal(size=samples) * loudness, 16_000)
    return path


def _states(model: Model, path: Path, chunks: ChunkSettings) -> np.ndarray:
    settings = InferenceSettings(chunks=chunks, batch_seconds=1.0)
    [(_, results)] = by_recording(model, _last_hidden_state, open_recordings([path]), settings, framewise=True)
    return np.concatenate([result.values for result in results])


def _last_hidden_state(output: WavLMOutput) -> jax.Array:
    return output.last_hidden_state


def _compared(whole: np.ndarray, cut: np.ndarray) -> dict[str, float]:
    deviation = np.linalg.norm(whole - cut, axis=1) / np.linalg.norm(whole, axis=1)
    right = 0
    for frame, state in enumerate(cut):
        near = whole[max(0, frame - NEAR) : frame + NEAR + 1]
        right += int(np.linalg.norm(near - state, axis=1).argmin() == min(frame, NEAR))
    return {
        "frames": len(cut),
        "median_deviation": round(float(np.median(deviation)), 5),
        "worst_deviation": round(float(deviation.max()), 5),
        "right_place": round(right / len(cut), 5),
    }


if __name__ == "__main__":
    main()
