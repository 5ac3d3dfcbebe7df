"""Weights out, proved: written beside the wanted place, read again, compared with transformers, and only then moved."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wavlm_jax.convert.huggingface import export_huggingface, huggingface_tensors
from wavlm_jax.convert.huggingface_config import CONVENTIONS
from wavlm_jax.convert.microsoft import export_microsoft, microsoft_tensors, open_microsoft
from wavlm_jax.convert.model_card import model_card
from wavlm_jax.convert.precision import Precision
from wavlm_jax.convert.shards import open_weights
from wavlm_jax.convert.verify import Proof, check_file, compare, why_not
from wavlm_jax.model.heads import tree_shapes
from wavlm_jax.model.ready import Model

CARD = "README.md"


def save_huggingface(model: Model, folder: Path | str, *, dtype: Precision = "float32", compared: bool = True) -> Proof:
    """A folder that transformers and `wavlm_jax.load` read: weights, configs, vocabulary, head, model card.

    Args:
        model: of `wavlm_jax.load`; `dataclasses.replace(model, params=...)` has others.
        folder: must not exist, be empty, or be an earlier folder of ours, which is replaced at once.
        dtype: of the numbers in the files.
        compared: whether transformers is asked too, where it is installed (seconds); the file is always read again.

    Raises:
        ValueError: parameters that do not fit, something that has no place there, or a proof that fails; nothing
            is left behind then.
        FileExistsError: `folder` holds something else.

    """
    weights, target = model.current, Path(folder)
    _check_replaceable(target)
    with _unproved(target) as scratch:
        export_huggingface(weights, scratch, tree_shapes, dtype)
        tensors = huggingface_tensors(weights, tree_shapes)
        path, found = open_weights(scratch)
        proof = _prove(scratch, check_file(found, tensors, dtype, path), len(tensors), compared=compared)
        (scratch / CARD).write_text(model_card(weights, dtype, proof), encoding="utf-8")
    return proof


def save_microsoft(model: Model, path: Path | str, *, dtype: Precision = "float32", compared: bool = True) -> Proof:
    """A `.pt` in the authors' layout, with the pre-training head if there is one.

    Args:
        model: of `wavlm_jax.load`; `dataclasses.replace(model, params=...)` has others.
        path: the file; an older one is replaced at once.
        dtype: of the numbers in the file.
        compared: whether transformers is asked too, where it is installed.

    Raises:
        ValueError: see `save_huggingface`; and a fine-tuned model, whose head the layout has no place for.

    """
    weights, target = model.current, Path(path)
    if target.is_dir():
        raise ValueError(f"{target}: is a folder, expected the name of a file (wavlm.pt)")
    if weights.task is not None:
        raise ValueError(
            f"the authors' layout has no place for the head of a {weights.task.kind}; write it as huggingface, or the "
            "encoder alone (task=None)"
        )
    with _unproved(target) as scratch:
        export_microsoft(weights.config, weights.params, scratch, weights.head, dtype=dtype)
        tensors = microsoft_tensors(weights.config, weights.params, weights.head, scratch)
        num_bytes = check_file(open_microsoft(scratch), tensors, dtype, scratch)
        return _prove(scratch, num_bytes, len(tensors), compared=compared)


def _prove(path: Path, num_bytes: int, num_tensors: int, *, compared: bool) -> Proof:
    reason = why_not() if compared else "not asked to"
    if reason is not None:
        return Proof(num_tensors, num_bytes, None, reason)
    return Proof(num_tensors, num_bytes, *compare(path))


def _check_replaceable(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONVENTIONS).is_file():
        raise FileExistsError(f"{folder}: is not empty and was not written by wavlm_jax; expected a new folder")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: is a file, expected a new folder")


@contextmanager
def _unproved(target: Path) -> Iterator[Path]:
    """A hidden place beside `target`, which becomes `target` when the block ends well and vanishes when it does not."""
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    scratch = target.absolute().with_name(f".{target.absolute().name}.{os.getpid()}.unproved")
    _remove(scratch)
    try:
        yield scratch
        older = scratch.with_suffix(".older")
        if target.is_dir():
            target.rename(older)
        scratch.rename(target)
        _remove(older)
    finally:
        _remove(scratch)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
