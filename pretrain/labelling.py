"""The stages from a corpus to a label store: sample, k-means, labels, quality.

Each stage continues from what an earlier run left. Several hosts do each stage together, each its share of the
utterances; the first host writes what all share.

request.json                   what is being made, written first: another request for the same folder is an error
kmeans.progress.safetensors    the fit after its last pass
kmeans.safetensors             the fit
{split}.progress.json          labels of a split up to some utterance (.progress.1-of-4.json: of a host's share)
header.json                    written last
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float32
from tqdm import tqdm

from pretrain.distributed import Share, replicate, row_sharding, run_on_all_hosts, sum_over_hosts
from pretrain.features import FeatureSource, FrameSpan, LayerFeatures, MfccFeatures, load_teacher
from pretrain.kmeans import FrameSample, KMeans, choose_utterances, fit
from pretrain.label_step import PartLabels, Use, in_parts, in_rounds, label_program, parts_of
from pretrain.labels import (
    FORMAT,
    HEADER,
    LabelError,
    LabelHeader,
    LabelSettings,
    LabelStore,
    SplitHeader,
    SplitWriter,
    offsets_of,
    utterance_keys,
)
from pretrain.quality import measure, report
from wavlm_jax.data.corpus import Corpus
from wavlm_jax.files import read_json, write_json
from wavlm_jax.shapes import SAMPLE_RATE
from wavlm_jax.training.hosts import broadcast_one_to_all
from wavlm_jax.training.lease import NAME as LEASE
from wavlm_jax.training.lease import owned

REQUEST, CLUSTERS, FIT = "request.json", "kmeans.safetensors", "kmeans.progress.safetensors"
TRAIN = "train"


@dataclass(frozen=True)
class LabelRequest:
    """A label store to be made, and the stages of making it."""

    settings: LabelSettings
    source: FeatureSource
    corpora: Mapping[str, Corpus]

    @property
    def folder(self) -> Path:
        """Of the label store."""
        return Path(self.settings.path)

    @property
    def request(self) -> dict[str, Any]:
        """Everything that shapes the clusters; nothing that only changes speed or memory."""
        return {
            "format": FORMAT,
            "num_clusters": self.settings.num_clusters,
            "teacher": dict(self.source.description),
            "seed": self.settings.seed,
            "sample_seconds": self.settings.sample_seconds,
            "kmeans": asdict(self.settings.kmeans),
            "corpus": self.corpora[TRAIN].fingerprint,
        }

    @property
    def digest(self) -> str:
        """Tells two requests apart."""
        return hashlib.sha256(json.dumps(self.request, sort_keys=True).encode()).hexdigest()[:16]

    def existing(self) -> LabelHeader | None:
        """The header of a store that answers this request, perhaps for fewer splits; None where there is none yet."""
        if self.folder.exists() and {path.name for path in self.folder.iterdir()} - {REQUEST, LEASE}:
            self.check()  # else nothing was made of the request before
        if not (self.folder / HEADER).exists():
            return None
        header = LabelHeader.load(self.folder)
        for split, corpus in self.corpora.items():
            name = header.named(split, corpus.fingerprint)
            if name in header.splits and header.splits[name].corpus != corpus.fingerprint:
                raise LabelError(
                    f"{self.folder}: has labels of {split} for the corpus {header.splits[split].corpus}, the config "
                    f"names {corpus.fingerprint}; give a folder of evaluation data another name, else choose another "
                    "config.labels.path, or remove the folder"
                )
        return header

    def check(self) -> None:
        """Checks that request.json, if there is one, is this request.

        Raises:
            LabelError: it is another one; the message names what differs.

        """
        file = self.folder / REQUEST
        if not file.exists():
            return
        found, wanted = read_json(file), self.request
        other = [key for key in wanted if key not in found or found[key] != wanted[key]]
        if other:
            changes = "; ".join(f"{key}: {found.get(key)}, asked for {wanted[key]}" for key in other)
            raise LabelError(
                f"{self.folder}: holds labels of another request ({changes}); choose another config.labels.path "
                "(--out), or remove the folder"
            )

    def claim(self) -> None:
        """Writes request.json: what is being made in this folder."""
        write_json(self.folder / REQUEST, self.request)

    def clusters(self) -> KMeans:
        """The clusters of this request: read, or learned."""
        file = self.folder / CLUSTERS
        if broadcast_one_to_all("whether the clusters are there", file.exists()):
            return KMeans.load(file, self.digest)
        made = fit(
            sum_over_hosts(self._sample()),
            self.settings.num_clusters,
            self.settings.kmeans,
            seed=self.settings.seed,
            checkpoint=self.folder / FIT,
            made_from=self.digest,
            on_pass=_print_pass,
        )
        if Share.here().first:
            made.save(file, self.digest)
        return made

    def _sample(self) -> Float32[np.ndarray, "frames dim"]:
        """The frames to fit on that are in this host's share of the utterances, 0 in the places of the others."""
        corpus = self.corpora[TRAIN]
        lengths = np.asarray(corpus.lengths)
        utterances = choose_utterances(lengths, self.settings.sample_seconds, self.settings.seed)
        counts = self.source.counts(lengths[utterances])
        first, end = Share.here().of(lengths[utterances])
        drawing = FrameSample(
            utterances,
            counts,
            size=self.settings.kmeans.sample_frames,
            dim=self.source.dim,
            seed=self.settings.seed,
        )
        program = partial(jax.jit(self.source.compute, out_shardings=row_sharding()), self.source.params)
        name, edges = "features to cluster", offsets_of(counts)
        with _bar(float(lengths[utterances[first:end]].sum() / SAMPLE_RATE), name) as bar:
            use = _watched(drawing.take, bar, self.settings.rate_hz)

            def part(start: int, stop: int) -> None:
                in_rounds(name, self.source, corpus, utterances[start:stop], program, use)

            in_parts(name, parts_of(edges, first, end), part)
        return drawing.kept

    def header(self, clusters: KMeans) -> LabelHeader:
        """The header of a store that has no split yet."""
        lengths = np.asarray(self.corpora[TRAIN].lengths)
        sampled = choose_utterances(lengths, self.settings.sample_seconds, self.settings.seed)
        frames = int(self.source.counts(lengths[sampled]).sum())
        return LabelHeader(
            format=FORMAT,
            num_clusters=self.settings.num_clusters,
            rate_hz=self.settings.rate_hz,
            kmeans=clusters.fingerprint,
            inertia=clusters.inertia,
            teacher=self.source.description,
            seed=self.settings.seed,
            sample_share=float(lengths[sampled].sum() / lengths.sum()),
            sample_frames=min(frames, self.settings.kmeans.sample_frames),
            request=self.digest,
            splits={},
        )

    def label(self, split: str, corpus: Corpus, clusters: KMeans) -> SplitHeader:
        """Labels a split, each host its share, from where an earlier run stopped."""
        lengths = np.asarray(corpus.lengths)
        made_from = f"{corpus.fingerprint} {clusters.fingerprint}"
        counts, share = self.source.counts(lengths), Share.here()
        keys, name = utterance_keys(corpus.ids), f"labels of {split}"
        writer = run_on_all_hosts(name, lambda: SplitWriter(self.folder, split, counts, keys, made_from, share))
        self._fill(name, writer, corpus, clusters)
        run_on_all_hosts(name, writer.finish)
        digest = run_on_all_hosts(f"joined labels of {split}", lambda: writer.join() if share.first else "")
        return SplitHeader(
            corpus=corpus.fingerprint,
            kmeans=clusters.fingerprint,
            utterances=len(lengths),
            labels=int(writer.offsets[-1]),
            sha256=digest,
            quality={},
        )

    def _fill(self, name: str, writer: SplitWriter, corpus: Corpus, clusters: KMeans) -> None:
        rows, centroids = row_sharding(), replicate(clusters.centroids)
        label = label_program(self.source.compute, rows)
        seconds = np.asarray(corpus.lengths)[writer.done : writer.end].sum() / SAMPLE_RATE
        with _bar(float(seconds), name) as bar:

            def part(first: int, end: int) -> None:
                made = PartLabels(writer.offsets[first : end + 1], first)
                in_rounds(
                    name,
                    self.source,
                    corpus,
                    np.arange(first, end),
                    lambda arrays: label(self.source.params, arrays, centroids),
                    _watched(made.take, bar, self.settings.rate_hz),
                )
                if end > first:
                    writer.write(first, end, made.whole())

            in_parts(name, parts_of(writer.offsets, writer.done, writer.end), part)


