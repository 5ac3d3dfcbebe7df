"""What a model with a head is applied to: a batch normalised and masked as the config says, from one key a row.

Losses of rows: cross entropy, margins for speaker vectors, speakers in any order. Values a row, never means.

What all fine-tuning tasks share: their sections, their streams, the body they start from, the task they become.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from wavlm_jax.config import Compute, HeadConfig, WavLMConfig
from wavlm_jax.data.augment import Augment, AugmentationSettings, augment_for
from wavlm_jax.data.batches import BatchSettings
from wavlm_jax.data.corpus import Corpus, DataSettings
from wavlm_jax.data.loader import Annotate, CropStream, Host, LoaderSettings, PaddedStream, SpecStream, spec_stream
from wavlm_jax.loading import CheckFiles, Load, fitting_head, fitting_weights
from wavlm_jax.lora import BRANCH, LoRASettings, exact_product, fresh_adapters, merged
from wavlm_jax.model.frontend import model_waveform
from wavlm_jax.model.layers import Keys, Masks, channel_mask, span_mask
from wavlm_jax.settings import SettingsError, read, read_sections, refuse_unknown_sections
from wavlm_jax.shapes import Batch, NumSamples, Params, RowKeys, StepKey, Waveform, num_frames, samples_for
from wavlm_jax.training.optim import Freeze
from wavlm_jax.training.start import RunSettings
from wavlm_jax.training.task import LossSums, Score, Task, Topology, no_score


class Arguments(NamedTuple):
    """Of every model with a head, in order (`model.heads.Headed`)."""

    waveform: Waveform
    num_samples: NumSamples
    masks: Masks | None
    keys: Keys | None


def arguments(config: WavLMConfig, batch: Batch, key: StepKey | None) -> Arguments:
    """What the model hears of a batch of the loader: `model.apply({"params": params}, *arguments(...))`.

    Args:
        config: of the encoder.
        batch: `waveform` int16, `num_samples`, `mean`, `variance`; in training `row`, the number in the global batch.
        key: of the step: decides masks (SpecAugment), dropout and layer drop. None: evaluation, nothing is random.

    """
    waveform = model_waveform(batch, config)
    keys, masks = None, None
    if key is not None:
        rows = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, batch["row"])
        keys, masks = Keys(key, rows), spec_augment(config, rows, waveform, batch["num_samples"])
    return Arguments(waveform, batch["num_samples"], masks, keys)


def spec_augment(config: WavLMConfig, row_keys: RowKeys, waveform: Waveform, num_samples: NumSamples) -> Masks:
    """Spans of frames that become the mask vector, spans of channels that become 0 (FACTS D1, E45)."""
    time, channels = None, None
    if config.mask_time_prob > 0:
        time = span_mask(
            row_keys,
            num_frames(num_samples),
            num_frames(waveform.shape[1]),
            prob=config.mask_time_prob,
            length=config.mask_time_length,
            min_masks=config.mask_time_min_masks,
        )
    if config.mask_feature_prob > 0:
        channels = channel_mask(
            row_keys,
            config.hidden_size,
            prob=config.mask_feature_prob,
            length=config.mask_feature_length,
            min_masks=config.mask_feature_min_masks,
        )
    return Masks(time, channels)


Margin: TypeAlias = Literal["additive", "angular"]
Classes = Float[Array, "rows classes"]
Labels = Int[Array, "rows"]
Activity = Float[Array, "rows frames speakers"]

MOST_SPEAKERS = 6
"""720 orders; beyond that trying them all is no longer cheap."""


class Matched(NamedTuple):
    """The loss of each row in the order of speakers that suits it best."""

    loss: Float[Array, "rows"]
    """Sum over frames that count and speakers."""
    order: Int[Array, "rows speakers"]
    """order[i]: which target output i is compared with."""


def cross_entropy(logits: Classes, labels: Labels) -> Float[Array, "rows"]:
    """-log softmax(logits)[label] in float32; labels outside the classes give a finite number, to be weighted 0."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_probs, labels[:, None], axis=1, mode="clip")[:, 0]


class ClassSums(NamedTuple):
    """Sums over the rows that count."""

    loss: Float[Array, ""]
    rows: Float[Array, ""]
    right: Float[Array, ""]
    """Rows whose highest score is that of their class."""


