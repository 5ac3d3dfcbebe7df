"""Bad inputs to every command, from a table.

    python -m tests.attacks.bad_inputs

Clean is: exit code 2, one message on stderr that names what was wrong, no traceback, nothing where the output would
stand, at most 2 GiB, at most 90 seconds. The table is the same for each seed; the seed is the order.
"""

import itertools
import json
import os
import re
import runpy
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

import wavlm_jax.__main__
import wavlm_jax.convert.__main__
import wavlm_jax.data.__main__
import wavlm_jax.inference.commands
import wavlm_jax.plan.report  # noqa: F401  all of them: a fork has them then
from tests.attacks import ROOT, Came, Tally, attempt, made, options

EXIT_WRONG = 2
_LINES, _CHARACTERS = 12, 6_000


class Bad(NamedTuple):
    """A bad input."""

    program: str
    """A module, or train.py."""
    words: tuple[str, ...]
    """{in} is the folder of the inputs, {out} what must not be there afterwards."""
    names: str
    """Regular expression of what the message has to name."""
    stdin: str = ""


MODEL = {
    "transcribe": "ctc",
    "align": "ctc",
    "embed": "speakers",
    "verify": "speakers",
    "diarize": "turns",
    "classify": "classes",
    "features": "encoder",
}
NEEDED = {"align": ("--text", "A"), "verify": ("{in}/b.wav",), "features": ("--layer", "1", "--out", "{out}")}


def inputs(root: Path) -> None:
    """Files that are wrong, each in its own way."""
    texts = {
        "words.wav": "these are words, no audio\n",
        "no_tab.tsv": "a A B\n",
        "twice.tsv": "a\tA\na\tB\n",
        "trials_label.txt": "2 a.wav b.wav\n",
        "trials_columns.txt": "1 a.wav\n",
        "turns.rttm": "SPEAKER a 1 zero 1.0 <NA> <NA> x <NA> <NA>\n",
        "nan.rttm": "SPEAKER a 1 nan 1.0 <NA> <NA> x <NA> <NA>\n",
        "other.rttm": "SPEAKER other 1 0 1.0 <NA> <NA> x <NA> <NA>\n",
        "words.uem": "a 1 0\n",
        "lm.arpa": "\\data\\\nngram 1=x\n",
        "empty.arpa": "",
        "manifest.tsv": "id\tsamples\nx\t1\n",
        "twice_id.tsv": "id\tpath\nx\ta.wav\nx\tb.wav\n",
        "escapes.tsv": "id\tpath\nx\t../../../../etc/passwd\n",
        "broken.jsonl": '{"id": "x", "path": "a.wav"}\n{"id": \n',
        "number.jsonl": '{"id": "x", "path": 7}\n',
        "list.jsonl": "[1, 2]\n",
        "nul.csv": "id,path\nx,a\0b.wav\n",
        "rows.parquet": "PAR1 and nothing else PAR1",
        "model.pt": "no archive, no pickle",
        "metrics.jsonl": "{broken\n",
        "no_step.jsonl": '{"a": 1}\n',
        "table.txt": "nothing\n",
    }
    for name, text in texts.items():
        (root / name).write_text(text)
    (root / "latin.tsv").write_bytes("a\tGr\xfc\xdfe\n".encode("latin-1"))
    (root / "binary.txt").write_bytes(bytes(range(256)) * 4)
    for name in ("empty", "texts", "list_config", "no_weights", "huge_config"):
        (root / name).mkdir(exist_ok=True)
    (root / "texts" / "notes.txt").write_text("no audio here")
    (root / "list_config" / "config.json").write_text("[]")
    config = json.loads((root / "encoder" / "config.json").read_text())
    (root / "no_weights" / "config.json").write_text(json.dumps(config))
    (root / "huge_config" / "config.json").write_text(json.dumps(config | {"hidden_size": 10**9}))
    weights = (root / "encoder" / "model.safetensors").read_bytes()
    for name in ("huge_config", "list_config"):
        (root / name / "model.safetensors").write_bytes(weights)


