"""The manifest of a checkpoint: what it holds, what it was made from, and a checksum of every file.

It is the last file of a checkpoint to be written (`storage`); so a checkpoint without it is damaged, not unfinished.
"""

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import jax

from wavlm_jax.training.files import Files
from wavlm_jax.training.storage import NAME
from wavlm_jax.training.trees import path_name

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


def describe_files(files: Files) -> dict[str, list[Any]]:
    """Path -> [bytes, SHA-256] of every file but the manifest, each made durable first."""
    files.settle()
    sizes = _sizes(files)
    return {name: [sizes[name], digest] for name, digest in _digests(files, sizes)}


def write(manifest: Manifest, files: Files) -> None:
    """The manifest beside the files that it describes, durable when this returns."""
    files.write(NAME, json.dumps(asdict(manifest), indent=1).encode())


def read(files: Files) -> Manifest:
    """The manifest of the checkpoint that `files` are.

    Raises:
        CheckpointError: missing, damaged, or of a format that this version does not know.

    """
    path = f"{files.place}/{NAME}"
    try:
        values = json.loads(files.read(NAME))
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


def verify(files: Files, step: int) -> Manifest:
    """The manifest of the checkpoint of `step`, of which every file is as it was written.

    Raises:
        CheckpointError: naming the first file that is missing, changed or not listed.

    """
    manifest = read(files)
    if step != manifest.step:
        raise CheckpointError(
            f"{files.place}/{NAME}: is of step {manifest.step}, so this folder holds another checkpoint"
        )
    sizes = _sizes(files)
    for name in sorted(sizes.keys() ^ set(manifest.files)):
        raise CheckpointError(f"{files.place}/{name}: {'not in the manifest' if name in sizes else 'missing'}")
    for name, (size, _) in manifest.files.items():
        if sizes[name] != size:
            raise CheckpointError(f"{files.place}/{name}: {sizes[name]} bytes, expected {size}")
    for name, digest in _digests(files, sizes):
        if digest != manifest.files[name][1]:
            raise CheckpointError(f"{files.place}/{name}: contents have changed (SHA-256 differs)")
    return manifest


def _sizes(files: Files) -> dict[str, int]:
    return {name: size for name, size in files.sizes().items() if name != NAME}


def _digests(files: Files, sizes: Mapping[str, int]) -> Iterable[tuple[str, str]]:
    """SHA-256 of each, as many at a time as the place can take."""
    with ThreadPoolExecutor(files.readers) as pool:
        yield from zip(sizes, pool.map(files.digest, sizes, sizes.values()), strict=True)


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


def _check_types(manifest: Manifest, path: str) -> None:
    pairs = (
        [*manifest.arrays.values(), *manifest.files.values()] if _is_object(manifest.arrays, manifest.files) else [0]
    )
    shapes_are_lists = all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)  # noqa: PLR2004 two of each
    if not shapes_are_lists or not _is_object(manifest.config, manifest.fingerprints, manifest.versions):
        raise CheckpointError(f"{path}: entries have the wrong type, so this checkpoint is damaged")


def _is_object(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)
