"""The pre-training task: corpora, labels, model, mixing and objective become a `Task` here and nowhere else.

Also what pre-training adds to the rows of the loader (frame labels, noise clips; picklable, for worker processes), and
the parameters it starts from: fresh ones, or those of an earlier run or an imported model.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Traced
from jaxtyping import Int32

from pretrain.label_step import trace_label_step
from pretrain.labelling import make_labels
from pretrain.labels import HEADER, LabelSettings, LabelStore
from pretrain.mixing import MixingSettings
from pretrain.predictor import NO_LABEL, MaskedPredictionLoss, MaskedPredictor, ObjectiveSettings
from pretrain.preflight import check_labels
from wavlm_jax.config import Compute, WavLMConfig
from wavlm_jax.data.batches import BatchSettings, describe
from wavlm_jax.data.corpus import Corpus, DataSettings, open_corpora
from wavlm_jax.data.loader import CropStream, Host, LoaderSettings, PaddedStream, SpecStream, spec_stream
from wavlm_jax.loading import fitting_weights, shapes_of
from wavlm_jax.model.attention import current_device
from wavlm_jax.model.attention import describe as describe_attention
from wavlm_jax.settings import SettingsError, read_sections, refuse_unknown_sections
from wavlm_jax.shapes import Params, StepKey, label_index, samples_for
from wavlm_jax.tasks import FINE_TUNING
from wavlm_jax.training.optim import Freeze
from wavlm_jax.training.start import RunSettings
from wavlm_jax.training.task import BatchStream, Task, TaskKind, Topology


@dataclass(frozen=True)
class FrameLabels:
    """The labels of the frames of a crop (FACTS C5): frame i of the utterance has label floor(i * rate / 50)."""

    store: LabelStore

    def __call__(self, index: int, first_frame: int, frames: int, bits: int) -> Mapping[str, np.ndarray]:
        """`labels` int32 (frames,), NO_LABEL behind the last one."""
        del bits  # labels are not random
        return {"labels": self.frame_labels(index, first_frame, frames)}

    @staticmethod
    def shapes(frames: int) -> Mapping[str, jax.ShapeDtypeStruct]:
        """What a row of `frames` gets."""
        return {"labels": jax.ShapeDtypeStruct((frames,), np.int32)}

    def frame_labels(self, index: int, first_frame: int, frames: int) -> Int32[np.ndarray, " frames"]:
        """Labels of the frames `first_frame`, `first_frame` + 1, ... of utterance `index`."""
        stored = self.store.labels(index)
        wanted = label_index(first_frame + np.arange(frames), self.store.header.rate_hz)
        found = np.full(frames, NO_LABEL, np.int32)
        there = wanted < len(stored)
        found[there] = stored[wanted[there]]
        return found


@dataclass(frozen=True)
class NoiseClips:
    """Deals a noise clip to a share of the rows, so that the same share of the mixed rows is mixed with noise."""

    corpus: Corpus
    share: float

    def __call__(self, index: int, first_frame: int, frames: int, bits: int) -> Mapping[str, np.ndarray]:
        """`noise` int16 (samples / 2,), zeros behind `num_noise_samples`, which is 0 where the row got no clip.

        `noise_power` and `noise_place` float32 () are those of `mixing.WholeClips`, 0 without a clip.
        A span never takes more than half of a row (FACTS C7), so more of a clip is never needed; its start is random.
        """
        del index, first_frame
        size = samples_for(frames) // 2
        dealt, which, where = np.random.Generator(np.random.Philox(bits)).random(3)
        noise, count, power = np.zeros(size, np.int16), 0, 0.0
        if dealt < self.share:
            clip = self.corpus.random_piece(which, where, size)
            count = len(clip)
            noise[:count] = clip
            number = self.corpus.random_index(which)
            power = self.corpus.means[number] ** 2 + self.corpus.variances[number]
        return {
            "noise": noise,
            "num_noise_samples": np.asarray(count, np.int32),
            "noise_power": np.asarray(power, np.float32),
            "noise_place": np.asarray(where if count else 0, np.float32),
        }

    @staticmethod
    def shapes(frames: int) -> Mapping[str, jax.ShapeDtypeStruct]:
        """What a row of `frames` gets."""
        noise = jax.ShapeDtypeStruct((samples_for(frames) // 2,), np.int16)
        number = jax.ShapeDtypeStruct((), np.float32)
        count = jax.ShapeDtypeStruct((), np.int32)
        return {"noise": noise, "num_noise_samples": count, "noise_power": number, "noise_place": number}


@dataclass(frozen=True)
class Annotations:
    """Several annotations as one."""

    parts: tuple[FrameLabels | NoiseClips, ...]

    def __call__(self, index: int, first_frame: int, frames: int, bits: int) -> Mapping[str, np.ndarray]:
        """The arrays of all parts."""
        arrays: dict[str, np.ndarray] = {}
        for part in self.parts:
            arrays.update(part(index, first_frame, frames, bits))
        return arrays


_SPECIAL_ROWS = 4
"""Label embeddings that fairseq's dictionary has before those of the clusters (FACTS E20)."""