def class_sums(losses: Float[Array, "rows"], scores: Classes, labels: Labels, counts: Bool[Array, "rows"]) -> ClassSums:
    """What an accuracy and a mean loss are made of; rows that do not count may have any label and loss."""
    right = counts & (jnp.argmax(scores, axis=-1) == labels)
    loss = jnp.sum(jnp.where(counts, losses, 0.0))
    return ClassSums(loss, jnp.sum(counts.astype(jnp.float32)), jnp.sum(right.astype(jnp.float32)))


def margin_loss(cosines: Classes, labels: Labels, kind: Margin, *, scale: float, margin: float) -> Float[Array, "rows"]:
    """Cross entropy of scaled cosines of which the right one is made smaller first.

    Args:
        cosines: of each row's embedding with every speaker's vector, in [-1, 1].
        labels: speakers.
        kind: "additive": cos - margin (AM-softmax, FACTS B4). "angular": cos(angle + margin), AAM-softmax or ArcFace
            (FACTS D4); beyond pi, where that would rise again, cos - margin * sin(margin).
        scale: of all cosines (30).
        margin: in cosine or radians (0.4; 0.2).

    """
    own = jax.nn.one_hot(labels, cosines.shape[1], dtype=jnp.bool_)
    if kind == "additive":
        reduced = cosines - margin
    else:
        sines = jnp.sqrt(jnp.maximum(1 - jnp.square(cosines), 1e-9))  # the slope at 0 and pi is infinite
        turned = cosines * math.cos(margin) - sines * math.sin(margin)
        reduced = jnp.where(cosines > math.cos(math.pi - margin), turned, cosines - margin * math.sin(margin))
    return cross_entropy(scale * jnp.where(own, reduced, cosines), labels)


def speakers_in_any_order(logits: Activity, targets: Activity, mask: Bool[Array, "rows frames"]) -> Matched:
    """Binary cross entropy of who speaks when, in the order of speakers with the smallest loss (PIT, FACTS E31).

    Args:
        logits: of each output in each frame, before the logistic function.
        targets: 1 where a speaker speaks, 0 elsewhere.
        mask: frames that count.

    Raises:
        ValueError: more than six speakers.

    """
    logits, keep = logits.astype(jnp.float32), mask[:, :, None].astype(jnp.float32)
    # -log sigma(x) where on, -log sigma(-x) = x - log sigma(x) where off: softplus(x) - target * x
    silent = (keep * jax.nn.softplus(logits)).sum(axis=1)
    agreement = jnp.einsum("rfi,rfj->rij", keep * logits, targets, precision=jax.lax.Precision.HIGHEST)
    matched = in_best_order(silent[:, :, None] - agreement)
    return Matched(jnp.maximum(matched.loss, 0.0), matched.order)


def in_best_order(costs: Float[Array, "rows speakers speakers"]) -> Matched:
    """The cheapest way to compare outputs with targets one by one, `costs[i, j]` being output i's with target j.

    Raises:
        ValueError: more than six speakers.

    """
    num_speakers = costs.shape[-1]
    if num_speakers > MOST_SPEAKERS:
        raise ValueError(f"speakers: found {num_speakers}, expected {MOST_SPEAKERS} or fewer: all orders are tried")
    orders = np.array(list(itertools.permutations(range(num_speakers))))
    totals = costs[:, np.arange(num_speakers)[None, :], orders].sum(axis=-1)
    best = jnp.argmin(totals, axis=1)
    return Matched(jnp.take_along_axis(totals, best[:, None], axis=1)[:, 0], jnp.asarray(orders)[best])


def one_speaker_a_frame(logits: Activity, targets: Activity) -> Float[Array, "rows"]:
    """Transformers' loss: cross entropy of each frame against the first active speaker, padding included (FACTS B3).

    The sum over frames; a frame in which nobody speaks counts as the first speaker's.
    """
    rows, frames, speakers = logits.shape
    labels = jnp.argmax(targets, axis=-1).reshape(-1)
    return cross_entropy(logits.reshape(-1, speakers), labels).reshape(rows, frames).sum(axis=1)


"""Whoever writes a task finds here what every task is made of."""

Loss: TypeAlias = Callable[[Params, Batch, StepKey | None], LossSums]

