"""Makes label stores: from the settings to features, clusters, labels and quality; resumable, and idempotent."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from pretrain.features import Corpus, FeatureSource, MfccFeatures
from pretrain.label_request import TRAIN, LabelRequest
from pretrain.labels import LabelError, LabelHeader, LabelSettings, LabelStore
from pretrain.layer_features import LayerFeatures, Teacher
from pretrain.quality import measure, report
from pretrain.shares import Share, together
from wavlm_jax.shapes import SAMPLE_RATE, Params
from wavlm_jax.starting import Load


def make_labels(settings: LabelSettings, corpora: Mapping[str, Corpus], load: Load) -> LabelHeader:
    """Makes the label store `settings.path` for all splits, or what of it is missing. All processes of a run call it.

    Args:
        settings: the config section `labels`.
        corpora: split -> corpus; the clusters are learned from "train" and label all of them.
        load: reads the weights of a teacher.

    Returns:
        The header of the store; its `quality` has been printed.

    Raises:
        LabelError: the folder holds labels of another request, or the settings contradict each other.

    """
    if TRAIN not in corpora:
        raise LabelError(f"config.data: found the splits {', '.join(sorted(corpora))}, expected one called {TRAIN!r}")
    request = LabelRequest(settings, feature_source(settings, load), corpora)
    header = together("what is there of the labels", request.existing)
    missing = {split: corpus for split, corpus in corpora.items() if header is None or split not in header.splits}
    if header is not None and not missing:
        return header
    first = Share.here().first
    if first:
        request.claim()
    clusters = request.clusters()
    header = header or request.header(clusters)
    for split, corpus in missing.items():
        described = request.label(split, corpus, clusters)
        header = replace(header, splits={**header.splits, split: described})
        if first:
            header = _measured(request, split, header)
    together("the header of the labels", lambda: _complete(request, header) if first else None)
    return LabelHeader.load(request.folder)


def _measured(request: LabelRequest, split: str, header: LabelHeader) -> LabelHeader:
    """With the quality of a split, which is printed."""
    quality = measure(LabelStore(request.folder, split, header), request.corpora[split])
    print(report(split, quality), flush=True)
    return replace(header, splits={**header.splits, split: replace(header.splits[split], quality=quality)})


def _complete(request: LabelRequest, header: LabelHeader) -> None:
    header.write(request.folder)
    for leftovers in ("*.progress.*", "*.labels.*-of-*.npy*"):
        for leftover in request.folder.glob(leftovers):
            leftover.unlink()


def feature_source(settings: LabelSettings, load: Load) -> FeatureSource:
    """What is to be clustered: MFCC, or a layer of the teacher that `settings.run` names.

    Raises:
        LabelError: `rate_hz` is not that of the features.

    """
    source: FeatureSource = MfccFeatures(settings.num_threads)
    if settings.teacher == "layer" and settings.run is not None and settings.layer is not None:
        source = LayerFeatures(
            load_teacher(load, Path(settings.run), settings.step),
            settings.layer,
            piece_seconds=settings.piece_seconds,
            batch_seconds=settings.batch_seconds,
            num_threads=settings.num_threads,
        )
    rate = SAMPLE_RATE // source.geometry.hop
    if rate != settings.rate_hz:
        raise LabelError(
            f"config.labels.rate_hz: found {settings.rate_hz}, but {settings.teacher!r} gives {rate} labels a second; "
            f"set it to {rate}"
        )
    return source


def load_teacher(load: Load, path: Path, step: int | None = None) -> Teacher:
    """The teacher in `path`.

    Args:
        load: reads weights.
        path: workdir of a run of ours, or a Hugging Face folder (WavLM or HuBERT).
        step: checkpoint of the run; None: its newest.

    Raises:
        ValueError: neither of the two, a step of a folder that has none, or whatever the file's reader finds.

    """
    weights = load(path, step)
    # A padded batch must give what each row gives alone, whatever the checkpoint was trained with.
    return Teacher(replace(weights.config, padding="exact"), weights.params, fingerprint(weights.params))


def fingerprint(params: Params) -> str:
    """16 hex digits over names, shapes, dtypes and values of a parameter tree."""
    digest = hashlib.sha256()
    for name, array in sorted(_named(params)):
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _named(params: Params) -> Iterator[tuple[str, np.ndarray]]:
    for path, array in jax.tree_util.tree_leaves_with_path(params):
        yield jax.tree_util.keystr(path), np.asarray(array)