@dataclass(frozen=True, kw_only=True)
class InitSettings:
    """The config section `init`."""

    path: str | None
    """Workdir of an earlier run, or a checkpoint of any kind that `wavlm_jax.loading` reads; None: from scratch."""
    step: int | None
    """Checkpoint of the run; None: its newest."""
    head_warmup_steps: int
    """Updates of the head alone, the body bit-equal meanwhile, where `path` has no head that fits and it is fresh."""

    def __post_init__(self) -> None:
        if self.head_warmup_steps < 0:
            raise ValueError(f"head_warmup_steps: found {self.head_warmup_steps}, expected 0 or more")
        if self.head_warmup_steps and self.path is None:
            raise ValueError(
                f"head_warmup_steps: found {self.head_warmup_steps} without init.path; from scratch there is no body "
                "to protect, expected 0"
            )


def head_warmup(settings: InitSettings) -> dict[str, Freeze]:
    """What stands still while a fresh head learns: the whole body; nothing where the head was given."""
    if settings.head_warmup_steps == 0:
        return {}
    return {"head_warmup": Freeze(pattern="^wavlm/", updates=settings.head_warmup_steps, unless_given="^head/")}


def initial_params(settings: InitSettings, model: WavLMConfig, fresh: Params) -> Params:
    """`fresh` itself, or the same tree with what `init.path` holds.

    The body has to fit in every shape and compute the same function. The head is taken where it is there and has as
    many clusters; fairseq's four rows before them are dropped or kept as the objective wants. Else it stays fresh: the
    labels of another k-means mean something else anyway.

    Raises:
        SettingsError: the body does not fit; the first fields or shapes that differ are named.

    """
    if settings.path is None:
        return fresh
    weights = fitting_weights(settings.path, settings.step, model, fresh["wavlm"])
    return {"wavlm": weights.params, "head": _fitting_head(weights.head, fresh["head"])}


def _fitting_head(found: Params | None, fresh: Params) -> Params:
    """The head that was found, with as many special rows as `fresh` has, or `fresh`, the very same arrays.

    Special rows that the source does not have are drawn as fresh ones are, from [0, 1); none is ever a target.
    """
    if found is None:
        return fresh
    rows, wanted = found["label_embeddings"], fresh["label_embeddings"]
    missing = wanted.shape[0] - rows.shape[0]
    if missing == -_SPECIAL_ROWS:
        rows = rows[_SPECIAL_ROWS:]
    elif missing == _SPECIAL_ROWS:
        special = np.random.default_rng(0).random((_SPECIAL_ROWS, *rows.shape[1:]), np.float32)
        rows = np.concatenate([special, rows])
    head: dict[str, Any] = {**found, "label_embeddings": rows}
    return head if shapes_of(head) == shapes_of(fresh) else fresh


@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """The sections of the config that belong to pre-training."""

    seed: int
    model: WavLMConfig
    compute: Compute
    data: DataSettings
    batch: BatchSettings
    loader: LoaderSettings
    labels: LabelSettings
    mixing: MixingSettings
    objective: ObjectiveSettings
    init: InitSettings


def build(config: Mapping[str, Any], topology: Topology) -> Task:
    """The task of a pre-training config.

    Labels are made here where `labels.make` says so, and every label is looked at before anything is compiled.

    Args:
        config: resolved, as JSON values.
        topology: the devices that share the rows of a batch.

    Raises:
        SettingsError: a section or key that is missing, unknown or mistyped.
        FileNotFoundError: a corpus or label store that is not there, with the command that makes it.
        ValueError: labels that do not fit the audio, batches that cannot be cut, an attention that the device lacks.

    """
    settings = _read(config)
    corpora = open_corpora(settings.data)
    stores = _label_stores(settings, corpora)
    lines = describe(settings.batch, topology.num_devices, settings.mixing.group)
    lines += describe_attention(settings.model, settings.compute, settings.batch.buckets, current_device())
    if topology.process_index == 0:
        print("\n".join(lines), flush=True)
    return _assemble(settings, _streams(settings, corpora, stores, topology), _fingerprints(corpora, stores))


