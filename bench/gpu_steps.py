"""The pre-training step on this machine's GPU: audio a second, MFU, and against transformers on torch.

    python -m bench.gpu_steps [--models base large] [--attention auto chunked] [--runs N] [--no-torch]

The real step of the config (dropouts, mixing, Adam; bf16) on full rows of 768 frames in one micro-batch. torch trains
transformers' model with the same head and loss under bf16 autocast with fused AdamW; before a time counts, both must
give the same loss for the same weights, waves and masks without dropout. Runs alternate. MFU is three times the matrix
FLOPs of the forward pass over the time and the peak of dense bf16, 989 TFLOP/s on H100 and H200.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bench.base_cpu import seconds
from bench.row_configs import FRAMES, row_config

ROWS = {"base": 16, "large": 8}
PEAK = 989e12
STEPS = 5
"""Of one timed run, dispatched together."""
MASK_STARTS = 0.08
"""Share of frames at which a masked span of ten begins."""
TOLERANCE = 5e-3
"""Of the loss, bf16 against bf16."""

Run = Callable[[], Any]


class Step(NamedTuple):
    """One side, ready to be timed."""

    run: Run
    """`STEPS` updates, finished when it returns."""
    loss: float
    """Mean loss of a masked frame with fresh weights, nothing dropped or mixed."""


class Batch(NamedTuple):
    """What both sides train on."""

    waveform: np.ndarray
    """int16 (rows, samples)."""
    labels: np.ndarray
    """int32 (rows, frames)."""
    time_mask: np.ndarray
    """bool (rows, frames)."""

    @property
    def audio(self) -> np.ndarray:
        """float32 in [-1, 1)."""
        return self.waveform.astype(np.float32) / 2**15


def main() -> None:
    """Print one JSON line a figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=tuple(ROWS), choices=tuple(ROWS))
    parser.add_argument("--rows", type=int, help="of 15.4 s; default 16 (base) and 8 (large)")
    parser.add_argument("--attention", nargs="+", default=("auto",))
    parser.add_argument("--remat", default="dots")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each (default %(default)s)")
    parser.add_argument("--no-torch", action="store_true", help="ours alone")
    parser.add_argument("--profile", help="folder for a trace of one run of each of ours")
    options = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")
    for model in options.models:
        for attention in options.attention:
            measure(model, attention, options)


def measure(model: str, attention: str, options: argparse.Namespace) -> None:
    """The figures of one model."""
    rows = options.rows or ROWS[model]
    config = row_config(model, rows, 1)
    config.compute.attention, config.compute.remat = attention, options.remat
    ours, weights, batch, facts = jax_side(config)
    sides = {"ours": ours}
    if not options.no_torch:
        sides["theirs"] = torch_side(config, weights, batch)
        if not np.isclose(ours.loss, sides["theirs"].loss, rtol=TOLERANCE):
            raise SystemExit(f"{model}: our loss is {ours.loss}, transformers' {sides['theirs'].loss}")
    if options.profile:
        profiled(ours.run, f"{options.profile}/{model}-{attention}")
    for side in sides.values():
        side.run()
    times = [{name: seconds(side.run) / STEPS for name, side in sides.items()} for _ in range(options.runs)]
    step = statistics.median(pair["ours"] for pair in times)
    audio = facts["audio_seconds"]
    name = f"gpu_{model}" + ("" if attention == "auto" else f"_{attention}")
    line: dict[str, Any] = {
        "name": f"{name}_audio_s_per_s",
        "value": round(audio / step, 1),
        "unit": "s of audio a second",
        "runs": options.runs,
        "step_ms": round(1e3 * step, 2),
        "spread_ms": [round(1e3 * pair["ours"], 2) for pair in times],
        "device": facts["device"],
    }
    if "theirs" in sides:
        theirs = statistics.median(pair["theirs"] for pair in times)
        line["against"] = f"transformers on torch, bf16 autocast, fused AdamW: {audio / theirs:.1f}"
        line["ratio"] = round(statistics.median(pair["theirs"] / pair["ours"] for pair in times), 2)
    print(json.dumps(line), flush=True)
    mfu = facts["model_flops"] / step / PEAK
    about = f"{facts['model_flops'] / 1e12:.2f} TFLOP an update, {rows} x {FRAMES} frames, peak {PEAK / 1e12:.0f}"
    for figure, value, unit, more in (
        (f"{name}_mfu", round(mfu, 4), "of peak", {"about": about}),
        (f"{name}_peak_gib", round(facts["peak"] / 2**30, 2), "GiB", {"compile_s": round(facts["compile_s"], 1)}),
    ):
        print(json.dumps({"name": figure, "value": value, "unit": unit, "runs": options.runs, **more}), flush=True)


