"""train.py on several processes: the losses of one, the same rows, stopped together, gone on with by any number."""

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from configs.finetune import speaker_xvector
from pretrain.labelling import make_labels
from pretrain.labels import LabelSettings
from tests.support import tones, toy_task
from tests.support.pods import Run
from tests.support.speech import NOISY, make_corpora, tiny_config
from tests.support.trials import trial_list
from wavlm_jax.data.corpus import DataSettings, open_corpora
from wavlm_jax.settings import read
from wavlm_jax.text.records import Trial
from wavlm_jax.training.checkpoint import load_params

STEPS = 8
PREEMPTED = 75
OFTEN = {"num_steps": STEPS, "eval_every": 1}
"""An evaluation is due at every step, so wherever a run is stopped one is still to be done."""


def pretraining(root: Path) -> dict:
    """Pre-training of a tiny model with all that is random switched on."""
    config = tiny_config(root, make_corpora(root, train=20, valid=4), **NOISY)
    config["batch"].update({"buckets": (48,), "seconds_per_update": 15.4, "row_multiple": 16})
    config["train"].update(OFTEN | {"compilation_cache": None})
    config["checkpoint"].update({"every": 3, "keep_last": 20})
    config["metrics"].update({"log_every": 1, "tensorboard": False})
    config["optim"].update({"warmup_steps": 4})
    return config


def recognition(root: Path) -> dict:
    """The CTC task on tones, with dropout and masks."""
    train = tones.make_corpus(root, "train", tones.ten_texts())
    valid = tones.make_corpus(root, "valid", tones.ten_texts()[:4])
    config = tones.tiny_ctc(train, valid, model={"hidden_dropout": 0.1, "mask_time_prob": 0.3})
    config["optim"]["tri_stage"].update({"hold_steps": 2, "decay_steps": 2})
    return often(config)


def classification(root: Path) -> dict:
    """Two speakers by name; macro F1 is of all answers together, no sum of hosts."""
    return often(tones.tiny_classes(*two_speakers(root)))


def verification(root: Path) -> dict:
    """X-vectors of two speakers; trials are of embeddings that lie on different hosts."""
    corpora = two_speakers(root)
    pairs = [Trial(a % 2 == b % 2, f"{a:03d}.flac", f"{b:03d}.flac") for a, b in combinations(range(5), 2)]
    (root / "pairs.txt").write_text(trial_list(pairs))
    config = often(tones.tiny_speakers(speaker_xvector, *corpora, trials=[str(root / "pairs.txt")]))
    config["optim"]["learning_rate"] = 3e-4  # a loss of 1e-7, as ten times as much brings, is rounding alone
    return config


def two_speakers(root: Path) -> list[Path]:
    """Corpora of training and evaluation; five utterances in the latter, so that four devices hold fillers as well."""
    texts = {"train": tones.ten_texts(), "valid": tones.ten_texts()[:5]}
    return [tones.make_corpus(root, name, rows) for name, rows in texts.items()]


def often(config: dict) -> dict:
    """A fine-tuning task, evaluated at every step, with as many rows as four devices share."""
    config["batch"].update({"row_multiple": 4})
    config["train"].update(OFTEN | {"compilation_cache": None})
    config["metrics"].update({"log_every": 1})
    config["optim"].update({"warmup_steps": 4})
    return config


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> dict:
    """Of a pre-training whose labels are there."""
    found = pretraining(tmp_path_factory.mktemp("pretraining"))
    settings = read(found["labels"], LabelSettings, "labels")
    make_labels(settings, open_corpora(read(found["data"], DataSettings, "data")))
    return found


@pytest.fixture(scope="module")
def alone(config: dict, tmp_path_factory) -> Run:
    """One process that nobody disturbs."""
    run = Run.of(tmp_path_factory.mktemp("alone") / "run", config)
    run.session(1)
    return run


def same_training(run: Run, other: Run) -> None:
    """The same rows at every step, each step once, losses and parameters to the tolerance of a sum's order."""
    assert run.rows() == other.rows()
    assert sorted(run.rows()) == list(range(1, STEPS + 1))
    for kind, value in (("train", "loss"), ("train", "grad_norm"), ("eval/valid", "loss")):
        assert [line["step"] for line in run.lines(kind)] == list(range(1, STEPS + 1))
        np.testing.assert_allclose(run.values(kind, value), other.values(kind, value), rtol=1e-4)
    ours, theirs = (toy_task.jax.tree.leaves(load_params(one.workdir, STEPS)[1]) for one in (run, other))
    for one, another in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, another, atol=1e-4)


def test_pretraining_on_two_processes_stopped_by_one_and_gone_on_with(alone: Run, config: dict, tmp_path: Path) -> None:
    """SIGTERM reaches process 1 at step 3; both save the same step. The next session is stopped before its first step
    boundary, and another one goes on.
    """
    run = Run.of(tmp_path / "run", config)
    outputs = run.session(2, stop="1,3", code=PREEMPTED)
    stopped = run.newest()
    assert 3 <= stopped.step < STEPS, outputs
    assert [line["step"] for line in run.lines("train")] == list(range(1, stopped.step + 1))
    assert [line["step"] for line in run.lines("eval/valid")] == list(range(1, stopped.step))  # the last is still due
    run.session(2, stop=f"0,{stopped.step + 1}", code=PREEMPTED)
    assert stopped.step < run.newest().step < STEPS
    run.session(2)
    assert run.newest().run_id == stopped.run_id
    same_training(run, alone)


@pytest.mark.parametrize(
    ("recipe", "metrics"),
    [
        (recognition, ("cer", "wer")),
        pytest.param(classification, ("accuracy", "macro_f1"), marks=pytest.mark.slow),
        pytest.param(verification, ("accuracy", "eer", "min_dcf"), marks=pytest.mark.slow),
    ],
)
def test_fine_tuning_on_two_processes(recipe: Callable, metrics: Sequence[str], tmp_path: Path) -> None:
    """The training of one process, and its evaluations."""
    config = recipe(tmp_path)
    one, two = Run.of(tmp_path / "one", config), Run.of(tmp_path / "two", config)
    one.session(1)
    two.session(2)
    same_training(two, one)
    for metric in metrics:
        np.testing.assert_allclose(two.values("eval/valid", metric), one.values("eval/valid", metric), atol=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_four_processes_then_two_then_one(alone: Run, config: dict, tmp_path: Path) -> None:
    """The mesh shrinks from 8 devices to 2 at checkpoints."""
    run = Run.of(tmp_path / "run", config)
    run.session(4, stop="2,2", code=PREEMPTED)
    four = run.newest()
    run.session(2, stop=f"0,{four.step + 1}", code=PREEMPTED)
    assert 2 <= four.step < run.newest().step < STEPS
    run.session(1)
    assert run.newest().run_id == four.run_id
    same_training(run, alone)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("processes", [2, 4])
def test_the_same_processes_end_in_the_same_bits(config: dict, tmp_path: Path, processes: int) -> None:
    """Left alone, and stopped by one of them and gone on with."""
    undisturbed, stopped = Run.of(tmp_path / "undisturbed", config), Run.of(tmp_path / "stopped", config)
    undisturbed.session(processes)
    stopped.session(processes, stop=f"{processes - 1},3", code=PREEMPTED)
    stopped.session(processes)
    digests = {toy_task.digest(load_params(run.workdir, STEPS)[1]) for run in (undisturbed, stopped)}
    assert len(digests) == 1
    assert stopped.values("train", "loss") == undisturbed.values("train", "loss")
