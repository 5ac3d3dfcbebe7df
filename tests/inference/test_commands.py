"""The command line on exported Hugging Face folders: what transformers' classes say too, and answers to wrong uses."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
import transformers

import wavlm_jax
from tests.support.inference_models import TOKENS, weights_of
from wavlm_jax.__main__ import main
from wavlm_jax.convert.huggingface import export_huggingface
from wavlm_jax.inference import work
from wavlm_jax.inference.running import InferenceSettings
from wavlm_jax.text.records import read_rttm, write_rttm
from wavlm_jax.text.vocabulary import write_vocabulary

KINDS = {
    "ctc": "WavLMForCTC",
    "speakers": "WavLMForXVector",
    "classes": "WavLMForSequenceClassification",
    "turns": "WavLMForAudioFrameClassification",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    for name, kind in KINDS.items():
        labels = ("cat", "dog", "owl") if name == "classes" else None
        weights = weights_of(kind, 500 if name == "ctc" else 30, labels=labels)
        export_huggingface(weights, folder / name)
    write_vocabulary(TOKENS, folder / "ctc")
    export_huggingface(replace(weights, task=None), folder / "encoder")
    random = np.random.default_rng(0)
    soundfile.write(folder / "a.wav", random.normal(size=9_000) * 0.1, 16_000)
    soundfile.write(folder / "b.wav", random.normal(size=12_000) * np.linspace(0, 0.2, 12_000), 16_000)
    soundfile.write(folder / "slow.wav", random.normal(size=9_000) * 0.1, 8_000)
    soundfile.write(folder / "empty.wav", np.zeros(0), 16_000)
    (folder / "trials.txt").write_text("1 a.wav a.wav\n0 a.wav b.wav\n")
    (folder / "lost.txt").write_text("1 a.wav a.wav\n0 a.wav gone.wav\n")
    return folder


def test_a_recording_is_transcribed_and_aligned(folder, capsys):
    recording, model = str(folder / "a.wav"), ["--model", str(folder / "ctc")]
    assert main(["transcribe", recording, *model]) == 0
    heard = json.loads(capsys.readouterr().out)
    assert heard["name"] == "a"
    assert [word["text"] for word in heard["words"]] == heard["text"].split()
    assert main(["align", recording, *model, "--text", "AB C", "--format", "ctm", "--out", str(folder / "o.ctm")]) == 0
    assert [line.split()[4] for line in (folder / "o.ctm").read_text().splitlines()] == ["AB", "C"]


def stdin(content):
    return io.TextIOWrapper(io.BytesIO(content))


def theirs(folder, kind, name, file):
    """What transformers' class says of a file."""
    model = getattr(transformers, kind).from_pretrained(folder / name).eval()
    wave = soundfile.read(folder / file, dtype="float32")[0]
    with torch.no_grad():
        return model(torch.from_numpy(wave)[None])


