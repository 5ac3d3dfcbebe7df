"""k-means on the devices: a fixed-size sample of frames, k-means++ seeds, then passes of mini-batch updates.

The sample is spread evenly over random utterances and has a fixed number of frames however large the corpus is; it is
a function of the seed and the corpus, so an interrupted fit finds the same one again. Rows are spread over the devices
of all hosts, centroids are on each of them, and sums go over all; the number of devices and hosts changes only the
order of float additions.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int, Int64, UInt32

from pretrain.distributed import fit_sharding, from_first_host, local_rows, put_sharded
from pretrain.features import FrameSpan
from wavlm_jax.files import write_bytes
from wavlm_jax.shapes import SAMPLE_RATE, Scalar, StepKey

Frames = Float[Array, "frames dim"]
Batches = Float[Array, "batches batch dim"]
Centroids = Float[Array, "clusters dim"]
Counts = Float[Array, " clusters"]
"""Frames that have moved a centroid since it was seeded: the next one moves it by 1 / (count + 1) of the way."""
Index = Int[Array, ""]


@dataclass(frozen=True, kw_only=True)
class KMeansSettings:
    """The config section `labels.kmeans`."""

    sample_frames: int
    """Frames that are kept in memory to fit on (all frames of a smaller corpus)."""
    batch_frames: int
    """Frames of one update; a multiple of the number of devices uses all. Several hosts round it down to one."""
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
    def load(cls, path: Path, made_from: str | None = None) -> "KMeans":
        """Reads what `save` wrote.

        Raises:
            ValueError: not such a file, or clusters of something else than `made_from`.

        """
        tensors, header = read_tensors(path, {"centroids": ("float32", 2)})
        if made_from is not None and header["made_from"] != made_from:
            raise ValueError(f"{path}: clusters of {header['made_from']}, expected {made_from}; delete it to fit anew")
        return cls(tensors["centroids"], float(header["inertia"]), int(header["passes"]))


def choose_utterances(
    lengths: Int64[np.ndarray, " utterances"], sample_seconds: float | None, seed: int
) -> Int64[np.ndarray, " sampled"]:
    """Random whole utterances of together at least `sample_seconds` (None: all), ascending."""
    if sample_seconds is None:
        return np.arange(len(lengths), dtype=np.int64)
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(lengths))
    before = np.cumsum(lengths[order]) - lengths[order]
    return np.sort(order[before < sample_seconds * SAMPLE_RATE]).astype(np.int64)


def choose_frames(total: int, size: int, seed: int) -> Int64[np.ndarray, " frames"]:
    """`size` of the numbers below `total` (all of them if fewer), ascending: a random one in each of `size` strata."""
    if total <= size:
        return np.arange(total, dtype=np.int64)
    strata = (np.arange(size + 1) * total) // size
    offsets = np.random.Generator(np.random.Philox(key=seed)).random(size)
    return strata[:-1] + (offsets * np.diff(strata)).astype(np.int64)


class FrameSample:
    """Draws at most `size` frames from features given batch by batch; memory depends on `size` and `dim` alone.

    Args:
        utterances: ascending.
        counts: frames of each of them.
        size: frames to keep.
        dim: width of a frame.
        seed: decides which.

    """

    def __init__(
        self,
        utterances: Int64[np.ndarray, " sampled"],
        counts: Int64[np.ndarray, " sampled"],
        *,
        size: int,
        dim: int,
        seed: int,
    ) -> None:
        self._utterances = utterances
        self._chosen = choose_frames(int(counts.sum()), size, seed)
        self._starts = np.cumsum(counts) - counts
        self.kept: Float32[np.ndarray, "frames dim"] = np.zeros((len(self._chosen), dim), np.float32)
        """0 in the places of frames that have not come by."""

    def take(self, result: Float[Array, "rows dim"], pieces: tuple[FrameSpan, ...]) -> None:
        """The features of a batch; fetched from the devices if a frame of this host's rows is chosen."""
        features: np.ndarray | None = None
        for piece in pieces:
            first = int(self._starts[np.searchsorted(self._utterances, piece.utterance)]) + piece.start
            low, high = np.searchsorted(self._chosen, [first, first + piece.frames])
            if high > low:
                features = local_rows(result) if features is None else features
                self.kept[low:high] = features[self._chosen[low:high] - first + piece.row]


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
    frames = _batches(sample, num_clusters, settings, seed)
    state = _load_state(checkpoint, made_from) or _FitState(
        _seeds(frames, num_clusters, settings, seed), np.zeros(num_clusters, np.float32), ()
    )
    batches = _place(frames)
    everywhere = NamedSharding(_mesh_of(batches), PartitionSpec())
    one_pass, _ = _programs(everywhere)
    while not _finished(state.inertias, settings):
        number = len(state.inertias)
        key_bits = jax.random.key_data(jax.random.fold_in(jax.random.key(seed), number))  # bits travel like any array
        # One placement before every pass, so that one compiled program serves them all.
        moved = [put_sharded(part, everywhere) for part in (state.centroids, state.counts, key_bits)]
        reseed = put_sharded(number + 1 < settings.passes, everywhere)
        centroids, counts, inertia = one_pass(*moved, batches, reseed)
        state = _FitState(np.asarray(centroids), np.asarray(counts), (*state.inertias, float(inertia)))
        if checkpoint is not None and jax.process_index() == 0:
            _save_state(checkpoint, state, made_from)
        on_pass(number + 1, state.inertias[-1])
    return KMeans(state.centroids, _mean_inertia(batches, state.centroids), len(state.inertias))


