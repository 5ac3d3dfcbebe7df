"""What all fine-tuning tasks share: their sections, their streams, the body they start from, the task they become."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from wavlm_jax.config import Compute, WavLMConfig
from wavlm_jax.data.corpora import DataSettings
from wavlm_jax.data.corpus import Corpus
from wavlm_jax.data.loader import CropStream, LoaderSettings, PaddedStream
from wavlm_jax.data.plan import BatchSettings
from wavlm_jax.data.reader import Annotate, Host
from wavlm_jax.model.head_config import HeadConfig
from wavlm_jax.settings import SettingsError, read
from wavlm_jax.shapes import Batch, Params, StepKey, samples_for
from wavlm_jax.starting import Load, fitting_weights
from wavlm_jax.training.loss_sums import LossSums
from wavlm_jax.training.task import Task
from wavlm_jax.training.topology import Topology

_SHORTEST_INIT = 32
"""Frames of the row that parameters are made with; enough for every head."""


@dataclass(frozen=True, kw_only=True)
class InitSettings:
    """The config section `init`."""

    path: str | None
    """Workdir of a run, or a checkpoint of any kind that `wavlm_jax.loading` reads; None: from scratch."""
    step: int | None
    """Checkpoint of the run; None: its newest."""


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
    init: InitSettings


class Split(NamedTuple):
    """What is shown of a corpus."""

    corpus: Corpus
    chosen: np.ndarray | None
    """Numbers of the utterances that take part; None: all."""
    annotate: Annotate
    """Adds the labels of a row."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a task brings along."""

    model: nn.Module
    """One of `wavlm_jax.model.heads`."""
    head: HeadConfig
    """Its head, complete."""
    loss: Callable[[Params, Batch, StepKey | None], LossSums]
    splits: Mapping[str, Split]
    """`train` and the evaluation splits."""
    resolved: Mapping[str, Any]
    """See `training.task.Task`; the head is added."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Of what the labels follow from; those of the corpora are added."""
    crop: bool = False
    """Whether training shows random crops instead of whole padded utterances."""


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
    """The task of these parts; `load` reads what `init.path` names."""
    corpora = {f"corpus.{split}": parts.splits[split].corpus.fingerprint for split in parts.splits}
    return Task(
        init=_initialiser(parts.model, settings),
        loss=parts.loss,
        stream=_streams(settings, parts, topology),
        initial_params=lambda fresh: _initial_params(settings, fresh, load),
        fingerprints={**corpora, **parts.fingerprints},
        resolved={**parts.resolved, "head": dataclasses.asdict(parts.head)},
    )


def _initialiser(model: nn.Module, settings: TaskSettings) -> Callable[[StepKey], Params]:
    samples = samples_for(max(settings.batch.buckets[0], _SHORTEST_INIT))

    def init(key: StepKey) -> Params:
        params: Params = model.init(key, jnp.zeros((1, samples)), jnp.full((1,), samples, jnp.int32))["params"]
        return params

    return init


def _initial_params(settings: TaskSettings, fresh: Params, load: Load) -> Params:
    """Fresh parameters, or the same with the body that `init.path` holds; the head is fresh."""
    init = settings.init
    if init.path is None:
        return fresh
    weights = fitting_weights(init.path, init.step, settings.model, fresh["wavlm"], load)
    return {**fresh, "wavlm": weights.params}


def _streams(settings: TaskSettings, parts: Parts, topology: Topology) -> Callable[[str], CropStream | PaddedStream]:
    told: set[str] = set()

    def stream(name: str) -> CropStream | PaddedStream:
        if name not in parts.splits:
            raise SettingsError(f"config.train.eval_splits: {name!r} is no folder of config.data.evaluation")
        made = _stream(settings, parts, name, topology)
        if topology.process_index == 0 and name not in told:
            told.add(name)
            print(f"{name}: {made.census.describe()}", flush=True)
        return made

    return stream


def _stream(settings: TaskSettings, parts: Parts, name: str, topology: Topology) -> CropStream | PaddedStream:
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
    )
