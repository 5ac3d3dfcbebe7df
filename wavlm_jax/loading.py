"""Weights from wherever they are: a run of ours or a Hugging Face folder, found out by looking."""

from dataclasses import dataclass
from pathlib import Path

from wavlm_jax.config import WavLMConfig
from wavlm_jax.convert.huggingface import import_huggingface
from wavlm_jax.settings import read
from wavlm_jax.shapes import Params
from wavlm_jax.training.stored import FOLDER, load_params


@dataclass(frozen=True)
class Weights:
    """A model without what computes it; arrays are numpy, on the host."""

    config: WavLMConfig
    params: Params
    """Of `wavlm_jax.model.wavlm.WavLM`."""
    head: Params | None
    """Of the pre-training head (`final_proj`, `label_embeddings`), where the source has one."""


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