def _print_pass(number: int, inertia: float) -> None:
    if Share.here().first:
        print(f"k-means: pass {number}, inertia {inertia:.6g}", flush=True)


def _bar(seconds: float, name: str) -> Any:
    """A progress bar in seconds of audio, on the first host's terminal only."""
    disable = None if Share.here().first else True
    return tqdm(total=round(seconds), desc=name, unit="s", unit_scale=True, disable=disable)


def _watched(use: Use, bar: Any, rate_hz: int) -> Use:
    def watched(result: Array, pieces: tuple[FrameSpan, ...]) -> None:
        bar.update(sum(piece.frames for piece in pieces) / rate_hz)
        use(result, pieces)

    return watched


def make_labels(settings: LabelSettings, corpora: Mapping[str, Corpus]) -> LabelHeader:
    """Makes the label store `settings.path` for all splits, or what of it is missing. All processes of a run call it.

    Args:
        settings: the config section `labels`.
        corpora: split -> corpus; the clusters are learned from "train" and label all of them.

    Returns:
        The header of the store; its `quality` has been printed.

    Raises:
        LabelError: the folder holds labels of another request, or the settings contradict each other.
        TakenError: another process makes labels there.

    """
    if TRAIN not in corpora:
        raise LabelError(f"config.data: found the splits {', '.join(sorted(corpora))}, expected one called {TRAIN!r}")
    request = LabelRequest(settings, feature_source(settings), corpora)
    header, missing = _missing(request)
    if header is not None and not missing:
        return header
    with owned(request.folder):
        return _make_missing(request, *_missing(request))


