"""One update and one evaluation, as pure functions of (state, batch), and the programs that are compiled from them.

The result depends on the global batch alone: not on devices, hosts, mesh shape or the number of micro-batches.
Every program is compiled before the first step. A later compilation is counted (`num_compilations`), and the log shows
it as `compiles_after_start`.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled, Traced
from jaxtyping import Array

from wavlm_jax.shapes import Batch, Params, Scalar, StepKey
from wavlm_jax.training.optim import FreezeRules, Optimizer, clip, first_thaws, stop_gradients, zero_frozen
from wavlm_jax.training.sharding import ROWS, by_rows, path_name, replicated, row_shards, state_shardings
from wavlm_jax.training.task import BatchSpec, LossSums, Task


@struct.dataclass
class TrainState:
    """All that training changes: float32 arrays and int32 scalars; or their shapes; or their shardings.

    Everything else is a function of the config and `step`.
    """

    step: Any
    """Steps done; the position of data and randomness."""
    params: Params
    opt_state: Any
    """`Optimizer.init` makes it."""
    updates: Any
    """Steps that changed the parameters: all but the skipped ones. The position of the schedule."""
    thaws: Any
    """`optim.Thaws`. A resumed run keeps those that it began with."""
    skipped: Any
    """Steps whose loss or gradient was not finite, in all."""
    skipped_in_a_row: Any
    """Of those, the ones since the last good step."""

    @property
    def num_bytes(self) -> int:
        """Of the whole state, which is also what a checkpoint takes on disk."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


@struct.dataclass
class Report:
    """What a step says about itself: scalars, the same on every device; numpy once fetched."""

    sums: Any
    """LossSums of the global batch."""
    values: dict[str, Any]
    """Gradient norm before clipping, learning rate."""
    finite: Any
    """bool: whether the step changed anything."""
    skipped: Any
    skipped_in_a_row: Any


def root_key(seed: int) -> StepKey:
    """The typed key that every draw of a run is derived from."""
    return jax.random.key(seed)


def init_key(seed: int) -> StepKey:
    """The key of fresh parameters: folded with a number that no step reaches."""
    return jax.random.fold_in(root_key(seed), 2**32 - 1)


def check_spec(spec: BatchSpec, row_group: int, shards: int) -> None:
    """Checks that the rows of `spec` can be split.

    Raises:
        ValueError: unless every array has the same rows, a multiple of micro-batches x row group x devices.

    """
    rows = {shape.shape[0] for shape in spec.arrays.values()}
    if len(rows) != 1:
        raise ValueError(f"batch {spec.name}: arrays have {sorted(rows)} rows, expected one number")
    unit = spec.microbatches * row_group * shards
    if (found := rows.pop()) % unit:
        raise ValueError(
            f"batch {spec.name}: {found} rows; expected a multiple of {unit} = {spec.microbatches} micro-batches "
            f"x groups of {row_group} rows x {shards} devices; change config.batch.row_multiple or seconds_per_update"
        )


def split_rows(batch: Batch, microbatches: int, group: int) -> dict[str, Any]:
    """Arrays (rows, ...) as (microbatches, rows / microbatches, ...), groups of `group` consecutive rows kept together.

    Interleaved: each device's rows go to all micro-batches in turn, so that nothing moves between devices.
    """

    def split(array: Array) -> Array:
        rows, *rest = array.shape
        blocks = array.reshape(rows // (microbatches * group), microbatches, group, *rest)
        parts = blocks.swapaxes(0, 1).reshape(microbatches, rows // microbatches, *rest)
        return jax.lax.with_sharding_constraint(parts, PartitionSpec(None, ROWS))

    return {name: split(array) for name, array in batch.items()}


def add_up(function: Callable[[Batch], Any], batch: Batch, microbatches: int, group: int) -> Any:
    """Sum of `function` over the micro-batches of `batch`, numbered by `row` beforehand; one at a time in memory."""
    rows = next(iter(batch.values())).shape[0]
    batch = {**batch, "row": jnp.arange(rows, dtype=jnp.int32)}
    if microbatches == 1:
        return function(batch)
    parts = split_rows(batch, microbatches, group)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
    )

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(part)), None

    return jax.lax.scan(add, zeros, parts)[0]


def train_step(
    state: TrainState, batch: Batch, *, task: Task, optimizer: Optimizer, key: StepKey, microbatches: int
) -> tuple[TrainState, Report]:
    """One update. A loss or gradient that is not finite changes nothing but `step` and the counters.

    Args:
        state: donated by the caller.
        batch: global arrays; `row` is added here.
        task: its loss and row group.
        optimizer: with its schedule, clipping and freezing.
        key: the root key of the run; this step's is `fold_in(key, state.step)`.
        microbatches: static.

    """
    step_key, freeze = jax.random.fold_in(key, state.step), optimizer.freeze
    gradients = partial(_gradients, task, state.params, step_key, freeze)
    sums, grads = add_up(gradients, batch, microbatches, task.row_group)
    count = jnp.where(sums.count > 0, sums.count, 1.0)
    grads = jax.tree.map(lambda g: g / count, grads)
    grads = zero_frozen(grads, freeze, state.thaws, state.updates)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(sums.loss) & jnp.isfinite(norm)
    grads = clip(grads, norm, optimizer.settings.max_grad_norm)
    changes, opt_state = optimizer.update(grads, state.opt_state, state.params, state.updates, state.thaws)
    params = _follow(optax.apply_updates(state.params, changes), sums.averages)

    def keep(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

    failed = 1 - finite.astype(jnp.int32)
    new = TrainState(
        step=state.step + 1,
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        updates=keep(state.updates + 1, state.updates),
        thaws=state.thaws,
        skipped=state.skipped + failed,
        skipped_in_a_row=(state.skipped_in_a_row + 1) * failed,
    )
    values = {"grad_norm": norm, "learning_rate": optimizer.schedule(state.updates)}
    return new, Report(replace(sums, averages={}), values, finite, new.skipped, new.skipped_in_a_row)


def _gradients(task: Task, params: Params, key: StepKey, freeze: FreezeRules, batch: Batch) -> tuple[LossSums, Params]:
    def total(params: Params) -> tuple[Scalar, LossSums]:
        sums = task.loss(stop_gradients(params, freeze), batch, key)
        return sums.loss, sums

    (_, sums), grads = jax.value_and_grad(total, has_aux=True)(params)
    return sums, jax.tree.map(lambda g: g.astype(jnp.float32), grads)


_AVERAGING_RATE = 0.1


def _follow(params: Params, averages: dict[str, tuple[Any, Any]]) -> Params:
    """Moves parameters that are running averages a tenth of the way to this batch's, as torch's batch norms do."""

    def of(path: Any, leaf: Array) -> Array:
        if (name := path_name(path)) not in averages:
            return leaf
        total, count = averages[name]
        return leaf + _AVERAGING_RATE * (total / count - leaf)

    return jax.tree_util.tree_map_with_path(of, params) if averages else params


def eval_step(params: Params, batch: Batch, *, task: Task, microbatches: int) -> LossSums:
    """Sums over the global batch, without randomness: so no row has partners, and any may go into any micro-batch."""
    rows = next(iter(batch.values())).shape[0]

    def in_place(answers: Array, row: Array) -> Array:
        # 0 for the rows of other micro-batches, so that the sum is the whole list
        return jnp.zeros((rows, *answers.shape[1:]), answers.dtype).at[row].set(answers)

    def score(part: Batch) -> LossSums:
        sums = task.loss(params, part, None)
        return replace(sums, answers={name: in_place(answer, part["row"]) for name, answer in sums.answers.items()})

    return add_up(score, batch, microbatches, group=1)


COMPILES = "/jax/core/compile/backend_compile_duration"
HITS = "/jax/compilation_cache/cache_hits"


class OutOfMemory(RuntimeError):  # noqa: N818 named as people call it
    """The devices' memory is too small for the config; the message names the settings that help."""


@dataclass(frozen=True)
class Programs:
    """One executable for each split and batch shape."""

    executables: Mapping[str, Mapping[str, Compiled]]
    """Split -> name of the batch spec -> `train_step` where the split is "train", else `eval_step`."""
    seconds: float
    found: int
    """How many came out of the compilation cache."""

    def describe(self) -> str:
        """For people: how many, how long, how many from the cache."""
        count = sum(map(len, self.executables.values()))
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
    """What the programs of a run are traced from, before any array of the run exists (`start.make_builder`)."""

    task: Task
    optimizer: Optimizer
    mesh: Mesh
    """Has to be the current one (`jax.set_mesh`) when a program is traced."""
    key: StepKey
    """Root key of the run, a constant of the program."""
    shardings: Mapping[str, NamedSharding]
    """Path of a parameter -> where it is."""
    state: TrainState
    """Shapes, dtypes and shardings: what is compiled for, and what a checkpoint is restored into."""

    def trace(self, split: str, spec: BatchSpec) -> Traced:
        """The program of a batch of `spec`: one update where the split is "train", else one evaluation.

        Raises:
            ValueError: the rows cannot be split.

        """
        batch = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=by_rows(self.mesh))
            for name, array in spec.arrays.items()
        }
        training, everywhere = split == "train", replicated(self.mesh)
        check_spec(spec, self.task.row_group if training else 1, row_shards(self.mesh))
        if not training:
            score = partial(eval_step, task=self.task, microbatches=spec.microbatches)
            return jax.jit(score, out_shardings=everywhere).trace(self.state.params, batch)
        step = partial(
            train_step, task=self.task, optimizer=self.optimizer, key=self.key, microbatches=spec.microbatches
        )
        places = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        return jax.jit(step, donate_argnums=0, out_shardings=(places, everywhere)).trace(self.state, batch)

    def compile(self, specs: Mapping[str, tuple[BatchSpec, ...]]) -> Programs:
        """A program for each spec of each split.

        Args:
            specs: of each split's stream.

        Raises:
            ValueError: a spec's rows cannot be split.
            OutOfMemory: a program does not fit.

        """
        started, found_before = time.monotonic(), events()[HITS]
        executables: dict[str, dict[str, Compiled]] = {split: {} for split in specs}
        for split, of_split in specs.items():
            for spec in of_split:
                traced = self.trace(split, spec)
                with out_of_memory_explained(f"batch {spec.name}"):
                    executables[split][spec.name] = traced.lower().compile()
        return Programs(executables, time.monotonic() - started, events()[HITS] - found_before)

    def fresh(self, params: Params, given: Iterable[str] = ()) -> TrainState:
        """The state before step 1, around parameters that are already on their devices.

        Args:
            params: kept, not copied.
            given: paths of those that were loaded; see `optim.first_thaws`.

        """
        places = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        opt_state = jax.jit(self.optimizer.init, out_shardings=places.opt_state)(params)
        thaws = first_thaws(self.optimizer.freeze, given)
        scalars = TrainState(0, {}, {}, 0, thaws, 0, 0)
        state = jax.tree.map(lambda value: jax.device_put(jnp.int32(value), replicated(self.mesh)), scalars)
        return replace(state, params=params, opt_state=opt_state)


def abstract_state(
    params: Params, optimizer: Optimizer, shardings: Mapping[str, NamedSharding], mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of a state around `params`, which may be shapes themselves."""
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    thaws = dict.fromkeys(first_thaws(optimizer.freeze), scalar)
    state = TrainState(scalar, params, jax.eval_shape(optimizer.init, params), scalar, thaws, scalar, scalar)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        state,
        state_shardings(state, params, shardings, mesh),
    )
