"""Released checkpoints by file name, and the SHA-256 that a sound copy has, so that a damaged one is refused.

Some copies of WavLM-Large.pt in circulation give NaN or 1e37 (FACTS E43). No SHA-256 stated by a publisher was found
(looked for in November 2026), and a hash that somebody took of an unknown copy proves nothing; the slots are therefore
empty until a trustworthy value is known. An empty slot is no check; the archive's own checksums and the test for finite
numbers are, and are always made.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from wavlm_jax.convert.faults import DamagedFile

KNOWN: Mapping[str, str | None] = {
    "WavLM-Base.pt": None,
    "WavLM-Base+.pt": None,
    "WavLM-Large.pt": None,
    "hubert_base_ls960.pt": None,
    "hubert_large_ll60k.pt": None,
}
"""File name -> SHA-256 as hexadecimal text, None where no trustworthy value is known."""


def check_known(path: Path, known: Mapping[str, str | None] = KNOWN) -> str:
    """Compares a released checkpoint with its SHA-256; one sentence about what was found.

    Args:
        path: any file; its name decides.
        known: file name -> SHA-256.

    Raises:
        DamagedFile: the file is a known one and its hash is another.

    """
    expected = known.get(path.name)
    if expected is None:
        listed = "no trustworthy SHA-256 is known for it" if path.name in known else "it is not a known release"
        return f"{path.name}: {listed}; its content was not compared with a hash"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise DamagedFile(f"{path}: SHA-256 is {found}, expected {expected}; the file is damaged, fetch it again")
    return f"{path.name}: SHA-256 is that of the release"
