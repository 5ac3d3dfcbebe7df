"""Checkpoints where they are kept, for whoever reads them: the next session, another run, an export."""

from pathlib import Path
from typing import Any

import numpy as np
from orbax.checkpoint import v1 as orbax

from wavlm_jax.training.manifest import CheckpointError, Manifest, verify
from wavlm_jax.training.storage import FOLDER, Storage, open_storage


def steps(workdir: Path | str) -> list[int]:
    """Steps that have a checkpoint, valid or not, oldest first."""
    return open_storage(workdir).steps()


def newest_valid(workdir: Path | str) -> tuple[Manifest | None, dict[int, str]]:
    """The newest checkpoint of which every checksum holds, and why each newer one was refused."""
    return newest_valid_of(open_storage(workdir))


def newest_valid_of(storage: Storage) -> tuple[Manifest | None, dict[int, str]]:
    """As `newest_valid`."""
    refused: dict[int, str] = {}
    for step in reversed(storage.steps()):
        try:
            return verify(storage.checkpoint(step), step), refused
        except (CheckpointError, OSError) as error:
            refused[step] = str(error)
    return None, refused


def load_params(workdir: Path | str, step: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and parameters of a run, on the host, whatever devices it was trained on.

    Args:
        workdir: of the run, a folder or a gs:// address.
        step: None: the newest checkpoint that verifies.

    Returns:
        (resolved config, nested dict of numpy arrays).

    Raises:
        CheckpointError: no such checkpoint, or it does not verify.

    """
    manifest, params = load_stored(workdir, step)
    return manifest.config, params


def load_stored(workdir: Path | str, step: int | None = None) -> tuple[Manifest, dict[str, Any]]:
    """As `load_params`, with the whole manifest."""
    storage = open_storage(workdir)
    if step is not None:
        manifest: Manifest | None = verify(storage.checkpoint(step), step)
    else:
        manifest, refused = newest_valid_of(storage)
    if manifest is None:
        reasons = "".join(f"\n  {reason}" for reason in refused.values())
        raise CheckpointError(f"{storage.files.place}/{FOLDER}: no usable checkpoint{reasons}")
    abstract: dict[str, Any] = {}
    for path, (shape, dtype) in manifest.arrays.items():
        first, *parents, last = path.split("/")
        if first == "params":
            node = abstract
            for name in parents:
                node = node.setdefault(name, {})
            node[last] = np.empty(shape, dtype)
    place = storage.checkpoint(manifest.step).place
    try:
        return manifest, orbax.load_checkpointables(place, {"params": abstract})["params"]
    except (OSError, ValueError, KeyError):
        if step is None and manifest.step not in (left := storage.steps()) and left:
            return load_stored(workdir)  # the run goes on, and its retention has removed it under our eyes
        raise
