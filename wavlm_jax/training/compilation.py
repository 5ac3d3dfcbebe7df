"""Everything is compiled before the first step; afterwards a compilation is a fault that the metrics show."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import optax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from jax.stages import Compiled, Traced

from wavlm_jax.training.freeze import Rules
from wavlm_jax.training.mesh import row_shards
from wavlm_jax.training.sharding import by_rows, replicated
from wavlm_jax.training.state import TrainState
from wavlm_jax.training.step import check_spec, eval_step, train_step
from wavlm_jax.training.stream import BatchSpec
from wavlm_jax.training.task import Task

COMPILES = "/jax/core/compile/backend_compile_duration"
HITS = "/jax/compilation_cache/cache_hits"


class OutOfMemory(RuntimeError):  # noqa: N818 named as people call it
    """The devices' memory is too small for the config; the message names the settings that help."""


@dataclass(frozen=True)
class Programs:
    """One executable for each static shape."""

    train: dict[str, Compiled]
    evaluate: dict[str, dict[str, Compiled]]
    """Split -> spec name -> executable."""
    seconds: float
    found: int
    """How many came out of the cache."""

    def describe(self) -> str:
        """For people: how many, how long, how many from the cache."""
        count = len(self.train) + sum(map(len, self.evaluate.values()))
        return f"{count} programs in {self.seconds:.1f} s ({self.found} of them found in the cache)"


@cache
def events() -> Counter[str]:
    """Live counts of JAX's own events: COMPILES and HITS among them."""
    counts: Counter[str] = Counter()

    def count(event: str, **_: str | int) -> None:
        counts[event] += 1

    def count_timed(event: str, duration_secs: float, **_: str | int) -> None:  # noqa: ARG001 JAX's signature
        counts[event] += 1

    jax.monitoring.register_event_listener(count)
    jax.monitoring.register_event_duration_secs_listener(count_timed)
    return counts


def num_compilations() -> int:
    """Programs compiled by this process since the first call."""
    return events()[COMPILES]


def use_cache(place: str | Path) -> None:
    """Compiled programs are kept in `place` and found there by the next start (trusted like the code itself).

    Args:
        place: a folder or a gs:// address; JAX opens either through etils.epath.

    """
    jax.config.update("jax_compilation_cache_dir", str(place))
    if "://" in str(place):  # XLA's own cache of tuned kernels (GPU), in the same place, is opened by XLA
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    compilation_cache.reset_cache()


@contextmanager
def out_of_memory_explained(what: str) -> Iterator[None]:
    """Turns JAX's out-of-memory error into one that says what to change."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        raise OutOfMemory(
            f"{what}: out of device memory. What helps, cheapest first: a smaller batch.seconds_per_device (more "
            f"micro-batches, same update), compute.remat = 'dots' or 'full', compute.dtype = 'bfloat16', "
            f"a larger mesh.fsdp.\n{str(error).splitlines()[0]}"
        ) from error


@dataclass(frozen=True)
class Builder:
    """Traces the programs of a run: what the loop compiles, and what `wavlm_jax.plan` counts."""

    task: Task
    """Its loss and row group."""
    state: TrainState
    """Abstract, with shardings; donated by the step."""
    mesh: Mesh
    """The current one (`jax.set_mesh`)."""
    optimizer: optax.GradientTransformation
    """Of `optim.adam`."""
    schedule: optax.Schedule
    """For the report."""
    max_grad_norm: float | None
    freeze: Rules
    """See `step.train_step`."""
    key: jax.Array
    """Root key of the run, a constant of the program."""

    def update(self, spec: BatchSpec) -> Traced:
        """One step of training on a batch of `spec`.

        Raises:
            ValueError: the rows cannot be split.

        """
        step = partial(
            train_step,
            task=self.task,
            optimizer=self.optimizer,
            schedule=self.schedule,
            max_grad_norm=self.max_grad_norm,
            freeze=self.freeze,
            key=self.key,
        )
        places = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        check_spec(spec, self.task.row_group, row_shards(self.mesh))
        return self._traced(spec, step, self.state, donate_argnums=0, out_shardings=(places, replicated(self.mesh)))

    def evaluation(self, spec: BatchSpec) -> Traced:
        """The sums of a batch of `spec`, without randomness; raises as `update` does."""
        score = partial(eval_step, task=self.task)
        check_spec(spec, 1, row_shards(self.mesh))
        return self._traced(spec, score, self.state.params, out_shardings=replicated(self.mesh))

    def _traced(self, spec: BatchSpec, function: Any, argument: Any, **options: Any) -> Traced:
        batch = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=by_rows(self.mesh))
            for name, array in spec.arrays.items()
        }
        return jax.jit(partial(function, microbatches=spec.microbatches), **options).trace(argument, batch)


def compile_programs(builder: Builder, specs: dict[str, tuple[BatchSpec, ...]]) -> Programs:
    """Compiles a step for every spec of "train" and an evaluation for every spec of the other splits.

    Args:
        builder: traces them.
        specs: of each split's stream.

    Raises:
        ValueError: a spec's rows cannot be split.
        OutOfMemory: a program does not fit.

    """
    started, found_before = time.monotonic(), events()[HITS]

    def compiled(trace: Callable[[BatchSpec], Traced], specs: tuple[BatchSpec, ...]) -> dict[str, Compiled]:
        programs = {}
        for spec in specs:
            traced = trace(spec)
            with out_of_memory_explained(f"batch {spec.name}"):
                programs[spec.name] = traced.lower().compile()
        return programs

    train = compiled(builder.update, specs["train"])
    evaluate = {split: compiled(builder.evaluation, found) for split, found in specs.items() if split != "train"}
    return Programs(train, evaluate, time.monotonic() - started, events()[HITS] - found_before)
