"""The flat arrays of a label store: where they lie, how they are read, what tells them apart."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt64

_DIGEST_PIECE = 2**22


class LabelError(ValueError):
    """Labels that cannot be right for the corpus or the config; the message names file, utterance and cause."""


def offsets_of(counts: Int64[np.ndarray, " utterances"]) -> Int64[np.ndarray, " edges"]:
    """Where each utterance's labels begin, and behind the last one the end of all."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def file_of(folder: Path, split: str, array: str) -> Path:
    """Where the store in `folder` keeps "labels", "offsets" or "keys" of a split."""
    return folder / f"{split}.{array}.npy"


def utterance_keys(ids: Iterable[str]) -> UInt64[np.ndarray, " utterances"]:
    """A 64-bit hash of each utterance id."""
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in ids)
    return np.frombuffer(digests, np.dtype("<u8")).astype(np.uint64)


def array_digest(array: np.ndarray) -> str:
    """SHA-256 (hex) of an array's bytes, read in small pieces: a memory map stays out of memory."""
    digest = hashlib.sha256()
    for start in range(0, len(array), _DIGEST_PIECE):
        digest.update(array[start : start + _DIGEST_PIECE].tobytes())
    return digest.hexdigest()


def map_array(file: Path, dtype: type[np.generic]) -> np.ndarray:
    """A one-dimensional .npy file of `dtype`, by memory map.

    Raises:
        LabelError: missing, cut off, or something else.

    """
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise LabelError(f"{file}: not a whole .npy file ({error}); make the labels anew") from error
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != 1:
        found = f"{array.ndim}-D {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise LabelError(f"{file}: found {found}, expected 1-D {np.dtype(dtype).name}; make the labels anew")
    return array
