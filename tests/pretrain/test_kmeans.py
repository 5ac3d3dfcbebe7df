"""Clusters on the device: planted ones are found, as sklearn finds them, on any number of devices, after any kill."""

import os
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import MiniBatchKMeans
from sklearn.metrics import adjusted_rand_score, homogeneity_score, pairwise_distances_argmin_min

from pretrain.kmeans import KMeans, KMeansSettings, fit, nearest

SETTINGS = KMeansSettings(sample_frames=10**6, batch_frames=512, passes=12, tolerance=0.0, initialisations=2)


def planted(num_clusters=12, frames=6000, dim=39, spread=0.4, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(num_clusters, dim)) * 3
    labels = rng.integers(num_clusters, size=frames)
    return (centres[labels] + spread * rng.normal(size=(frames, dim))).astype(np.float32), labels


def speech_like(frames=8000, dim=39, seed=0):
    """No clusters to find: a slow random walk, heavier in the first dimensions, as cepstra are."""
    rng = np.random.default_rng(seed)
    walk = np.cumsum(rng.normal(size=(frames, dim)), 0)
    walk -= np.cumsum(np.full(frames, 1.0))[:, None] * walk[-1] / frames
    return (walk / np.arange(1, dim + 1) + rng.normal(size=(frames, dim))).astype(np.float32)


def settings(**changes):
    return KMeansSettings(**({name: getattr(SETTINGS, name) for name in SETTINGS.__dataclass_fields__} | changes))


def test_planted_clusters_are_found():
    frames, truth = planted()
    found = fit(frames, 12, SETTINGS, seed=0)
    labels, _ = nearest(frames, found.centroids)
    assert adjusted_rand_score(truth, np.asarray(labels)) > 0.95


def test_inertia_is_that_of_sklearn():
    """Within 3 % of sklearn's mini-batch k-means with the same batches, clusters and passes."""
    frames = speech_like()
    ours = fit(frames, 50, SETTINGS, seed=0)
    theirs = MiniBatchKMeans(50, batch_size=512, max_iter=12, n_init=2, random_state=0, reassignment_ratio=0).fit(
        frames
    )
    _, distances = nearest(frames, ours.centroids)
    ratio = float(np.asarray(distances, np.float64).mean()) / (theirs.inertia_ / len(frames))
    assert ratio < 1.03
    assert ours.inertia == pytest.approx(float(np.asarray(distances).mean()), rel=0.02)


def test_assignment_is_the_nearest_centroid():
    frames, _ = planted(frames=500)
    centroids = frames[:40]
    labels, distances = nearest(frames, centroids)
    expected, gaps = pairwise_distances_argmin_min(frames.astype(np.float64), centroids.astype(np.float64))
    assert np.array_equal(labels, expected)
    np.testing.assert_allclose(distances, gaps**2, rtol=1e-4, atol=2e-3)


def test_first_of_equal_centroids_is_taken():
    labels, _ = nearest(np.ones((3, 2), np.float32), np.ones((4, 2), np.float32))
    assert np.asarray(labels).tolist() == [0, 0, 0]


def test_one_device_and_eight_agree(monkeypatch):
    frames, _ = planted()
    eight = fit(frames, 12, SETTINGS, seed=3)
    first = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: first)
    one = fit(frames, 12, SETTINGS, seed=3)
    np.testing.assert_allclose(one.centroids, eight.centroids, atol=1e-5, rtol=1e-5)


def test_empty_clusters_get_a_new_seed(monkeypatch):
    """Seeds that all lie on one frame leave every other cluster empty at first."""
    frames, truth = planted()
    monkeypatch.setattr("sklearn.cluster.kmeans_plusplus", lambda x, k, **_: (np.repeat(x[:1], k, axis=0), None))
    found = fit(frames, 24, SETTINGS, seed=1)
    labels = np.asarray(nearest(jnp.asarray(frames), jnp.asarray(found.centroids))[0])
    assert len(np.unique(labels)) == 24
    assert homogeneity_score(truth, labels) > 0.95


def test_stops_when_a_pass_gains_too_little():
    frames, _ = planted()
    assert fit(frames, 12, settings(passes=100, tolerance=0.01), seed=0).passes < 20


def test_identical_frames_are_no_trouble():
    found = fit(np.zeros((64, 3), np.float32), 4, settings(batch_frames=16, initialisations=1), seed=0)
    assert found.inertia == 0
    assert np.isfinite(found.centroids).all()


def test_too_few_frames():
    with pytest.raises(ValueError, match=r"num_clusters: 10 clusters need as many frames, the sample has 9"):
        fit(np.zeros((9, 3), np.float32), 10, SETTINGS, seed=0)


def test_file_is_read_back(tmp_path):
    frames, _ = planted(frames=600)
    made = fit(frames, 5, SETTINGS, seed=0)
    made.save(tmp_path / "kmeans.safetensors", "mfcc")
    read = KMeans.load(tmp_path / "kmeans.safetensors", "mfcc")
    assert np.array_equal(read.centroids, made.centroids)
    assert (read.inertia, read.passes, read.fingerprint) == (made.inertia, made.passes, made.fingerprint)
    with pytest.raises(ValueError, match=r"clusters of mfcc, expected layer 6"):
        KMeans.load(tmp_path / "kmeans.safetensors", "layer 6")
    (tmp_path / "kmeans.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match=r"not a safetensors file"):
        KMeans.load(tmp_path / "kmeans.safetensors")


PROGRAMME = """
    import os, signal, sys
    from pathlib import Path
    import numpy as np
    from pretrain.kmeans import KMeansSettings, fit

    folder, kill_after = Path(sys.argv[1]), int(sys.argv[2])
    frames = np.random.default_rng(0).normal(size=(4000, 8)).astype(np.float32)
    def on_pass(number, inertia):
        if number == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
    settings = KMeansSettings(sample_frames=4000, batch_frames=500, passes=8, tolerance=0.0, initialisations=1)
    made = fit(frames, 30, settings, seed=0, checkpoint=folder / "fit.safetensors", made_from="noise", on_pass=on_pass)
    made.save(folder / "kmeans.safetensors", "noise")
    print(made.fingerprint)
"""


def test_killed_fit_goes_on_to_the_same_centroids(tmp_path):
    def run(folder, kill_after):
        command = [sys.executable, "-c", textwrap.dedent(PROGRAMME), str(folder), str(kill_after)]
        return subprocess.run(
            command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False
        )

    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    whole = run(tmp_path / "whole", -1)
    assert whole.returncode == 0, whole.stderr
    assert run(tmp_path / "killed", 3).returncode == -signal.SIGKILL
    resumed = run(tmp_path / "killed", -1)
    assert resumed.stdout == whole.stdout
    first, second = ((tmp_path / folder / "kmeans.safetensors").read_bytes() for folder in ("whole", "killed"))
    assert first == second
    with pytest.raises(ValueError, match=r"a fit of noise, expected speech"):
        fit(
            np.zeros((99, 8), np.float32),
            3,
            SETTINGS,
            seed=0,
            checkpoint=tmp_path / "killed/fit.safetensors",
            made_from="speech",
        )
