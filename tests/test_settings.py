"""The border between a config and the code: whatever is misspelt, missing or of the wrong type is named."""

import argparse
import contextlib
import dataclasses
import json
import math
import re
import types
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from tests.support import toy_task
from wavlm_jax.command_line import last_overrides, plain_number
from wavlm_jax.config import Compute, WavLMConfig
from wavlm_jax.inference.commands import COMMANDS
from wavlm_jax.settings import SettingsError, convert, read, read_sections
from wavlm_jax.training.metric_writers import WandbSettings
from wavlm_jax.training.start import RunSettings


def as_config(value: Any) -> Any:
    """A settings dataclass as the sections that it came from."""
    if dataclasses.is_dataclass(value):
        return {field.name: as_config(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


FULL = dataclasses.replace(
    toy_task.make_settings(),
    metrics=dataclasses.replace(
        toy_task.make_settings().metrics,
        wandb=WandbSettings(project="p", entity=None, name=None, group=None, mode="offline"),
    ),
)


def leaves(section: dict, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    result = []
    for key, value in section.items():
        result += leaves(value, (*path, key)) if isinstance(value, dict) else [(*path, key)]
    return result


PATHS = leaves(as_config(FULL))
IDS = [".".join(path) for path in PATHS]


def parent_of(config: dict, path: tuple[str, ...]) -> dict:
    for key in path[:-1]:
        config = config[key]
    return config


def test_a_config_dict_becomes_the_dataclasses() -> None:
    assert read_sections(ConfigDict(as_config(FULL)).to_dict(), RunSettings) == FULL
    assert read_sections(json.loads(ConfigDict(as_config(FULL)).to_json()), RunSettings) == FULL
    assert read_sections(as_config(FULL), RunSettings) == FULL


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_each_field_misspelt_is_an_error_that_names_it(path: tuple[str, ...]) -> None:
    config = as_config(FULL)
    section = parent_of(config, path)
    section[path[-1] + "x"] = section.pop(path[-1])
    with pytest.raises(SettingsError) as caught:
        read_sections(config, RunSettings)
    assert f"config.{'.'.join(path)}" in str(caught.value)
    assert f"did you mean {path[-1]}?" in str(caught.value) or len(path) == 1


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_each_field_left_out_is_an_error_that_names_it(path: tuple[str, ...]) -> None:
    config = as_config(FULL)
    del parent_of(config, path)[path[-1]]
    with pytest.raises(SettingsError, match=re.escape(f"config.{'.'.join(path)}: missing")):
        read_sections(config, RunSettings)


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_each_field_of_another_type_is_an_error_that_names_it(path: tuple[str, ...]) -> None:
    config = as_config(FULL)
    parent_of(config, path)[path[-1]] = object()
    with pytest.raises(SettingsError, match=re.escape(f"config.{'.'.join(path)}: found")):
        read_sections(config, RunSettings)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("train", {"num_steps": 0}, "config.train: num_steps: found 0, expected 1 or more"),
        ("train", {"num_steps": 1e5}, "config.train.num_steps: found 100000.0"),
        ("train", {"num_steps": True}, "config.train.num_steps: found True"),
        ("optim", {"learning_rate": "1e-4"}, "config.optim.learning_rate: found '1e-4'"),
        ("optim", {"learning_rate": -1}, "config.optim: learning_rate -1.0"),
        ("optim", {"schedule": "linaer"}, "did you mean 'linear'?"),
        ("optim", {"max_grad_norm": 0.0}, "config.optim: max_grad_norm: found 0.0, expected a positive number or None"),
        ("checkpoint", {"keep_last": 0}, "config.checkpoint: every"),
        ("metrics", {"log_every": 0}, "config.metrics: log_every: found 0"),
    ],
)
def test_values_that_cannot_be_right(section: str, changes: dict, message: str) -> None:
    config = as_config(FULL)
    config[section] |= changes
    with pytest.raises(SettingsError) as caught:
        read_sections(config, RunSettings)
    assert message in str(caught.value)


def test_whole_numbers_have_64_bits() -> None:
    with pytest.raises(
        SettingsError, match=r"config.seed: found 1180591620717411303424 \(int\), expected an int of 64"
    ):
        read_sections(as_config(FULL) | {"seed": 2**70}, RunSettings)


def test_an_int_is_a_float_and_a_list_is_a_tuple() -> None:
    config = as_config(FULL)
    config["optim"]["learning_rate"] = 1
    config["train"]["eval_splits"] = ["valid", "other"]
    found = read_sections(config, RunSettings)
    assert isinstance(found.optim.learning_rate, float)
    assert found.train.eval_splits == ("valid", "other")


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, -0.0])
def test_no_number_that_comparisons_let_pass_is_a_setting(odd: float) -> None:
    """Wherever it stands, and whatever type is expected there; the key is named, at once."""
    for hint, value, where in (
        (float, odd, "train.x"),
        (float | None, odd, "train.x"),
        (tuple[float, ...], (1.0, odd), "train.x[1]"),
        (dict[str, float], {"a": odd}, "train.x.a"),
        (Any, {"a": [0.5, {"b": odd}]}, "train.x.a[1].b"),
        (object, odd, "train.x"),
    ):
        with pytest.raises(
            SettingsError, match=rf"^config\.{re.escape(where)}: found -?(nan|inf|0\.0).* finite number"
        ):
            convert(value, hint, "train.x")
    config = as_config(FULL)
    floats = [path for path in PATHS if isinstance(parent_of(config, path)[path[-1]], float)]
    assert ("train", "max_step_seconds") in floats
    for path in floats:
        config = as_config(FULL)
        parent_of(config, path)[path[-1]] = odd
        with pytest.raises(SettingsError, match=re.escape(f"config.{'.'.join(path)}: found")):
            read_sections(config, RunSettings)


