"""Pieces and batches do not change frames; features on disk are the model's own hidden states, and resume."""

import io
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from wavlm_jax.__main__ import main
from wavlm_jax.audio.recordings import ChunkSettings, normalize, open_recordings
from wavlm_jax.config import WavLMConfig
from wavlm_jax.convert.huggingface import export_huggingface
from wavlm_jax.inference.running import InferenceSettings, frames_of, jobs_of, run
from wavlm_jax.model.wavlm import WavLM
from wavlm_jax.weights import Weights

CONFIG = WavLMConfig.tiny(do_normalize=True, normalize_eps=1e-7)
LENGTHS = {"a": 16_100, "b": 9_000, "c": 40_000}
CUT = ["--chunk-seconds", "1", "--overlap-seconds", "0.5"]


@pytest.fixture(scope="module")
def params():
    return jax.jit(WavLM(CONFIG).init)(jax.random.key(0), jnp.zeros((1, 400)))["params"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, params):
    folder = tmp_path_factory.mktemp("features")
    random = np.random.default_rng(0)
    for name, length in LENGTHS.items():
        soundfile.write(folder / f"{name}.wav", random.normal(size=length) * 0.1, 16_000)
    export_huggingface(Weights(CONFIG, jax.device_get(params), None), folder / "model")
    return folder


def _files(folder, names="abc"):
    return [str(folder / f"{name}.wav") for name in names]


def _arguments(folder, out, *more, names="abc"):
    return ["features", *_files(folder, names), "--model", str(folder / "model"), "--out", str(out), *more]


@pytest.mark.parametrize("batch_seconds", [0.1, 7.0, 100.0])
def test_frames_of_pieces_are_those_of_the_file_by_index(folder, batch_seconds):
    """With a function that looks at the samples of each frame alone, cut and whole agree exactly."""
    plain = WavLMConfig.tiny()
    recordings = open_recordings([folder / f"{name}.wav" for name in LENGTHS])
    how = InferenceSettings(chunks=ChunkSettings(seconds=1.3, overlap_seconds=0.4), batch_seconds=batch_seconds)

    def frames(wave):
        return np.lib.stride_tricks.sliding_window_view(wave, 400, axis=-1)[..., ::320, :]

    shapes = set()

    def compute(inputs):
        shapes.add(inputs.waveform.shape)
        return {"samples": frames(inputs.waveform), "first": frames(inputs.waveform)[..., 0]}

    found = {recording: [] for recording in recordings}
    for (recording, _), values in run(jobs_of(recordings, plain, how), compute, plain, how):
        found[recording].append(values)
    for recording, values in found.items():
        expected = frames(recording.read())
        np.testing.assert_array_equal(np.concatenate([v["samples"] for v in values]), expected)
        np.testing.assert_array_equal(np.concatenate([v["first"] for v in values]), expected[:, 0])
        assert len(expected) == frames_of(recording, plain)
    assert len(shapes) <= 6


def test_features_of_whole_files_are_the_hidden_states(folder, params, tmp_path):
    assert main(_arguments(folder, tmp_path / "all", "--layer", "all", names="bc")) == 0
    every = np.load(tmp_path / "all/features-00000.npy")
    index = json.loads((tmp_path / "all/features-00000.json").read_text())
    alone = jax.jit(lambda params, wave: WavLM(CONFIG).apply({"params": params}, wave, output_hidden_states=True))
    assert [row["name"] for row in index] == ["b", "c"]
    for row in index:
        (recording,) = open_recordings([folder / f"{row['name']}.wav"])
        wave = jnp.asarray(normalize(recording.read(), CONFIG))
        states = alone(params, wave[None]).hidden_states
        expected = np.asarray(states[:, 0]).transpose(1, 0, 2)
        found = every[row["start"] : row["start"] + row["frames"]]
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert len(every) == sum(row["frames"] for row in index)
    header = json.loads((tmp_path / "all/features.json").read_text())
    assert (header["hop_samples"], header["window_samples"]) == (320, 400)