def of_use() -> Iterator[Bad]:
    """What all commands of `wavlm_jax` share, three kinds for each, and what is a command's own."""
    shared = {
        r"gone\.wav": ("{in}/gone.wav",),
        r"words\.wav": ("{in}/words.wav",),
        r"empty\.wav": ("{in}/empty.wav",),
        r"slow\.wav": ("{in}/slow.wav",),
        r"table\.txt": ("{in}/table.txt",),
        r"piece": ("{in}/a.wav", "--chunk-seconds", "0"),
        r"overlap": ("{in}/a.wav", "--overlap-seconds", "-1"),
        r"overlap.seconds": ("{in}/a.wav", "--overlap-seconds", "nan"),
        r"batch-seconds": ("{in}/a.wav", "--batch-seconds", "inf"),
        r"chunk-seconds": ("{in}/a.wav", "--chunk-seconds", "long"),
        r"step": ("{in}/a.wav", "--step", "3"),
        r"no such folder": ("{in}/a.wav", "--out", "{in}/nowhere/out.txt"),
        r"tpu": ("{in}/a.wav", "--device", "tpu"),
        r"in/empty": ("{in}/a.wav", "--model", "{in}/empty"),
        r"config\.json": ("{in}/a.wav", "--model", "{in}/list_config"),
        r"no_weights": ("{in}/a.wav", "--model", "{in}/no_weights"),
        r"hidden_size|huge_config": ("{in}/a.wav", "--model", "{in}/huge_config"),
        r"a\.wav": ("{in}/b.wav", "--model", "{in}/a.wav"),
        r"nowhere": ("{in}/a.wav", "--model", "{in}/nowhere"),
        r"unrecognized": ("{in}/a.wav", "--hop", "3"),
        r"encoder|head": ("{in}/a.wav", "--model", "{in}/encoder"),
    }
    commands = itertools.cycle(MODEL)
    for names, words in shared.items():
        chosen = list(itertools.islice(commands, 2))
        for command in chosen:
            if names == r"encoder|head" and command == "features":
                continue
            model = () if "--model" in words else ("--model", f"{{in}}/{MODEL[command]}")
            needed = tuple(w for w in NEEDED.get(command, ()) if not (w in ("--out", "{out}") and "--out" in words))
            yield Bad("wavlm_jax", (command, words[0], *needed, *words[1:], *model), names)
    own = {
        "transcribe": [
            (("--lm", "{in}/nowhere.arpa"), r"nowhere\.arpa"),
            (("--lm", "{in}/lm.arpa"), r"lm\.arpa"),
            (("--lm", "{in}/empty.arpa"), r"empty\.arpa"),
            (("--lexicon", "{in}/binary.txt"), r"binary\.txt"),
            (("--lm-weight", "1"), r"lm-weight"),
            (("--beam", "0"), r"beam"),
            (("--beam", "9999999999999"), r"beam"),
        ],
        "align": [
            (("--texts", "{in}/no_tab.tsv"), r"no_tab\.tsv"),
            (("--texts", "{in}/twice.tsv"), r"twice\.tsv"),
            (("--texts", "{in}/latin.tsv"), r"latin\.tsv"),
            (("--text", "@@@"), r"@|a\.wav"),
            (("--text", "A" * 5000), r"a\.wav"),
            (("--text", ""), r"text|a\.wav"),
        ],
        "diarize": [
            (("--threshold", "2"), r"threshold"),
            (("--fill-seconds", "-1"), r"fill"),
            (("--collar", "-1"), r"collar"),
            (("--uem", "{in}/words.uem"), r"reference"),
            (("--reference", "{in}/turns.rttm"), r"turns\.rttm"),
            (("--reference", "{in}/nan.rttm"), r"nan\.rttm"),
            (("--reference", "{in}/other.rttm"), r"reference|other"),
            (("--reference", "{in}/other.rttm", "--uem", "{in}/words.uem"), r"words\.uem"),
            (("--reference", "{in}/binary.txt"), r"binary\.txt"),
        ],
        "classify": [(("--top", "0"), r"top"), (("--top", "-3"), r"top")],
        "features": [
            (("--layer", "99", "--out", "{out}"), r"layer"),
            (("--layer", "-1", "--out", "{out}"), r"layer"),
            (("--layer", "1"), r"--out"),
            (("--layer", "1", "--out", "{in}/a.wav"), r"a\.wav"),
        ],
    }
    for command, rows in own.items():
        for words, names in rows:
            yield Bad("wavlm_jax", (command, "{in}/a.wav", *words, "--model", f"{{in}}/{MODEL[command]}"), names)
    for files, names in (
        (("{in}/trials_label.txt",), r"trials_label"),
        (("{in}/trials_columns.txt",), r"trials_columns"),
        (("{in}/binary.txt",), r"binary\.txt"),
        (("{in}/a.wav", "{in}/b.wav", "{in}/a.flac"), r"FILES"),
    ):
        yield Bad("wavlm_jax", ("verify", *files, "--model", "{in}/speakers"), names)
    yield Bad("wavlm_jax", ("transcribe", "-", "--model", "{in}/ctc"), r"stdin")