class _FitState(NamedTuple):
    """Where a fit stands between two passes."""

    centroids: np.ndarray
    counts: np.ndarray
    inertias: tuple[float, ...]


def _finished(inertias: tuple[float, ...], settings: KMeansSettings) -> bool:
    """Enough passes, nothing left to gain, or the last pass gained too little."""
    if len(inertias) >= settings.passes:
        return True
    if len(inertias) < 2:  # noqa: PLR2004 (a gain needs two passes)
        return False
    before, after = inertias[-2:]
    return after == 0 or (settings.tolerance > 0 and before - after < settings.tolerance * before)


def _batches(
    sample: Float32[np.ndarray, "frames dim"], num_clusters: int, settings: KMeansSettings, seed: int
) -> Float32[np.ndarray, "batches batch dim"]:
    """The frames in random order, cut into batches that every pass visits in another order."""
    if len(sample) < num_clusters:
        raise ValueError(
            f"labels.num_clusters: {num_clusters} clusters need as many frames, the sample has {len(sample)}"
        )
    size = min(settings.batch_frames, len(sample))
    if jax.process_count() > 1:
        size -= size % jax.device_count()
    if size == 0:
        raise ValueError(f"labels.kmeans: {len(sample)} frames for {jax.device_count()} devices; take fewer hosts")
    count = len(sample) // size
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(sample))[: count * size]
    return sample[order].reshape(count, size, -1)


def _place(frames: Float32[np.ndarray, "batches batch dim"]) -> Batches:
    """On the devices, each holding its rows of every batch."""
    rows = fit_sharding(frames.shape[1])
    return put_sharded(frames, NamedSharding(rows.mesh, PartitionSpec(None, "rows")))