@pytest.mark.parametrize("odd", ["nan", "inf", "-inf", "-0", "1e999", "x"])
def test_no_option_takes_such_a_number(odd: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in COMMANDS.items():
        parser = argparse.ArgumentParser(name)
        command.add_options(parser)
        for action in parser._actions:
            assert action.type is not float, action.option_strings
            if action.type is plain_number:
                with pytest.raises(SystemExit):
                    parser.parse_args(["a.wav", "--model", "m", f"{action.option_strings[0]}={odd}"])
                assert action.option_strings[0] in capsys.readouterr().err


def test_of_an_override_that_is_given_twice_the_last_counts() -> None:
    """For tuples too, which ml_collections joins."""
    words = ["--config.seed=3", "--config.batch.buckets=(48,)", "--config.seed=4", "--config.batch.buckets=(96,)"]
    assert last_overrides(["train.py", *words]) == ["train.py", *words[2:]]


def test_a_section_that_is_a_value_is_named() -> None:
    with pytest.raises(SettingsError, match=r"config\.optim: found 3, expected a section with keys"):
        read_sections(as_config(FULL) | {"optim": 3}, RunSettings)
    with pytest.raises(SettingsError, match=r"config\.metrics\.wandb: found 3"):
        read_sections(as_config(FULL) | {"metrics": as_config(FULL)["metrics"] | {"wandb": 3}}, RunSettings)


@pytest.mark.parametrize("config", [WavLMConfig.base(), WavLMConfig.large(), WavLMConfig.tiny()])
def test_models_go_through_a_config_unchanged(config: WavLMConfig) -> None:
    assert read(ConfigDict(as_config(config)).to_dict(), WavLMConfig, "model") == config
    assert read({}, Compute, "compute") == Compute()
    with pytest.raises(SettingsError, match=r"config\.model: model\.hidden_size: found 30, expected a multiple of"):
        read(as_config(config) | {"hidden_size": 30}, WavLMConfig, "model")


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers())


def fits(value: Any, hint: Any) -> bool:
    """What may stand behind the border."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is types.UnionType:
        return any(fits(value, choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(fits(item, get_args(hint)[0]) for item in value)
    return type(value) is hint


@given(VALUES, st.sampled_from([int, float, str, bool, int | None, tuple[int, ...], Literal["a", "b"], Literal[1, 2]]))
def test_whatever_passes_has_its_type(value: Any, hint: Any) -> None:
    with contextlib.suppress(SettingsError):
        assert fits(convert(value, hint, "here"), hint)


def test_every_setting_of_the_training_tower_is_documented() -> None:
    """The defaults live nowhere: each field is required, so a config spells out all that happens."""
    pending = [RunSettings]
    while pending:
        kind = pending.pop()
        for field in dataclasses.fields(kind):
            assert field.default is dataclasses.MISSING, f"{kind.__name__}.{field.name} has a default"
        pending += [hint for hint in get_type_hints(kind).values() if dataclasses.is_dataclass(hint)]