def of_data() -> Iterator[Bad]:
    rows: list[tuple[tuple[str, ...], str]] = [
        (("{in}/nowhere",), r"nowhere"),
        (("{in}/empty",), r"empty"),
        (("{in}/texts",), r"texts"),
        (("{in}/manifest.tsv",), r"manifest\.tsv"),
        (("{in}/twice_id.tsv",), r"twice_id|'?x'?"),
        (("{in}/escapes.tsv",), r"escapes|passwd"),
        (("{in}/broken.jsonl",), r"broken\.jsonl"),
        (("{in}/number.jsonl",), r"number\.jsonl"),
        (("{in}/list.jsonl",), r"list\.jsonl"),
        (("{in}/nul.csv",), r"nul\.csv"),
        (("{in}/rows.parquet",), r"rows\.parquet"),
        (("{in}/a.wav",), r"a\.wav"),
        (("{in}/audio/train", "--holdout", "2"), r"holdout"),
        (("{in}/audio/train", "--holdout", "nan"), r"holdout"),
        (("{in}/audio/train", "--min-seconds", "9", "--max-seconds", "1"), r"seconds|samples"),
        (("{in}/audio/train", "--workers", "many"), r"workers"),
        (("{in}/audio/train", "--fault-cap", "-1"), r"fault-cap"),
        (("{in}/audio/train", "--rttm", "{in}/nowhere.rttm"), r"nowhere\.rttm"),
        (("{in}/audio/train", "--rttm", "{in}/turns.rttm"), r"turns\.rttm"),
        (("{in}/audio/train", "--rttm", "{in}/texts"), r"texts|rttm"),
        (("{in}/audio/train", "--split", "dev"), r"split|dev"),
        (("{in}/audio/train", "--id-column", "nothing"), r"id-column"),
        (("{in}/audio/train", "--root", "{in}/nowhere"), r"nowhere"),
    ]
    for words, names in rows:
        yield Bad("wavlm_jax.data", (*words, "--out", "{out}"), names)
    yield Bad("wavlm_jax.data", ("{in}/audio/train", "--out", "{in}/a.wav"), r"a\.wav")
    for words, names in (
        (("verify", "{in}/nowhere"), r"nowhere"),
        (("verify", "{in}/empty"), r"empty"),
        (("verify", "{in}/a.wav"), r"a\.wav"),
        (("demo", "--out", "{out}", "--voices", "0"), r"voices"),
        (("demo", "--out", "{out}", "--sentences", "-1"), r"sentences"),
        (("demo", "--out", "{out}", "--voices", "1000000000"), r"voices"),
        (("simulate", "{in}/nowhere", "--out", "{out}"), r"nowhere"),
        (("simulate", "{in}/corpus/train", "--out", "{out}", "--snr-db", "nan", "nan"), r"snr-db"),
        (("simulate", "{in}/corpus/train", "--out", "{out}", "--speakers", "0"), r"speakers"),
        (("simulate", "{in}/corpus/train", "--out", "{out}", "--conversations", "3"), r"speaker"),
    ):
        yield Bad("wavlm_jax.data", words, names)


