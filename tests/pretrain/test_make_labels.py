"""From a corpus to labels: real processes, a real teacher against transformers, kills, and memory that stays flat."""

import dataclasses
import functools
import hashlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sklearn.metrics import pairwise_distances_argmin
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor
from transformers import WavLMConfig as TorchConfig
from transformers import WavLMModel as TorchModel

from pretrain.distributed import local_rows, row_sharding
from pretrain.features import LayerFeatures, bucket_of, load_teacher, mfcc
from pretrain.kmeans import KMeans, choose_frames, choose_utterances
from pretrain.label_step import in_rounds
from pretrain.labelling import make_labels
from pretrain.labels import LabelError, LabelStore
from pretrain.preflight import check_labels
from tests.pretrain.test_labels import KMEANS, SETTINGS
from tests.support.fake_corpus import FakeCorpus, ragged
from tests.support.speech import make_corpora
from wavlm_jax.config import WavLMConfig
from wavlm_jax.model.frontend import normalize_waveform
from wavlm_jax.model.wavlm import WavLM
from wavlm_jax.training.checkpoint import Checkpoints, CheckpointSettings, RunRecord
from wavlm_jax.training.step import TrainState

MFCC = dataclasses.replace(SETTINGS, rate_hz=100, num_clusters=12, kmeans=dataclasses.replace(KMEANS, passes=4))


@pytest.fixture(scope="module")
def corpora():
    return {"train": FakeCorpus(ragged(20)), "valid": FakeCorpus(ragged(6, seed=1), seed=1, aligned=False)}


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def made(tmp_path_factory, corpora):
    folder = tmp_path_factory.mktemp("labels")
    settings = dataclasses.replace(MFCC, path=str(folder))
    return settings, make_labels(settings, corpora), contents(folder)


def test_labels_are_the_nearest_centroids(made, corpora):
    """Each label found again by scikit-learn, from features of one utterance at a time."""
    settings, header, files = made
    centroids = KMeans.load(Path(settings.path) / "kmeans.safetensors").centroids
    for split, corpus in corpora.items():
        store = LabelStore.open(Path(settings.path), split)
        for index in range(len(corpus.ids)):
            expected = pairwise_distances_argmin(mfcc(corpus.wave(index)), centroids)
            assert store.labels(index).tolist() == expected.tolist()
    assert sorted(files) == [
        "header.json", "kmeans.safetensors", "request.json", "train.keys.npy", "train.labels.npy", "train.offsets.npy",
        "valid.keys.npy", "valid.labels.npy", "valid.offsets.npy",
    ]  # fmt: skip
    assert header.sample_share == 1.0


def test_labels_pass_the_preflight_and_know_the_sounds(made, corpora):
    settings, header, _ = made
    check_labels(settings, corpora)
    assert header.splits["train"].quality["pnmi"] > 0.5
    assert header.splits["valid"].quality["pnmi"] is None
    assert header.splits["valid"].quality["used_clusters"] > 6


def test_second_run_does_nothing(made, corpora, monkeypatch):
    settings, header, files = made
    monkeypatch.setattr(FakeCorpus, "wave", lambda *_: pytest.fail("audio was read"))
    assert make_labels(settings, corpora) == header
    assert contents(Path(settings.path)) == files


def test_labels_are_the_same_bytes_with_other_threads(made, corpora, tmp_path):
    _, _, files = made
    make_labels(dataclasses.replace(MFCC, path=str(tmp_path), num_threads=1), corpora)
    assert contents(tmp_path) == files


def test_another_request_for_the_same_folder_is_refused(made, corpora):
    settings, _, files = made
    with pytest.raises(LabelError, match=r"labels of another request \(num_clusters: 12, asked for 13\)"):
        make_labels(dataclasses.replace(settings, num_clusters=13), corpora)
    with pytest.raises(LabelError, match=r"has labels of valid for the corpus \w+, the config names"):
        make_labels(settings, corpora | {"valid": FakeCorpus(ragged(6, seed=2))})
    with pytest.raises(LabelError, match=r"expected one called 'train'"):
        make_labels(settings, {"valid": corpora["valid"]})
    with pytest.raises(LabelError, match=r"rate_hz: found 50, but 'mfcc' gives 100 labels a second; set it to 100"):
        make_labels(dataclasses.replace(settings, rate_hz=50), corpora)
    assert contents(Path(settings.path)) == files


