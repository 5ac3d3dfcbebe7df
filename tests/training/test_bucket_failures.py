"""What goes wrong with a bucket: no answer, no permission, no such bucket; and runs that end badly in one."""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import jax
import numpy as np
import pytest
from fsspec.registry import _registry
from gcsfs.core import GCSFileSystem
from gcsfs.retry import HttpError

from tests.support import toy_task
from tests.support.buckets import NAME, Objects
from tests.support.pods import free_port
from tests.training.test_train_processes import STEPS as TOY_STEPS
from tests.training.test_train_processes import Runner
from wavlm_jax.extras import MissingExtraError
from wavlm_jax.training import loop
from wavlm_jax.training.checkpoint import MARK, CheckpointStore, load_params, steps
from wavlm_jax.training.sharding import make_mesh
from wavlm_jax.training.workdir import check_room, open_workdir

DIVERGED, STUCK = 76, 77


def test_stuck_it_ends_with_its_code_and_leaves_the_stacks_in_the_bucket(objects: Objects) -> None:
    runner, workdir = Runner(), f"gs://{NAME}/runs/stuck"
    code, output = runner.run(workdir, stall="0,5", max_step_seconds=15)
    assert code == STUCK, output
    assert steps(workdir) == [3]
    (stacks,) = (name for name in objects.names("runs/stuck/") if "/stacks-" in name)
    assert b"toy_task.py" in objects.read(stacks)
    assert runner.run(workdir)[0] == 0
    assert steps(workdir) == [9, TOY_STEPS]


def test_diverged_it_ends_with_its_code_and_the_last_good_state(objects: Objects) -> None:
    task, settings = toy_task.make_task(poison=tuple(range(5, 100))), toy_task.make_settings(every=12)
    place = f"gs://{NAME}/runs/diverged"
    with open_workdir(place) as workdir:
        outcome = loop.run(task, settings, make_mesh(settings.mesh), workdir, config={}, table=toy_task.TABLE)
    assert int(outcome.status) == DIVERGED
    params = load_params(place)[1]
    assert steps(place)[-1] == outcome.step
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert [line["step"] for line in objects.lines("runs/diverged/nonfinite.jsonl")][:3] == [6, 7, 8]


@pytest.mark.usefixtures("objects")
def test_a_bucket_that_does_not_answer_loses_no_checkpoint(objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks whether there is a manifest, and gets no answer, must not take it for a no and sweep."""
    for name in (MARK, "3/manifest.json", "3/model"):
        objects.write(f"flaky/checkpoints/{name}", b"x")
    ask = GCSFileSystem._call

    async def unanswered(self, method, path, *arguments, **named):
        if method == "GET" and "manifest.json" in str(arguments):
            raise HttpError({"code": 503, "message": "try later"})
        return await ask(self, method, path, *arguments, **named)

    monkeypatch.setattr(GCSFileSystem, "_call", unanswered)
    for do in ("steps", "clean_up"):
        with pytest.raises(
            OSError, match=rf"gs://{NAME}/flaky/checkpoints/3/manifest.json: cannot be read .*try later"
        ):
            getattr(CheckpointStore(f"gs://{NAME}/flaky"), do)()
    assert "flaky/checkpoints/3/model" in objects.names("flaky/")


@pytest.mark.usefixtures("objects")
def test_what_cannot_be_written_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    cure = r"a checkpoint cannot be written here \(.*; look at the address.*roles/storage.objectUser"
    with (
        open_workdir("gs://no-such-bucket/run") as workdir,
        pytest.raises(OSError, match=f"no-such-bucket/run: {cure}"),
    ):
        workdir.claim(1000)
    with pytest.raises(ValueError, match=r"--workdir: found s3://bucket/run, expected a folder or a gs:// address"):
        open_workdir("s3://bucket/run").__enter__()
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(OSError, match=f"gs://{NAME}/run: {cure}") as error:
        check_room(f"gs://{NAME}/run", 1000)
    assert "Could not connect" in str(error.value)


class Forbidding(BaseHTTPRequestHandler):
    """A bucket that this account may look into and not write to."""

    def do_GET(self) -> None:
        self._answer(404, "Not Found")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(403, "somebody does not have storage.objects.create access")

    def _answer(self, code: int, message: str) -> None:
        body = json.dumps({"error": {"code": code, "message": message}}).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.mark.usefixtures("objects")
def test_a_bucket_that_one_may_not_write_to_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Forbidding) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(OSError, match=r"a checkpoint cannot be written here .*roles/storage.objectUser") as error:
            check_room(f"gs://{NAME}/forbidden", 1000)
        server.shutdown()
    assert "does not have storage.objects.create access" in str(error.value)


def test_without_its_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.delitem(_registry, "gcs", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'wavlm-jax\[gcs\]', or give a folder"):
        check_room("gs://bucket/run", 1000)