def of_convert() -> Iterator[Bad]:
    rows: list[tuple[tuple[str, ...], str]] = [
        (("import", "{in}/nowhere", "{out}"), r"nowhere"),
        (("import", "{in}/empty", "{out}"), r"empty"),
        (("import", "{in}/model.pt", "{out}"), r"model\.pt"),
        (("import", "{in}/list_config", "{out}"), r"config\.json"),
        (("import", "{in}/huge_config", "{out}"), r"hidden_size|huge_config"),
        (("import", "{in}/encoder", "{out}", "--step", "3"), r"step"),
        (("import", "{in}/encoder", "{out}", "--heads", "7"), r"heads"),
        (("import", "{in}/encoder", "{out}", "--dtype", "int8"), r"dtype"),
        (("import", "{in}/encoder", "{in}/a.wav", "--no-compare"), r"a\.wav"),
        (("import", "{in}/corpus/train", "{out}"), r"train"),
        (("export", "{in}/ctc", "{out}", "--to", "microsoft"), r"head|fine-tuned|WavLMForCTC"),
        (("export", "{in}/encoder", "{out}", "--to", "onnx"), r"onnx"),
        (("export", "{in}/encoder", "{in}/empty", "--to", "microsoft", "--no-compare"), r"empty"),
        (("export", "{in}/run", "{out}", "--to", "huggingface", "--step", "99"), r"99"),
    ]
    for words, names in rows:
        yield Bad("wavlm_jax.convert", words, names)


def of_configs() -> Iterator[Bad]:
    """train.py, the planner, labels, curves."""
    overrides = {
        "train.num_steps=-5": "num_steps",
        "train.num_steps=1e99": "num_steps",
        "train.eval_splits=('dev',)": "dev|eval_splits",
        "train.eval_every=0": "eval_every",
        "train.max_step_seconds=nan": "max_step_seconds",
        "optim.name=adagrab": "adagrab",
        "optim.learning_rate=-1.0": "learning_rate",
        "optim.learning_rate=inf": "learning_rate",
        "optim.warmup_steps=-4": "warmup",
        "batch.buckets=()": "buckets",
        "batch.buckets=(0,)": "buckets",
        "batch.seconds_per_update=1e9": "seconds_per_update|memory",
        "batch.row_multiple=0": "row_multiple",
        "model.hidden_size=33": "hidden_size|heads",
        "model.hidden_size=1000000000": "hidden_size",
        "model.num_attention_heads=0": "num_attention_heads",
        "model.conv_dim=(32,)": "conv",
        "model.layerdrop=1.5": "layerdrop",
        "mixing.prob=1.5": "prob",
        "mixing.group=0": "group",
        "mesh.tensor=3": "mesh|devices",
        "mesh.data=0": "data",
        "checkpoint.every=0": "every",
        "checkpoint.keep_last=-1": "keep_last",
        "metrics.log_every=0": "log_every",
        "labels.num_clusters=0": "num_clusters",
        "labels.num_clusters=70000": "num_clusters",
        "labels.kmeans.passes=-1": "passes",
        "labels.path={in}/a.wav": r"a\.wav",
        "data.train={in}/a.wav": r"a\.wav",
        "data.evaluation=('{in}/nowhere',)": "nowhere",
        "data.evaluation_buckets=(10,)": "evaluation_buckets",
        "init.path={in}/nowhere": "nowhere|init",
        "seed=1180591620717411303424": "seed",
        "task=translation": "task|translation",
        "compute.dtype=float8": "dtype|float8",
        "masking.prob=-0.5": "prob",
        "nothing.here=1": "nothing",
    }
    for override, names in overrides.items():
        yield Bad("train.py", ("{flags}", "--workdir={out}", f"--config.{override}"), names)
    yield Bad("train.py", ("{flags}", "--workdir={in}/a.wav"), r"a\.wav")
    yield Bad("train.py", ("{flags}", "--workdir=/proc/nothing/here"), r"/proc")
    yield Bad("train.py", ("--config=configs/pretrain/nothing.py", "--workdir={out}"), r"nothing\.py")
    yield Bad("train.py", ("--config=configs/pretrain/demo.py:v9", "--workdir={out}"), r"v9")
    plans = {
        "--topology=v9z:2x2": "v9z",
        "--topology=v5e:0x0": "v5e:0x0",
        "--topology=v5e:3": "v5e:3",
        "--topology=v5e:2x2 --slices=0": "slices",
        "--topology=v5e:2x2 --memory_gib=-1": "memory",
        "--topology=v5e:2x2 --config.task=translation": "translation",
        "--topology=v5e:2x2 --config.model.num_hidden_layers=0": "num_hidden_layers",
        "--topology=v5e:2x2 --config.batch.buckets=(-4,)": "buckets",
        "--topology=": "topology",
    }
    for words, names in plans.items():
        yield Bad("wavlm_jax.plan", ("--config=configs/pretrain/demo.py", *words.split()), names)
    labels = {
        "--layer=3": "layer|teacher",
        "--teacher={in}/nowhere --layer=1 --out={out}": "nowhere",
        "--teacher={in}/encoder --layer=99 --out={out}": "layer",
        "--teacher={in}/encoder --layer=1 --step=3 --out={out}": "step",
        "--clusters=1 --out={out}": "clusters",
        "--clusters=1000000 --out={out}": "clusters",
        "--clusters=60000 --out={out}": "clusters|frames",
        "--out={in}/a.wav": r"a\.wav",
        "--config.labels.rate_hz=33 --out={out}": "rate_hz",
        "--config.labels.sample_seconds=0.0 --out={out}": "sample_seconds",
    }
    for words, names in labels.items():
        yield Bad("pretrain.make_labels", ("{flags}", *words.split()), names)
    for words, names in (
        (("{in}/nowhere.jsonl", "--out", "{out}"), r"nowhere\.jsonl"),
        (("{in}/metrics.jsonl", "--out", "{out}"), r"metrics\.jsonl"),
        (("{in}/no_step.jsonl", "--out", "{out}"), r"in none of"),
        (("{in}/a.wav", "--out", "{out}"), r"a\.wav"),
    ):
        yield Bad("pretrain.curves", words, names)


