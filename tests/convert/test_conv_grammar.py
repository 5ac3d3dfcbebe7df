"""Conv layers in fairseq's notation: what the grammar takes is read as Python would read it, the rest is refused."""

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavlm_jax.convert.microsoft import format_conv_layers, parse_conv_layers

NUMBERS = st.integers(1, 600)
LAYERS = st.lists(st.tuples(NUMBERS, NUMBERS, st.integers(1, 2)), min_size=1, max_size=4)
SPACES = st.sampled_from(["", " ", "  "])


@given(LAYERS)
def test_written_and_read_again(layers):
    assert parse_conv_layers(format_conv_layers(layers)) == tuple(layers)


@given(st.lists(st.tuples(LAYERS, st.integers(1, 2)), min_size=1, max_size=2), SPACES)
def test_sums_of_repeated_lists(terms, space):
    text = f"{space}+{space}".join(f"{layers}{space}*{space}{count}" for layers, count in terms)
    expected = [layer for layers, count in terms for layer in layers * count]
    assert parse_conv_layers(text) == tuple(expected)


@given(LAYERS)
def test_a_plain_list_is_read_as_python_reads_it(layers):
    assert list(parse_conv_layers(str(layers))) == ast.literal_eval(str(layers))


def test_the_released_models():
    layers = parse_conv_layers("[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2")
    assert [kernel for _, kernel, _ in layers] == [10, 3, 3, 3, 3, 2, 2]
    assert format_conv_layers(layers) == "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"
    assert parse_conv_layers("[(512, 10, 5,),]") == ((512, 10, 5),)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "()", "[(1,2)]", "[(1,2,3,4)]", "[(1,2,3)] +", "+ [(1,2,3)]", "[(1,2,3)] [(1,2,3)]"),
        *(
            "[(1,2,3)] * 0",
            "[(0,2,3)]",
            "[(1,2,-3)]",
            "[(1,2,3.5)]",
            "[(1 2,2,3)]",
            "[(1,2,3)] * 33",
            "[(1,2,3)] * 999999",
        ),
        *("2 * [(1,2,3)]", "[(1,2,3)] ** 2", "[(99999,2,3)]", "[(1,2,60000)] * 8", "[(1,2,3)]" + " " * 5000),
        *("__import__('os').system('true')", "[(1,2,3)] if open('x') else []", "[(1,2,3)\n# x\n]", "[(1,2,٣)]"),
        "(" * 4000,
    ],
)
def test_everything_else_is_refused(text):
    with pytest.raises(ValueError, match="conv_feature_layers: "):
        parse_conv_layers(text)


@given(st.text(alphabet="[](),+* 123", max_size=60))
def test_any_text_is_a_list_of_layers_or_an_error(text):
    try:
        layers = parse_conv_layers(text)
    except ValueError:
        return
    assert all(number > 0 for layer in layers for number in layer)
