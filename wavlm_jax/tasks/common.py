"""What all fine-tuning tasks share: config sections, forward pass, start parameters, streams, and the finished `Task`.

A task module names its config sections (a `TaskSettings` with more fields) and writes one function that says what is
special about it (`Parts`). `build` makes of both what the training loop trains, `outline` what the planner compiles.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from wavlm_jax.config import Compute, HeadConfig, WavLMConfig
from wavlm_jax.data.augment import Augment, AugmentationSettings, augment_for
from wavlm_jax.data.batches import BatchSettings
from wavlm_jax.data.corpus import Corpora, Corpus, DataSettings, open_corpora
from wavlm_jax.data.loader import Annotate, CropStream, Host, LoaderSettings, PaddedStream, spec_stream
from wavlm_jax.loading import fitting_weights, shapes_of
from wavlm_jax.lora import BRANCH, LoRASettings, exact_product, fresh_adapters, merged
from wavlm_jax.model.frontend import model_waveform
from wavlm_jax.model.heads import Headed, head_of_task
from wavlm_jax.model.layers import Keys, Masks, channel_mask, span_mask
from wavlm_jax.settings import SettingsError, read, read_sections, refuse_unknown_sections
from wavlm_jax.shapes import Batch, NumSamples, Params, RowKeys, StepKey, Waveform, num_frames, samples_for
from wavlm_jax.text.vocabulary import VOCABULARY, Vocabulary, parse_vocabulary
from wavlm_jax.training.optim import Freeze
from wavlm_jax.training.start import RunSettings
from wavlm_jax.training.task import BatchStream, LossSums, Score, Task, Topology, no_score
from wavlm_jax.weights import Weights

Loss: TypeAlias = Callable[[Params, Batch, StepKey | None], LossSums]
"""(parameters, batch, key of the step or None in evaluation) -> sums over the rows."""
LabelShapes: TypeAlias = Mapping[str, jax.ShapeDtypeStruct]

_WITHOUT_ADAPTERS = {"lora": Freeze(pattern="^wavlm/", updates=None)}
"""Frozen where there are adapters; the head is trained as always."""
_ADAPTERS = 7
"""Folded into the key of fresh parameters for those of the adapters."""
_SHORTEST_INIT = 32
"""Frames of the row that parameters are initialised with; enough for every head."""


@dataclass(frozen=True, kw_only=True)
class TaskInitSettings:
    """The config section `init` of fine-tuning."""

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

    task: str
    """Its name in train.py."""
    seed: int
    model: WavLMConfig
    compute: Compute
    head: Mapping[str, Any]
    """Fields of `HeadConfig`, without those that follow from the data."""
    data: DataSettings
    batch: BatchSettings
    loader: LoaderSettings
    augmentation: AugmentationSettings
    init: TaskInitSettings
    lora: LoRASettings


Sections = TypeVar("Sections", bound=TaskSettings)


class Split(NamedTuple):
    """What a stream shows of a corpus."""

    corpus: Corpus
    chosen: np.ndarray | None
    """Numbers of the utterances that take part; None: all. In training one that is named twice is shown twice."""
    annotate: Annotate
    """Adds the labels of a row."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What one task has of its own."""

    model: Headed
    loss: Loss
    splits: Mapping[str, Split]
    """`train` and the evaluation splits; empty where the task is only planned."""
    label_shapes: Callable[[int], LabelShapes]
    """Bucket -> labels of one of its rows, for a task that is only planned."""
    lines: Sequence[str] = ()
    """What people should know about the data; the first process prints it."""
    classes: tuple[str, ...] | None = None
    """Names of the model's outputs, where they are classes."""
    vocabulary: Vocabulary | None = None
    """Of the model's outputs, where they are tokens."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Of what the labels of training follow from; that of its corpus is added."""
    score: Score = no_score
    """See `training.task.Task`."""
    crop: bool = False
    """Whether training shows random crops instead of whole padded utterances."""
    by_frame: bool = False
    """Whether labels belong to frames, so that another speed would shift them."""
    speeds_are_classes: bool = False
    """Whether the labels know `augmentation.speed_makes_speakers`."""


def build(
    config: Mapping[str, Any],
    topology: Topology,
    kind: type[Sections],
    parts_of: Callable[[Sections, Corpora, Topology], Parts],
) -> Task:
    """The task of a config. All labels are looked at before anything is compiled.

    Args:
        config: resolved, as JSON values.
        topology: the devices that share the rows of a batch.
        kind: the sections of the task.
        parts_of: its own part, from its sections and corpora.

    Raises:
        SettingsError: a section or key that is missing, unknown or mistyped; labels that cannot be learned from.
        FileNotFoundError: a corpus that is not there.

    """
    settings = _read_task(config, kind)
    parts = parts_of(settings, open_corpora(settings.data), topology)
    if topology.process_index == 0:
        for line in parts.lines:
            print(line, flush=True)
    return _assembled(settings, parts, topology)


