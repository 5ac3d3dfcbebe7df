"""The model's config: presets, Hugging Face JSON in and out, errors."""

import dataclasses

import pytest
import transformers

from wavlm_jax.config import WavLMConfig

PRESETS = [WavLMConfig.base(), WavLMConfig.large(), WavLMConfig.tiny(), WavLMConfig.tiny(position_bias=False)]
SOURCE_ONLY = ("normalize_eps", "feature_grad_mult", "layerdrop_first", "padding")


@pytest.mark.parametrize("config", PRESETS)
def test_huggingface_json_holds_all_that_it_can(config):
    back = WavLMConfig.from_huggingface(config.to_huggingface(), do_normalize=config.do_normalize)
    kept = {name: getattr(config, name) for name in SOURCE_ONLY}
    if not config.position_bias:
        kept |= {"num_buckets": config.num_buckets, "max_bucket_distance": config.max_bucket_distance}
    assert dataclasses.replace(back, **kept) == config


@pytest.mark.parametrize("config", PRESETS)
def test_transformers_reads_every_value_as_meant(config):
    kind = transformers.WavLMConfig if config.position_bias else transformers.HubertConfig
    values = config.to_huggingface()
    theirs = kind(**{key: value for key, value in values.items() if key != "architectures"})
    for key, value in values.items():
        if key != "architectures":
            found = getattr(theirs, key)
            assert (list(found) if isinstance(found, tuple) else found) == value, key


@pytest.mark.parametrize("kind", [transformers.WavLMConfig, transformers.HubertConfig])
def test_missing_keys_take_transformers_defaults(kind):
    ours = WavLMConfig.from_huggingface({"model_type": kind.model_type})
    theirs = kind()
    for field in dataclasses.fields(ours):
        if hasattr(theirs, field.name):
            expected = getattr(theirs, field.name)
            assert getattr(ours, field.name) == (tuple(expected) if isinstance(expected, list) else expected), (
                field.name
            )


def test_base_and_large_differ_as_published():
    base, large = WavLMConfig.base(), WavLMConfig.large()
    assert (base.feat_extract_norm, base.do_stable_layer_norm, base.do_normalize) == ("group", False, False)
    assert (large.feat_extract_norm, large.do_stable_layer_norm, large.do_normalize) == ("layer", True, True)
    assert base.head_dim == large.head_dim == 64
    assert WavLMConfig.base_plus() == base


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_dim": (8, 8)}, "one each per conv layer"),
        ({"hidden_size": 33}, "model.hidden_size: found 33, expected a multiple of 2"),
        ({"num_buckets": 30}, "expected a multiple of 4"),
        ({"num_buckets": 32, "max_bucket_distance": 8}, "max_bucket_distance: found 8, expected more"),
        ({"layerdrop": 1.5}, "model.layerdrop: found 1.5, expected a probability"),
        ({"num_attention_heads": 0}, "model.num_attention_heads: found 0, expected 1 or more"),
        ({"num_conv_pos_embedding_groups": -4}, "model.num_conv_pos_embedding_groups: found -4, expected 1 or more"),
        ({"hidden_size": 10**9}, "model.hidden_size: found 1000000000, expected at most 1048576"),
        ({"conv_stride": (5, 2, 2, 2, 2, 2, 0)}, r"model.conv_stride: found \(5, .*\), expected 1 or more"),
        ({"mask_time_min_masks": -1}, "model.mask_time_min_masks: found -1, expected 0 or more"),
        ({"layer_norm_eps": -1.0}, "model.layer_norm_eps: found -1.0, expected 0 or more"),
    ],
)
def test_impossible_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        WavLMConfig.tiny(**changes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "wav2vec2"}, "model_type is 'wav2vec2', expected wavlm or hubert"),
        ({"num_feat_extract_layers": 6}, "num_feat_extract_layers is 6, conv_dim has 7 layers"),
        ({"add_adapter": True}, "add_adapter is True"),
    ],
)
def test_json_of_another_model_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        WavLMConfig.from_huggingface(values)
