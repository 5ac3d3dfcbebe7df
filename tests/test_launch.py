"""The launch scripts are sound shell, say what is missing, and run train.py as it is; presets name real machines."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from bench import plan_table
from configs.pretrain import base, base_plus, large, xlarge
from configs.pretrain.machines import MACHINES
from pretrain.task import outline
from tests.support.train_flags import parsed
from wavlm_jax.plan.targets import open_target
from wavlm_jax.training.sharding import SMALLEST_SHARD, MeshSettings, make_mesh
from wavlm_jax.training.task import Topology

ROOT = Path(__file__).parents[1]
PRETRAINING = sorted(path.stem for path in (ROOT / "configs" / "pretrain").glob("*.py") if path.stem != "machines")
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
COMMON = {"DRY_RUN": "1", "CONFIG": "configs/pretrain/base.py:v5e-256", "WORKDIR": "/gcs/my runs/base"}


def run(script: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {"PATH": os.environ["PATH"]} | variables
    return subprocess.run([ROOT / "launch" / script], env=environment, capture_output=True, text=True, check=False)


def test_shellcheck_finds_nothing():
    checker = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([checker, *SCRIPTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert len(SCRIPTS) == 3


@pytest.mark.parametrize(
    ("script", "variables", "lines"),
    [
        ("tpu_vm.sh", {"TPU": "pod", "ZONE": "us-west4-a"}, 1),
        ("tpu_vm.sh", {"TPU": "pod", "ZONE": "us-west4-a", "SLICES": "2"}, 2),
        ("gke_xpk.sh", {"CLUSTER": "c", "TPU_TYPE": "v5litepod-256", "IMAGE": "i", "NAME": "n"}, 1),
        ("slurm.sh", {}, 1),
    ],
)
def test_a_dry_run_prints_what_would_run_and_quotes_survive(script, variables, lines):
    done = run(script, **COMMON, **variables)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert len(printed) == lines
    for line in printed:
        words = shlex.split(line)
        while "train.py" not in words:  # the command travels as one word, perhaps inside another shell
            inner = next(word for word in words if "train.py" in word)
            words = shlex.split(inner)
        flags = words[words.index("train.py") + 1 :]
        assert flags[:4] == ["--config", COMMON["CONFIG"], "--workdir", COMMON["WORKDIR"]]
        assert flags[4] == "--platform"


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS])
def test_what_is_missing_is_named(script):
    done = run(script, DRY_RUN="1")
    assert done.returncode != 0
    assert ": " in done.stderr


@pytest.mark.parametrize("module", [base, base_plus, large, xlarge], ids=lambda module: module.__name__.split(".")[-1])
@pytest.mark.parametrize("machine", list(MACHINES))
def test_every_preset_cuts_its_batches(module, machine):
    """Rows of all buckets can be shared by the machine's hosts and devices, in training and evaluation."""
    config = json.loads(module.get_config(machine).to_json())
    mesh = MeshSettings(**config["mesh"])
    data, fsdp, _ = mesh.sizes(mesh.devices)
    task = outline(config, Topology(data * fsdp, 0, mesh.hosts))
    wanted = config["batch"]["seconds_per_update"]
    for spec in task.stream("train").specs:
        assert 0.6 * wanted < spec.seconds < 1.4 * wanted
    assert task.stream("valid").specs


def test_fsdp_may_be_any_divisor_of_the_chips():
    """8 is no product of whole axes of a v5p-128, which JAX's own arrangement refuses."""
    mesh = make_mesh(MeshSettings.anywhere(data=-1, fsdp=8, tensor=1), open_target("v5p:4x4x4").devices)
    assert dict(mesh.shape) == {"data": 8, "fsdp": 8, "tensor": 1}
    owners = [device.process_index for device in mesh.devices.flat]
    assert owners == sorted(owners)


@pytest.mark.parametrize("module", [base, base_plus, large, xlarge], ids=lambda module: module.__name__.split(".")[-1])
@pytest.mark.parametrize("machine", list(MACHINES))
def test_no_preset_cuts_parameters_thinner_than_a_tile(module, machine):
    config = json.loads(module.get_config(machine).to_json())
    assert config["model"]["hidden_size"] // config["mesh"]["fsdp"] >= SMALLEST_SHARD


TPUS = [machine for machine in plan_table.TOPOLOGIES if not machine.startswith("h100")]


