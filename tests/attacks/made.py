"""Sound files that the attacks start from: models, recordings, a corpus, labels, a run."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable  # noqa: TC003
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import soundfile

from tests.attacks import ROOT, attempt
from tests.attacks.kills import flags_of
from tests.support.inference_models import HEAD, TOKENS, weights_of
from wavlm_jax.config import WavLMConfig
from wavlm_jax.convert.huggingface import export_huggingface
from wavlm_jax.export import save_microsoft
from wavlm_jax.model.heads import module_of
from wavlm_jax.text.vocabulary import write_vocabulary
from wavlm_jax.weights import Origin, Weights, ready

KINDS = {
    "ctc": "WavLMForCTC",
    "speakers": "WavLMForXVector",
    "classes": "WavLMForSequenceClassification",
    "turns": "WavLMForAudioFrameClassification",
}


def models(root: Path) -> None:
    """A folder for each kind of head, the encoder alone, and a .pt."""
    for name, kind in KINDS.items():
        weights = weights_of(kind, labels=("cat", "dog", "owl") if name == "classes" else None)
        export_huggingface(weights, root / name)
    write_vocabulary(TOKENS, root / "ctc")
    export_huggingface(replace(weights, task=None), root / "encoder")
    config = WavLMConfig.tiny(num_hidden_layers=1, conv_dim=(16,) * 7)  # the authors' has a projection then only
    module = module_of(config, "WavLMForCTC", HEAD)
    encoder = jax.device_get(module.init(jax.random.key(1), jnp.zeros((1, 4_000)))["params"]["wavlm"])
    weights = Weights(config, encoder, None, None, Origin(path="a model"))
    save_microsoft(ready(weights), root / "encoder.pt", compared=False)


def recordings(root: Path) -> None:
    """Noise of 9,000 samples in six formats, and one at 8 kHz."""
    wave = np.random.default_rng(0).normal(size=9_000) * 0.1
    for name in ("a.wav", "b.wav", "a.flac", "a.mp3", "a.ogg", "a.aiff", "a.w64"):
        soundfile.write(root / name, wave, 16_000)
    soundfile.write(root / "slow.wav", wave, 8_000)
    soundfile.write(root / "empty.wav", wave[:0], 16_000)


def run(root: Path, steps: int = 4) -> list[str]:
    """A corpus, labels, and a run of a few updates with two checkpoints; the flags of the run."""
    shutil.rmtree(root / "corpus", ignore_errors=True)
    shutil.rmtree(root / "audio", ignore_errors=True)
    flags = [
        *flags_of(root),
        f"--config.train.num_steps={steps}",
        "--config.optim.warmup_steps=2",
        "--config.train.eval_every=2",
        "--config.checkpoint.every=2",
    ]
    command = [sys.executable, "train.py", "--config=configs/pretrain/demo.py", f"--workdir={root / 'run'}", *flags]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    (root / "flags.json").write_text(json.dumps(flags))
    return flags


def all_in(root: Path, folder: Path) -> None:
    """All of them, in forks: this process computes nothing.

    Raises:
        SystemExit: one could not be made.

    """
    prepare: list[Callable[[Path], object]] = [models, recordings, run]
    for make in prepare:
        came = attempt(partial(make, root), folder, seconds=600)
        if came.code:
            raise SystemExit(f"{make.__name__}: exit code {came.code}: {came.err}")
