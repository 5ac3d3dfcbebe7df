"""k-means on the device: k-means++ seeds, then passes of mini-batch updates over a sample that stays in memory.

The sample has a fixed number of frames however large the corpus is (pretrain/sample.py). Rows are spread over the local
devices, centroids are on all of them; the number of devices changes nothing but the order of float additions.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import sklearn.cluster
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Int

from pretrain.files import read_tensors, write_tensors

Frames = Float[Array, "frames dim"]
Centroids = Float[Array, "clusters dim"]


@dataclass(frozen=True, kw_only=True)
class KMeansSettings:
    """The config section `labels.kmeans`."""

    sample_frames: int
    """Frames that are kept in memory to fit on (all frames of a smaller corpus)."""
    batch_frames: int
    """Frames of one update; a multiple of the number of devices uses all of them."""
    passes: int
    """Passes over the sample, at most."""
    tolerance: float
    """Stop when a pass lowers the inertia by less than this share; 0: never before `passes`."""
    initialisations: int
    """k-means++ seedings, of which the one with the lowest inertia is taken."""

    def __post_init__(self) -> None:
        for name in ("sample_frames", "batch_frames", "passes", "initialisations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected at least 1")
        if self.tolerance < 0:
            raise ValueError(f"tolerance: found {self.tolerance}, expected 0 or more")


@dataclass(frozen=True)
class KMeans:
    """Fitted clusters."""

    centroids: Float32[np.ndarray, "clusters dim"]
    inertia: float
    """Mean squared distance of a frame of the sample to its centroid."""
    passes: int
    """Passes over the sample that were made."""

    @property
    def fingerprint(self) -> str:
        """Tells two clusterings apart: 16 hex digits over the centroids."""
        return hashlib.sha256(str(self.centroids.shape).encode() + self.centroids.tobytes()).hexdigest()[:16]

    def save(self, path: Path, made_from: str) -> None:
        """Writes a safetensors file, whole or not at all; `made_from` names what was clustered, for `load`."""
        header = {"made_from": made_from, "inertia": self.inertia, "passes": self.passes}
        write_tensors(path, {"centroids": self.centroids}, header)

    @classmethod
    def load(cls, path: Path, made_from: str | None = None) -> Self:
        """Reads what `save` wrote.

        Raises:
            ValueError: not such a file, or clusters of something else than `made_from`.

        """
        tensors, header = read_tensors(path, {"centroids": ("float32", 2)})
        if made_from is not None and header["made_from"] != made_from:
            raise ValueError(f"{path}: clusters of {header['made_from']}, expected {made_from}; delete it to fit anew")
        return cls(tensors["centroids"], float(header["inertia"]), int(header["passes"]))


class FitState(NamedTuple):
    """What one update hands to the next."""

    centroids: Centroids
    counts: Float[Array, " clusters"]
    """Frames that have moved a centroid since it was seeded: the next one moves it by 1 / (count + 1)."""


def row_sharding(rows: int) -> NamedSharding:
    """Rows over as many local devices as divide them."""
    devices = jax.local_devices()
    used = max(count for count in range(1, len(devices) + 1) if rows % count == 0)
    mesh = jax.sharding.Mesh(np.array(devices[:used]), ("rows",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("rows"))


def squared_distances(frames: Frames, centroids: Centroids) -> Float[Array, "frames clusters"]:
    """|x|^2 - 2 x.c + |c|^2, float32 at full precision."""
    products = jnp.matmul(frames, centroids.T, precision=jax.lax.Precision.HIGHEST)
    norms = jnp.square(frames).sum(1)[:, None], jnp.square(centroids).sum(1)[None, :]
    return jnp.maximum(norms[0] - 2 * products + norms[1], 0)


@jax.jit
def nearest(frames: Frames, centroids: Centroids) -> tuple[Int[Array, " frames"], Float[Array, " frames"]]:
    """The nearest centroid of each frame (the first of equals), and its squared distance."""
    distances = squared_distances(frames.astype(jnp.float32), centroids)
    return distances.argmin(1), distances.min(1)


def fit(
    sample: Float32[np.ndarray, "frames dim"],
    num_clusters: int,
    settings: KMeansSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
    made_from: str = "",
    on_pass: Callable[[int, float], None] = lambda _number, _inertia: None,
) -> KMeans:
    """Clusters of `sample`.

    Args:
        sample: frames in memory; those that do not fill a batch are left out, at random.
        num_clusters: K.
        settings: how to fit.
        seed: of the order of frames and of the seeds.
        checkpoint: state after each pass, from which an interrupted fit goes on to the same centroids.
        made_from: names the sample, so that no other sample's checkpoint is taken up.
        on_pass: called after each pass with its number and mean inertia.

    Raises:
        ValueError: fewer frames than clusters, or a checkpoint of another sample.

    """
    batches = _batches(sample, num_clusters, settings, seed)
    state, start, previous = _resume(checkpoint, made_from) or (_seed(batches, num_clusters, settings, seed), 0, np.inf)
    placed = _place(batches)
    number = start
    while number < settings.passes and previous > 0:
        key = jax.random.fold_in(jax.random.key(seed), number)
        last = number + 1 == settings.passes
        state, inertia = _one_pass(state, placed, key, reseed=not last)
        improved, number, current = previous - float(inertia), number + 1, float(inertia)
        on_pass(number, current)
        if checkpoint is not None:
            _save_state(checkpoint, state, number, current, made_from)
        if improved < settings.tolerance * previous < np.inf:
            break
        previous = current
    return KMeans(np.asarray(state.centroids), float(_inertia(placed, state.centroids)), number)