def recorded(name: str, split: str) -> dict[str, dict]:
    """The cells of docs/plans/ of every TPU, by machine."""
    return {machine: json.loads((plan_table.FOLDER / f"{name}_{machine}_{split}.json").read_text()) for machine in TPUS}


def test_the_table_of_the_docs_is_that_of_the_figures():
    """Of every model on v5e, v4, v5p and v6e, and all of them fit, in training and evaluation."""
    printed = plan_table.rows(plan_table.FOLDER)
    assert "\n".join(printed) in (ROOT / "docs" / "pods.md").read_text()
    for machine in TPUS:
        for name in plan_table.MODELS:
            (line,) = [line for line in printed if line.startswith(f"| {name}:{machine} |")]
            assert line.split(" | ")[2] == "yes"
            assert " - " not in line


def test_a_program_that_the_compiler_gave_up_is_in_the_table_and_does_not_fit():
    """Without figures where there are none; so does one whose buffers are more than the chip has."""
    fits = recorded("base", "train")["v5e-16"]
    failed = {key: value for key, value in fits.items() if key not in ("buffers", "traffic", "collectives")}
    failed["failed"] = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm."
    columns = plan_table.row(failed, fits).strip("| ").split(" | ")
    assert len(columns) == len(plan_table.COLUMNS)
    assert columns[:4] == ["base:v5e-16", "16 v5e", "NO", "-"]
    assert columns[7:] == ["-"] * 6
    for broken in (failed, fits | {"buffers": fits["chip"]["memory"] + 1}):
        columns = plan_table.row(fits, broken).strip("| ").split(" | ")
        assert columns[2] == "NO"
        assert columns[5:] == plan_table.row(fits, fits).strip("| ").split(" | ")[5:]


@pytest.mark.parametrize("name", ["base", "base_plus", "large"])
def test_messages_are_flat_from_16_to_256_chips_and_in_the_dtype_of_the_config(name):
    """As compiled for docs/pods.md: the gradients, once a micro-batch, in bfloat16; nothing is gathered.

    Of several micro-batches libtpu moves some sums out of the loop, and reduces those once an update, in float32.
    """
    reduced: dict[int, list[float]] = {}
    for cell in recorded(name, "train").values():
        rows = cell["collectives"]
        assert {row["kind"] for row in rows} == {"all-reduce"}
        bf16, f32 = (sum(row["payload"] for row in rows if row["dtype"] == dtype) for dtype in ("bf16", "f32"))
        assert bf16 > 0.98 * sum(row["payload"] for row in rows)
        reduced.setdefault(cell["microbatches"], []).append(bf16 / 2 + f32 / 4)
    alone = reduced.pop(1)
    assert len(alone) >= 3
    assert max(alone) == pytest.approx(min(alone), rel=0.01)
    once = [(count * alone[0] - numbers) / (count - 1) for count, found in reduced.items() for numbers in found]
    assert all(0 <= number < 0.02 * alone[0] for number in once)
    assert once == pytest.approx(once[:1] * len(once), rel=0.001)


@pytest.mark.parametrize("name", plan_table.MODELS)
def test_no_array_is_brought_to_every_device_for_want_of_another_way(name):
    """XLA's "involuntary full rematerialization": none in any cell; tests/plan shows that it is found."""
    cells = [cell for split in ("train", "valid") for cell in recorded(name, split).values()]
    assert [cell["replicated"] for cell in cells] == [[]] * len(cells)


def test_an_unknown_machine_lists_those_that_there_are():
    with pytest.raises(ValueError, match="no preset for 'v7-8'; there are v5e-16, v4-32"):
        base.get_config("v7-8")


def absent(config: ConfigDict, prefix: str = "config") -> list[str]:
    names: list[str] = []
    for key, value in config.items():
        name = f"{prefix}.{key}"
        names += absent(value, name) if isinstance(value, ConfigDict) else [name] if value is None else []
    return names


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections' way to load a file
@pytest.mark.parametrize("name", PRETRAINING)
def test_every_value_that_a_config_leaves_open_can_be_given_by_a_flag(name):
    file = f"configs/pretrain/{name}.py"
    sections = ["config.optim.tri_stage"]
    open_values = [key for key in absent(parsed(file)) if key not in sections]
    assert "config.init.path" in open_values
    given = parsed(file, *(f"--{key}=1" for key in open_values))
    assert sorted(absent(given)) == sections
    assert given.init.path == "1"
    assert given.metrics.wandb.project == "1"
    assert given.init.step == 1