def outline(config: Mapping[str, Any], topology: Topology) -> Task:
    """The same task without corpus and labels, whose streams know their shapes only: what `wavlm_jax.plan` compiles.

    Every bucket of the config counts as used, and an evaluation batch as full.

    Args:
        config: as for `build`.
        topology: the devices that it is planned for.

    Raises:
        SettingsError: as `build`.
        ValueError: batches that cannot be cut.

    """
    settings = _read(config)

    def stream(split: str) -> SpecStream:
        batch, shapes, group = settings.batch, FrameLabels.shapes, settings.mixing.group
        if split != "train":
            batch, group = dataclasses.replace(batch, buckets=settings.data.evaluation_buckets), 1
        elif settings.mixing.noise_prob_given_mix > 0:
            shapes = _with_noise
        host = Host(topology.process_index, topology.process_count)
        return spec_stream(batch, shapes, topology.num_devices, group, host)

    return _assemble(settings, stream, {})


def label_step(config: Mapping[str, Any], devices: Sequence[jax.Device]) -> tuple[str, Traced, float, Mesh]:
    """(name, program, seconds of audio, mesh) of the step that makes the labels of a config, on all devices."""
    return trace_label_step(_read(config).labels, devices)


def _read(config: Mapping[str, Any]) -> PretrainSettings:
    refuse_unknown_sections(config, PretrainSettings, RunSettings)
    settings = read_sections(config, PretrainSettings)
    settings.model.require_standard_frames("labels and masks are laid on these frames")
    return settings


def _assemble(
    settings: PretrainSettings, stream: Callable[[str], BatchStream], fingerprints: Mapping[str, str]
) -> Task:
    predictor = MaskedPredictor(settings.model, settings.compute, settings.objective, settings.labels.num_clusters)
    return Task(
        init=_initialiser(predictor, settings),
        loss=MaskedPredictionLoss(predictor, settings.mixing),
        stream=stream,
        initial_params=lambda fresh: initial_params(settings.init, settings.model, fresh),
        row_group=settings.mixing.group,
        freeze=head_warmup(settings.init),
        fingerprints=fingerprints,
    )


def _label_stores(settings: PretrainSettings, corpora: Mapping[str, Corpus]) -> dict[str, LabelStore]:
    """Checked labels of every split, made first where the config allows it."""
    folder = Path(settings.labels.path)
    if settings.labels.make:
        make_labels(settings.labels, corpora)
    elif not (folder / HEADER).is_file():
        raise FileNotFoundError(
            f"config.labels.path: {folder} holds no labels; make them with: python -m pretrain.make_labels --config "
            "CONFIG, or set config.labels.make to True"
        )
    return check_labels(settings.labels, corpora)


def _initialiser(predictor: MaskedPredictor, settings: PretrainSettings) -> Callable[[StepKey], Params]:
    samples = samples_for(max(settings.batch.buckets[0], 1))

    def init(key: StepKey) -> Params:
        params: Params = predictor.init(key, jnp.zeros((1, samples)), jnp.full((1,), samples, jnp.int32))["params"]
        return params

    return init


def _streams(
    settings: PretrainSettings, corpora: Mapping[str, Corpus], stores: Mapping[str, LabelStore], topology: Topology
) -> Callable[[str], BatchStream]:
    host = Host(topology.process_index, topology.process_count)
    group = settings.mixing.group

    def stream(split: str) -> BatchStream:
        if split not in corpora:
            raise SettingsError(f"config.train.eval_splits: {split!r} is no folder of config.data.evaluation")
        labels = FrameLabels(stores[split])
        if split != "train":
            batch = dataclasses.replace(settings.batch, buckets=settings.data.evaluation_buckets)
            return PaddedStream(
                corpora[split],
                batch,
                settings.loader,
                annotate=labels,
                devices=topology.num_devices,
                host=host,
            )
        return CropStream(
            corpora["train"],
            settings.batch,
            settings.loader,
            seed=settings.seed,
            annotate=Annotations((labels, *_noise(settings.mixing))),
            devices=topology.num_devices,
            group=group,
            host=host,
        )

    return stream


def _with_noise(frames: int) -> Mapping[str, jax.ShapeDtypeStruct]:
    return {**FrameLabels.shapes(frames), **NoiseClips.shapes(frames)}


def _noise(mixing: MixingSettings) -> tuple[NoiseClips, ...]:
    if mixing.noise_corpus is None or mixing.noise_prob_given_mix == 0:
        return ()
    return (NoiseClips(Corpus.open(Path(mixing.noise_corpus)), mixing.noise_prob_given_mix),)


def _fingerprints(corpora: Mapping[str, Corpus], stores: Mapping[str, LabelStore]) -> dict[str, str]:
    """What a resumed run has to find unchanged; evaluation changes nothing in training."""
    store = stores["train"]
    labels = store.header.splits[store.split].sha256
    return {"corpus.train": corpora["train"].fingerprint, "labels.train": labels}


TASKS = {"masked_prediction": TaskKind(build, outline, label_step), **FINE_TUNING}
"""What train.py trains and `wavlm_jax.plan` plans, by `config.task`."""
