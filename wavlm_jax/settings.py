"""From an untyped config section to a frozen dataclass, once: the code after it never sees ml_collections.

Unknown, missing and mistyped keys are errors that name the key, what was found, what was expected, and the nearest key.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

T = TypeVar("T")


class SettingsError(ValueError):
    """A mistake in a config; the message names the key and what to do."""


def read(section: Any, kind: type[T], where: str) -> T:
    """Fills the settings dataclass `kind` from `section`.

    Args:
        section: a ConfigDict or dict; nested sections fill nested dataclasses.
        kind: a frozen dataclass; fields without a default are required.
        where: the section's path in the config, for messages ("optim").

    Raises:
        SettingsError: unknown key (with the nearest known one), missing key, wrong type, or a ValueError of the
            dataclass itself.

    """
    if not hasattr(section, "items"):
        raise SettingsError(f"config.{where}: found {section!r}, expected a section with keys")
    known = {field.name: field for field in dataclasses.fields(typing.cast("Any", kind))}
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in section.items():
        if key not in known:
            raise SettingsError(f"config.{where}.{key}: no such key; {nearest(key, known)}")
        values[key] = convert(value, hints[key], f"{where}.{key}")
    for name, field in known.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if name not in values and required:
            raise SettingsError(f"config.{where}.{name}: missing; expected {describe(hints[name])}")
    try:
        return kind(**values)
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(f"config.{where}: {error}") from error


def read_sections(config: Mapping[str, Any], kind: type[T]) -> T:
    """Fills `kind` from those sections of a whole config that it has fields for.

    Raises:
        SettingsError: a section or key that is missing, unknown or of the wrong type.

    """
    hints = typing.get_type_hints(kind)
    for name in hints:
        if name not in config:
            raise SettingsError(f"config.{name}: missing; {nearest(name, config)}")
    return kind(**{name: convert(config[name], hint, name) for name, hint in hints.items()})


def refuse_unknown_sections(config: Mapping[str, Any], *kinds: type) -> None:
    """Checks that each section of a config is a field of one of the dataclasses `kinds`.

    Raises:
        SettingsError: naming the section, and the nearest known one.

    """
    known = {"task": None}
    for kind in kinds:
        known |= {field.name: None for field in dataclasses.fields(typing.cast("Any", kind))}
    for name in config:
        if name not in known:
            raise SettingsError(f"config.{name}: no such section; {nearest(name, known)}")


def nearest(key: str, known: Mapping[str, Any]) -> str:
    """A hint for a mistyped key: the nearest known one, or all of them."""
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"did you mean {close[0]}?" if close else f"known keys: {', '.join(sorted(known))}"


def check_sizes(settings: Any, *names: str, least: int = 1, most: int = 2**20, prefix: str = "") -> None:
    """Checks fields that are whole numbers, or tuples of them; `prefix` stands before the name in the message.

    Raises:
        ValueError: naming the first field that is below `least` or above `most`.

    """
    for name in names:
        value = getattr(settings, name)
        for number in value if isinstance(value, tuple) else (value,):
            if not least <= number <= most:
                wanted = f"{least} or more" if number < least else f"at most {most}"
                raise ValueError(f"{prefix}{name}: found {value!s:.80}, expected {wanted}")


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`. An int may stand for a float and a list for a tuple; nothing else is converted.

    Every float, also inside a value of any type, has to be an `is_plain` one.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return _any(value, where)
    if dataclasses.is_dataclass(hint):
        return read(value, typing.cast("type[Any]", hint), where)
    containers = {
        Literal: _one_of,
        typing.Union: _optional,
        types.UnionType: _optional,
        tuple: _tuple,
        dict: _mapping,
        Mapping: _mapping,
    }
    if origin in containers:
        return containers[origin](value, arguments, where)
    return _scalar(value, hint, where)


def is_plain(number: float) -> bool:
    """Whether a number can be a setting: NaN, the infinities and -0.0 are mistakes that checks of ranges let pass."""
    return math.isfinite(number) and (number != 0 or math.copysign(1, number) > 0)


PLAIN = "a finite number, and 0 without a sign"
"""What `is_plain` demands, for messages."""


def describe(hint: Any) -> str:
    """A type in words, for messages."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(hint))
    return getattr(hint, "__name__", str(hint)) if get_origin(hint) is None else str(hint)


def _fail(value: Any, expected: str, where: str) -> typing.NoReturn:
    raise SettingsError(f"config.{where}: found {value!r} ({type(value).__name__}), expected {expected}")


def _one_of(value: Any, choices: tuple[Any, ...], where: str) -> Any:
    if value not in choices:
        hint = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
        also = f"; did you mean {hint[0]!r}?" if hint else ""
        raise SettingsError(
            f"config.{where}: found {value!r}, expected one of {', '.join(repr(c) for c in choices)}{also}"
        )
    return value


def _optional(value: Any, choices: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in choices:
        return None
    others = [choice for choice in choices if choice is not type(None)]
    for choice in others[:-1]:
        try:
            return convert(value, choice, where)
        except SettingsError:
            continue
    return convert(value, others[-1], where)


def _tuple(value: Any, arguments: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, (tuple, list)):
        _fail(value, "a tuple", where)
    if arguments[-1] is Ellipsis:
        return tuple(convert(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value))
    if len(value) != len(arguments):
        _fail(value, f"a tuple of {len(arguments)}", where)
    return tuple(convert(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, arguments, strict=True)))


def _mapping(value: Any, arguments: tuple[Any, ...], where: str) -> dict[str, Any]:
    if not hasattr(value, "items"):
        _fail(value, "a section with keys", where)
    inner = arguments[1] if arguments else Any
    return {str(key): convert(item, inner, f"{where}.{key}") for key, item in value.items()}


def _any(value: Any, where: str) -> Any:
    if hasattr(value, "items"):
        for key, item in value.items():
            _any(item, f"{where}.{key}")
    elif isinstance(value, (tuple, list)):
        for number, item in enumerate(value):
            _any(item, f"{where}[{number}]")
    elif isinstance(value, float) and not is_plain(value):
        _fail(value, PLAIN, where)
    return value


def _scalar(value: Any, hint: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, bool):
        _fail(value, "int", where)
    if hint is int and isinstance(value, int) and not -(2**63) <= value < 2**63:
        _fail(value, "an int of 64 bits", where)
    if not isinstance(value, hint):
        _fail(value, describe(hint), where)
    return _any(value, where)