def _missing(request: LabelRequest) -> tuple[LabelHeader | None, dict[str, Corpus]]:
    """What is there, and the splits that are not."""
    header = run_on_all_hosts("what is there of the labels", request.existing)
    there = {} if header is None else header.splits
    named = {
        split: split if header is None else header.named(split, c.fingerprint) for split, c in request.corpora.items()
    }
    return header, {split: request.corpora[split] for split, name in named.items() if name not in there}


def _make_missing(request: LabelRequest, header: LabelHeader | None, missing: Mapping[str, Corpus]) -> LabelHeader:
    first = Share.here().first
    run_on_all_hosts("the folder of the labels", lambda: request.claim() if first else None)
    run_on_all_hosts("the request of the labels", request.check)
    clusters = request.clusters()
    header = header or request.header(clusters)
    for split, corpus in missing.items():
        described = request.label(split, corpus, clusters)
        header = replace(header, splits={**header.splits, split: described})
        if first:
            header = _measured(request, split, header)
    run_on_all_hosts("the header of the labels", lambda: _complete(request, header) if first else None)
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


def feature_source(settings: LabelSettings) -> FeatureSource:
    """What is to be clustered: MFCC, or a layer of the teacher that `settings.run` names.

    Raises:
        LabelError: `rate_hz` is not that of the features.

    """
    source: FeatureSource = MfccFeatures(settings.num_threads)
    if settings.teacher == "layer" and settings.run is not None and settings.layer is not None:
        source = LayerFeatures(
            load_teacher(Path(settings.run), settings.step),
            settings.layer,
            piece_seconds=settings.piece_seconds,
            batch_seconds=settings.batch_seconds,
            num_threads=settings.num_threads,
        )
    rate, rest = divmod(SAMPLE_RATE, source.geometry.hop)
    if rest:
        raise LabelError(
            f"config.labels.run: frames of {source.geometry.hop} samples; expected a teacher whose frames are a whole "
            "number of times in a second, as the rate of labels is in Hz"
        )
    if rate != settings.rate_hz:
        raise LabelError(
            f"config.labels.rate_hz: found {settings.rate_hz}, but {settings.teacher!r} gives {rate} labels a second; "
            f"set it to {rate}"
        )
    return source
