"""The table of docs/pods.md: every pre-training preset on its TPUs, by libtpu's own optimized program; nothing is run.

    python -m bench.plan_table compile            # a process a cell, about 20 s of CPU each; finished cells are kept
    python -m bench.plan_table print              # the rows of the table, from docs/plans/

A TPU's cell waits for the optimized program and the assignment of its buffers, and not for machine code, which takes
ten times as long; memory and traffic are those of the finished program (docs/LOG.md, 2026-11-26). A GPU's cell is
compiled to the end, where JAX's CUDA plugin is installed.
`python -m wavlm_jax.plan` compiles to the end.
"""

import argparse
import importlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "docs" / "plans"
MODELS = ("base", "base_plus", "large", "xlarge")
TOPOLOGIES = {
    "v5e-16": "v5e:4x4",
    "v5e-256": "v5e:16x16",
    "v4-32": "v4:2x2x4",
    "v5p-128": "v5p:4x4x4",
    "v6e-256": "v6e:16x16",
    "h100-64": "h100:64",
}
GIB = 2**30
COLUMNS = (
    *(
        "config",
        "chips",
        "fits",
        "training GiB",
        "evaluation GiB",
        "of",
        "TFLOP",
        "HBM GB",
        "sent MB",
        "bound by",
        "ms",
    ),
    *("audio s/s/chip", "chip-hours"),
)


def main() -> None:
    """Compile what is not there yet, or print what is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("compile", "print", "cell"))
    parser.add_argument("cell", nargs="*", help="of `cell`: model, machine, split, file")
    arguments = parser.parse_args()
    if arguments.action == "print":
        print("\n".join(rows(FOLDER)))
    elif arguments.action == "cell":
        compile_cell(*arguments.cell)
    else:
        compile_all()


def compile_all() -> None:
    """Every cell in a process of its own: only the end of the process stops the compiler."""
    from wavlm_jax.plan.targets import has_cuda

    machines = [name for name in TOPOLOGIES if not name.startswith("h100") or has_cuda()]
    for split in ("train", "valid"):
        for machine in machines:
            for model in MODELS:
                file = FOLDER / f"{model}_{machine}_{split}.json"
                if not _done(file):
                    print(file.name, flush=True)
                    command = [sys.executable, "-m", "bench.plan_table", "cell", model, machine, split, str(file)]
                    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def _done(file: Path) -> bool:
    """Whether a cell is there, and of a version that kept what the partitioner said."""
    return file.exists() and "replicated" in json.loads(file.read_text())


def compile_cell(model: str, machine: str, split: str, file: str) -> None:
    """Writes the figures of one program, and ends the process."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from wavlm_jax.plan.program import matrix_flops
    from wavlm_jax.plan.targets import open_target

    config = json.loads(importlib.import_module(f"configs.pretrain.{model}").get_config(machine).to_json())
    target = open_target(TOPOLOGIES[machine])
    traced, spec, mesh, state = traced_step(config, target, split)
    found: dict[str, Any] = {
        "config": f"{model}:{machine}",
        "topology": TOPOLOGIES[machine],
        "program": f"{split} {spec.name}",
        "chip": asdict(target.chip),
        "mesh": dict(mesh.shape),
        "microbatches": spec.microbatches,
        "audio_seconds": spec.seconds,
        "num_steps": config["train"]["num_steps"],
        "state_bytes": state,
        "flops": matrix_flops(traced.jaxpr, target.platform) / mesh.size,
    }
    figures = finished if target.platform == "cuda" else stopped
    found |= figures(traced, spec, mesh, target)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(json.dumps(found, indent=1) + "\n")
    os._exit(0)  # the compiler is still at work


def finished(traced: Any, spec: Any, mesh: Any, target: Any) -> dict[str, Any]:
    """Figures of a program that is compiled to the end: a compiler that does not write what it has on the way."""
    from wavlm_jax.plan.program import Counted, count

    made = count(spec.name, traced, target, mesh, audio_seconds=spec.seconds, microbatches=spec.microbatches)
    if not isinstance(made, Counted):
        return {"buffers": made.peak, "failed": "out of memory"}
    rows = [asdict(row) for row in made.collectives]
    replicated = list(made.replicated)
    return {"buffers": made.memory.peak, "traffic": made.traffic, "collectives": rows, "replicated": replicated}


def stopped(traced: Any, _spec: Any, mesh: Any, target: Any) -> dict[str, Any]:
    """Figures of a program of libtpu's before its machine code is made."""
    from wavlm_jax.plan.targets import replicated_arrays

    with tempfile.TemporaryDirectory(prefix="wavlm-plan-") as dumped:
        with replicated_arrays() as replicated:
            outcome = optimized(traced.lower(), Path(dumped))
        found = {"failed": outcome} if isinstance(outcome, str) else counted(*outcome, mesh, target)
    return found | {"replicated": replicated}


