"""The command line on a CTC model that was exported to a Hugging Face folder: text out, and answers to wrong uses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from wavlm_jax.__main__ import main
from wavlm_jax.config import WavLMConfig
from wavlm_jax.convert.huggingface import export_huggingface
from wavlm_jax.model.head_config import HeadConfig, TaskHead
from wavlm_jax.model.heads import WavLMForCTC, tree_shapes
from wavlm_jax.text.vocabulary import Vocabulary
from wavlm_jax.text.vocabulary_files import write_vocabulary
from wavlm_jax.weights import Weights

CONFIG = WavLMConfig.tiny(num_hidden_layers=1)
HEAD = HeadConfig(vocab_size=5)
TOKENS = Vocabulary(tokens=("<pad>", "|", "A", "B", "C"), unknown=None, begin=None, end=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    params = jax.device_get(WavLMForCTC(CONFIG, HEAD).init(jax.random.key(1), jnp.zeros((1, 400)))["params"])
    params["lm_head"] = jax.tree.map(lambda leaf: leaf * 500, params["lm_head"])
    task = TaskHead("WavLMForCTC", HEAD, {"lm_head": params["lm_head"]})
    export_huggingface(Weights(CONFIG, params["wavlm"], None, task), folder / "ctc", tree_shapes)
    write_vocabulary(TOKENS, folder / "ctc")
    export_huggingface(Weights(CONFIG, params["wavlm"], None), folder / "encoder", tree_shapes)
    soundfile.write(folder / "a.wav", np.random.default_rng(0).normal(size=9_000) * 0.1, 16_000)
    return folder


def test_a_recording_is_transcribed_and_aligned(folder, capsys):
    recording, model = str(folder / "a.wav"), ["--model", str(folder / "ctc")]
    assert main(["transcribe", recording, *model]) == 0
    heard = json.loads(capsys.readouterr().out)
    assert heard["name"] == "a"
    assert [word["text"] for word in heard["words"]] == heard["text"].split()
    assert main(["align", recording, *model, "--text", "AB C", "--format", "ctm", "--out", str(folder / "o.ctm")]) == 0
    assert [line.split()[4] for line in (folder / "o.ctm").read_text().splitlines()] == ["AB", "C"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["embed", "a.wav", "--model", "ctc"],
            "a WavLMForCTC, which does transcribe, align; expected a WavLMForXVector",
        ),
        (["transcribe", "a.wav", "--model", "encoder"], "an encoder without a head, which does `features`"),
        (["align", "a.wav", "--model", "ctc", "--text", "XYZ"], "found 'X' (U+0058), 'Y' (U+0059), 'Z' (U+005A)"),
        (["transcribe", "b.wav", "--model", "ctc"], "b.wav: no such file"),
        (["transcribe", "a.wav", "--model", "ctc", "--lm", "none.arpa"], "none.arpa: no such file"),
        (["verify", "a.wav", "a.wav", "a.wav", "--model", "ctc"], "expected two recordings or one trial list"),
        (["transcribe", "a.wav", "--model", "nowhere"], "nowhere"),
    ],
)
def test_wrong_uses_are_answered(folder, capsys, monkeypatch, words, message):
    monkeypatch.chdir(folder)
    assert main(words) == 2
    assert message in capsys.readouterr().err
