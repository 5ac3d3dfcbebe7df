"""Checkpoints on the disk, for whoever reads them: the next session, another run, an export."""

from pathlib import Path
from typing import Any

import numpy as np
from orbax.checkpoint import v1 as orbax

from wavlm_jax.training.manifest import CheckpointError, Manifest, verify

FOLDER = "checkpoints"


def steps(workdir: Path) -> list[int]:
    """Steps that have a checkpoint folder, valid or not, oldest first."""
    folder = workdir / FOLDER
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal()) if folder.is_dir() else []


def newest_valid(workdir: Path) -> tuple[Manifest | None, dict[int, str]]:
    """The newest checkpoint of which every checksum holds, and why each newer one was refused."""
    refused: dict[int, str] = {}
    for step in reversed(steps(workdir)):
        try:
            return verify(workdir / FOLDER / str(step)), refused
        except (CheckpointError, OSError) as error:
            refused[step] = str(error)
    return None, refused


def load_params(workdir: Path, step: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and parameters of a run, on the host, whatever devices it was trained on.

    Args:
        workdir: of the run.
        step: None: the newest checkpoint that verifies.

    Returns:
        (resolved config, nested dict of numpy arrays).

    Raises:
        CheckpointError: no such checkpoint, or it does not verify.

    """
    manifest, params = load_stored(workdir, step)
    return manifest.config, params


def load_stored(workdir: Path, step: int | None = None) -> tuple[Manifest, dict[str, Any]]:
    """As `load_params`, with the whole manifest."""
    if step is not None:
        manifest: Manifest | None = verify(workdir / FOLDER / str(step))
    else:
        manifest, refused = newest_valid(workdir)
    if manifest is None:
        reasons = "".join(f"\n  {reason}" for reason in refused.values())
        raise CheckpointError(f"{workdir / FOLDER}: no usable checkpoint{reasons}")
    abstract: dict[str, Any] = {}
    for path, (shape, dtype) in manifest.arrays.items():
        first, *parents, last = path.split("/")
        if first == "params":
            node = abstract
            for name in parents:
                node = node.setdefault(name, {})
            node[last] = np.empty(shape, dtype)
    folder = workdir.absolute() / FOLDER / str(manifest.step)
    try:
        return manifest, orbax.load_checkpointables(folder, {"params": abstract})["params"]
    except (OSError, ValueError, KeyError):
        if step is None and not folder.is_dir() and steps(workdir):
            return load_stored(workdir)  # the run goes on, and its retention has removed it under our eyes
        raise
