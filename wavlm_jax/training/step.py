"""One update and one evaluation, as pure functions of (state, batch).

The result depends on the global batch alone: not on devices, hosts, mesh shape or the number of micro-batches.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from wavlm_jax.shapes import Batch, Params, Scalar, StepKey
from wavlm_jax.training.freeze import Rules, hold_for_ever, without_frozen
from wavlm_jax.training.loss_sums import LossSums
from wavlm_jax.training.mesh import ROWS
from wavlm_jax.training.optim import clip
from wavlm_jax.training.state import Report, TrainState
from wavlm_jax.training.stream import BatchSpec
from wavlm_jax.training.task import Task
from wavlm_jax.training.trees import path_name


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