_WITHOUT_ADAPTERS = {"lora": Freeze(pattern="^wavlm/", updates=None)}
"""What stands still where there are adapters; the head is trained as always."""
_ADAPTERS = 7
"""Folded into the key of fresh parameters for those of the adapters."""
_SHORTEST_INIT = 32
"""Frames of the row that parameters are made with; enough for every head."""


@dataclass(frozen=True, kw_only=True)
class InitSettings:
    """The config section `init`."""

    path: str | None
    """Workdir of a run, or a checkpoint of any kind that `wavlm_jax.loading` reads; None: from scratch."""
    step: int | None
    """Checkpoint of the run; None: its newest."""
    head: bool
    """Whether the head comes from there too (a further stage of the same task); else it is fresh."""

    def __post_init__(self) -> None:
        if self.head and self.path is None:
            raise ValueError("head: found True without a path; name the run whose head it is, or set it to False")


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """The sections that every fine-tuning config has besides those of the training tower."""

    seed: int
    model: WavLMConfig
    compute: Compute
    head: Mapping[str, Any]
    """Fields of `HeadConfig`, without those that follow from the data."""
    data: DataSettings
    batch: BatchSettings
    loader: LoaderSettings
    augmentation: AugmentationSettings
    init: InitSettings
    lora: LoRASettings


Sections = TypeVar("Sections", bound=TaskSettings)


class Split(NamedTuple):
    """What is shown of a corpus."""

    corpus: Corpus
    chosen: np.ndarray | None
    """Numbers of the utterances that take part; None: all. In training one that is named twice is shown twice."""
    annotate: Annotate
    """Adds the labels of a row."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a task brings along."""

    model: nn.Module
    """One of `wavlm_jax.model.heads`."""
    head: HeadConfig
    """Its head, complete."""
    loss: Loss
    splits: Mapping[str, Split]
    """`train` and the evaluation splits."""
    resolved: Mapping[str, Any]
    """See `training.task.Task`; the head is added."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Of what the labels follow from; those of the corpora are added."""
    crop: bool = False
    """Whether training shows random crops instead of whole padded utterances."""
    names: tuple[str, ...] | None = None
    """Of the classes; a head that `init.path` brings along has to have the same."""
    check_head: CheckFiles = lambda _files, _path: None
    """Raises where the outputs of such a head mean something else than here."""
    score: Score = no_score
    """See `training.task.Task`; as the next."""
    freeze: Mapping[str, Freeze] = field(default_factory=dict)
    speeds_are_classes: bool = False
    """Whether the labels know `augmentation.speed_makes_speakers`."""
    by_frame: bool = False
    """Whether labels belong to frames, so that another speed would shift them."""


def read_task(config: Mapping[str, Any], kind: type[Sections]) -> Sections:
    """The sections of a task; all others have to be the training tower's.

    Raises:
        SettingsError: a section or key that is missing, unknown or mistyped.

    """
    refuse_unknown_sections(config, kind, RunSettings)
    return read_sections(config, kind)


def head_config(section: Mapping[str, Any], **derived: int) -> HeadConfig:
    """The config section `head` with what follows from the data.

    Raises:
        SettingsError: a wrong key or value, or a value that is not the config's to choose.

    """
    for name, value in derived.items():
        if name in section:
            raise SettingsError(
                f"config.head.{name}: found {section[name]!r}, but it follows from the data (here it is {value}); "
                "leave it out"
            )
    return read({**section, **derived}, HeadConfig, "head")


def assemble(settings: TaskSettings, parts: Parts, topology: Topology, load: Load) -> Task:
    """The task of these parts; `load` reads what `init.path` names. Without splits (`outlined`) nothing is read yet."""
    corpora = {f"corpus.{split}": parts.splits[split].corpus.fingerprint for split in parts.splits}
    augment = augment_for(settings.augmentation, by_frame=parts.by_frame, own_classes=parts.speeds_are_classes)
    if augment is not None and parts.splits:
        corpora |= augment.fingerprints()
    return Task(
        init=_initialiser(parts.model, settings),
        loss=parts.loss if settings.lora.pattern is None else _adapted_loss(parts.loss, settings.lora),
        stream=_streams(settings, parts, topology, augment),
        initial_params=lambda fresh: _initial_params(settings, fresh, load, parts),
        freeze=parts.freeze if settings.lora.pattern is None else {**parts.freeze, **_WITHOUT_ADAPTERS},
        score=parts.score,
        fingerprints={**corpora, **parts.fingerprints},
        resolved={**parts.resolved, "head": dataclasses.asdict(parts.head)},
    )


