"""The small files of a run whose workdir is a bucket: a folder of this machine, uploaded now and then.

Objects cannot be appended to, and metrics.jsonl is. So every process writes into a new folder of its own: what an
earlier session has left in the bucket is fetched at the start, and what has changed is uploaded before each checkpoint
is committed and at the end. A committed checkpoint thus has all lines up to its step beside it, and no machine that
ran an earlier session is needed to go on.
"""

import shutil
import tempfile
from pathlib import Path

from wavlm_jax.training.files import Files

_PARTIAL = ".partial"
"""Files that are about to be renamed."""


class Mirror:
    """The folder, below TMPDIR, and its home."""

    def __init__(self, home: Files) -> None:
        self.home = home
        self.folder = Path(tempfile.mkdtemp(prefix="wavlm_jax-"))
        self._uploaded: dict[str, tuple[int, int]] = {}
        self.fetched = False
        """Whether the home has shown that it can be read and written; nothing is uploaded before."""

    def fetch(self) -> None:
        """Brings the files directly in the home, but what this session has written already. From now on it uploads."""
        for name in self.home.entries():
            path = self.folder / name
            if not path.exists() and self.home.exists(name):
                path.write_bytes(self.home.read(name))
                self._uploaded[name] = _stamp(path)
        self.fetched = True

    def publish(self) -> None:
        """Uploads what has changed since it was last uploaded or fetched. Safe in any thread."""
        if not self.fetched:
            return
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if not path.is_file() or path.suffix == _PARTIAL:
                continue
            stamp = _stamp(path)  # before reading: what is written meanwhile goes with the next time
            if self._uploaded.get(name) != stamp:
                self.home.write(name, path.read_bytes())
                self._uploaded[name] = stamp

    def close(self) -> None:
        """Uploads the rest and removes the folder; it stays where there is no home for it.

        Raises:
            OSError: they could not be uploaded; the message says where they are.

        """
        try:
            self.publish()
        except OSError as error:
            raise OSError(
                f"{self.folder}: the last lines of the run are here and not in its workdir: {error}"
            ) from error
        if self.fetched:
            shutil.rmtree(self.folder, ignore_errors=True)


def _stamp(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns
