"""Exports prove themselves: transformers loads them as they are, and what is not exact is not left behind."""

import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
import torch
import transformers
from safetensors.numpy import load_file

import wavlm_jax
from tests.support.foreign_layouts import HEAD_ROWS
from tests.support.head_twins import small_head, torch_head
from tests.support.speech import write_audio
from tests.support.torch_twins import small_config, torch_model, waveforms
from wavlm_jax import export
from wavlm_jax.convert import __main__ as command
from wavlm_jax.convert import compare, huggingface
from wavlm_jax.convert.state_dict import ConversionError
from wavlm_jax.model.heads import HEADS
from wavlm_jax.text.decoding import decode
from wavlm_jax.text.vocabulary import Vocabulary, read_vocabulary, write_vocabulary

ROOT = Path(__file__).parents[1]
TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "|", "A", "B", "C", "D", "E", "F")
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # transformers' own call


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def head():
    """A random pre-training head for a model 32 wide."""
    random = np.random.default_rng(0)
    projection = {"kernel": random.random((32, 24), np.float32), "bias": random.random(24, np.float32)}
    return {"final_proj": projection, "label_embeddings": random.random((HEAD_ROWS, 24), np.float32)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory, head):
    """A bare encoder, with a pre-training head and conventions of our own."""
    folder = tmp_path_factory.mktemp("plain")
    torch_model(small_config()).save_pretrained(folder)
    model = wavlm_jax.load(folder, "exact")
    config = dataclasses.replace(model.config, feature_grad_mult=0.1, normalize_eps=1e-5, layerdrop_first=True)
    return dataclasses.replace(model, config=config, weights=dataclasses.replace(model.weights, head=head))


@pytest.fixture(scope="module")
def ctc(tmp_path_factory):
    """A CTC model with its vocabulary."""
    folder = tmp_path_factory.mktemp("ctc")
    torch_head(HEADS["WavLMForCTC"].module, small_config(), small_head(final_dropout=0.0)).save_pretrained(folder)
    roles = {"blank": "<pad>", "delimiter": "|", "unknown": "<unk>", "begin": "<s>", "end": "</s>"}
    write_vocabulary(Vocabulary(tokens=TOKENS, do_lower_case=False, **roles), folder)
    return wavlm_jax.load(folder)


@pytest.fixture(scope="module")
def exported(ctc, tmp_path_factory):
    """What a user gets: the whole proof, in a process of its own."""
    folder = tmp_path_factory.mktemp("out") / "ctc"
    return folder, wavlm_jax.save_huggingface(ctc, folder)


def assert_same(found, expected) -> None:
    ours, theirs = found.current, expected.current
    assert json.dumps(dataclasses.asdict(ours.config)) == json.dumps(dataclasses.asdict(theirs.config))
    jax.tree.map(np.testing.assert_array_equal, dict(ours.tree), dict(theirs.tree))
    assert (ours.head is None) == (theirs.head is None)
    jax.tree.map(np.testing.assert_array_equal, ours.head, theirs.head)


def test_the_proof_names_its_error_in_the_card(exported, ctc):
    folder, proof = exported
    assert proof.max_error < 1e-4
    assert "logits" in proof.against
    card = (folder / "README.md").read_text()
    assert f"max error {proof.max_error:.2e} (tolerance 0.0001) against WavLMForCTC of transformers" in card
    assert "CC BY-SA 3.0" in card
    assert sorted(path.name for path in folder.parent.iterdir()) == ["ctc"]
    assert_same(wavlm_jax.load(folder), ctc)


