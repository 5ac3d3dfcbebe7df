"""A full-size WavLM Base on two cores against transformers' torch model: one training step, and inference.

    python -m bench.base_cpu [--runs N]

Both start from the same weights, take the same 2 x 10 s of audio in float32, and must give the same number before a
time counts. A step is forward, backward and AdamW, dropout off. Runs alternate, so that whatever else the machine does
falls on both; the ratio is the median of the pairs' ratios.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import numpy as np

THREADS = 2
ROWS, SECONDS, RATE = 2, 10, 16_000
LEARNING_RATE = 1e-5
NO_DROPOUT = dict.fromkeys(
    ("feat_proj_dropout", "hidden_dropout", "attention_dropout", "activation_dropout", "layerdrop"), 0.0
)

Run = Callable[[], float]
"""Does the work once; returns a number that both sides must agree on."""


def main() -> None:
    """Print one JSON line a figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="alternating pairs a figure (default %(default)s)")
    runs = parser.parse_args().runs
    # Before a library starts its threads: XLA takes as many as there are processors to run on.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    waveform = 0.1 * np.random.default_rng(0).standard_normal((ROWS, SECONDS * RATE)).astype(np.float32)
    their_inference, their_step, weights = torch_side(waveform)
    our_inference, our_step = jax_side(waveform, weights)
    compare("base_inference_cpu", our_inference, their_inference, runs)
    compare("base_step_cpu", our_step, their_step, runs)


def compare(name: str, ours: Run, theirs: Run, runs: int) -> None:
    """Time `runs` alternating pairs after one untimed pair that must agree; print the figure."""
    found, expected = ours(), theirs()
    if not np.isclose(found, expected, rtol=1e-4):
        raise SystemExit(
            f"{name}: ours gives {found}, transformers gives {expected}; times of different work say nothing"
        )
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(runs)]
    figure = {
        "name": name,
        "value": statistics.median(ours for ours, _ in pairs),
        "unit": "s",
        "runs": runs,
        "against": f"transformers WavLMModel, torch, {THREADS} threads, {ROWS} x {SECONDS} s float32, alternating",
        "ratio": statistics.median(theirs / ours for ours, theirs in pairs),
    }
    print(json.dumps(figure), flush=True)


def seconds(run: Run) -> float:
    """Wall-clock time of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def torch_side(waveform: np.ndarray) -> tuple[Run, Run, dict[str, np.ndarray]]:
    """Inference and training step of transformers' model, and its initial weights."""
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = transformers.WavLMModel(transformers.WavLMConfig(**NO_DROPOUT, apply_spec_augment=False))
    weights = {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    batch = torch.tensor(waveform)

    def inference() -> float:
        model.eval()
        with torch.inference_mode():
            return float(model(batch).last_hidden_state.abs().mean())

    def step() -> float:
        model.train()
        optimizer.zero_grad()
        loss = model(batch).last_hidden_state.abs().mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return inference, step, weights


def jax_side(waveform: np.ndarray, weights: dict[str, np.ndarray]) -> tuple[Run, Run]:
    """Inference and training step of ours, from the same weights."""
    import jax
    import jax.numpy as jnp
    import optax

    from wavlm_jax.config import WavLMConfig
    from wavlm_jax.convert.state_dict import from_torch
    from wavlm_jax.model.heads import tree_shapes
    from wavlm_jax.model.wavlm import WavLM

    config = WavLMConfig.base(**NO_DROPOUT, feature_grad_mult=1.0)
    model = WavLM(config)
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=1e-2)
    params = jax.tree.map(jnp.asarray, from_torch(weights, tree_shapes(config)))
    state = (params, jax.jit(optimizer.init)(params))
    batch = jnp.asarray(waveform)

    def objective(params: dict, batch: jax.Array) -> jax.Array:
        return jnp.abs(model.apply({"params": params}, batch).last_hidden_state).mean()

    def update(state: tuple, batch: jax.Array) -> tuple:
        params, moments = state
        loss, gradients = jax.value_and_grad(objective)(params, batch)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    forward, train = jax.jit(objective), jax.jit(update, donate_argnums=0)

    def inference() -> float:
        return float(forward(state[0], batch))

    def step() -> float:
        nonlocal state
        state, loss = train(state, batch)
        jax.block_until_ready(state)
        return float(loss)

    return inference, step


if __name__ == "__main__":
    main()
