"""A teacher: the model whose hidden states are clustered, from an earlier run or from a Hugging Face folder."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from wavlm_jax.config import WavLMConfig
from wavlm_jax.convert.huggingface import import_huggingface
from wavlm_jax.settings import read
from wavlm_jax.shapes import Params
from wavlm_jax.training.stored import FOLDER, load_params


@dataclass(frozen=True)
class Teacher:
    """A WavLM or HuBERT in evaluation."""

    config: WavLMConfig
    params: Params
    """Of `wavlm_jax.model.wavlm.WavLM`, on the host."""
    fingerprint: str
    """Over names, shapes and values of the parameters: 16 hex digits."""

    def up_to(self, layer: int) -> "Teacher":
        """The same model without the layers above `layer` (1-based); its fingerprint stays that of the whole model.

        Raises:
            ValueError: the model has no such layer.

        """
        if not 1 <= layer <= self.config.num_hidden_layers:
            raise ValueError(
                f"labels.layer: found {layer}, the teacher has the layers 1 to {self.config.num_hidden_layers}"
            )
        layers = jax.tree.map(lambda stacked: stacked[:layer], self.params["encoder"]["layers"])
        params = {**self.params, "encoder": {**self.params["encoder"], "layers": layers}}
        return replace(self, config=replace(self.config, num_hidden_layers=layer), params=params)


def load_teacher(path: Path, step: int | None = None) -> Teacher:
    """The teacher in `path`.

    Args:
        path: workdir of a run of ours, or a Hugging Face folder (WavLM or HuBERT).
        step: checkpoint of the run; None: its newest.

    Raises:
        ValueError: neither of the two, a step of a folder that has none, or whatever the file's reader finds.

    """
    if (path / FOLDER).is_dir():
        resolved, everything = load_params(path, step)
        config, params = read(resolved["model"], WavLMConfig, "model"), everything["wavlm"]
    elif (path / "config.json").is_file():
        if step is not None:
            raise ValueError(f"labels.step: found {step}, but {path} is a Hugging Face folder; expected None")
        config, params = import_huggingface(path, without_head=True)
    else:
        raise ValueError(
            f"labels.run: {path} is no teacher; expected the workdir of a run ({FOLDER}/) or a Hugging Face folder "
            "(config.json, model.safetensors)"
        )
    # A padded batch must give what each row gives alone, whatever the checkpoint was trained with.
    return Teacher(replace(config, padding="exact"), params, fingerprint(params))


def fingerprint(params: Params) -> str:
    """16 hex digits over names, shapes, dtypes and values of a parameter tree."""
    digest = hashlib.sha256()
    for name, array in sorted(_named(params)):
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _named(params: Params) -> Iterator[tuple[str, np.ndarray]]:
    for path, array in jax.tree_util.tree_leaves_with_path(params):
        yield jax.tree_util.keystr(path), np.asarray(array)