def test_a_request_of_which_nothing_was_made_can_be_changed(corpora, tmp_path):
    settings = dataclasses.replace(MFCC, path=str(tmp_path))
    with pytest.raises(ValueError, match=r"60000 clusters need as many frames"):
        make_labels(dataclasses.replace(settings, num_clusters=60_000), corpora)
    assert make_labels(settings, corpora).num_clusters == 12


def test_a_split_can_be_added_later(made, corpora, tmp_path):
    """With the k-means of the training split, as if it had been there from the start."""
    _, header, files = made
    settings = dataclasses.replace(MFCC, path=str(tmp_path))
    make_labels(settings, {"train": corpora["train"]})
    assert make_labels(settings, corpora) == header
    assert contents(tmp_path) == files


def test_audio_shorter_than_the_corpus_says(tmp_path):
    corpus = FakeCorpus(ragged(5))
    corpus.lengths = corpus.lengths + 1600
    corpus.wave = lambda index: FakeCorpus.wave(corpus, index, 0, int(corpus.lengths[index]) - 1600)
    with pytest.raises(
        LabelError, match=r"50 frames are missing from the utterances number 0 to 4; the audio is shorter"
    ):
        make_labels(dataclasses.replace(MFCC, path=str(tmp_path)), {"train": corpus})


KILLED = """
    import dataclasses, os, signal, sys
    import numpy as np
    import pretrain.label_step, pretrain.kmeans, pretrain.labels
    from tests.support.fake_corpus import FakeCorpus, ragged
    from pretrain.kmeans import KMeansSettings
    from pretrain.labelling import load_teacher, make_labels
    from pretrain.labels import LabelSettings

    folder, where, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    pretrain.label_step.PART_LABELS = 800
    if where != "nowhere":
        fit, labels = (pretrain.kmeans, "_save_state"), (pretrain.labels, "write_json")
        module, name = fit if where == "fit" else labels
        original, calls = getattr(module, name), []
        def counted(*arguments):
            original(*arguments)
            calls.append(1)
            if len(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
        setattr(module, name, counted)
    kmeans = KMeansSettings(sample_frames=3000, batch_frames=256, passes=4, tolerance=0.0, initialisations=1)
    settings = LabelSettings(
        path=folder, make=True, num_clusters=12, rate_hz=100, teacher="mfcc", run=None, step=None, layer=None, seed=0,
        sample_seconds=None, kmeans=kmeans, piece_seconds=30.0, batch_seconds=20.0, num_threads=2, min_entropy=0.5,
        max_constant_share=0.01,
    )
    make_labels(settings, {"train": FakeCorpus(ragged(20)), "valid": FakeCorpus(ragged(6, seed=1), seed=1)})
"""