def test_embeddings_are_those_of_transformers(folder, capsys):
    files, model = [str(folder / "a.wav"), str(folder / "b.wav")], ["--model", str(folder / "speakers")]
    assert main(["embed", *files, *model]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert main(["embed", *files, *model, "--out", str(folder / "e.npy")]) == 0
    stored = np.load(folder / "e.npy")
    assert json.loads((folder / "e.json").read_text()) == files
    for line, row, file in zip(lines, stored, files, strict=True):
        expected = theirs(folder, "WavLMForXVector", "speakers", file).embeddings[0].numpy()
        np.testing.assert_allclose(line["embedding"], expected / np.linalg.norm(expected), atol=1e-5)
        np.testing.assert_allclose(row, line["embedding"], atol=1e-6)


def test_two_files_and_a_trial_list_are_scored_alike(folder, capsys, monkeypatch):
    model = ["--model", str(folder / "speakers")]
    assert main(["verify", str(folder / "a.wav"), str(folder / "b.wav"), *model]) == 0
    pair = capsys.readouterr().out.split("\t")[0]
    assert main(["verify", str(folder / "a.wav"), str(folder / "a.wav"), *model]) == 0
    assert capsys.readouterr().out.startswith("1.000000\t")
    (folder / "one_kind.txt").write_text("1 a.wav a.wav\n")
    monkeypatch.setattr("sys.stdin", stdin(f"{folder / 'one_kind.txt'}\n".encode()))
    assert main(["verify", "-", "--root", str(folder), *model]) == 0
    assert "no error rate: all 1 trials are of one kind" in capsys.readouterr().err
    assert main(["verify", str(folder / "trials.txt"), "--root", str(folder), *model]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ["1.000000\t1\ta.wav\ta.wav", f"{pair}\t0\ta.wav\tb.wav"]
    assert "EER 0.00 %" in err


@pytest.mark.parametrize(
    ("command", "name", "flags"),
    [
        ("transcribe", "ctc", ["--format", "tsv"]),
        ("align", "ctc", ["--texts", "texts.tsv"]),
        ("embed", "speakers", []),
        ("verify", "speakers", ["--root", "."]),
        ("classify", "classes", []),
        ("diarize", "turns", ["--threshold", "0.01"]),
    ],
)
def test_answers_that_were_there_outlive_a_damaged_file(folder, capsys, monkeypatch, command, name, flags):
    """Its header is right and its end is missing, so it is found when it is its turn, after the shorter one."""
    monkeypatch.chdir(folder)
    soundfile.write("half.flac", np.random.default_rng(2).normal(size=64_000) * 0.1, 16_000)
    whole = (folder / "half.flac").read_bytes()
    (folder / "half.flac").write_bytes(whole[: len(whole) // 2])
    (folder / "texts.tsv").write_text("half\tAB\na\tC\n")
    (folder / "half.txt").write_text("0 half.flac a.wav\n")
    files = ["half.txt"] if command == "verify" else ["half.flac", "a.wav"]
    assert main([command, *files, "--model", name, "--out", f"{command}.out", "--strict", *flags]) == 2
    err = capsys.readouterr().err
    assert "half.flac" in err
    assert f"stopped; answers of 1 of 2 recordings are in {command}.out.partial" in err
    assert not (folder / f"{command}.out").exists()
    assert main([command, "a.wav", *(["a.wav"] if command == "verify" else []), "--model", name, *flags]) == 0
    alone = capsys.readouterr().out
    assert alone
    kept = (folder / f"{command}.out.partial").read_text()
    assert kept == alone if command != "verify" else json.loads(kept)["name"] == "a"


def test_answers_that_were_there_outlive_sigterm(folder, capsys, monkeypatch):
    """It comes when the first of two recordings is done."""
    monkeypatch.setattr(work, "progress_bar", lambda *_: lambda _: signal.raise_signal(signal.SIGTERM))
    files = [str(folder / name) for name in ("b.wav", "a.wav")]
    out = folder / "ended.tsv"
    call = ["transcribe", *files, "--model", str(folder / "ctc"), "--format", "tsv", "--out", str(out)]
    with pytest.raises(SystemExit) as ended:
        main([*call, "--batch-seconds", "0.1"])
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    monkeypatch.undo()
    assert not out.exists()
    assert "stopped; answers of 1 of 2 recordings are in" in capsys.readouterr().err
    kept = (folder / "ended.tsv.partial").read_text()
    assert kept.startswith("a\t")
    assert main(call) == 0
    assert kept in out.read_text()


def test_classes_are_those_of_transformers(folder, capsys):
    assert main(["classify", str(folder / "b.wav"), "--model", str(folder / "classes"), "--top", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    logits = theirs(folder, "WavLMForSequenceClassification", "classes", "b.wav").logits[0]
    expected = dict(zip(("cat", "dog", "owl"), logits.softmax(dim=0).tolist(), strict=True))
    assert found["classes"] == pytest.approx(expected, abs=1e-5)
    assert found["label"] == max(expected, key=expected.get)


def test_a_regression_says_its_numbers_and_a_name_that_was_changed_is_said(folder, capsys):
    config = json.loads((folder / "classes" / "config.json").read_text()) | {"problem_type": "regression"}
    shutil.copytree(folder / "classes", folder / "numbers")
    (folder / "numbers" / "config.json").write_text(json.dumps(config))
    for name in ("call 1.wav", "call_1.wav"):
        shutil.copy(folder / "b.wav", folder / name)
    calls = [str(folder / "call 1.wav"), str(folder / "call_1.wav")]
    assert main(["classify", *calls, "--model", str(folder / "numbers"), "--top", "1"]) == 0
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    logits = theirs(folder, "WavLMForSequenceClassification", "numbers", "b.wav").logits[0].tolist()
    assert found[0]["values"] == pytest.approx(dict(zip(("cat", "dog", "owl"), logits, strict=True)), abs=1e-5)
    assert "label" not in found[0]
    assert found[0]["name"] != found[1]["name"]
    assert f"{calls[0]} as {found[0]['name']}" in err


def test_turns_are_those_of_transformers(folder):
    """Frames that transformers' class holds for speech, gaps under 0.2 s filled, then turns under 0.1 s left out."""
    out = folder / "b.rttm"
    assert main(["diarize", str(folder / "b.wav"), "--model", str(folder / "turns"), "--out", str(out)]) == 0
    found = [(turn.speaker, round(turn.start / 0.02), round(turn.end / 0.02)) for turn in read_rttm(out)]
    logits = theirs(folder, "WavLMForAudioFrameClassification", "turns", "b.wav").logits[0].numpy()
    expected = []
    for speaker, active in enumerate((logits > 0).T, 1):
        text = "".join("x" if frame else "." for frame in active)
        text = re.sub(r"(?<=x)\.{1,9}(?=x)", lambda gap: "x" * len(gap[0]), text)
        expected += [(f"speaker{speaker}", *run.span()) for run in re.finditer("x{5,}", text)]
    assert sorted(found) == sorted(expected)
    assert len(expected) > 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["embed", "a.wav", "--model", "ctc"],
            "a WavLMForCTC, which does transcribe, align; expected a WavLMForXVector",
        ),
        (["transcribe", "a.wav", "--model", "encoder"], "an encoder without a head, which does `features`"),
        (["align", "a.wav", "--model", "ctc", "--text", "XYZ"], "found 'X' (U+0058), 'Y' (U+0059), 'Z' (U+005A)"),
        (["transcribe", "c.wav", "--model", "ctc"], "c.wav: no such file"),
        (["transcribe", "slow.wav", "--model", "ctc"], "8000"),
        (["classify", "empty.wav", "--model", "classes"], "empty.wav"),
        (["verify", "lost.txt", "--model", "speakers"], "gone.wav"),
        (["transcribe", "a.wav", "--model", "ctc", "--lm", "none.arpa"], "none.arpa: no such file"),
        (["transcribe", "a.wav", "--model", "ctc", "--lm-weight", "3"], "--lm-weight: found without --lm"),
        (["transcribe", "a.wav", "--model", "ctc", "--beam", "2", "--word-score", "3"], "found without --lexicon"),
        (
            ["verify", "a.wav", "--model", "speakers"],
            "one file is taken for a trial list, to compare recordings name two",
        ),
        (["verify", "a.wav", "a.wav", "a.wav", "--model", "ctc"], "expected two recordings or one trial list"),
        (["transcribe", "a.wav", "--model", "nowhere"], "nowhere"),
        (["transcribe", "a.wav", "--model", "ctc", "--chunk-seconds", "0"], "found a piece of 0.0 s"),
        (["diarize", "a.wav", "--model", "turns", "--score-windows", "3"], "--reference, with what, is missing"),
        (["classify", "a.wav", "--model", "classes", "--top", "0"], "--top: found 0"),
        (["diarize", "a.wav", "--model", "turns", "--threshold", "2"], "threshold: found 2.0"),
        (["diarize", "a.wav", "--model", "turns", "--collar", "-1"], "--collar, --score-windows: found -1.0, None"),
    ],
)
def test_wrong_uses_are_answered(folder, capsys, monkeypatch, words, message):
    monkeypatch.chdir(folder)
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_a_device_that_is_not_there_is_named(folder):
    """In a process of its own: JAX looks for devices once. Where its package lacks the plugin it only asserts."""
    words = [sys.executable, "-m", "wavlm_jax", "transcribe", str(folder / "a.wav"), "--model", str(folder / "ctc")]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run([*words, "--device", "gpu"], capture_output=True, text=True, check=False, env=hidden)
    assert found.returncode == 2
    assert "--device gpu: JAX finds none" in found.stderr
    assert "Traceback" not in found.stderr


def test_what_cannot_be_written_is_said_before_anything_is_computed(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match="2"):
        main(["transcribe", "a.wav", "--model", "ctc", "--out", "gone/a.json"])
    assert "--out: gone: no such folder" in capsys.readouterr().err


def test_a_recording_has_one_text(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "two.tsv").write_text("a\tAB\na\tAB\na\tCB\n")
    assert main(["align", "a.wav", "--model", "ctc", "--texts", "two.tsv"]) == 2
    assert "two.tsv, line 3: found a second text of a, expected one" in capsys.readouterr().err


def test_python_says_what_the_command_line_says(folder, capsys):
    """Each call of `wavlm_jax` on a loaded model, against the records of the command of the same name."""
    file, other = folder / "a.wav", folder / "b.wav"
    ctc, speakers, classes, turns = (wavlm_jax.load(folder / name) for name in KINDS)

    def lines(command, name, *words):
        assert main([command, str(other), str(file), "--model", str(folder / name), *words]) == 0
        return capsys.readouterr().out

    heard = [json.loads(line)["text"] for line in lines("transcribe", "ctc").splitlines()]
    assert [found.text for found in wavlm_jax.transcribe(ctc, [other, str(file)])] == heard
    aligned = wavlm_jax.align(ctc, {other: "AB C", file: "B"})
    assert [[word.text for word in one.transcript.words] for one in aligned] == [["AB", "C"], ["B"]]
    embedded = [json.loads(line)["embedding"] for line in lines("embed", "speakers").splitlines()]
    np.testing.assert_allclose(wavlm_jax.embed(speakers, [other, file]), embedded, atol=1e-6)
    assert wavlm_jax.verify(speakers, other, file) == pytest.approx(float(lines("verify", "speakers").split()[0]))
    assert wavlm_jax.verify(speakers, file, file) == pytest.approx(1.0)
    named = [json.loads(line)["label"] for line in lines("classify", "classes").splitlines()]
    assert [answers[0].label for answers in wavlm_jax.classify(classes, [other, file])] == named
    written = "".join(write_rttm(found) for found in wavlm_jax.diarize(turns, [other, file]))
    assert written == lines("diarize", "turns")
    slow = folder / "slow.wav"
    with pytest.raises(ValueError, match=r"found 8000 Hz.*resampling=True"):
        wavlm_jax.classify(classes, [slow])
    assert wavlm_jax.classify(classes, [slow], InferenceSettings(resampling=True))[0][0].label in ("cat", "dog", "owl")
    with pytest.raises(ValueError, match="a WavLMForCTC, which does transcribe, align; expected a WavLMForXVector"):
        wavlm_jax.embed(ctc, [file])