def outline(
    config: Mapping[str, Any],
    topology: Topology,
    kind: type[Sections],
    parts_of: Callable[[Sections, Corpora, Topology], Parts],
) -> Task:
    """The same task without corpora, for `wavlm_jax.plan`; its streams know their shapes only.

    Raises:
        SettingsError: as `build`.
        ValueError: batches that cannot be cut.

    """
    settings = _read_task(config, kind)
    parts = parts_of(settings, {}, topology)

    def stream(split: str) -> BatchStream:
        host = Host(topology.process_index, topology.process_count)
        return spec_stream(_batches(settings, split), parts.label_shapes, topology.num_devices, 1, host)

    return replace(_assembled(settings, parts, topology), stream=stream)


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
    head = read({**section, **derived}, HeadConfig, "head")
    if head.problem_type not in _TRAINED:
        raise SettingsError(
            f"config.head.problem_type: found {head.problem_type!r}; training knows one class per utterance alone, so "
            "leave it out (models of that kind are loaded and give their answers, but are not trained)"
        )
    return head


_TRAINED = (None, "single_label_classification")


def head_model(settings: TaskSettings, **derived: int) -> Headed:
    """The model that `model.heads.HEADS` has for the task; `derived` are the fields of `head_config`."""
    return head_of_task(settings.task).module(settings.model, head_config(settings.head, **derived), settings.compute)


def forward(
    model: Headed, params: Params, batch: Batch, key: StepKey | None, *, mutable: Sequence[str] | bool = False
) -> Any:
    """The model's output for a batch of the loader; in training with SpecAugment, dropout and layer drop.

    Args:
        model: a model with a head.
        params: its parameters.
        batch: `waveform` int16, `num_samples`, `mean`, `variance`; in training `row`, the number in the global batch.
        key: of the step, folded with the row's number; None: evaluation, nothing is random.
        mutable: variable collections that the model may write; the result is then (output, collections).

    """
    config, num_samples = model.config, batch["num_samples"]
    waveform = model_waveform(batch, config)
    keys, masks = None, None
    if key is not None:
        rows = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, batch["row"])
        keys, masks = Keys(key, rows), spec_augment(config, rows, waveform, num_samples)
    return model.apply({"params": params}, waveform, num_samples, masks, keys, mutable=mutable)