def test_a_stopped_run_goes_on(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("wavlm_jax.inference.commands.FeatureSettings", _small_shards)
    first = tmp_path / "first"
    assert main(_arguments(folder, first, "--layer", "2", *CUT)) == 0
    names = sorted(path.name for path in first.iterdir())
    assert names == [
        "features-00000.json",
        "features-00000.npy",
        "features-00001.json",
        "features-00001.npy",
        "features.json",
    ]
    before = {name: (first / name).read_bytes() for name in names}
    kept = (first / "features-00000.npy").stat().st_mtime_ns
    (first / "features-00001.json").unlink()  # as if killed between the shard and its index
    (first / "features-00001.npy").write_bytes(b"half")
    assert main(_arguments(folder, first, "--layer", "2", *CUT)) == 0
    assert {name: (first / name).read_bytes() for name in names} == before
    assert (first / "features-00000.npy").stat().st_mtime_ns == kept


def _small_shards(**settings):
    from wavlm_jax.inference.features import FeatureSettings

    return FeatureSettings(shard_frames=70, **settings)


def test_names_come_from_stdin_too(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{_files(folder, 'b')[0]}\n".encode())))
    arguments = ["features", "-", "--model", str(folder / "model"), "--out", str(tmp_path / "x"), "--layer", "0"]
    assert main([*arguments, "--dtype", "float16", "--device", "cpu"]) == 0
    array = np.load(tmp_path / "x/features-00000.npy")
    assert (array.dtype, array.shape) == (np.float16, (27, 32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--layer": "3"}, "layer: found 3, expected 0 (the input of the first layer) to 2, or all"),
        ({"--model": "/nowhere"}, "/nowhere"),
        ({"--chunk-seconds": "5", "--overlap-seconds": "5"}, "overlap_seconds: found 5.0"),
        ({"--batch-seconds": "0"}, "--batch-seconds: found 0.0, expected more than 0"),
        ({"FILE": "none.wav"}, "none.wav: no such file"),
        ({"FILE": "cd.wav"}, "found 8000 Hz, expected 16000 Hz"),
        ({"--out": None}, "--out: missing"),
        ({"--device": "tpu"}, "--device tpu: JAX finds none"),
    ],
)
def test_wrong_uses_are_answered(folder, tmp_path, capsys, monkeypatch, change, message):
    if "--device" in change:
        monkeypatch.setattr("jax.devices", _no_devices)
        monkeypatch.setattr("jax.config.update", lambda *_: None)
    soundfile.write(tmp_path / "cd.wav", np.zeros(8_000), 8_000)
    options = {"--model": str(folder / "model"), "--out": str(tmp_path / "o"), "--layer": "1"} | change
    files = [str(tmp_path / options.pop("FILE"))] if "FILE" in options else _files(folder)
    words = [word for option, value in options.items() if value is not None for word in (option, value)]
    assert main(["features", *files, *words]) == 2
    assert message in capsys.readouterr().err


def _no_devices():
    raise RuntimeError("Unknown backend")


def test_a_folder_with_other_features_is_left_alone(folder, tmp_path, capsys):
    out = tmp_path / "x"
    assert main(_arguments(folder, out, "--layer", "1", names="b")) == 0
    assert main(_arguments(folder, out, "--layer", "2", *CUT, names="b")) == 2
    assert "holds features with other layer, chunk_seconds, overlap_seconds; name a new" in capsys.readouterr().err
    (out / "features.json").write_text("{")
    assert main(_arguments(folder, out, "--layer", "1", names="b")) == 2
    assert "not readable as JSON" in capsys.readouterr().err
    (out / "features.json").unlink()
    assert main(_arguments(folder, out, "--layer", "1", names="b")) == 2
    assert "is not empty and has no features.json" in capsys.readouterr().err
