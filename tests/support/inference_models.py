"""Tiny models with a head and random weights, two recordings, and what the model says of each alone."""

from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import soundfile

from wavlm_jax.audio.recordings import Recording, open_recordings
from wavlm_jax.config import HeadConfig, TaskHead, WavLMConfig
from wavlm_jax.model.heads import module_of
from wavlm_jax.text.vocabulary import Vocabulary, files_of_record
from wavlm_jax.weights import Model, Origin, Weights, ready

CONFIG = WavLMConfig.tiny(num_hidden_layers=1)
HEAD = HeadConfig(vocab_size=5, num_labels=3, classifier_proj_size=8, xvector_output_dim=8, tdnn_dim=(8,) * 5)
TOKENS = Vocabulary(tokens=("<pad>", "|", "A", "B", "C"), unknown=None, begin=None, end=None)


def weights_of(
    kind: str, louder: float = 1.0, *, labels: tuple[str, ...] | None = None, vocabulary: Vocabulary | None = None
) -> Weights:
    """Random weights, those of the head multiplied: as they are, they say nearly the same of everything."""
    module = module_of(CONFIG, kind, HEAD)
    params = jax.device_get(jax.jit(module.init)(jax.random.key(1), jnp.zeros((1, 16_000)))["params"])
    encoder = params.pop("wavlm")
    head = jax.tree.map(lambda leaf: np.float32(louder) * leaf, params)
    files = {} if vocabulary is None else files_of_record(asdict(vocabulary))
    return Weights(CONFIG, encoder, None, TaskHead(kind, HEAD, head, labels), Origin(path="a model", files=files))


def model_of(kind: str, louder: float = 1.0, **named) -> Model:
    """The same, ready to be called."""
    return ready(weights_of(kind, louder, **named))


def two_recordings(folder: Path) -> list[Recording]:
    """Noise of 15,000 and 9,000 samples, called a and b."""
    random = np.random.default_rng(0)
    for name, length in {"a": 15_000, "b": 9_000}.items():
        soundfile.write(folder / f"{name}.wav", random.normal(size=length) * 0.1, 16_000)
    return open_recordings([folder / "a.wav", folder / "b.wav"])


def alone(model: Model, recording: Recording):
    """What the head gives for a recording that is neither cut nor padded."""
    wave = jnp.asarray(recording.read())[None]
    return jax.jit(lambda params: model.module.apply({"params": params}, wave))(model.params)
