"""train.py as it is, with a notebook: which rows each process trained on at each step, and a signal where a test wants.

python tests/support/noting_train.py NOTES STOP --config ... --workdir ...

NOTES is a folder, STOP is "process,step" or "".
"""

import gc
import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
gc.set_threshold(100_000, 50, 100)  # as tests/conftest.py does

import jax

import train
import wavlm_jax.command_line
from wavlm_jax.training import loop

AFTER_THE_SIGNAL = 1.0
"""Seconds a step from then on: the hosts agree on a step while the run is still going."""


def note(folder: Path, stop: tuple[int, int] | None) -> None:
    """Wraps the two places of the loop where a step begins and ends."""
    update, boundary = loop._Session.update, loop._Session.boundary

    def noted(self, spec, batch, ids) -> None:
        update(self, spec, batch, ids)
        with (folder / f"{jax.process_index()}.jsonl").open("a") as file:
            file.write(json.dumps({"step": self.step, "bucket": spec.name, "ids": ids.tolist()}) + "\n")

    def stopping(self):
        if stop is not None and self.step >= stop[1]:
            if (jax.process_index(), self.step) == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(AFTER_THE_SIGNAL)
        return boundary(self)

    loop._Session.update, loop._Session.boundary = noted, stopping


if __name__ == "__main__":
    folder, where = sys.argv[1:3]
    del sys.argv[1:3]
    process, _, step = where.partition(",")
    note(Path(folder), (int(process), int(step)) if where else None)
    wavlm_jax.command_line.run(train.main, required=["config", "workdir"])