def _seeds(
    frames: Float32[np.ndarray, "batches batch dim"], num_clusters: int, settings: KMeansSettings, seed: int
) -> Float32[np.ndarray, "clusters dim"]:
    """The best of several k-means++ seedings, each on its own part of the frames; scored on the first batches."""
    from sklearn.cluster import kmeans_plusplus  # noqa: PLC0415 a second of every launch, for those who make labels

    flat = frames.reshape(-1, frames.shape[-1])
    size = min(len(flat), max(3 * frames.shape[1], 3 * num_clusters))
    candidates = []
    for number in range(settings.initialisations):
        start = number * size % (len(flat) - size + 1)
        seeds, _ = kmeans_plusplus(flat[start : start + size], num_clusters, random_state=seed + number)
        candidates.append(from_first_host(np.asarray(seeds, np.float32)))
    scored = _place(frames[: max(1, size // frames.shape[1])])
    return min(candidates, key=lambda centroids: _mean_inertia(scored, centroids))


@cache
def _programs(everywhere: NamedSharding) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(one pass, mean inertias of batches) over the devices of all hosts; results are on each device."""
    return jax.jit(_one_pass, out_shardings=everywhere), jax.jit(_inertias, out_shardings=everywhere)


def _one_pass(
    centroids: Centroids, counts: Counts, key_bits: UInt32[Array, " bits"], batches: Batches, reseed: Bool[Array, ""]
) -> tuple[Centroids, Counts, Scalar]:
    """One mini-batch update per batch, in random order; then clusters that no frame fell into get a new seed."""
    order_key, seed_key = jax.random.split(jax.random.wrap_key_data(key_bits))
    order = jax.random.permutation(order_key, len(batches))

    def step(carry: tuple[Centroids, Counts], index: Index) -> tuple[tuple[Centroids, Counts], tuple[Counts, Scalar]]:
        return _update(*carry, batches[index])

    (centroids, counts), (members, inertias) = jax.lax.scan(step, (centroids, counts), order)
    empty = reseed & (members.sum(0) == 0)
    centroids = jnp.where(empty[:, None], _far_frames(batches[order[0]], centroids, seed_key), centroids)
    return centroids, jnp.where(empty, 0, counts), inertias.mean()


def _update(
    centroids: Centroids, counts: Counts, batch: Frames
) -> tuple[tuple[Centroids, Counts], tuple[Counts, Scalar]]:
    """Each centroid becomes the running mean of all frames that it was nearest to (Sculley 2010)."""
    labels, distances = nearest(batch, centroids)
    member = jax.nn.one_hot(labels, len(centroids), dtype=jnp.float32)
    members = member.sum(0)
    sums = jnp.matmul(member.T, batch, precision=jax.lax.Precision.HIGHEST)
    total = counts + members
    centroids = centroids + (sums - members[:, None] * centroids) / jnp.maximum(total, 1)[:, None]
    return (centroids, total), (members, distances.mean())


def _far_frames(batch: Frames, centroids: Centroids, key: StepKey) -> Centroids:
    """One frame per cluster, none twice, drawn with probability proportional to the squared distance (k-means++)."""
    _, distances = nearest(batch, centroids)
    scores = jnp.log(distances) + jax.random.gumbel(key, distances.shape)
    _, chosen = jax.lax.top_k(scores, min(len(centroids), len(batch)))
    return batch[jnp.resize(chosen, (len(centroids),))]


def _inertias(batches: Batches, centroids: Centroids) -> Float[Array, " batches"]:
    means: Float[Array, " batches"] = jax.lax.map(lambda batch: nearest(batch, centroids)[1].mean(), batches)
    return means


def _mesh_of(batches: Batches) -> Any:
    sharding: Any = batches.sharding
    return sharding.mesh


def _mean_inertia(batches: Batches, centroids: Float32[np.ndarray, "clusters dim"]) -> float:
    everywhere = NamedSharding(_mesh_of(batches), PartitionSpec())
    found = _programs(everywhere)[1](batches, put_sharded(centroids, everywhere))
    return float(np.asarray(found, np.float64).mean())


def _save_state(path: Path, state: _FitState, made_from: str) -> None:
    tensors = {"centroids": state.centroids, "counts": state.counts}
    write_tensors(path, tensors, {"made_from": made_from, "inertias": list(state.inertias)})


def _load_state(path: Path | None, made_from: str) -> _FitState | None:
    if path is None or not path.exists():
        return None
    tensors, header = read_tensors(path, {"centroids": ("float32", 2), "counts": ("float32", 1)})
    if header["made_from"] != made_from:
        raise ValueError(f"{path}: a fit of {header['made_from']}, expected {made_from}; delete it to start anew")
    inertias = tuple(float(value) for value in header["inertias"])
    return _FitState(tensors["centroids"], tensors["counts"], inertias)


_HEADER_KEY = "header"


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> None:
    """Writes a safetensors file, whole or not at all, with `header` as JSON in its metadata."""
    metadata = {_HEADER_KEY: json.dumps(header, sort_keys=True)}
    write_bytes(path, safetensors.numpy.save(dict(tensors), metadata=metadata))


def read_tensors(path: Path, expected: Mapping[str, tuple[str, int]]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and header of a file that `write_tensors` wrote.

    Args:
        path: the file.
        expected: name -> (dtype, number of dimensions); exactly these must be there, with finite values.

    Raises:
        ValueError: not safetensors, or other tensors than expected.

    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            header = json.loads((file.metadata() or {})[_HEADER_KEY])
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not a safetensors file that this program wrote ({error}); delete it") from error
    found = {name: (str(tensor.dtype), tensor.ndim) for name, tensor in tensors.items()}
    if found != dict(expected) or not isinstance(header, dict):
        raise ValueError(f"{path}: holds {found}, expected {dict(expected)}; delete it")
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds values that are not finite; delete it")
    return tensors, header
