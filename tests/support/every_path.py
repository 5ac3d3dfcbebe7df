"""Small vocabularies, random log probabilities, and the best path of every text, all paths tried."""

import itertools
import math

import numpy as np
from hypothesis import strategies as st

from wavlm_jax.text.vocabulary import Vocabulary

TINY = Vocabulary(tokens=("<pad>", "|", "A", "B"), unknown=None, begin=None, end=None)
SPECIAL = Vocabulary(tokens=("A", "<unk>", "B", "<s>", "|", "<pad>"), end=None)
seeds = st.integers(0, 2**32 - 1)


def log_probs_of(seed, frames, tokens=4, sharpness=1.0):
    logits = np.random.default_rng(seed).normal(size=(frames, tokens)) * sharpness
    return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)


def best_by_text(log_probs, vocabulary):
    """Of every text, its best path: all paths are tried."""
    best = {}
    for path in itertools.product(range(len(vocabulary)), repeat=len(log_probs)):
        score = float(sum(row[token] for row, token in zip(log_probs, path, strict=True)))
        tokens = tuple(token for token, _ in itertools.groupby(path) if token != vocabulary.blank_id)
        if score > best.get(tokens, (-math.inf,))[0]:
            best[tokens] = (score, path)
    return best
