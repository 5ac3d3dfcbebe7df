"""Sample and frame arithmetic against the numbers of the sources and against transformers."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.torch_twins import attention_mask, small_config, torch_model
from wavlm_jax.shapes import (
    STANDARD,
    expected_labels,
    huggingface_num_frames,
    label_index,
    microsoft_num_frames,
    num_frames,
    samples_for,
)

KNOWN = {
    0: 0, 1: 0, 399: 0, 400: 1, 719: 1, 720: 2, 8000: 24, 16000: 49, 32000: 99, 160000: 499, 250000: 781, 480000: 1499,
}  # fmt: skip


@pytest.fixture(scope="module")
def transformers_model():
    return torch_model(small_config())


def test_lengths_of_the_sources():
    for samples, expected in KNOWN.items():
        assert num_frames(samples) == expected
    assert num_frames(np.array(list(KNOWN))).tolist() == list(KNOWN.values())
    assert num_frames(jnp.array(list(KNOWN))).tolist() == list(KNOWN.values())


def test_standard_geometry():
    assert (STANDARD.hop, STANDARD.receptive_field) == (320, 400)


@given(st.integers(1, 100_000))
def test_samples_for_is_the_fewest(count):
    samples = samples_for(count)
    assert samples == 320 * count + 80
    assert num_frames(samples) == count
    assert num_frames(samples - 1) == count - 1


@pytest.mark.parametrize(
    ("padded", "length", "microsoft", "conv"),
    [(16000, 8000, 25, 24), (16000, 5000, 16, 15), (16000, 400, 2, 1), (250000, 249000, 779, 777)],
)
def test_valid_frames_of_both_conventions(padded, length, microsoft, conv):
    assert microsoft_num_frames(length, padded) == microsoft
    assert num_frames(length) == conv


def microsoft_mask(length: int, padded: int) -> np.ndarray:
    """The authors' rule from its description: a frame is padding if all samples of its block are."""
    count = num_frames(padded)
    padding = np.arange(padded) >= length
    return ~padding[: padded - padded % count].reshape(count, -1).all(axis=1)


@given(st.integers(400, 50_000), st.data())
def test_microsoft_frames_follow_the_block_rule(padded, data):
    length = data.draw(st.integers(0, padded))
    assert microsoft_num_frames(length, padded) == microsoft_mask(length, padded).sum()


@given(st.integers(720, 50_000), st.data())  # in a batch of one frame a shorter row makes transformers raise
def test_huggingface_frames_equal_transformers(transformers_model, padded, data):
    lengths = data.draw(st.lists(st.integers(1, padded), min_size=1, max_size=4))
    mask = attention_mask(lengths, padded).long()
    count = num_frames(padded)
    theirs = transformers_model._get_feature_vector_attention_mask(count, mask).sum(-1)
    assert huggingface_num_frames(np.array(lengths), padded).tolist() == theirs.tolist()
    formula = transformers_model._get_feat_extract_output_lengths(torch.tensor(lengths)).clamp(min=0)
    assert num_frames(np.array(lengths)).tolist() == formula.tolist()


def test_labels_per_frame():
    assert [label_index(frame, 50) for frame in range(4)] == [0, 1, 2, 3]
    assert [label_index(frame, 100) for frame in range(4)] == [0, 2, 4, 6]
    assert expected_labels(16000, 50) == 49
