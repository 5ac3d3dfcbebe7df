"""The pre-training head in a safetensors file of its own, beside a Hugging Face folder, which has no place for it.

Tensors are named and laid out as in the authors' checkpoints: `final_proj.weight`, `final_proj.bias`,
`label_embs_concat` (clusters x final_dim, with fairseq's four special rows where the model has them).
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from wavlm_jax.convert.names import ConversionError
from wavlm_jax.convert.precision import Precision
from wavlm_jax.convert.safetensors_file import open_safetensors, write_safetensors
from wavlm_jax.convert.source import Source
from wavlm_jax.convert.state_dict import read_head
from wavlm_jax.shapes import Params

PRETRAINING_HEAD = "pretraining_head.safetensors"
NAMES = ("final_proj.weight", "final_proj.bias", "label_embs_concat")


def head_tensors(head: Params, width: int, path: Path) -> dict[str, np.ndarray]:
    """The head in the authors' names and layouts, float32.

    Raises:
        ConversionError: parts that do not fit each other or an encoder of this width, or that are not finite.

    """
    projection = head["final_proj"]
    arrays = (np.asarray(projection["kernel"]).T, projection["bias"], head["label_embeddings"])
    tensors = {name: np.asarray(array, np.float32) for name, array in zip(NAMES, arrays, strict=True)}
    sources = (Source(name, tensor.shape, partial(np.asarray, tensor)) for name, tensor in tensors.items())
    read_head(*sources, width=width, path=path)
    return tensors


def write_pretraining_head(head: Params, folder: Path, width: int, dtype: Precision) -> None:
    """Writes the file into `folder`.

    Raises:
        ConversionError: see `head_tensors`, and numbers that `dtype` has no room for.

    """
    path = folder / PRETRAINING_HEAD
    write_safetensors(path, head_tensors(head, width, path), dtype)


def read_pretraining_head(folder: Path, width: int) -> Mapping[str, Any] | None:
    """The head beside a model of this width; None where there is none.

    Raises:
        DamagedFile, ConversionError: a file that cannot be read, or a head that does not fit.

    """
    path = folder / PRETRAINING_HEAD
    if not path.is_file():
        return None
    found = open_safetensors(path)
    if set(found) != set(NAMES):
        raise ConversionError(f"{path}: has {', '.join(sorted(found))[:200]}, expected {', '.join(NAMES)}")
    return read_head(*(found[name] for name in NAMES), width=width, path=path)
