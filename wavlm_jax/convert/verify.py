"""The proof at the end of every conversion: the file is read again to the bit, and transformers computes the same.

transformers runs in a process of its own, so that neither torch nor a second copy of the weights is in this one; where
torch or transformers is missing, the proof says that this part was not made.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wavlm_jax.convert.precision import Precision, rounded
from wavlm_jax.convert.source import Source

TOLERANCE = 1e-4
"""Largest difference in a hidden state or logit, float32; of states whose root mean square is above 1, of that."""

_COMPARE = "wavlm_jax.convert.compare"


class NotProvedError(ValueError):
    """A conversion that did not come out exact; the message says where."""


@dataclass(frozen=True)
class Proof:
    """What was seen."""

    num_tensors: int
    num_bytes: int
    max_error: float | None
    """Against transformers; None: not compared."""
    against: str
    """What it was compared with, or why it was not."""

    def lines(self) -> list[str]:
        """For people."""
        read = f"{self.num_tensors} tensors, {self.num_bytes:,} bytes: read again, equal to the bit, all finite"
        if self.max_error is None:
            return [read, f"not compared with transformers: {self.against}"]
        return [read, f"max error {self.max_error:.2e} (tolerance {TOLERANCE:g}) against {self.against}"]


def check_file(found: Mapping[str, Source], tensors: Mapping[str, np.ndarray], dtype: Precision, path: Path) -> int:
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


def why_not() -> str | None:
    """Why transformers cannot be asked here; None: it can."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed (pip install 'wavlm-jax[torch]')" if missing else None


def compare(path: Path) -> tuple[float, str]:
    """Max error of an export against transformers' (or, for a `.pt`, torch's reading), and what was compared.

    Raises:
        NotProvedError: it does not load there, the error is above the tolerance, or the comparison itself failed.

    """
    root = str(Path(__file__).parents[2])
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    done = subprocess.run(  # noqa: S603 our own module, and a path
        [sys.executable, "-m", _COMPARE, str(path.absolute())],
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
    """Whether a comparison came out well.

    Raises:
        NotProvedError: it did not.

    """
    if not max_error <= TOLERANCE:  # NaN is none either
        raise NotProvedError(
            f"{path.name}: max error against transformers is {max_error:.2e}, expected at most {TOLERANCE:g}; nothing "
            "was left behind. Please report this with the config"
        )