def traced_step(config: dict[str, Any], target: Any, split: str) -> tuple[Any, Any, Any, int]:
    """(traced program of the longest batch, its spec, mesh, bytes of the state on a device)."""
    import flax.linen as nn
    import jax

    from pretrain.task import outline
    from wavlm_jax.plan.program import bytes_per_device
    from wavlm_jax.settings import read_sections
    from wavlm_jax.training.sharding import RULES, make_mesh, row_shards
    from wavlm_jax.training.start import RunSettings, make_builder
    from wavlm_jax.training.task import Topology

    settings = read_sections(config, RunSettings)
    mesh = make_mesh(settings.mesh, target.devices)
    task = outline(config, Topology(row_shards(mesh), 0, target.num_processes))
    spec = max(task.stream(split).specs, key=lambda spec: spec.arrays["waveform"].shape[1])
    builder = make_builder(task, settings, mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        traced = builder.trace(split, spec)
    return traced, spec, mesh, bytes_per_device(builder.state)


def optimized(lowered: Any, dumped: Path) -> tuple[str, int] | str:
    """(optimized program, bytes of its buffers in HBM), as soon as the compiler has written them; or why not."""
    failed: list[str] = []

    def compiling() -> None:
        try:
            lowered.compile(compiler_options={"xla_dump_to": str(dumped), "xla_dump_hlo_as_text": True})
        except Exception as error:  # noqa: BLE001 all that a compiler says
            failed.append(str(error)[:2000])

    threading.Thread(target=compiling, daemon=True).start()
    while not failed:
        time.sleep(1)
        reports = list(dumped.glob("*memory-usage-report.txt"))
        if reports and (total := re.search(r"Total bytes: (\d+)", reports[0].read_text())):
            time.sleep(1)  # the report is the last of them
            return next(dumped.glob("*.after_optimizations.txt")).read_text(), int(total.group(1))
    return failed[0]


def counted(text: str, buffers: int, mesh: Any, target: Any) -> dict[str, Any]:
    """Traffic, messages and memory."""
    from wavlm_jax.plan.cost import Module, collectives, memory_traffic

    module = Module.parse(text)
    found = [asdict(row) for row in collectives(module, mesh, target)]
    return {"buffers": buffers, "traffic": memory_traffic(module), "collectives": found}


def rows(folder: Path) -> list[str]:
    """The table in Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for machine in TOPOLOGIES:
        for model in MODELS:
            file = folder / f"{model}_{machine}_train.json"
            if file.exists():
                evaluation = folder / f"{model}_{machine}_valid.json"
                later = json.loads(evaluation.read_text()) if evaluation.exists() else None
                lines.append(row(json.loads(file.read_text()), later))
    return lines


def row(train: dict[str, Any], evaluation: dict[str, Any] | None) -> str:
    """One config on one machine; a dash where evaluation was not compiled yet, or where the compiler gave up."""
    chip, chips = train["chip"], math.prod(train["mesh"].values())
    done = [train, evaluation] if evaluation is not None else [train]
    fits = all("failed" not in found and found["buffers"] <= chip["memory"] for found in done)
    cells = [
        train["config"],
        f"{chips} {chip['name'].removeprefix('TPU ')}",
        "yes" if fits else "NO",
        *(f"{found['buffers'] / GIB:.2f}" if found.get("buffers") else "-" for found in done),
        *(["-"] if evaluation is None else []),
        f"{chip['memory'] / GIB:.2f}",
        f"{train['flops'] / 1e12:.2f}",
    ]
    cells += ["-"] * (len(COLUMNS) - len(cells)) if "failed" in train else _update(train, chips)
    return f"| {' | '.join(cells)} |"


def _update(train: dict[str, Any], chips: int) -> list[str]:
    """What an update moves, and its roofline."""
    chip = train["chip"]
    seconds = {
        "arithmetic": train["flops"] / chip["peak_flops"],
        "memory": train["traffic"] / chip["bandwidth"],
        "network": sum(found["seconds"] for found in train["collectives"]),
    }
    bound = max(seconds, key=lambda name: seconds[name])
    return [
        f"{train['traffic'] / 1e9:.1f}",
        f"{sum(found['sent'] for found in train['collectives']) / 1e6:,.0f}",
        bound,
        f"{seconds[bound] * 1e3:.1f}",
        f"{train['audio_seconds'] / seconds[bound] / chips:,.0f}",
        f"{train['num_steps'] * seconds[bound] / 3600 * chips:,.0f}",
    ]


if __name__ == "__main__":
    main()
