"""train.py itself, as a process: killed, stopped and started again, it ends in the same bits."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.speech import make_corpora, tiny_flags
from wavlm_jax.training.checkpoint import load_params

ROOT = Path(__file__).parents[2]
STEPS = 12
PREEMPTED = 75


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A tiny demo config with dropout, layer drop and mixing on; labels are made by the first run."""
    root = tmp_path_factory.mktemp("process")
    changes = {
        "train.num_steps": STEPS,
        "train.eval_every": 6,
        "train.compilation_cache": os.environ["JAX_COMPILATION_CACHE_DIR"],
        "checkpoint.every": 3,
    }
    return tiny_flags(root, make_corpora(root, train=20, valid=4), changes)


def start(workdir, flags):
    command = [sys.executable, "train.py", "--config=configs/pretrain/demo.py", f"--workdir={workdir}", *flags]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(workdir, flags):
    process = start(workdir, flags)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output


def interrupt(workdir, flags, step, how):
    """Sends `how` once the log has come to `step`; the exit code."""
    with start(workdir, flags) as process:
        seen = []
        for line in process.stdout:
            seen.append(line)
            if line.startswith(f"train {step}/"):
                process.send_signal(how)
                break
        else:
            pytest.fail("the run ended before the step: " + "".join(seen))
        process.stdout.read()
        return process.wait(timeout=400)


def digest(workdir):
    """SHA-256 over the final parameters."""
    _, params = load_params(workdir, STEPS)
    total = hashlib.sha256()

    def add(tree, path=""):
        for name in sorted(tree):
            if isinstance(tree[name], dict):
                add(tree[name], f"{path}/{name}")
            else:
                total.update(f"{path}/{name}".encode())
                total.update(np.ascontiguousarray(tree[name]).tobytes())

    add(params)
    return total.hexdigest()


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    run(workdir, flags)
    return workdir


def test_the_log_has_each_step_once_with_what_a_user_watches(undisturbed):
    records = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if record["kind"] == "train"]
    assert steps == list(range(1, STEPS + 1))
    watched = {"masked_loss", "masked_accuracy", "unmasked_loss", "unmasked_accuracy", "feature_penalty", "grad_norm"}
    watched |= {"learning_rate", "masked_share", "mixed_share", "prediction_entropy", "label_entropy"}
    watched |= {"audio_seconds_per_second", "data_wait_share", "steps_per_second"}
    assert watched <= set(records[-2]) | set(records[0])
    evaluations = [record for record in records if record["kind"] == "eval/valid"]
    assert [record["step"] for record in evaluations] == [6, STEPS]
    assert all(np.isfinite(record["masked_loss"]) for record in evaluations)


@pytest.mark.parametrize(("how", "step", "code"), [(signal.SIGKILL, 5, -9), (signal.SIGTERM, 7, PREEMPTED)])
def test_an_interrupted_run_ends_in_the_same_parameters(flags, undisturbed, tmp_path, how, step, code):
    workdir = tmp_path / "run"
    flags = [*flags, "--config.metrics.tensorboard=False"]  # its package imports torch
    assert interrupt(workdir, flags, step, how) == code
    run(workdir, flags)
    assert digest(workdir) == digest(undisturbed)
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if record["kind"] == "train"]
    assert steps == list(range(1, STEPS + 1))


def test_a_finished_run_is_exported_and_loads_in_transformers(undisturbed, tmp_path):
    import torch
    from transformers import WavLMModel

    out = tmp_path / "export"
    command = [sys.executable, "-m", "wavlm_jax.convert", "export", str(undisturbed), str(out), "--to", "huggingface"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    model, report = WavLMModel.from_pretrained(out, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    _, params = load_params(undisturbed)
    np.testing.assert_array_equal(
        model.feature_projection.projection.weight.detach().numpy().T,
        params["wavlm"]["feature_projection"]["projection"]["kernel"],
    )
    assert torch.isfinite(model(torch.zeros(1, 4000)).last_hidden_state).all()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.mixing.porb=0.3", "did you mean prob?"),
        ("--config.optim.learning_rate=fast", "learning_rate"),
        ("--config.data.train=/nowhere", "python -m wavlm_jax.data SOURCE --out /nowhere"),
    ],
)
def test_a_wrong_flag_is_one_message_and_exit_code_2(flags, tmp_path, flag, message):
    process = start(tmp_path / "run", [*flags, flag])
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 2
    assert message in output
    assert "Traceback" not in output