def spec_augment(config: WavLMConfig, row_keys: RowKeys, waveform: Waveform, num_samples: NumSamples) -> Masks:
    """Spans of frames that become the mask vector, spans of channels that become 0 (FACTS D1, E45)."""
    time, channels = None, None
    if config.mask_time_prob > 0:
        time = span_mask(
            row_keys,
            num_frames(num_samples, config.geometry),
            num_frames(waveform.shape[1], config.geometry),
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


ClassScores = Float[Array, "rows classes"]
Labels = Int[Array, "rows"]


def cross_entropy(logits: ClassScores, labels: Labels) -> Float[Array, "rows"]:
    """-log softmax(logits)[label] in float32; labels outside the classes give a finite number, to be weighted 0."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_probs, labels[:, None], axis=1, mode="clip")[:, 0]


def class_sums(
    losses: Float[Array, "rows"], scores: ClassScores, labels: Labels, counts: Bool[Array, "rows"]
) -> LossSums:
    """Sums of loss and accuracy over the rows that count; the others may have any label and loss."""
    right = counts & (jnp.argmax(scores, axis=-1) == labels)
    loss = jnp.sum(jnp.where(counts, losses, 0.0))
    rows = jnp.sum(counts.astype(jnp.float32))
    return LossSums(loss, rows, {"accuracy": (jnp.sum(right.astype(jnp.float32)), rows)})


def _read_task(config: Mapping[str, Any], kind: type[Sections]) -> Sections:
    """The sections of a task; all others have to be the training tower's."""
    refuse_unknown_sections(config, kind, RunSettings)
    return read_sections(config, kind)


def _assembled(settings: TaskSettings, parts: Parts, topology: Topology) -> Task:
    fingerprints = {"corpus.train": parts.splits["train"].corpus.fingerprint} if parts.splits else {}
    augment = augment_for(settings.augmentation, by_frame=parts.by_frame, own_classes=parts.speeds_are_classes)
    if augment is not None and parts.splits:
        fingerprints |= augment.fingerprints()
    resolved: dict[str, Any] = {"head": asdict(parts.model.head)}
    if parts.classes is not None:
        resolved["classes"] = list(parts.classes)
    if parts.vocabulary is not None:
        resolved["vocabulary"] = asdict(parts.vocabulary)
    freeze: dict[str, Freeze] = {}
    if (pattern := head_of_task(settings.task).running_statistics) is not None:
        freeze["running statistics"] = Freeze(pattern=pattern, updates=None)  # set by the step (`LossSums.averages`)
    adapted = settings.lora.pattern is not None
    return Task(
        init=_initialiser(parts.model, settings),
        loss=_adapted_loss(parts.loss, settings.lora) if adapted else parts.loss,
        stream=_streams(settings, parts, topology, augment),
        initial_params=lambda fresh: _initial_params(settings, parts, fresh),
        freeze={**freeze, **_WITHOUT_ADAPTERS} if adapted else freeze,
        score=parts.score,
        fingerprints={**fingerprints, **parts.fingerprints},
        resolved=resolved,
    )


def _initialiser(model: Headed, settings: TaskSettings) -> Callable[[StepKey], Params]:
    samples = samples_for(max(settings.batch.buckets[0], _SHORTEST_INIT))

    def init(key: StepKey) -> Params:
        params: Params = model.init(key, jnp.zeros((1, samples)), jnp.full((1,), samples, jnp.int32))["params"]
        if settings.lora.pattern is None:
            return params
        return {**params, BRANCH: fresh_adapters(params["wavlm"], settings.lora, jax.random.fold_in(key, _ADAPTERS))}

    return init


def _adapted_loss(loss: Loss, settings: LoRASettings) -> Loss:
    """The loss of the model whose kernels have their adapters folded in."""
    return lambda params, batch, key: loss(merged(params, settings, exact_product), batch, key)


def _initial_params(settings: TaskSettings, parts: Parts, fresh: Params) -> Params:
    """Fresh parameters, or the same with the body, and where it is asked for the head, that `init.path` holds."""
    init = settings.init
    if init.path is None:
        return fresh
    weights = fitting_weights(init.path, init.step, settings.model, fresh["wavlm"])
    head: Params = {}
    if init.head:
        wanted = {name: part for name, part in fresh.items() if name not in ("wavlm", BRANCH)}
        head = _fitting_head(init.path, weights, wanted, parts)
    return {**fresh, **head, "wavlm": weights.params}


def _fitting_head(path: str, weights: Weights, fresh: Params, parts: Parts) -> Params:
    """The head that `init.path` brings along, of the same parts and sizes as the fresh one.

    Raises:
        SettingsError: no head, another kind of head or other sizes, or one whose outputs mean something else.

    """
    task, cure = weights.task, "a fresh head is config.init.head = False"
    found, wanted = sorted(task.params) if task is not None else [], sorted(fresh)
    if task is None or found != wanted:
        raise SettingsError(
            f"config.init.head: {path} has a head of {', '.join(found) or 'no parts'}, expected one of "
            f"{', '.join(wanted)}; {cure}"
        )
    if task.config.problem_type not in _TRAINED:
        raise SettingsError(
            f"config.init.head: {path} has a head for {task.config.problem_type}, which is not what is trained here; "
            f"{cure}"
        )
    if parts.classes is not None and task.labels is not None and task.labels != parts.classes:
        raise SettingsError(
            f"config.init.head: the classes of {path} are not those of config.data.train "
            f"({len(task.labels)} there, {len(parts.classes)} here); train on the same, or with "
            "config.init.head = False"
        )
    if parts.vocabulary is not None and VOCABULARY in weights.origin.files:
        there = parse_vocabulary(weights.origin.files, Path(path), num_outputs=task.config.vocab_size)
        _check_vocabulary(path, there, parts.vocabulary)
    expected, given = shapes_of(fresh), shapes_of(task.params)
    if differing := [name for name in sorted({*expected, *given}) if expected.get(name) != given.get(name)]:
        first = differing[0]
        raise SettingsError(
            f"config.init.head: {path} has other sizes: {first}: found {given.get(first)}, expected "
            f"{expected.get(first)}; {cure}"
        )
    return task.params


def _check_vocabulary(path: str, there: Vocabulary, here: Vocabulary) -> None:
    """An output is a token by its number alone, and texts with the same letters can number them in another order."""
    if (there.tokens, there.blank, there.delimiter) != (here.tokens, here.blank, here.delimiter):
        raise SettingsError(
            f"config.init.head: the vocabulary of {path} ({' '.join(there.tokens)}) is not the one "
            f"here ({' '.join(here.tokens)}). Export that run (python -m wavlm_jax.convert export) and name "
            "the folder in config.text.vocabulary, or take config.init.head = False"
        )


def _batches(settings: TaskSettings, split: str) -> BatchSettings:
    """How the batches of a split are cut: evaluation has buckets of its own."""
    if split == "train":
        return settings.batch
    return replace(settings.batch, buckets=settings.data.evaluation_buckets)


def _streams(
    settings: TaskSettings, parts: Parts, topology: Topology, augment: Augment | None
) -> Callable[[str], CropStream | PaddedStream]:
    described: set[str] = set()

    def stream(name: str) -> CropStream | PaddedStream:
        if name not in parts.splits:
            raise SettingsError(f"config.train.eval_splits: {name!r} is no folder of config.data.evaluation")
        corpus, chosen, annotate = parts.splits[name]
        train = name == "train"
        given: dict[str, Any] = {
            "annotate": annotate,
            "chosen": chosen,
            "devices": topology.num_devices,
            "host": Host(topology.process_index, topology.process_count),
            "seed": settings.seed if train else None,
            "augment": augment if train else None,
        }
        kind = CropStream if train and parts.crop else PaddedStream
        made = kind(corpus, _batches(settings, name), settings.loader, **given)
        if topology.process_index == 0 and name not in described:
            described.add(name)
            print(f"{name}: {made.census.describe()}", flush=True)
        return made

    return stream
