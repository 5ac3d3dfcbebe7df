"""Equal error rate of every layer of a model that was not trained on speakers.

    python -m bench.speaker_layers MODEL --evaluation CORPUS --trials LIST

The embedding is the mean and deviation of a hidden state over the utterance, each feature normalised over the
utterances of the corpus (without knowing their speakers), compared by cosine; for MODEL, and for random weights of its
shape. One JSON line per layer.
"""

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import wavlm_jax
from wavlm_jax.data.corpus import Corpus
from wavlm_jax.model.wavlm import WavLM
from wavlm_jax.tasks.speaker import VerificationScores, place_trials

ROWS = 8


def main() -> None:
    """Print the scores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--trials", required=True)
    options = parser.parse_args()
    model, corpus = wavlm_jax.load(options.model), Corpus.open(options.evaluation)
    score = VerificationScores(place_trials([options.trials], {"evaluation": corpus}))
    encoder = WavLM(model.config)
    trained = model.params.get("wavlm", model.params)
    untrained = encoder.init(jax.random.key(0), jnp.zeros((1, 16_000)))["params"]
    for weights, params in (("given", trained), ("random", untrained)):
        for layer, found in enumerate(statistics(encoder, params, corpus)):
            normed = (found - found.mean(axis=0)) / np.maximum(found.std(axis=0), 1e-9)
            values = score("evaluation", {"id": np.arange(len(corpus)), "embedding": normed})
            print(json.dumps({"weights": weights, "layer": layer, **values}), flush=True)


def statistics(encoder: WavLM, params: dict, corpus: Corpus) -> np.ndarray:
    """(layers, utterances, 2 x width)."""
    rows: dict[int, np.ndarray] = {}
    for ids, waves in _batches(corpus):
        lengths = jnp.asarray(corpus.lengths[ids], jnp.int32)
        found = np.asarray(_statistics(encoder, params, jnp.asarray(waves), lengths))
        rows |= {index: found[:, row] for row, index in enumerate(ids)}
    return np.stack([rows[index] for index in range(len(corpus))], axis=1)


@partial(jax.jit, static_argnums=0)
def _statistics(encoder: WavLM, params: dict, waves: jax.Array, lengths: jax.Array) -> jax.Array:
    output = encoder.apply({"params": params}, waves, lengths, output_hidden_states=True)
    mask = output.frame_mask[None, :, :, None]
    count = output.frame_mask.sum(axis=1)[None, :, None]
    mean = jnp.where(mask, output.hidden_states, 0).sum(axis=2) / count
    squares = jnp.where(mask, jnp.square(output.hidden_states - mean[:, :, None, :]), 0).sum(axis=2)
    return jnp.concatenate([mean, jnp.sqrt(squares / count)], axis=-1)


def _batches(corpus: Corpus) -> Iterator[tuple[list[int], np.ndarray]]:
    """Utterances of like length, padded to one of a few lengths; the last batch repeats its last row."""
    order = np.argsort(corpus.lengths, kind="stable").tolist()
    for start in range(0, len(order), ROWS):
        ids = order[start : start + ROWS]
        ids += ids[-1:] * (ROWS - len(ids))
        longest = int(corpus.lengths[ids].max())
        waves = np.zeros((ROWS, -(-longest // 80_000) * 80_000), np.float32)
        for row, index in enumerate(ids):
            wave = corpus.wave(index)
            waves[row, : len(wave)] = wave.astype(np.float32) / 32768
        yield ids, waves


if __name__ == "__main__":
    main()
