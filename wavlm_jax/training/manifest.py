"""The manifest of a checkpoint: what it holds, what it was made from, and a checksum of every file.

`manifest.json` is part of the folder that one rename commits; so a checkpoint without it is damaged, not unfinished.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from wavlm_jax.training.trees import path_name

NAME = "manifest.json"
FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, or none that can; the message says which file and what to do."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that is known about a checkpoint without opening its arrays."""

    format: int
    step: int
    run_id: str
    """The same for all sessions of a run; a tracker continues its curve by it."""
    elapsed: float
    """Seconds of all sessions up to here."""
    config: dict[str, Any]
    """Resolved."""
    fingerprints: dict[str, str]
    """Of everything outside the config that training depends on: corpus, labels, k-means."""
    versions: dict[str, str]
    arrays: dict[str, list[Any]]
    """Path of every array of the train state -> [shape, dtype]."""
    files: dict[str, list[Any]]
    """Path of every file below the checkpoint's folder -> [bytes, SHA-256]."""


def describe_arrays(tree: Any) -> dict[str, list[Any]]:
    """Path -> [shape, dtype], ready for JSON."""
    return {
        path_name(path): [list(leaf.shape), str(leaf.dtype)] for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def describe_files(folder: Path) -> dict[str, list[Any]]:
    """Path -> [bytes, SHA-256] of every file below `folder` but the manifest, each pushed to the disk first."""
    result: dict[str, list[Any]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / NAME:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            result[path.relative_to(folder).as_posix()] = [path.stat().st_size, digest]
    return result


def write(manifest: Manifest, folder: Path) -> None:
    """The manifest into `folder`, pushed to the disk."""
    with (folder / NAME).open("w") as file:
        json.dump(asdict(manifest), file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> Manifest:
    """The manifest of the checkpoint `folder`.

    Raises:
        CheckpointError: missing, damaged, or of a format that this version does not know.

    """
    path = folder / NAME
    try:
        values = json.loads(path.read_bytes())
        found = values["format"]
        manifest = Manifest(**values) if found == FORMAT else None
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing, so this checkpoint is damaged") from error
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: not a manifest ({error}), so this checkpoint is damaged") from error
    if manifest is None:
        raise CheckpointError(f"{path}: format {found}, this version reads {FORMAT}")
    _check_types(manifest, path)
    return manifest


def verify(folder: Path) -> Manifest:
    """The manifest of a checkpoint of which every file is as it was written.

    Raises:
        CheckpointError: naming the first file that is missing, changed or not listed.

    """
    manifest = read(folder)
    if folder.name != str(manifest.step):
        raise CheckpointError(f"{folder / NAME}: is of step {manifest.step}, so this folder holds another checkpoint")
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {NAME}
    for name in sorted(present ^ set(manifest.files)):
        raise CheckpointError(f"{folder / name}: {'not in the manifest' if name in present else 'missing'}")
    for name, (size, digest) in manifest.files.items():
        path = folder / name
        if path.stat().st_size != size:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes, expected {size}")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise CheckpointError(f"{path}: contents have changed (SHA-256 differs)")
    return manifest


def difference(expected: Mapping[str, list[Any]], found: Mapping[str, list[Any]]) -> list[str]:
    """Lines that say how two results of `describe_arrays` differ; none where they agree."""
    lines = [f"missing in the checkpoint: {name} {expected[name]}" for name in sorted(set(expected) - set(found))]
    lines += [f"only in the checkpoint: {name} {found[name]}" for name in sorted(set(found) - set(expected))]
    lines += [
        f"{name}: the checkpoint has {found[name][1]}{tuple(found[name][0])}, "
        f"expected {expected[name][1]}{tuple(expected[name][0])}"
        for name in sorted(set(found) & set(expected))
        if list(found[name]) != list(expected[name])
    ]
    return lines


def _check_types(manifest: Manifest, path: Path) -> None:
    pairs = (
        [*manifest.arrays.values(), *manifest.files.values()] if _is_object(manifest.arrays, manifest.files) else [0]
    )
    shapes_are_lists = all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)  # noqa: PLR2004 two of each
    if not shapes_are_lists or not _is_object(manifest.config, manifest.fingerprints, manifest.versions):
        raise CheckpointError(f"{path}: entries have the wrong type, so this checkpoint is damaged")


def _is_object(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)
