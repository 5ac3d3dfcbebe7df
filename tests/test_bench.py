"""Benchmarks that nothing else calls still run: on little, without a look at their figures."""

import pytest

from bench import first_step, labels
from tests.support.tones import make_corpus, ten_texts
from tests.support.train_flags import parsed
from wavlm_jax.settings import read_sections
from wavlm_jax.training.start import RunSettings


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections' way to load a file
def test_the_launch_that_is_timed_has_flags_of_its_config():
    config, *overrides = first_step.FLAGS
    found = read_sections(parsed(config.removeprefix("--config="), *overrides).to_dict(), RunSettings)
    assert found.train.num_steps == 1
    assert found.metrics.log_every == 1


def test_labels_are_made_by_both_of_its_ways(tmp_path, monkeypatch):
    corpus = make_corpus(tmp_path, "train", ten_texts())
    for name, value in {"CLUSTERS": 4, "SAMPLE": 200}.items():
        monkeypatch.setattr(labels, name, value)
    for way in (labels._ours, labels._script):
        found = way(corpus)
        assert found["speed"] > 0
        assert found["peak_rss_mib"] > 0