def test_transformers_recognises_speech_as_we_do(exported, tmp_path):
    folder, _ = exported
    write_audio(tmp_path / "audio", 1, seed=3)
    (path,) = (tmp_path / "audio").iterdir()
    recogniser = transformers.pipeline("automatic-speech-recognition", model=str(folder))
    wave = soundfile.read(path, dtype="float32")[0]
    text = recogniser({"raw": wave, "sampling_rate": 16_000})["text"]
    model = wavlm_jax.load(folder)
    output = model(*model.inputs([wave]))
    ids = np.asarray(output.logits[0].argmax(axis=-1)).tolist()
    assert text
    assert decode(ids, read_vocabulary(folder)).text == text
    auto = transformers.AutoModel.from_pretrained(folder)
    with torch.no_grad():
        states = auto(torch.tensor(wave[None])).last_hidden_state
    np.testing.assert_allclose(output.last_hidden_state, states.numpy(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["WavLMModel", *(name for name, row in HEADS.items() if row.transformers)])
def test_all_five_classes_load_without_a_warning(name, tmp_path, caplog, plain):
    if name == "WavLMModel":
        model = plain
    else:
        torch_head(HEADS[name].module, small_config(), small_head()).save_pretrained(tmp_path / "theirs")
        model = wavlm_jax.load(tmp_path / "theirs")
    wavlm_jax.save_huggingface(model, tmp_path / "ours", compared=False)
    logger = logging.getLogger("transformers")
    logger.propagate = True
    with caplog.at_level(logging.WARNING):
        loaded, report = getattr(transformers, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    logger.propagate = False
    assert not {key: found for key, found in report.items() if found}
    assert not caplog.records
    assert type(loaded).__name__ == name
    result = compare.compare(tmp_path / "ours")
    assert result["max_error"] < 1e-4


def test_our_own_folder_keeps_what_hugging_face_has_no_place_for(plain, tmp_path):
    wavlm_jax.save_huggingface(plain, tmp_path / "out", compared=False)
    assert_same(wavlm_jax.load(tmp_path / "out"), plain)
    head = load_file(tmp_path / "out" / "pretraining_head.safetensors")
    assert {name: tensor.shape for name, tensor in head.items()} == {
        "final_proj.weight": (24, 32),
        "final_proj.bias": (24,),
        "label_embs_concat": (HEAD_ROWS, 24),
    }


@pytest.mark.parametrize(("dtype", "too_large"), [("float16", 1e5), ("bfloat16", 3.402e38)])
def test_half_precision(plain, tmp_path, dtype, too_large):
    proof = wavlm_jax.save_huggingface(plain, tmp_path / "out", dtype=dtype, compared=False)
    tensors = transformers.WavLMModel.from_pretrained(tmp_path / "out").state_dict()
    assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{dtype}"}
    assert proof.num_bytes == 2 * sum(tensor.numel() for tensor in tensors.values())
    assert compare.compare(tmp_path / "out")["max_error"] < 1e-4
    huge = {**plain.params, "masked_spec_embed": np.full(32, too_large, np.float32)}
    with pytest.raises(ConversionError, match="masked_spec_embed"):
        wavlm_jax.save_huggingface(dataclasses.replace(plain, params=huge), tmp_path / "huge", dtype=dtype)
    assert not list(tmp_path.glob("*huge*"))


def test_the_authors_layout_and_back(plain, ctc, tmp_path):
    wavlm_jax.save_microsoft(plain, tmp_path / "wavlm.pt", compared=False)
    assert not {"final_proj.weight", "label_embs_concat"} & set(torch.load(tmp_path / "wavlm.pt")["model"])
    assert wavlm_jax.load(tmp_path / "wavlm.pt").weights.head is None
    wavlm_jax.save_microsoft(plain, tmp_path / "wavlm.pt", compared=False, with_head=True)
    assert compare.compare(tmp_path / "wavlm.pt")["max_error"] < 1e-4
    back = wavlm_jax.load(tmp_path / "wavlm.pt")
    jax.tree.map(np.testing.assert_array_equal, back.params, plain.params)
    jax.tree.map(np.testing.assert_array_equal, back.weights.head, plain.weights.head)
    with pytest.raises(ValueError, match="no place for the head of a WavLMForCTC"):
        wavlm_jax.save_microsoft(ctc, tmp_path / "ctc.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["wavlm.pt"]


def test_a_failing_rename_leaves_the_older_export(plain, tmp_path, monkeypatch):
    wavlm_jax.save_huggingface(plain, tmp_path / "out", compared=False)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    rename = Path.rename

    def failing(self, target):
        if self.name.endswith(".unproved"):
            raise OSError(28, "no space left", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no space left"):
        wavlm_jax.save_huggingface(plain, tmp_path / "out", compared=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_an_export_that_is_not_exact_is_not_left_behind(plain, tmp_path, monkeypatch):
    """A wrong norm order, which no comparison of names and shapes would notice: transformers' numbers do."""
    right = huggingface.config_json

    def wrong(*arguments):
        return right(*arguments) | {"layer_norm_eps": 0.1}

    monkeypatch.setattr(huggingface, "config_json", wrong)
    # our own reading of the folder would follow the wrong config too, so the reference is the model that was meant
    monkeypatch.setattr(export, "compare_models", lambda path: compare_with(path, plain))
    with pytest.raises(export.NotProvedError, match=r"max error against transformers is .*, expected at most 0.0001"):
        wavlm_jax.save_huggingface(plain, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def compare_with(path: Path, meant) -> tuple[float, str]:
    theirs = compare._load_folder(path)
    waveform = waveforms((7000,))
    states = compare._run(theirs, waveform, None).last_hidden_state.numpy()
    found = compare.error(np.asarray(meant(waveform).last_hidden_state), states)
    export.check_error(found, path)
    return found, "what was meant"


def test_a_proof_that_cannot_run_leaves_nothing(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "check_file", lambda *_: (_ for _ in ()).throw(export.NotProvedError("broken disk")))
    for save, name in ((wavlm_jax.save_huggingface, "out"), (wavlm_jax.save_microsoft, "out.pt")):
        with pytest.raises(export.NotProvedError, match="broken disk"):
            save(plain, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_without_transformers_it_says_so(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "missing_packages", lambda: "torch not installed")
    proof = wavlm_jax.save_huggingface(plain, tmp_path / "out")
    assert proof.max_error is None
    assert "not compared with transformers: torch not installed" in (tmp_path / "out" / "README.md").read_text()


def test_only_our_own_folders_are_replaced(plain, tmp_path):
    wavlm_jax.save_huggingface(plain, tmp_path / "out", compared=False)
    (tmp_path / "out" / "model.safetensors").write_bytes(b"")
    wavlm_jax.save_huggingface(plain, tmp_path / "out", compared=False)
    assert_same(wavlm_jax.load(tmp_path / "out"), plain)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match="is not empty and was not written by wavlm_jax"):
        wavlm_jax.save_huggingface(plain, tmp_path / "mine", compared=False)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_the_command_line(plain, tmp_path, monkeypatch, capsys):
    wavlm_jax.save_huggingface(plain, tmp_path / "a", compared=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["convert", *arguments])
        code = command.main()
        return (code, *capsys.readouterr())

    source = str(tmp_path / "a")
    options = ("export", source, str(tmp_path / "w.pt"), "--to", "microsoft", "--no-compare", "--dtype", "float16")
    code, out, _ = run(*options)
    assert "left out: the pre-training head" in out
    code, out, _ = run(*options, "--with-head")
    assert (code, "left out" in out) == (0, False)
    assert "padding: exact" in out
    code, out, _ = run("import", str(tmp_path / "w.pt"), str(tmp_path / "b"), "--no-compare")
    assert code == 0
    assert "padding: microsoft" in out
    assert f"pre-training head: {HEAD_ROWS} label embeddings" in out
    assert "equal to the bit, all finite" in out
    code, _, err = run("import", str(tmp_path / "absent"), str(tmp_path / "c"))
    assert (code, (tmp_path / "c").exists()) == (2, False)
    assert "no model here" in err


def test_importing_the_package_is_cheap():
    code = "import sys, wavlm_jax; print(sorted({'jax', 'numpy', 'flax', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["[]"]


MEASURE = """
import resource, sys
from pathlib import Path
import jax
from wavlm_jax.loading import load_weights
from wavlm_jax.convert.huggingface import export_huggingface
from wavlm_jax.weights import ready
small, big, out = map(Path, sys.argv[1:])
def go(source, out):
    model = ready(load_weights(source))
    export_huggingface(model.current, out)
go(small, out / "small")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
go(big, out / "big")
assert "torch" not in sys.modules
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_of_an_import_and_an_export(plain, tmp_path):
    """The parameters and little more: below 1.3 times the file, whatever its size."""
    wavlm_jax.save_huggingface(plain, tmp_path / "small", compared=False)
    big = small_config(hidden_size=512, intermediate_size=4096, num_hidden_layers=8)
    torch_model(big).save_pretrained(tmp_path / "big")
    size = (tmp_path / "big" / "model.safetensors").stat().st_size
    arguments = [str(tmp_path / name) for name in ("small", "big", "out")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert size > 150e6
    assert int(done.stdout) < 1.3 * size