def profiled(run: Run, folder: str) -> None:
    """A trace of one run."""
    import jax

    run()
    with jax.profiler.trace(folder):
        run()


def jax_side(config: Any) -> tuple[Step, dict[str, np.ndarray], Batch, dict[str, Any]]:
    """Our step as `train.py` compiles it, its weights by torch's names, what it trains on, and facts about it."""
    import flax.linen as nn
    import jax

    from pretrain.task import outline
    from wavlm_jax.convert.state_dict import to_torch
    from wavlm_jax.settings import read_sections
    from wavlm_jax.training.sharding import RULES, by_rows, make_mesh
    from wavlm_jax.training.start import RunSettings, make_builder
    from wavlm_jax.training.step import init_key
    from wavlm_jax.training.task import Topology

    values = json.loads(config.to_json())
    settings = read_sections(values, RunSettings)
    mesh = make_mesh(settings.mesh, jax.devices()[:1])
    task = outline(values, Topology(1, 0, 1))
    (spec,) = task.stream("train").specs
    batch, arrays = make_batch(spec, task.loss.predictor.num_clusters)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        builder = make_builder(task, settings, mesh)
        traced = builder.trace("train", spec)
        start = time.perf_counter()
        program = traced.lower().compile()
        compile_s = time.perf_counter() - start
        places = jax.tree.map(lambda leaf: leaf.sharding, builder.state.params)
        params = jax.jit(task.init, out_shardings=places)(init_key(settings.seed))
        weights = to_torch(params["wavlm"]) | {f"head.{n}": v for n, v in to_torch(params["head"]).items()}
        loss, model_flops = undisturbed(task.loss, params, batch)
        state = builder.fresh(params)
    placed = {name: jax.device_put(array, by_rows(mesh)) for name, array in arrays.items()}

    def run() -> float:
        nonlocal state
        for _ in range(STEPS):
            state, report = program(state, placed)
        jax.block_until_ready(state)
        return float(report.sums.loss / report.sums.count)

    stats = program.memory_analysis()
    facts = {
        "audio_seconds": spec.seconds,
        "model_flops": model_flops,
        "compile_s": compile_s,
        "device": jax.devices()[0].device_kind,
        "peak": stats.argument_size_in_bytes + stats.temp_size_in_bytes,
    }
    return Step(run, loss), weights, batch, facts


def make_batch(spec: Any, num_clusters: int) -> tuple[Batch, dict[str, np.ndarray]]:
    """Noise and random labels, full rows: the same for both sides, and as the arrays of `spec`."""
    random = np.random.default_rng(0)
    arrays = {name: np.zeros(shape.shape, shape.dtype) for name, shape in spec.arrays.items()}
    rows, samples = arrays["waveform"].shape
    arrays["waveform"] = random.normal(0, 3000, (rows, samples)).astype(np.int16)
    arrays["labels"] = random.integers(0, num_clusters, (rows, FRAMES)).astype(arrays["labels"].dtype)
    arrays |= {
        "num_samples": np.full(rows, samples, np.int32),
        "id": np.arange(rows, dtype=np.int32),
        "weight": np.ones(rows, np.float32),
        "variance": np.full(rows, (3000 / 2**15) ** 2, np.float32),
    }
    starts = random.random((rows, FRAMES)) < MASK_STARTS
    mask = np.stack([np.roll(starts, step, axis=1) for step in range(10)]).any(axis=0)
    return Batch(arrays["waveform"], arrays["labels"].astype(np.int32), mask), arrays


