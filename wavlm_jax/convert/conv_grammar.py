"""The strings that describe conv layers in fairseq's configs, "[(512,10,5)] + [(512,3,2)] * 4": read by a grammar.

    layers  =  term { "+" term }
    term    =  list [ "*" number ]
    list    =  "[" layer { "," layer } [ "," ] "]"
    layer   =  "(" number "," number "," number [ "," ] ")"

The authors' code hands this string, which comes out of the checkpoint, to Python's `eval`.
"""

import itertools
import math
import re
from collections.abc import Iterable

ConvLayer = tuple[int, int, int]
"""Channels, kernel, stride."""

_MAX_TEXT = 4096
_MAX_LAYERS = 32
_MAX_NUMBER = 65536
_MAX_STRIDE = 2**20
_LAYER = r"\(([0-9]{1,6}),([0-9]{1,6}),([0-9]{1,6}),?\)"
_LAYER_ONCE = re.compile(_LAYER)
_LIST = rf"\[{_LAYER}(?:,{_LAYER})*,?\]"
_TERM = re.compile(rf"(?P<list>{_LIST})(?:\*(?P<repeats>[0-9]{{1,6}}))?(?P<more>\+|$)")
_BROKEN_NUMBER = re.compile(r"[0-9]\s+[0-9]")


def parse_conv_layers(text: str) -> tuple[ConvLayer, ...]:
    """The conv layers that `text` describes.

    Raises:
        ValueError: anything but the grammar above, no layer, a number of 0, or out of all proportion (more than 32
            layers, numbers above 65,536, strides that multiply to more than 2**20).

    """
    compact = "".join(text[:_MAX_TEXT].split())
    if len(text) > _MAX_TEXT or _BROKEN_NUMBER.search(text):
        raise ValueError(_expected(text))
    layers: list[ConvLayer] = []
    position, more = 0, True
    while more:
        term = _TERM.match(compact, position)
        if term is None:
            raise ValueError(_expected(text))
        once = [_layer(match.groups()) for match in _LAYER_ONCE.finditer(term["list"])]
        repeats = int(term["repeats"] or 1)
        if len(layers) + len(once) * repeats > _MAX_LAYERS:
            raise ValueError(f"conv_feature_layers: more than {_MAX_LAYERS} layers in {text[:120]!r}")
        layers += once * repeats
        position, more = term.end(), bool(term["more"])
    return _checked(layers, text)


def _expected(text: str) -> str:
    return (
        f"conv_feature_layers: found {text[:120]!r}, expected a sum of lists such as '[(512,10,5)] + [(512,3,2)] * 4'"
    )


def format_conv_layers(layers: Iterable[ConvLayer]) -> str:
    """`layers` as fairseq writes them, runs of equal layers shortened."""
    terms = []
    for layer, run in itertools.groupby(layers):
        count = len(list(run))
        terms.append(f"[({','.join(map(str, layer))})]" + (f" * {count}" if count > 1 else ""))
    return " + ".join(terms)


def _layer(numbers: Iterable[str]) -> ConvLayer:
    channels, kernel, stride = map(int, numbers)
    return channels, kernel, stride


def _checked(layers: list[ConvLayer], text: str) -> tuple[ConvLayer, ...]:
    numbers = list(itertools.chain.from_iterable(layers))
    stride = math.prod(stride for _, _, stride in layers)
    if not layers or min(numbers) < 1 or max(numbers) > _MAX_NUMBER or stride > _MAX_STRIDE:
        raise ValueError(f"conv_feature_layers: {text[:120]!r} describes no conv encoder of speech")
    return tuple(layers)
