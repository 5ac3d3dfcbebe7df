"""Everything is compiled before the first step; afterwards a compilation is a fault that the metrics show."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import optax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from jax.stages import Compiled

from wavlm_jax.training.freeze import Rules
from wavlm_jax.training.mesh import row_shards
from wavlm_jax.training.sharding import by_rows, replicated
from wavlm_jax.training.state import TrainState
from wavlm_jax.training.step import check_spec, eval_step, train_step
from wavlm_jax.training.task import BatchSpec, Task

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


def use_cache(folder: Path) -> None:
    """Compiled programs are kept in `folder` and found there by the next start (trusted like the code itself)."""
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
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


def compile_programs(
    task: Task,
    specs: dict[str, tuple[BatchSpec, ...]],
    state: TrainState,
    mesh: Mesh,
    *,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    max_grad_norm: float | None,
    freeze: Rules,
    key: jax.Array,
) -> Programs:
    """Compiles a step for every spec of "train" and an evaluation for every spec of the other splits.

    Args:
        task: its loss and row group.
        specs: of each split's stream.
        state: abstract, with shardings; donated by the step.
        mesh: the current one.
        optimizer: of `optim.adam`.
        schedule: for the report.
        max_grad_norm: see `step.train_step`.
        freeze: see there too.
        key: root key of the run, a constant of the program.

    Raises:
        ValueError: a spec's rows cannot be split.
        OutOfMemory: a program does not fit.

    """
    started, found_before = time.monotonic(), events()[HITS]
    fixed = {"optimizer": optimizer, "schedule": schedule, "max_grad_norm": max_grad_norm, "freeze": freeze}
    update = partial(train_step, task=task, key=key, **fixed)

    def compiled(spec: BatchSpec, function: Any, argument: Any, **options: Any) -> Compiled:
        check_spec(spec, task.row_group, row_shards(mesh))
        batch = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=by_rows(mesh))
            for name, array in spec.arrays.items()
        }
        program = jax.jit(partial(function, microbatches=spec.microbatches), **options)
        with out_of_memory_explained(f"batch {spec.name}"):
            return program.lower(argument, batch).compile()

    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    options = {"donate_argnums": 0, "out_shardings": (places, replicated(mesh))}
    train = {spec.name: compiled(spec, update, state, **options) for spec in specs["train"]}
    score = partial(eval_step, task=task)
    evaluate = {
        split: {spec.name: compiled(spec, score, state.params, out_shardings=replicated(mesh)) for spec in found}
        for split, found in specs.items()
        if split != "train"
    }
    return Programs(train, evaluate, time.monotonic() - started, events()[HITS] - found_before)
