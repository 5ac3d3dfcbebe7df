"""Weights from wherever they are: a run of ours or a Hugging Face folder, found out by looking."""

from pathlib import Path

from wavlm_jax.config import WavLMConfig
from wavlm_jax.convert.huggingface import import_huggingface
from wavlm_jax.settings import read
from wavlm_jax.training.stored import FOLDER, load_params
from wavlm_jax.weights import Weights


def load_weights(path: Path, step: int | None = None) -> Weights:
    """The model in `path`.

    Args:
        path: workdir of a run of ours, or a Hugging Face folder (WavLM or HuBERT, with or without a head of its own).
        step: checkpoint of the run; None: the newest that verifies.

    Raises:
        ValueError: neither of the two, a step of a folder that has none, or what the file's own reader finds wrong.

    """
    if (path / FOLDER).is_dir():
        resolved, params = load_params(path, step)
        return Weights(read(resolved["model"], WavLMConfig, "model"), params["wavlm"], params.get("head"))
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{path}: no model here; expected the workdir of a run ({FOLDER}/) or a Hugging Face folder (config.json)"
        )
    if step is not None:
        raise ValueError(f"{path}: found step {step} for a Hugging Face folder, which has none; expected None")
    return Weights(*import_huggingface(path, without_head=True), head=None)
