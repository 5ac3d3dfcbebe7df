"""Real processes of train.py with two CPU devices each, joined by gloo: started, noted, compared."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from wavlm_jax.training.checkpoint import Manifest, newest_valid

ROOT = Path(__file__).parents[2]
DEVICES = 2
"""Of each process."""
PATIENCE = 500
"""Seconds; a busy machine is no failure."""
CONFIG = """
import json
from ml_collections import ConfigDict
def get_config():
    return ConfigDict(json.loads({text!r}))
"""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    """For a process with so many CPU devices, which takes the session's compiled programs."""
    fixed = {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **fixed, "JAX_NUM_CPU_DEVICES": str(devices)}


def joined(processes: int) -> list[list[str]]:
    """The flags that make one run of so many processes; none for one."""
    address = f"--coordinator=127.0.0.1:{free_port()}"
    if processes == 1:
        return [[]]
    return [[address, f"--num_processes={processes}", f"--process_index={index}"] for index in range(processes)]


def spawn(commands: list[list[str]], devices: int) -> list[subprocess.Popen]:
    """One process a command."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [subprocess.Popen(command, cwd=ROOT, env=environment(devices), **pipes) for command in commands]


def finish(processes: list[subprocess.Popen], code: int = 0) -> list[str]:
    """Their outputs; all have to end with `code`."""
    outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    codes = [process.returncode for process in processes]
    assert codes == [code] * len(processes), "\n".join(outputs)
    return outputs


@dataclass(frozen=True)
class Run:
    """A workdir, and what its sessions have noted."""

    folder: Path
    config: Path

    @classmethod
    def of(cls, folder: Path, config: dict) -> "Run":
        """A run that has not begun."""
        folder.mkdir(parents=True)
        path = folder / "config.py"
        path.write_text(CONFIG.format(text=json.dumps(config)))
        return cls(folder, path)

    @property
    def workdir(self) -> Path:
        """As train.py knows it."""
        return self.folder / "run"

    def session(self, processes: int, *, devices: int = DEVICES, stop: str = "", code: int = 0) -> list[str]:
        """One session of `processes` processes, to its end; what they said."""
        notes = self.folder / "notes" / f"{len(list(self.folder.glob('notes/*')))}"
        notes.mkdir(parents=True)
        command = [sys.executable, "tests/support/noting_train.py", str(notes), stop]
        command += [f"--config={self.config}", f"--workdir={self.workdir}"]
        return finish(spawn([[*command, *flags] for flags in joined(processes)], devices), code)

    def lines(self, kind: str) -> list[dict]:
        """Of metrics.jsonl."""
        found = map(json.loads, (self.workdir / "metrics.jsonl").read_text().splitlines())
        return [line for line in found if line["kind"] == kind]

    def values(self, kind: str, name: str) -> list[float]:
        """One number of each line."""
        return [line[name] for line in self.lines(kind)]

    def rows(self) -> dict[int, tuple[str, list[int]]]:
        """Step -> (bucket, utterances of the global batch in order), as the last session that made the step saw it."""
        result = {}
        for session in sorted((self.folder / "notes").iterdir(), key=lambda path: int(path.name)):
            files = sorted(session.iterdir(), key=lambda path: int(path.stem))
            for parts in zip(*(map(json.loads, file.read_text().splitlines()) for file in files), strict=True):
                ids = [index for part in parts for index in part["ids"]]
                assert len({(part["step"], part["bucket"]) for part in parts}) == 1
                result[parts[0]["step"]] = parts[0]["bucket"], ids
        return result

    def newest(self) -> Manifest:
        """Of its newest checkpoint."""
        found, refused = newest_valid(self.workdir)
        assert found is not None, refused
        return found
