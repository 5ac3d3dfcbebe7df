"""Weights out, proved: written beside the wanted place, read again, compared with transformers, and only then moved.

The file is read again to the bit. transformers then computes the same, in a process of its own (`convert.compare`), so
that neither torch nor a second copy of the weights is in this one; where torch or transformers is missing, the proof
says that this part was not made. The README.md of an export, its model card, says how exact it is.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from wavlm_jax.convert.huggingface import CONVENTIONS, export_huggingface, huggingface_tensors
from wavlm_jax.convert.huggingface_files import open_weights
from wavlm_jax.convert.microsoft import export_microsoft, microsoft_tensors, open_microsoft
from wavlm_jax.convert.state_dict import Precision, StoredTensor, rounded
from wavlm_jax.extras import missing
from wavlm_jax.files import write_text
from wavlm_jax.weights import Model, Weights

TOLERANCE = 1e-4
"""Largest difference in a hidden state or logit, float32; of states whose root mean square is above 1, of that."""
CARD = "README.md"
_LICENCE = (
    "The weights have the licence of whoever trained them; this export adds none. For WavLM's released weights the "
    "sources disagree: the authors' code is MIT, the model cards on the Hugging Face hub say CC BY-SA 3.0 "
    "(microsoft/unilm issue 1757, open). Weights that you trained yourself are yours, within the terms of your data."
)
_INPUT = {
    True: "Speech at 16 kHz, each wave normalised to mean 0 and variance 1 first (`do_normalize`).",
    False: "Speech at 16 kHz, not normalised (`do_normalize` is false).",
}
_USE = """## Use

```python
import transformers, wavlm_jax

transformers.AutoModel.from_pretrained(FOLDER)  # PyTorch
wavlm_jax.load(FOLDER)  # JAX
```"""


class NotProvedError(ValueError):
    """A conversion that did not come out exact; the message says where."""


@dataclass(frozen=True)
class Proof:
    """What the proof of an export found."""

    num_tensors: int
    num_bytes: int
    max_error: float | None
    """Against transformers; None: not compared."""
    against: str
    """What it was compared with, or why it was not."""

    def lines(self) -> list[str]:
        """The same in sentences, for the command line and the model card."""
        read = f"{self.num_tensors} tensors, {self.num_bytes:,} bytes: read again, equal to the bit, all finite"
        if self.max_error is None:
            return [read, f"not compared with transformers: {self.against}"]
        return [read, f"max error {self.max_error:.2e} (tolerance {TOLERANCE:g}) against {self.against}"]


def save_huggingface(model: Model, folder: Path | str, *, dtype: Precision = "float32", compared: bool = True) -> Proof:
    """A folder that transformers and `wavlm_jax.load` read: weights, configs, vocabulary, head, model card.

    Args:
        model: of `wavlm_jax.load`; `dataclasses.replace(model, params=...)` has others.
        folder: must not exist, be empty, or be an earlier folder of ours, which is replaced at once.
        dtype: of the numbers in the files.
        compared: whether to compare with transformers too, where it is installed (takes seconds); the file is always
            read again.

    Raises:
        ValueError: parameters that do not fit, something that has no place there, or a proof that fails; nothing
            is left behind then.
        FileExistsError: `folder` holds something else.

    """
    weights, target = model.current, Path(folder)
    _check_replaceable(target)
    with _unproved(target) as scratch:
        export_huggingface(weights, scratch, dtype)
        tensors = huggingface_tensors(weights)
        path, found = open_weights(scratch)
        proof = _prove(scratch, check_file(found, tensors, dtype, path), len(tensors), compared=compared)
        write_text(scratch / CARD, model_card(weights, dtype, proof))
    return proof


def save_microsoft(
    model: Model,
    path: Path | str,
    *,
    dtype: Precision = "float32",
    compared: bool = True,
    with_head: bool = False,
) -> Proof:
    """A `.pt` in the authors' layout.

    Args:
        model: of `wavlm_jax.load`; `dataclasses.replace(model, params=...)` has others.
        path: the file; an older one is replaced at once.
        dtype: of the numbers in the file.
        compared: whether to compare with transformers too, where it is installed.
        with_head: whether the pre-training head, where there is one, is written too, as fairseq does. The authors' own
            class loads strictly and has no place for its three tensors; what builds on it (s3prl) has none either.

    Raises:
        ValueError: see `save_huggingface`; no head that could be written; and a fine-tuned model, whose head the layout
            has no place for.

    """
    weights, target = model.current, Path(path)
    if with_head and weights.head is None:
        raise ValueError(f"{weights.origin.path}: has no pre-training head that could be written")
    weights = weights if with_head else replace(weights, head=None)
    if target.is_dir():
        raise ValueError(f"{target}: is a folder, expected the name of a file (wavlm.pt)")
    if weights.task is not None:
        raise ValueError(
            f"the authors' layout has no place for the head of a {weights.task.kind}; write it as huggingface, or the "
            "encoder alone (task=None)"
        )
    with _unproved(target) as scratch:
        export_microsoft(weights, scratch, dtype)
        tensors = microsoft_tensors(weights, scratch)
        num_bytes = check_file(open_microsoft(scratch)[1], tensors, dtype, scratch)
        return _prove(scratch, num_bytes, len(tensors), compared=compared)


def _check_replaceable(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONVENTIONS).is_file():
        raise FileExistsError(f"{folder}: is not empty and was not written by wavlm_jax; expected a new folder")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: is a file, expected a new folder")


@contextmanager
def _unproved(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`: renamed to `target` at the end of the block, removed on an exception."""
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    scratch = target.absolute().with_name(f".{target.absolute().name}.{os.getpid()}.unproved")
    _remove(scratch)
    try:
        yield scratch
        older = scratch.with_suffix(".older")
        if target.is_dir():
            target.rename(older)
        try:
            scratch.rename(target)
        except OSError:
            if older.is_dir():
                older.rename(target)
            raise
        _remove(older)
    finally:
        _remove(scratch)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _prove(path: Path, num_bytes: int, num_tensors: int, *, compared: bool) -> Proof:
    reason = missing_packages() if compared else "not asked to"
    if reason is not None:
        return Proof(num_tensors, num_bytes, None, reason)
    return Proof(num_tensors, num_bytes, *compare_models(path))


