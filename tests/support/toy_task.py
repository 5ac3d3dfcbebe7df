"""A task in miniature for the training tower: ragged rows, partners inside row groups, dropout per row, two shapes.

As a script it is one real process of a run: python tests/support/toy_task.py --workdir DIR --num_steps 20 ...
"""

import argparse
import dataclasses
import gc
import hashlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(Path(__file__).parents[2]))
    gc.set_threshold(100_000, 50, 100)  # as tests/conftest.py does

import jax
import jax.numpy as jnp
import numpy as np

from wavlm_jax.training import hosts, loop, workdir
from wavlm_jax.training.checkpoint import CheckpointSettings
from wavlm_jax.training.metric_writers import MetricsSettings
from wavlm_jax.training.optim import AdamSettings, OptimSettings
from wavlm_jax.training.sharding import MeshSettings, make_mesh
from wavlm_jax.training.start import LoopSettings, RunSettings
from wavlm_jax.training.task import BatchSpec, LossSums, Task

FRAME, WIDTH, HIDDEN, LABELS = 4, 8, 16, 5
TABLE = (
    (r"front/kernel", (None, "embed")),
    (r"front/bias", (None,)),
    (r"layers/up", ("layers", "embed", "mlp")),
    (r"layers/down", ("layers", "mlp", "embed")),
    (r"head", ("embed", None)),
)


def init(key: jax.Array) -> dict:
    shapes = {
        "front": {"kernel": (FRAME, WIDTH), "bias": (WIDTH,)},
        "layers": {"up": (2, WIDTH, HIDDEN), "down": (2, HIDDEN, WIDTH)},
        "head": (WIDTH, LABELS),
    }
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(tree, [0.3 * jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=True)])