def test_killed_anywhere_it_ends_with_the_same_bytes(tmp_path):
    """SIGKILL in the fit, then twice while labelling; the result is that of a run nobody touched."""

    def run(folder, where, count):
        code = textwrap.dedent(KILLED)
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": "."}
        command = [sys.executable, "-c", code, str(tmp_path / folder), where, str(count)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert run("whole", "nowhere", 0).returncode == 0
    for where, count in (("fit", 2), ("labels", 3), ("labels", 3)):
        killed = run("killed", where, count)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not (tmp_path / "killed/header.json").exists()
    assert run("killed", "nowhere", 0).returncode == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


MEASURED = """
    import dataclasses, re, sys, tempfile, threading
    from pathlib import Path
    import numpy as np
    from tests.support.fake_corpus import FakeCorpus, ragged
    from tests.pretrain.test_labels import SETTINGS
    from pretrain.labelling import load_teacher, make_labels

    def own_mib():
        return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

    peak, done = 0, threading.Event()
    def watch():
        global peak
        while not done.wait(0.01):
            peak = max(peak, own_mib())
    kmeans = dataclasses.replace(SETTINGS.kmeans, sample_frames=20_000, batch_frames=2000)
    settings = dataclasses.replace(SETTINGS, path=tempfile.mkdtemp(), num_clusters=20, rate_hz=100, kmeans=kmeans)
    corpus = FakeCorpus(ragged(int(sys.argv[1]), low=150_000, high=250_000))
    thread = threading.Thread(target=watch)
    thread.start()
    make_labels(settings, {"train": corpus})
    done.set()
    thread.join()
    print(peak)
"""


def test_memory_does_not_grow_with_the_corpus():
    """Ten times the audio (42 minutes, 80 MB of samples, 40 MB of features): within 10 % of the memory."""

    def peak(utterances):
        command = [sys.executable, "-c", textwrap.dedent(MEASURED), str(utterances)]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": "."}
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return float(found.stdout.splitlines()[-1])

    assert peak(200) < 1.1 * peak(20)


def test_command_line(tmp_path):
    """The real command on a real corpus, twice, and once with another request for the same folder."""
    folders = make_corpora(tmp_path, train=12, valid=3)
    command = [sys.executable, "-m", "pretrain.make_labels", "--config=configs/pretrain/demo.py"]
    command += [f"--config.data.train={folders['train']}", f"--config.data.evaluation=('{folders['valid']}',)"]
    command += ["--config.labels.kmeans.batch_frames=256", f"--out={tmp_path / 'labels'}", "--clusters=15"]

    def run(*more):
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        return subprocess.run([*command, *more], env=environment, capture_output=True, text=True, check=False)

    first = run()
    assert first.returncode == 0, first.stderr
    assert "labels of valid: frames" in first.stdout
    files = contents(tmp_path / "labels")
    store = LabelStore.open(tmp_path / "labels", "valid")
    assert (len(store), store.header.num_clusters, store.header.rate_hz) == (3, 15, 100)
    again = run()
    assert again.stdout.count("\n") == 1
    assert contents(tmp_path / "labels") == files
    lost = run("--layer=3")
    assert (lost.returncode, "expected --teacher with a run" in lost.stderr) == (2, True)
    refused = run("--clusters=16")
    assert refused.returncode != 0
    assert "num_clusters: 15, asked for 16" in refused.stderr


# Layers of a teacher.

TINY = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
KINDS = {
    "wavlm_base": lambda: TorchModel(TorchConfig(**TINY, num_buckets=32, max_bucket_distance=80)),
    "wavlm_large": lambda: TorchModel(
        TorchConfig(**TINY, feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
    ),
    "hubert": lambda: HubertModel(HubertConfig(**TINY)),
}


def torch_teacher(kind, folder):
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=kind == "wavlm_large").save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def wavlm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wavlm")
    return folder, torch_teacher("wavlm_base", folder)


def torch_layer(model, wave, layer, normalise):
    wave = torch.tensor(wave, dtype=torch.float32) / 32768
    if normalise:
        wave = (wave - wave.mean()) / torch.sqrt(wave.var(correction=0) + 1e-7)
    with torch.no_grad():
        return model(wave[None], output_hidden_states=True).hidden_states[layer][0].numpy()


def frames_of(source, corpus):
    """utterance -> features, gathered from batches."""
    lengths = np.asarray(corpus.lengths)
    counts = source.counts(lengths)
    found = [np.full((count, source.dim), np.nan, np.float32) for count in counts]
    program = functools.partial(jax.jit(source.compute, out_shardings=row_sharding()), source.params)

    def use(features, pieces):
        features = local_rows(features)
        for utterance, start, frames, row in pieces:
            found[utterance][start : start + frames] = features[row : row + frames]

    in_rounds("features", source, corpus, np.arange(len(lengths)), program, use)
    return found


@pytest.mark.parametrize(("kind", "layer"), [("wavlm_base", 2), ("wavlm_large", 3), ("hubert", 1)])
def test_layer_is_that_of_transformers(kind, layer, tmp_path):
    """Padded batches on 8 devices against transformers, one utterance at a time, unpadded."""
    model = torch_teacher(kind, tmp_path)
    speech = FakeCorpus([6000, 399, 400, 18000, 20000, 9999, 719], seed=4)
    source = LayerFeatures(load_teacher(tmp_path), layer, piece_seconds=30.0, batch_seconds=5.0, num_threads=2)
    found = frames_of(source, speech)
    assert [len(frames) for frames in found] == [18, 0, 1, 56, 62, 30, 1]
    for index in np.flatnonzero(speech.lengths >= 400):
        expected = torch_layer(model, speech.wave(index), layer, kind == "wavlm_large")
        np.testing.assert_allclose(found[index], expected, atol=1e-4, rtol=1e-4)


def test_long_utterances_go_through_in_equal_pieces(wavlm):
    """Each piece as if it were an utterance of its own; not one frame is lost between."""
    folder, model = wavlm
    corpus = FakeCorpus([50000], seed=2)
    source = LayerFeatures(load_teacher(folder), 2, piece_seconds=1.04, batch_seconds=5.0, num_threads=1)
    found = frames_of(source, corpus)[0]
    assert len(found) == 156
    for start, end in ((0, 52), (52, 104), (104, 156)):
        expected = torch_layer(model, corpus.wave(0)[start * 320 : end * 320 + 80], 2, normalise=False)
        np.testing.assert_allclose(found[start:end], expected, atol=1e-4, rtol=1e-4)


def test_layer_labels_are_made(wavlm, tmp_path, capsys):
    folder, model = wavlm
    corpora = {
        "train": FakeCorpus(ragged(24, low=16500, high=20400)),
        "valid": FakeCorpus(ragged(3, seed=1, low=16500, high=20400), seed=1),
    }
    teacher = {"teacher": "layer", "run": str(folder), "layer": 2, "rate_hz": 50}
    settings = dataclasses.replace(MFCC, path=str(tmp_path), num_clusters=8, sample_seconds=15.0, **teacher)
    header = make_labels(settings, corpora)
    assert (header.teacher["layer"], header.teacher["params"]) == (2, load_teacher(folder).fingerprint)
    assert 15 <= header.sample_share * corpora["train"].lengths.sum() / 16000 < 17
    check_labels(settings, corpora)
    centroids = KMeans.load(tmp_path / "kmeans.safetensors").centroids
    store = LabelStore.open(tmp_path, "valid")
    for index in range(3):
        features = torch_layer(model, corpora["valid"].wave(index), 2, normalise=False)
        distances = np.square(features[:, None, :] - centroids[None]).sum(-1)
        chosen = distances[np.arange(len(features)), store.labels(index)]
        np.testing.assert_allclose(chosen, distances.min(1), rtol=1e-3, atol=1e-3)
    assert "labels of valid: frames" in capsys.readouterr().out


def test_a_run_of_ours_is_a_teacher(tmp_path):
    """Its newest checkpoint; the layer is what the model itself gives for one utterance without padding."""
    config = WavLMConfig.tiny(do_normalize=True)
    model = WavLM(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8000)))["params"]
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, {"wavlm": params, "head": {"bias": jnp.ones(3)}}, {"m": zero}, zero, {}, zero, zero)
    checkpoints = Checkpoints(tmp_path, CheckpointSettings(every=1, keep_last=1, keep_every=None))
    record = RunRecord(run_id="run", config={"model": dataclasses.asdict(config)}, fingerprints={})
    checkpoints.save(state, 7, record, 0.0)
    assert checkpoints.wait() is None
    teacher = load_teacher(tmp_path, 7)
    assert teacher.config == config
    assert load_teacher(tmp_path).fingerprint == teacher.fingerprint
    corpus = FakeCorpus([8000])
    source = LayerFeatures(teacher, 1, piece_seconds=30.0, batch_seconds=1.0, num_threads=1)
    waveform = normalize_waveform(jnp.asarray(corpus.wave(0)[None] / 32768, jnp.float32), None, 1e-5)
    output = jax.jit(functools.partial(model.apply, output_hidden_states=True))({"params": params}, waveform)
    np.testing.assert_allclose(frames_of(source, corpus)[0], output.hidden_states[1][0], atol=1e-4, rtol=1e-4)


