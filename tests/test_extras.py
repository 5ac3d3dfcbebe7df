"""Whatever extra is not installed: one message that names it, and no bare import of one anywhere."""

import argparse
import ast
import io
import re
import runpy
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from pretrain.curves import draw
from wavlm_jax.audio.transcoding import as_au
from wavlm_jax.data.demo_corpus import Synthesizer, Voice
from wavlm_jax.export import missing_packages
from wavlm_jax.extras import MissingExtraError
from wavlm_jax.inference import commands, work
from wavlm_jax.metrics import scorer
from wavlm_jax.plan.targets import open_target
from wavlm_jax.text.beam import BeamSearch
from wavlm_jax.text.vocabulary import Vocabulary
from wavlm_jax.training.metric_writers import Tensorboard, Wandb, WandbSettings
from wavlm_jax.training.workdir import exists

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def _search():
    BeamSearch(Vocabulary(tokens=("<pad>", "|", "A"), unknown=None, begin=None, end=None))


def _wandb(folder):
    Wandb(WandbSettings(project="p", entity=None, name=None, group=None, mode=None), folder, "id", {})


def _speak():
    Synthesizer(Voice(name="a", accent="en-us", variant="f1", speed=170, pitch=50, range=50)).speak("a")


def _draw(folder):
    draw({"a": [{"step": 1, "train/loss": 1.0}]}, folder / "a.png", panels=(("loss", ("loss",)),))


USES = [
    ("demo", "espeakng_loader", lambda _: _speak()),
    ("demo", "matplotlib", _draw),
    ("tensorboard", "tensorboardX", lambda folder: Tensorboard(folder, 0)),
    ("wandb", "wandb", _wandb),
    ("torch", "torch", lambda _: runpy.run_module("wavlm_jax.convert.compare")),
    ("torch", "transformers", lambda _: runpy.run_module("wavlm_jax.convert.compare")),
    ("decode", "flashlight.lib.text.dictionary", lambda _: _search()),
    ("evaluate", "pyannote.metrics", lambda _: scorer()),
    ("containers", "av", lambda _: as_au(io.BytesIO(), "mov").__enter__()),
    ("gcs", "gcsfs", lambda _: exists("gs://bucket/run")),
    ("plan", "libtpu", lambda _: open_target("v5e:2x2", 1)),
]


@pytest.mark.parametrize(("extra", "module", "use"), USES, ids=[module for _, module, _ in USES])
def test_an_extra_that_is_not_installed_is_named(extra, module, use, tmp_path, monkeypatch):
    from fsspec.registry import _registry

    monkeypatch.delitem(_registry, "gcs", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "wavlm_jax.convert.compare", raising=False)  # run as a script below
    with pytest.raises(MissingExtraError, match=re.escape(f"pip install 'wavlm-jax[{extra}]'")) as error:
        use(tmp_path)
    assert "\n" not in str(error.value)


def test_every_extra_is_tried():
    """tpu and cuda are JAX's plugins: whoever asks for such a device is told. `jax.export` asks for its own package."""
    assert {extra for extra, _, _ in USES} == EXTRAS.keys() - {"tpu", "cuda", "export"}


def test_who_asks_for_a_device_is_told_its_extra(monkeypatch):
    monkeypatch.setattr("jax.config.update", lambda *_: None)
    monkeypatch.setattr("jax.devices", _no_devices)
    for device, extra in {"gpu": "cuda", "tpu": "tpu"}.items():
        with pytest.raises(work.UsageError, match=re.escape(f"'wavlm-jax[{extra}]'")):
            work._choose_device(device)


def _no_devices():
    raise RuntimeError("none")


def test_an_export_without_torch_says_why_it_is_not_compared(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "(torch and transformers): pip install 'wavlm-jax[torch]'" in missing_packages()


def test_errors_are_asked_for_before_anything_is_computed(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyannote.metrics", None)
    parser = argparse.ArgumentParser()
    commands.COMMANDS["diarize"].add_options(parser)
    options = parser.parse_args(["a.wav", "--model", "nowhere", "--reference", "a.rttm"])
    with pytest.raises(MissingExtraError):
        commands.COMMANDS["diarize"].run(options)


def test_no_package_of_an_extra_is_imported_bare():
    """Each import of a package that requirements.txt does not have stands in `with extra(NAME)` of an extra with it."""
    brought = ["jaxlib", "ml_dtypes", "fsspec", "tensorstore"]  # by jax, datasets and Orbax
    required = _names([*(ROOT / "requirements.txt").read_text().splitlines(), *brought])
    distributions = packages_distributions()
    found = set()
    for path in [ROOT / "train.py", *(ROOT / "wavlm_jax").rglob("*.py"), *(ROOT / "pretrain").rglob("*.py")]:
        for extra, module in _imports(ast.parse(path.read_text()), None):
            names = _names(distributions.get(module.split(".")[0], [module.split(".")[0]]))
            if module.split(".")[0] in {*sys.stdlib_module_names, "wavlm_jax", "pretrain"} or names & required:
                continue
            assert extra is not None, f"{path}: imports {module} outside of `with extra(...)`"
            found.add((extra, module.split(".")[0]))
            assert names & _names(EXTRAS[extra]), f"{path}: the extra {extra} of pyproject.toml has no {module}"
    assert {module for _, module in found} >= {"torch", "wandb", "pyannote", "flashlight", "matplotlib"}


def _names(requirements):
    return {re.sub("[_.]", "-", re.match(r"[\w.-]*", line)[0].lower()) for line in requirements}


def _imports(node, extra):
    for child in ast.iter_child_nodes(node):
        inner = extra
        if isinstance(child, ast.With) and isinstance(call := child.items[0].context_expr, ast.Call):
            inner = call.args[0].value if getattr(call.func, "id", "") == "extra" else extra
        if isinstance(child, ast.Import):
            yield from ((extra, alias.name) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield extra, child.module
        yield from _imports(child, inner)