def loss(params: dict, batch: dict, key: jax.Array | None) -> LossSums:
    rows, samples = batch["waveform"].shape
    frames = samples // FRAME
    hidden = batch["waveform"].reshape(rows, frames, FRAME) @ params["front"]["kernel"]
    hidden = hidden + params["front"]["bias"][None, None, :]
    if key is not None:
        pairs = hidden.reshape(rows // 2, 2, frames, WIDTH)
        hidden = hidden + 0.5 * pairs[:, ::-1].reshape(rows, frames, WIDTH)  # the partner in the group
        row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["row"])
        keep = jax.vmap(lambda k: jax.random.bernoulli(k, 0.9, (frames, WIDTH)))(row_keys)
        hidden = jnp.where(keep, hidden / 0.9, 0.0)

    def layer(x: jax.Array, weights: dict) -> tuple[jax.Array, None]:
        return x + jax.nn.gelu(x @ weights["up"]) @ weights["down"], None

    hidden, _ = jax.lax.scan(layer, hidden, params["layers"])
    scores = jax.nn.log_softmax(hidden @ params["head"])
    counted = (jnp.arange(frames)[None, :] < batch["num_samples"][:, None] // FRAME) & (batch["weight"][:, None] > 0)
    nll = -jnp.take_along_axis(scores, batch["labels"][..., None], axis=-1)[..., 0]
    right = counted & (jnp.argmax(scores, axis=-1) == batch["labels"])
    count = counted.sum().astype(jnp.float32)
    used = jnp.where(counted[..., None], jax.nn.one_hot(batch["labels"], LABELS), 0.0).sum((0, 1))
    return LossSums(
        jnp.where(counted, nll, 0.0).sum(),
        count,
        {"accuracy": (right.sum().astype(jnp.float32), count)},
        {"labels": used},
    )


@dataclasses.dataclass
class Stream:
    """Batches that are a function of their number. Batch n is short when n is even."""

    rows: int
    microbatches: int = 1
    num_batches: int | None = None
    poison: tuple[int, ...] = ()
    delay: float = 0.0
    stall: int | None = None

    @property
    def specs(self) -> tuple[BatchSpec, ...]:
        return tuple(self.spec(name, frames) for name, frames in (("short", 4), ("long", 8)))

    def spec(self, name: str, frames: int) -> BatchSpec:
        arrays = {
            "waveform": jax.ShapeDtypeStruct((self.rows, frames * FRAME), np.float32),
            "num_samples": jax.ShapeDtypeStruct((self.rows,), np.int32),
            "labels": jax.ShapeDtypeStruct((self.rows, frames), np.int32),
            "id": jax.ShapeDtypeStruct((self.rows,), np.int32),
            "weight": jax.ShapeDtypeStruct((self.rows,), np.float32),
        }
        return BatchSpec(name, arrays, self.microbatches, self.rows * frames * 0.02)

    def global_batch(self, number: int) -> tuple[BatchSpec, dict[str, np.ndarray]]:
        spec = self.specs[number % 2]
        random = np.random.Generator(np.random.Philox(key=(7, number)))
        frames = spec.arrays["labels"].shape[1]
        waveform = random.standard_normal((self.rows, frames * FRAME)).astype(np.float32)
        labels = (np.abs(waveform.reshape(self.rows, frames, FRAME).sum(-1)) * 2).astype(np.int32).clip(max=LABELS - 1)
        num_samples = random.integers(0, frames * FRAME + 1, self.rows).astype(np.int32)
        num_samples[0] = 0  # a row in which nothing counts
        if number in self.poison:
            waveform[self.rows // 2, 0] = np.nan
            num_samples[self.rows // 2] = frames * FRAME
        ids = (number * self.rows + np.arange(self.rows)).astype(np.int32)
        weight = np.ones(self.rows, np.float32)
        if self.num_batches is not None:
            weight[-1] = 0  # a filler row
        return spec, {"waveform": waveform, "num_samples": num_samples, "labels": labels, "id": ids, "weight": weight}

    def batches(self, start: int = 0) -> Iterator[tuple[BatchSpec, dict[str, np.ndarray]]]:
        number, share = start, self.rows // jax.process_count()
        first = share * jax.process_index()
        while self.num_batches is None or number < self.num_batches:
            while number == self.stall:
                time.sleep(1)
            time.sleep(self.delay)  # a slow disk: gives a signal time to arrive at a chosen place
            spec, arrays = self.global_batch(number)
            yield spec, {name: array[first : first + share] for name, array in arrays.items()}
            number += 1

    def name(self, index: int) -> str:
        return f"utterance-{index}"


def make_task(
    rows: int = 16, microbatches: int = 1, *, poison: tuple[int, ...] = (), delay: float = 0.0, **changes
) -> Task:
    streams = {"train": Stream(rows, microbatches, None, poison, delay), "valid": Stream(rows, 1, 3)}
    return Task(
        **(
            {"init": init, "loss": loss, "stream": streams.__getitem__, "row_group": 2, "initial_params": _identity}
            | changes
        )
    )


def _identity(params: dict) -> dict:
    return params


def make_settings(
    num_steps: int = 12, *, every: int = 4, fsdp: int = 1, tensor: int = 1, log_every: int = 1, patience: int = 3
) -> RunSettings:
    adam = AdamSettings(b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.01, eps_added_to="uncorrected", no_decay=None)
    return RunSettings(
        seed=3,
        train=LoopSettings(
            num_steps=num_steps,
            eval_every=5,
            eval_splits=("valid",),
            max_nonfinite_in_a_row=patience,
            max_step_seconds=600.0,
            compilation_cache=None,
        ),
        optim=OptimSettings(
            name="adam",
            arguments={},
            learning_rate=1e-2,
            schedule="linear",
            warmup_steps=3,
            max_grad_norm=1.0,
            freeze={},
            adam=adam,
            tri_stage=None,
            groups={},
        ),
        checkpoint=CheckpointSettings(every=every, keep_last=2, keep_every=None),
        mesh=MeshSettings.anywhere(data=-1, fsdp=fsdp, tensor=tensor),
        metrics=MetricsSettings(log_every=log_every, tensorboard=False, progress=False, wandb=None),
    )


def digest(tree: object) -> str:
    """SHA-256 over every leaf and its path."""
    result = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        result.update(jax.tree_util.keystr(path).encode())
        result.update(np.ascontiguousarray(leaf).tobytes())
    return result.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--num_steps", type=int, default=12)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--who", type=int, default=0, help="nothing; tells a test's processes apart")
    parser.add_argument("--kill_at", default="", help="step:N or the name of a phase of a save")
    parser.add_argument("--full", default="", help="process,step: whose part of which save the disk does not take")
    parser.add_argument("--coordinator", default="", help="host:port,process,count")
    parser.add_argument("--wait", type=int, default=300, help="seconds, for the others at the start")
    parser.add_argument("--heartbeat", type=int, default=100, help="seconds")
    parser.add_argument("--visible", type=float, default=90.0, help="seconds that a file may take to be seen elsewhere")
    parser.add_argument("--max_step_seconds", type=float, default=600.0)
    parser.add_argument("--stall", default="", help="process,batch: where the loader stands still for ever")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", options.devices)
    if options.coordinator:
        address, process, count = options.coordinator.split(",")
        hosts.join(address, int(count), int(process), options.wait, heartbeat=options.heartbeat)
    settings = make_settings(options.num_steps, every=options.every)
    settings = dataclasses.replace(
        settings, train=dataclasses.replace(settings.train, max_step_seconds=options.max_step_seconds)
    )
    task = make_task(delay=options.delay)
    if options.stall:
        process, batch = map(int, options.stall.split(","))
        task.stream("train").stall = batch if process == jax.process_index() else None
    if options.full:
        fill(*map(int, options.full.split(",")))
    workdir.VISIBLE_WITHIN = options.visible
    if options.kill_at:
        arm(options.kill_at)
    with workdir.open_workdir(options.workdir) as place:
        outcome = loop.run(task, settings, make_mesh(settings.mesh), place, config={}, table=TABLE)
    print("outcome", outcome.status.name, outcome.step)
    return int(outcome.status)


def arm(where: str) -> None:
    """SIGKILL to ourselves on entering a chosen phase: the process gets no chance to tidy up."""
    from wavlm_jax.training import checkpoint

    phase, _, detail = where.partition(":")
    calls = iter(range(1, 1000))

    def now(*_: object) -> bool:
        return next(calls) == int(detail or 1)

    if phase == "step":
        loop._Session.boundary = lethal(loop._Session.boundary, before=lambda self: self.step == int(detail))
    elif phase in ("hash_files", "write_manifest"):
        setattr(checkpoint, phase, lethal(getattr(checkpoint, phase), before=now))
    elif phase == "renamed":
        store = checkpoint.CheckpointStore
        store.commit = lethal(store.commit, after=now)
    elif phase == "written":  # the manifest is there, the rename is not
        checkpoint.write_manifest = lethal(checkpoint.write_manifest, after=now)
    elif phase == "prune":  # out of sight, not yet gone
        shutil.rmtree = lethal(shutil.rmtree, before=lambda path, *_: Path(path).name.startswith("removed-"))
    elif phase == "arrays":  # Orbax's thread is writing
        save = checkpoint.orbax.save_checkpointables_async
        checkpoint.orbax.save_checkpointables_async = lethal(save, after=lambda place, *_: Path(place).name == detail)
    else:
        raise ValueError(where)


def fill(process: int, step: int) -> None:
    """ENOSPC for one process at the end of one save."""
    from wavlm_jax.training import checkpoint

    save = checkpoint.orbax.save_checkpointables_async

    def full(place: str, *arguments, **named):
        response = save(place, *arguments, **named)
        if (jax.process_index(), Path(place).name) != (process, str(step)):
            return response
        response.result()
        failed = Future()
        failed.set_exception(OSError(28, "No space left on device"))
        return failed

    checkpoint.orbax.save_checkpointables_async = full


def lethal(function, before=lambda *_: False, after=lambda *_: False):
    """`function`, and SIGKILL before or after the calls that are chosen by their arguments."""

    def wrapped(*arguments, **named):
        if before(*arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **named)
        if after(*arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapped


if __name__ == "__main__":
    sys.exit(main())