def outlined(
    task: Task, settings: TaskSettings, shapes: Callable[[int], Mapping[str, jax.ShapeDtypeStruct]], topology: Topology
) -> Task:
    """A task of parts without splits, with streams that know their shapes only: what `wavlm_jax.plan` compiles.

    Args:
        task: of `assemble`.
        settings: of the config.
        shapes: bucket -> labels of one of its rows.
        topology: the devices that it is planned for.

    """

    def stream(split: str) -> SpecStream:
        buckets = settings.batch.buckets if split == "train" else settings.data.evaluation_buckets
        batch = dataclasses.replace(settings.batch, buckets=buckets)
        host = Host(topology.process_index, topology.process_count)
        return spec_stream(batch, shapes, topology.num_devices, 1, host)

    return dataclasses.replace(task, stream=stream)


def _initialiser(model: nn.Module, settings: TaskSettings) -> Callable[[StepKey], Params]:
    samples = samples_for(max(settings.batch.buckets[0], _SHORTEST_INIT))

    def init(key: StepKey) -> Params:
        params: Params = model.init(key, jnp.zeros((1, samples)), jnp.full((1,), samples, jnp.int32))["params"]
        if settings.lora.pattern is None:
            return params
        return {**params, BRANCH: fresh_adapters(params["wavlm"], settings.lora, jax.random.fold_in(key, _ADAPTERS))}

    return init


def _adapted_loss(loss: Loss, settings: LoRASettings) -> Loss:
    """The loss of the model whose kernels have their adapters folded in."""

    def of(params: Params, batch: Batch, key: StepKey | None) -> LossSums:
        return loss(merged(params, settings, exact_product), batch, key)

    return of


def _initial_params(settings: TaskSettings, fresh: Params, load: Load, parts: Parts) -> Params:
    """Fresh parameters, or the same with the body, and where it is asked for the head, that `init.path` holds."""
    init = settings.init
    if init.path is None:
        return fresh
    weights = fitting_weights(init.path, init.step, settings.model, fresh["wavlm"], load)
    if not init.head:
        return {**fresh, "wavlm": weights.params}
    head = {name: part for name, part in fresh.items() if name not in ("wavlm", BRANCH)}
    found = fitting_head(init.path, weights, head, parts.names, parts.check_head)
    return {**fresh, **found, "wavlm": weights.params}


def _streams(
    settings: TaskSettings, parts: Parts, topology: Topology, augment: Augment | None
) -> Callable[[str], CropStream | PaddedStream]:
    told: set[str] = set()

    def stream(name: str) -> CropStream | PaddedStream:
        if name not in parts.splits:
            raise SettingsError(f"config.train.eval_splits: {name!r} is no folder of config.data.evaluation")
        made = _stream(settings, parts, name, topology, augment if name == "train" else None)
        if topology.process_index == 0 and name not in told:
            told.add(name)
            print(f"{name}: {made.census.describe()}", flush=True)
        return made

    return stream


def _stream(
    settings: TaskSettings, parts: Parts, name: str, topology: Topology, augment: Augment | None
) -> CropStream | PaddedStream:
    corpus, chosen, annotate = parts.splits[name]
    host = Host(topology.process_index, topology.process_count)
    if name == "train" and parts.crop:
        return CropStream(
            corpus,
            settings.batch,
            settings.loader,
            seed=settings.seed,
            annotate=annotate,
            chosen=chosen,
            devices=topology.num_devices,
            host=host,
            augment=augment,
        )
    batch = settings.batch
    if name != "train":
        batch = dataclasses.replace(batch, buckets=settings.data.evaluation_buckets)
    return PaddedStream(
        corpus,
        batch,
        settings.loader,
        annotate=annotate,
        seed=settings.seed if name == "train" else None,
        chosen=chosen,
        devices=topology.num_devices,
        host=host,
        augment=augment,
    )
