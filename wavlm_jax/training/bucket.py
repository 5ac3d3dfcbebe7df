"""A bucket: the objects below a gs:// address, through gcsfs.

Orbax writes arrays into it with TensorStore's driver and its own small files through etils.epath, which asks gcsfs too.
"""

import contextlib
import hashlib
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCHEME = "gs://"
_PIECE = 2**26
"""Bytes of an object that are in memory at a time, for each reader."""
_RETRIES = {"gcs_request_retries": {"max_retries": 3, "max_delay": "1s"}}
"""Of the probe: TensorStore's own 32 take minutes to say that nobody is there."""
_CURE = (
    "look at the address, at the network, and at who you are to Google (gcloud auth application-default login, or the "
    "service account of this machine): it must be allowed to list, read, write and delete objects here "
    "(roles/storage.objectUser)"
)


def address(path: str | Path) -> str | None:
    """The gs:// address that was written, or None for a path of this machine.

    pathlib makes one slash of two, so "gs:/bucket/run" is understood as well.
    """
    scheme, colon, rest = str(path).partition(":")
    if scheme + colon + "//" != SCHEME or not rest.startswith("/"):
        return None
    return SCHEME + rest.strip("/")


class Bucket:
    """`Files` of an address. Nothing is cached: another host or TensorStore may have written a moment ago."""

    readers = 8

    def __init__(self, place: str) -> None:
        """An address as `address` gives it, for instance "gs://bucket/runs/base"."""
        self.place = place

    def below(self, name: str) -> "Bucket":
        """See `Files`."""
        return Bucket(f"{self.place}/{name}")

    def entries(self) -> list[str]:
        """See `Files`."""
        with self._explained("listed"), contextlib.suppress(FileNotFoundError):
            return sorted(name for path in _gcs().ls(self.place, detail=False) if (name := _last(path)))
        return []

    def sizes(self) -> dict[str, int]:
        """See `Files`. Objects that stand for a folder are none."""
        inside = self.place.removeprefix(SCHEME) + "/"
        with self._explained("listed"):
            found = _gcs().find(self.place, detail=True)
        names = {path.removeprefix(inside): facts["size"] for path, facts in sorted(found.items())}
        return {name: int(size) for name, size in names.items() if name and not name.endswith("/")}

    def exists(self, name: str) -> bool:
        """See `Files`. Only the bucket's own word counts: gcsfs's isfile takes every failure for a no."""
        with self._explained("read", name), contextlib.suppress(FileNotFoundError):
            return bool(_gcs().info(f"{self.place}/{name}")["type"] == "file")
        return False

    def read(self, name: str) -> bytes:
        """See `Files`."""
        with self._explained("read", name):
            return bytes(_gcs().cat_file(f"{self.place}/{name}"))

    def digest(self, name: str, size: int) -> str:
        """See `Files`. The bytes come back from the bucket: it is what is stored that counts."""
        result = hashlib.sha256()
        for start in range(0, size, _PIECE):
            with self._explained("read", name):
                piece = _gcs().cat_file(f"{self.place}/{name}", start=start, end=min(start + _PIECE, size))
            result.update(piece)
        return result.hexdigest()

    def write(self, name: str, content: bytes) -> None:
        """See `Files`. An object is there whole or not at all."""
        with self._explained("written", name):
            _gcs().pipe_file(f"{self.place}/{name}", content)

    def delete(self, name: str) -> None:
        """See `Files`."""
        with self._explained("deleted", name), contextlib.suppress(FileNotFoundError):
            _gcs().rm_file(f"{self.place}/{name}")

    def clear(self) -> None:
        """See `Files`."""
        with self._explained("deleted"), contextlib.suppress(FileNotFoundError):
            _gcs().rm(self.place, recursive=True)

    def settle(self) -> None:
        """See `Files`. Objects are durable as soon as they are there."""

    def check_room(self, num_bytes: int) -> None:  # noqa: ARG002 a bucket has room for as many as wanted
        """Writes as arrays are written, reads and deletes as everything else is.

        Raises:
            OSError: the packages are missing, or any of the three cannot be done.

        """
        probe = f".probe-{secrets.token_hex(8)}"
        _gcs()
        try:
            self._write_like_arrays(probe, b"a probe of wavlm_jax")
            self.read(probe)
            self.delete(probe)
        except OSError as error:
            raise OSError(f"{self.place}: a checkpoint cannot be written here ({error}); {_CURE}") from error

    def _write_like_arrays(self, name: str, content: bytes) -> None:
        import tensorstore  # noqa: PLC0415 Orbax's, and slow to import

        bucket, _, path = self.place.removeprefix(SCHEME).partition("/")
        spec = {"driver": "gcs", "bucket": bucket, "path": f"{path}/" if path else ""}
        try:
            store = tensorstore.KvStore.open(spec, context=tensorstore.Context(_RETRIES)).result()
            store.write(name, content).result()
        except (ValueError, RuntimeError) as error:  # as TensorStore hands statuses over
            raise OSError(str(error)) from error

    @contextlib.contextmanager
    def _explained(self, done: str, name: str = "") -> Iterator[None]:
        """Whatever gcsfs, aiohttp and google.auth raise as an OSError that names the object."""
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:
            what = f"{self.place}/{name}" if name else self.place
            raise OSError(f"{what}: cannot be {done} ({type(error).__name__}: {error})") from error


def _gcs() -> Any:
    """The file system of gcsfs, one for all threads; it keeps its connections."""
    import fsspec  # noqa: PLC0415 an extra

    try:
        return fsspec.filesystem("gcs", use_listings_cache=False)
    except ImportError as error:
        raise OSError(
            f"gs:// needs packages that are not here ({error}); pip install 'wavlm-jax[gcs]', or give a folder"
        ) from error


def _last(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]
