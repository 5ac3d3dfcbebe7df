"""What training changes, and what a step says about itself. Everything else is a function of (config, step).

One update and one evaluation, as pure functions of (state, batch).

The result depends on the global batch alone: not on devices, hosts, mesh shape or the number of micro-batches.

Everything is compiled before the first step; afterwards a compilation is a fault that the metrics show.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
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
from jaxtyping import Array, Int

from wavlm_jax.shapes import Batch, Params, Scalar, StepKey
from wavlm_jax.training.optim import Rules, clip, hold_for_ever, without_frozen
from wavlm_jax.training.sharding import ROWS, by_rows, path_name, replicated, row_shards, tree_shardings
from wavlm_jax.training.task import BatchSpec, LossSums, Task


@struct.dataclass
class TrainState:
    """The whole state of training: float32 arrays and int32 scalars, or their shapes, or their shardings."""

    step: Any
    """Steps done; the position of data and randomness."""
    params: Params
    opt_state: Any
    skipped: Any
    """Steps whose loss or gradient was not finite, in all."""
    skipped_in_a_row: Any
    """Of those, the ones since the last good step."""


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
    """The typed key that every draw of a run descends from."""
    return jax.random.key(seed)


def init_key(seed: int) -> StepKey:
    """The key of fresh parameters: the one fold that no step takes."""
    return jax.random.fold_in(root_key(seed), 2**32 - 1)


def fresh_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before step 1, traced or real."""

    def zero() -> Int[Array, ""]:
        return jnp.zeros((), jnp.int32)

    return TrainState(
        step=zero(),
        params=params,
        opt_state=optimizer.init(params),
        skipped=zero(),
        skipped_in_a_row=zero(),
    )


def shard_state(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A fresh state around parameters that are already on their devices; the optimizer state is born beside them."""
    shardings = {path_name(path): leaf.sharding for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    abstract = abstract_state(params, optimizer, shardings, mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    opt_state = jax.jit(optimizer.init, out_shardings=places.opt_state)(params)
    zeros = [jax.device_put(jnp.zeros((), jnp.int32), replicated(mesh)) for _ in range(3)]
    return TrainState(zeros[0], params, opt_state, zeros[1], zeros[2])


def abstract_state(
    params: Params, optimizer: optax.GradientTransformation, shardings: Mapping[str, NamedSharding], mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of the state: what is compiled for, and what a checkpoint is restored into."""
    abstract = jax.eval_shape(lambda tree: fresh_state(tree, optimizer), params)
    places = tree_shardings(abstract, shardings, mesh)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), abstract, places
    )


def check_spec(spec: BatchSpec, row_group: int, shards: int) -> None:
    """Whether the rows of `spec` can be split.

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
            f"x groups of {row_group} rows x {shards} devices; change data.row_multiple or the seconds per update"
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
    state: TrainState,
    batch: Batch,
    *,
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    max_grad_norm: float | None,
    freeze: Rules,
    key: StepKey,
    microbatches: int,
) -> tuple[TrainState, Report]:
    """One update. A loss or gradient that is not finite changes nothing but `step` and the counters.

    Args:
        state: donated by the caller.
        batch: global arrays; `row` is added here.
        task: its loss and row group.
        optimizer: from `optim.adam`.
        schedule: learning rate for the report; the optimizer has it too.
        max_grad_norm: of the gradient of the mean loss.
        freeze: what stands still; the optimizer knows it too.
        key: the root key of the run; this step's is `fold_in(key, state.step)`.
        microbatches: static.

    """
    step_key = jax.random.fold_in(key, state.step)
    gradients = partial(_gradients, task, state.params, step_key, freeze)
    sums, grads = add_up(gradients, batch, microbatches, task.row_group)
    count = jnp.where(sums.count > 0, sums.count, 1.0)
    grads = jax.tree.map(lambda g: g / count, grads)
    grads = without_frozen(grads, freeze, state.opt_state.thaws, state.opt_state.updates)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(sums.loss) & jnp.isfinite(norm)
    updates, opt_state = optimizer.update(clip(grads, norm, max_grad_norm), state.opt_state, state.params)
    params = _follow(optax.apply_updates(state.params, updates), sums.averages)

    def keep(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

    failed = 1 - finite.astype(jnp.int32)
    new = TrainState(
        step=state.step + 1,
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        skipped=state.skipped + failed,
        skipped_in_a_row=(state.skipped_in_a_row + 1) * failed,
    )
    values = {"grad_norm": norm, "learning_rate": schedule(state.opt_state.updates)}
    return new, Report(replace(sums, averages={}), values, finite, new.skipped, new.skipped_in_a_row)


def _follow(params: Params, averages: dict[str, tuple[Any, Any]]) -> Params:
    """Parameters that are averages, moved a tenth of the way to what this batch says, as torch's batch norms do."""

    def of(path: Any, leaf: Array) -> Array:
        if (name := path_name(path)) not in averages:
            return leaf
        total, count = averages[name]
        return leaf + _PACE * (total / count - leaf)

    return jax.tree_util.tree_map_with_path(of, params) if averages else params


_PACE = 0.1


def eval_step(params: Params, batch: Batch, *, task: Task, microbatches: int) -> LossSums:
    """Sums over the global batch, without randomness: so no row has partners, and any may go into any micro-batch."""
    rows = next(iter(batch.values())).shape[0]

    def score(part: Batch) -> LossSums:
        sums = task.loss(params, part, None)
        return replace(
            sums, answers={name: _in_place(answer, part["row"], rows) for name, answer in sums.answers.items()}
        )

    return add_up(score, batch, microbatches, group=1)


def _in_place(answers: Array, row: Array, rows: int) -> Array:
    """Answers of a micro-batch where they belong in the batch of `rows`, 0 elsewhere: so sums are the whole list."""
    return jnp.zeros((rows, *answers.shape[1:]), answers.dtype).at[row].set(answers)


def _gradients(task: Task, params: Params, key: StepKey, freeze: Rules, batch: Batch) -> tuple[LossSums, Params]:
    def total(params: Params) -> tuple[Scalar, LossSums]:
        sums = task.loss(hold_for_ever(params, freeze), batch, key)
        return sums.loss, sums

    (_, sums), grads = jax.value_and_grad(total, has_aux=True)(params)
    return sums, jax.tree.map(lambda g: g.astype(jnp.float32), grads)


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
