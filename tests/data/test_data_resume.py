"""Preparation killed at any moment goes on where it was, and leaves no process behind."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support.audio_files import save, tone
from wavlm_jax.audio.wave import to_int16
from wavlm_jax.data.__main__ import main
from wavlm_jax.data.corpus import Corpus, is_corpus

COUNT = 64 * 10


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Ten shards' worth of files, few enough different ones."""
    root = tmp_path_factory.mktemp("speech")
    originals = [save(root / f"{number:04d}.wav", to_int16(tone(12_000, number))) for number in range(8)]
    for number in range(8, COUNT):
        os.link(originals[number % 8], root / f"{number:04d}.wav")
    return root


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory) -> Corpus:
    """What comes out when nothing goes wrong."""
    out = tmp_path_factory.mktemp("whole") / "corpus"
    assert main([str(source), "--out", str(out), "--workers", "1"]) == 0
    return Corpus.open(out)


def start(source: Path, out: Path, workers: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "wavlm_jax.data", source, "--out", out, "--workers", workers]
    return subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    """Until `condition` holds; the test fails if it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


def finished_shards(out: Path) -> set[str]:
    return {file.stem for file in out.with_name(out.name + ".partial").glob("data-*.json")}


@pytest.mark.parametrize(("workers", "shards"), [(1, 1), (2, 4)])
def test_killed_and_started_again(source: Path, whole: Corpus, tmp_path: Path, workers: int, shards: int):
    out = tmp_path / "corpus"
    process = start(source, out, workers)
    wait_for(lambda: len(finished_shards(out)) >= shards or process.poll() is not None)
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not psutil.wait_procs(family, timeout=0)[1], 20)
    assert not is_corpus(out), "killed too late to show anything"
    partial = out.with_name("corpus.partial")
    kept = {name: (partial / f"{name}.arrow").stat().st_mtime_ns for name in finished_shards(out)}
    assert len(kept) >= shards
    assert main([str(source), "--out", str(out), "--workers", "1"]) == 0
    again = Corpus.open(out)
    assert again.header == whole.header
    assert {name: (out / f"{name}.arrow").stat().st_mtime_ns for name in kept} == kept
    assert not partial.exists()
    assert not [file for file in out.iterdir() if file.suffix in (".tmp", ".partial")]


def test_killed_between_the_header_and_the_name(source: Path, whole: Corpus, tmp_path: Path):
    out, partial = tmp_path / "corpus", tmp_path / "corpus.partial"
    shutil.copytree(whole.path, partial)
    (partial / "plan.json").write_text("{}")
    assert main([str(source), "--out", str(out)]) == 0
    assert Corpus.open(out).header == whole.header
    assert not partial.exists()
    assert {file.name for file in out.iterdir()} == {file.name for file in whole.path.iterdir()}


def test_a_worker_that_is_killed_is_an_error_that_says_so(source: Path, whole: Corpus, tmp_path: Path):
    out = tmp_path / "corpus"
    process = start(source, out, 2)
    wait_for(lambda: finished_shards(out) or process.poll() is not None)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if any("spawn_main" in word for word in child.cmdline())
    ]
    workers[0].kill()
    _, message = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "a worker process died" in message
    assert "run the same command again" in message
    assert main([str(source), "--out", str(out), "--workers", "1"]) == 0
    assert Corpus.open(out).header == whole.header


def test_a_source_that_changed_in_between_is_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "corpus"
    process = start(source, out, 1)
    wait_for(lambda: finished_shards(out))
    process.kill()
    process.communicate()
    other = save(tmp_path / "other/0000.wav", to_int16(tone(3000))).parent
    for words in ([other, "--out", out], [source, "--out", out, "--min-seconds", 1]):
        assert main([str(word) for word in words]) == 1
        message = capsys.readouterr().err
        assert "cannot be resumed" in message
        assert "remove this folder to start over" in message