def start(bad: Bad, words: list[str]) -> None:
    """The program as `python -m` starts it, in this process."""
    sys.argv = [bad.program, *words]
    os.chdir(ROOT)
    if bad.program == "train.py":
        runpy.run_path("train.py", run_name="__main__")
    else:
        package = (ROOT / bad.program.replace(".", "/")).is_dir()
        name = f"{bad.program}.__main__" if package else bad.program
        sys.modules.pop(name, None)
        runpy.run_module(name, run_name="__main__", alter_sys=True)


def fault_of(bad: Bad, came: Came, out: Path) -> str | None:
    """What was not clean."""
    if fault := came.fault():
        return fault
    if came.code != EXIT_WRONG:
        return f"exit code {came.code}: {came.err.strip()[-200:]}"
    said = [line for line in came.err.splitlines() if line.strip()]
    if not re.search(bad.names, re.sub(r"(?s)usage:.*?(?=\n\S)", "", came.err)):
        return f"does not name {bad.names}: {' / '.join(said)[-300:]}"
    usage = came.err.startswith("usage:")
    if len(came.err) > _CHARACTERS or (len(said) > _LINES and not usage):
        return f"{len(said)} lines, {len(came.err)} characters of message"
    allowed = {"error.txt", ".owner.json", "request.json"}  # why a workdir was refused, what labels were asked for
    left = [str(path.relative_to(out.parent)) for path in out.parent.rglob("*") if path.is_file()]
    left = [name for name in left if Path(name).name not in allowed]
    return f"left on the disk: {left[:5]}" if left else None


def shown(bad: Bad) -> str:
    words = [word if len(word) < 60 else f"{word[:20]}..." for word in bad.words]
    return f"{bad.program} {' '.join(words)}"


def main() -> int:
    given, tally = options(__doc__, 1000), Tally()
    root = given.work / "in"
    root.mkdir(exist_ok=True)
    if not (root / "flags.json").exists():
        made.all_in(root, given.work)
    attempt(partial(inputs, root), given.work)
    flags = ["--config=configs/pretrain/demo.py", *json.loads((root / "flags.json").read_text())]
    bads = [*of_use(), *of_data(), *of_convert(), *of_configs()]
    order = np.random.default_rng(given.seed).permutation(len(bads))[: given.count]
    for number, index in enumerate(order):
        bad, folder = bads[index], given.work / "try" / f"{number:03d}"
        if given.only not in shown(bad):
            continue
        (folder / "place").mkdir(parents=True, exist_ok=True)
        out = folder / "place" / "out"
        words = [word.replace("{in}", str(root)).replace("{out}", str(out)) for word in bad.words]
        words = flags + words[1:] if words[0] == "{flags}" else words
        came = attempt(partial(start, bad, words), folder)
        line = (came.err.strip().splitlines() or [""])[-1 if "(traceback:" not in came.err else -2]
        what = f"{came.code}, {came.seconds:.1f} s, {came.memory / 2**20:.0f} MiB: {line[:160]}"
        tally.add(shown(bad), bad.program, what, fault_of(bad, came, out))
    return tally.close()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(main())