def check_file(
    found: Mapping[str, StoredTensor], tensors: Mapping[str, np.ndarray], dtype: Precision, path: Path
) -> int:
    """Reads back what was written, tensor by tensor; the number of bytes.

    Args:
        found: the tensors of the file.
        tensors: what should be in it, float32.
        dtype: of the file.
        path: for messages.

    Raises:
        NotProvedError: names that differ, or a tensor that is not what was meant.

    """
    if differing := sorted(found.keys() ^ tensors.keys()):
        raise NotProvedError(f"{path}: {differing[0]} is on one side only ({len(differing)} such tensors)")
    num_bytes = 0
    for name, tensor in tensors.items():
        written, meant = np.ascontiguousarray(found[name].read()), rounded(name, tensor, dtype)
        num_bytes += meant.nbytes
        if written.shape != meant.shape or written.tobytes() != meant.tobytes():
            raise NotProvedError(f"{path}: {name} is not what was written; the disk or the memory is faulty")
    return num_bytes


def missing_packages() -> str | None:
    """What keeps transformers from running here, as a sentence; None: nothing."""
    absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    return missing("torch", "that", " and ".join(absent)) if absent else None


def compare_models(path: Path) -> tuple[float, str]:
    """Max error of an export against transformers' (or, for a `.pt`, torch's reading), and what was compared.

    Raises:
        NotProvedError: it does not load there, the error is above the tolerance, or the comparison itself failed.

    """
    root = str(Path(__file__).parents[1])
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    done = subprocess.run(  # noqa: S603 our own module, and a path
        [sys.executable, "-m", "wavlm_jax.convert.compare", str(path.absolute())],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise NotProvedError(f"{path.name}: transformers does not take the export: {reason[0]}")
    result = json.loads(done.stdout.splitlines()[-1])
    check_error(result["max_error"], path)
    return result["max_error"], result["against"]


def check_error(max_error: float, path: Path) -> None:
    """Compares the largest difference with `TOLERANCE`.

    Raises:
        NotProvedError: it is larger, or NaN.

    """
    if not max_error <= TOLERANCE:  # NaN is none either
        raise NotProvedError(
            f"{path.name}: max error against transformers is {max_error:.2e}, expected at most {TOLERANCE:g}; nothing "
            "was left behind. Please report this with the config"
        )


def model_card(weights: Weights, dtype: str, proof: Proof) -> str:
    """Markdown with the hub's metadata at its head."""
    config = weights.config
    kind = weights.task.kind if weights.task else "WavLMModel" if config.position_bias else "HubertModel"
    sections = [
        "---\nlibrary_name: transformers\ntags:\n- speech\n- wavlm\n- jax\n---",
        f"# {kind}, {config.num_hidden_layers} layers of width {config.hidden_size}",
        f"{_INPUT[config.do_normalize]} Written by wavlm_jax in {dtype}.",
        _USE,
        "## Where it comes from\n\n" + _bullets([f"source: {weights.origin.dialect}", *weights.origin.notes]),
    ]
    if weights.origin.facts:
        sections.append(
            "## Training\n\n" + _bullets([f"{key}: {value}" for key, value in weights.origin.facts.items()])
        )
    sections += [
        "## Conventions\n\n" + _bullets(conventions(weights)),
        "## How exact the conversion is\n\n" + _bullets(proof.lines()),
        "## Licence\n\n" + _LICENCE,
    ]
    return "\n\n".join(sections) + "\n"


def conventions(weights: Weights) -> list[str]:
    """The conventions that this model follows, one per line, where the sources differ (docs/parity.md)."""
    config = weights.config
    lines = [
        f"padding: {config.padding}",
        f"do_normalize: {config.do_normalize}, normalize_eps {config.normalize_eps:g}",
        f"layerdrop_first: {config.layerdrop_first}, feature_grad_mult {config.feature_grad_mult:g} (training only)",
    ]
    if weights.task is not None:
        head = weights.task.config
        lines.append(f"head: compat {head.compat}, layer_sum_states {head.layer_sum_states}")
    if weights.head is not None:
        lines.append(f"pre-training head: {weights.head['label_embeddings'].shape[0]} label embeddings")
    return lines


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"* {' '.join(line.split())}" for line in lines)