def test_no_teacher_and_no_such_layer(wavlm, tmp_path):
    with pytest.raises(ValueError, match=r"no model here; expected the workdir of a run"):
        load_teacher(tmp_path)
    with pytest.raises(ValueError, match=r"labels.layer: found 4, the teacher has the layers 1 to 3"):
        load_teacher(wavlm[0]).up_to(4)
    with pytest.raises(ValueError, match=r"found step 7 for a Hugging Face folder"):
        load_teacher(wavlm[0], 7)


def test_buckets_hold_what_they_are_for():
    sizes = {bucket_of(frames, 2000) for frames in range(1, 2001)}
    assert sorted(sizes) == [32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2000]
    assert all(frames <= bucket_of(frames, 2000) < max(33, 1.51 * frames) for frames in range(1, 2001))


# The sample.


def test_sampled_frames_are_distinct_and_spread():
    chosen = choose_frames(10**9, 10**4, seed=3)
    assert len(np.unique(chosen)) == 10**4
    assert (chosen // 10**5 == np.arange(10**4)).all()
    assert choose_frames(5, 10, seed=0).tolist() == [0, 1, 2, 3, 4]


def test_sampled_utterances_last_as_long_as_asked():
    lengths = ragged(1000)
    chosen = choose_utterances(lengths, 100.0, seed=0)
    seconds = lengths[chosen] / 16000
    assert 100 <= seconds.sum() < 100 + seconds.max()
    assert len(np.unique(chosen)) == len(chosen)
    assert not np.array_equal(chosen, choose_utterances(lengths, 100.0, seed=1))