def undisturbed(objective: Any, params: Any, batch: Batch) -> tuple[float, float]:
    """Mean loss with the masks of `batch`, nothing dropped or mixed; and matrix FLOPs of three such forward passes."""
    import jax
    import jax.numpy as jnp

    from pretrain.predictor import masked_prediction
    from wavlm_jax.plan.program import matrix_flops

    predictor = objective.predictor
    rows, samples = batch.waveform.shape

    def forward(params: Any, audio: jax.Array) -> jax.Array:
        mask = jnp.asarray(batch.time_mask)
        count = jnp.full((rows,), samples, jnp.int32)
        scores, output = predictor.apply({"params": params}, audio, count, mask)
        valid = jnp.ones(mask.shape, bool)
        sums = masked_prediction(scores, batch.labels, mask, valid, output.conv_features, predictor.objective)
        return sums.loss / sums.count

    audio = jnp.asarray(batch.audio)
    # A TPU's program has the convolutions as they are; a GPU's positional one takes an eighth more than it must.
    flops = 3 * matrix_flops(jax.make_jaxpr(forward)(params, audio), "tpu")
    return float(jax.jit(forward)(params, audio)), flops


def torch_side(config: Any, weights: dict[str, np.ndarray], batch: Batch) -> Step:
    """The model of transformers with the same head and loss."""
    import torch

    values = json.loads(config.to_json())
    model, head, leaves = torch_model(values, weights)
    objective = values["objective"]
    waves, labels, mask = (torch.tensor(array, device="cuda") for array in (batch.audio, batch.labels, batch.time_mask))
    captured: list[Any] = []
    model.feature_extractor.register_forward_hook(lambda _, __, output: captured.append(output))
    optimizer = torch.optim.AdamW([*model.parameters(), *leaves], lr=1e-5, betas=(0.9, 0.98), fused=True)

    def loss() -> Any:
        captured.clear()
        with torch.autocast("cuda", torch.bfloat16):
            hidden = model(waves, mask_time_indices=mask).last_hidden_state
            projected = torch.nn.functional.linear(hidden, head["weight"], head["bias"])
        unit = torch.nn.functional.normalize
        scores = unit(projected.float(), dim=-1) @ unit(head["embeddings"], dim=-1).T / objective["logit_temp"]
        picked = torch.nn.functional.cross_entropy(scores[mask], labels[mask].long() + objective["special_rows"])
        masked = mask.sum(1).float()
        penalty = (captured[0].float().square().mean((1, 2)) * masked).sum() / masked.sum()
        return picked + objective["penalty_weight"] * penalty

    def run() -> float:
        model.train()
        for _ in range(STEPS):
            optimizer.zero_grad(set_to_none=True)
            value = loss()
            value.backward()
            optimizer.step()
        torch.cuda.synchronize()
        return float(value)

    model.eval()
    with torch.no_grad():
        return Step(run, float(loss()))


def torch_model(values: dict[str, Any], weights: dict[str, np.ndarray]) -> tuple[Any, dict[str, Any], list[Any]]:
    """The model on the GPU with our weights, and the head's tensors."""
    import torch
    import transformers

    from wavlm_jax.config import WavLMConfig
    from wavlm_jax.convert.huggingface import config_json
    from wavlm_jax.settings import read

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    described = config_json(read(values["model"], WavLMConfig, "model"), None, "float32")
    model = transformers.WavLMModel(transformers.WavLMConfig(**described))
    body = {name: torch.tensor(value) for name, value in weights.items() if not name.startswith("head.")}
    model.load_state_dict(body)
    model.cuda()
    names = {"weight": "head.final_proj.weight", "bias": "head.final_proj.bias", "embeddings": "head.label_embeddings"}
    head = {key: torch.nn.Parameter(torch.tensor(weights[name], device="cuda")) for key, name in names.items()}
    return model, head, list(head.values())


if __name__ == "__main__":
    main()
