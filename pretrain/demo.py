"""The main job from nothing to a model that is used, in minutes on a laptop.

python -m pretrain.demo --out runs/demo [--data FOLDER] [--smoke]

Corpus, labels, pre-training, labels of a layer, export; where the corpus has transcripts and speakers, also fine-tuning
for recognition and for speakers, and answers about new recordings. Every stage is a command that a person could type;
it is printed before it runs, and its results are reused when the demo is started again. The last line on stdout is one
JSON object with the results.
"""

import argparse
import itertools
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from pretrain.curves import draw, read_records
from pretrain.labels import LabelHeader, LabelStore
from wavlm_jax.files import named


def python(*arguments: str) -> None:
    """Prints a command, then runs it with this interpreter.

    Raises:
        SystemExit: it failed; its own message has been printed.

    """
    print("\n$ python " + shlex.join(arguments), flush=True)
    code = subprocess.run([sys.executable, *arguments], check=False).returncode  # noqa: S603  our own arguments
    if code:
        sys.exit(code)


_USE_SMOKE = (
    "--config.train.num_steps=4",
    "--config.optim.warmup_steps=2",
    "--config.train.eval_every=4",
    "--config.checkpoint.every=4",
    "--config.metrics.log_every=2",
)
"""Overrides for `--smoke`, of every fine-tuning config."""


class Use(NamedTuple):
    """Fine-tuning and using the pre-trained model: folders, and what each step runs."""

    corpus: Path
    body: Path
    """The pre-trained run."""
    out: Path
    smoke: bool

    def column(self, split: str, name: str) -> list[str]:
        """A column of the corpus, one string per utterance; "" where the corpus has none."""
        return list(datasets.load_from_disk(str(self.corpus / split))[name])

    def train(self, config: str, run: Path, split: str, *flags: str) -> dict[str, Any]:
        """Fine-tunes and evaluates on a split; returns the last value of every metric."""
        python(
            "train.py",
            f"--config={config}",
            f"--workdir={run}",
            f"--config.init.path={self.body}",
            f"--config.data.train={self.corpus / 'train'}",
            f"--config.data.evaluation={(str(self.corpus / split),)!r}",
            f"--config.train.eval_splits={(split,)!r}",
            *flags,
            *(_USE_SMOKE if self.smoke else ()),
        )
        return {name: value for record in read_records(run / "metrics.jsonl") for name, value in record.items()}

    def write_out(self, split: str, chosen: Sequence[int]) -> dict[Path, str]:
        """Writes utterances as FLAC files named after their ids; returns file -> text."""
        rows = datasets.load_from_disk(str(self.corpus / split))
        (self.out / "new").mkdir(parents=True, exist_ok=True)
        said = {}
        for row in (rows[index] for index in chosen):
            file = self.out / "new" / f"{row['id'].replace('/', '-')}.flac"
            file.write_bytes(row["audio"]["bytes"])
            said[file] = row["text"]
        return said


def use(where: Use) -> dict[str, Any]:
    """Runs what the corpus allows (transcripts, speakers); returns the figures for the report."""
    found: dict[str, Any] = {}
    if any(where.column("train", "text")) and any(where.column("valid", "text")):
        found |= recognise(where)
    split = "unseen_voices" if (where.corpus / "unseen_voices").is_dir() else "valid"
    voices = where.column(split, "speaker")
    chosen = triple(voices)
    if len(set(where.column("train", "speaker"))) > 1 and chosen is not None:
        found |= verify(where, split, voices, chosen)
    return found


def recognise(where: Use) -> dict[str, Any]:
    """Fine-tunes for recognition and transcribes two held-out utterances."""
    run, texts = where.out / "recognition", where.out / "transcripts.tsv"
    last = where.train("configs/finetune/ctc.py:demo", run, "valid")
    said = where.write_out("valid", (0, 1))
    ask = ("--model", str(run), "--format", "tsv", "--out", str(texts))
    python("-m", "wavlm_jax", "transcribe", *map(str, said), *ask)
    heard = [line.partition("\t")[2] for line in texts.read_text(encoding="utf-8").splitlines()]
    for text, found in zip(said.values(), heard, strict=True):
        print(f"said:  {text}\nheard: {found}", flush=True)
    return {"cer": last["valid/cer"], "wer": last["valid/wer"], "said": list(said.values()), "heard": heard}


def verify(where: Use, split: str, voices: Sequence[str], chosen: tuple[int, int, int]) -> dict[str, Any]:
    """Fine-tunes for speakers and compares voices: the same one twice, and two different ones."""
    run, all_trials, trials = where.out / "speakers", where.out / "all_trials.txt", where.out / "trials.txt"
    some = sorted({*chosen, *np.random.default_rng(0).permutation(len(voices))[:MOST_TRIED].tolist()})
    ids = where.column(split, "id")
    pairs = ((int(voices[i] == voices[j]), ids[i], ids[j]) for i, j in itertools.combinations(some, 2))
    all_trials.write_text("".join(f"{same} {left} {right}\n" for same, left, right in pairs), encoding="utf-8")
    listed = f"--config.trials={(str(all_trials),)!r}"
    last = where.train("configs/finetune/speaker_xvector.py:speakers", run, split, *SPEAKERS, listed)
    one, again, other = where.write_out(split, chosen)
    trials.write_text(f"1 {one.name} {again.name}\n0 {one.name} {other.name}\n", encoding="utf-8")
    scores = where.out / "scores.tsv"
    ask = ("--root", str(one.parent), "--model", str(run), "--out", str(scores))
    python("-m", "wavlm_jax", "verify", str(trials), *ask)
    print(scores.read_text(encoding="utf-8"), end="", flush=True)
    same, different = (float(line.split("\t")[0]) for line in scores.read_text(encoding="utf-8").splitlines())
    return {"eer": last[f"{split}/eer"], "same_voice": same, "other_voice": different}


SPEAKERS = (
    "--config.train.num_steps=160",
    "--config.train.eval_every=160",
    "--config.checkpoint.every=160",
    "--config.optim.warmup_steps=20",
    "--config.batch.buckets=(96,)",
)
"""Fewer updates than the preset and one batch shape to compile, so that the demo takes minutes."""
MOST_TRIED = 40
"""Utterances compared pairwise in the trial list, besides the three of `triple`."""


def triple(voices: Sequence[str]) -> tuple[int, int, int] | None:
    """Indices of two utterances of one voice and one utterance of another voice; None if there are none."""
    for index, voice in enumerate(voices):
        same = [number for number, found in enumerate(voices) if found == voice and number > index]
        others = [number for number, found in enumerate(voices) if found != voice]
        if voice and same and others:
            return index, same[0], others[0]
    return None


CONFIG = "configs/pretrain/demo.py"
LAYER = 3
"""Of the four; its hidden states are clustered into the labels of a second iteration."""
SMOKE = (
    "--config.train.num_steps=6",
    "--config.optim.warmup_steps=2",
    "--config.metrics.log_every=2",
    "--config.train.eval_every=3",
    "--config.checkpoint.every=3",
    "--config.labels.num_clusters=20",
    "--config.labels.kmeans.passes=3",
)
"""Overrides for `--smoke`: every stage for real, no learning to speak of."""


@dataclass(frozen=True)
class Demo:
    """The folders and commands of one demo."""

    out: Path
    data: str | None
    smoke: bool

    @property
    def corpus(self) -> Path:
        """Folder with the prepared corpora `train`, `valid` and, for the embedded speech, `unseen_voices`."""
        return self.out / "corpus"

    @property
    def run(self) -> Path:
        """Workdir of the pre-training."""
        return self.out / "pretraining"

    @property
    def export(self) -> Path:
        """The encoder as a Hugging Face folder."""
        return self.out / "huggingface"

    def labels(self, name: str) -> Path:
        """Folder of a label store."""
        return self.out / "labels" / name

    def prepare(self) -> None:
        """The corpus: embedded speech, or anyone's audio with one utterance in twenty held out."""
        if self.data is None:
            small = ("--voices", "6", "--sentences", "8") if self.smoke else ()
            python("-m", "wavlm_jax.data", "demo", "--out", str(self.corpus), *small)
        else:
            python("-m", "wavlm_jax.data", self.data, "--out", str(self.corpus), "--holdout", "0.05")

    def settings(self) -> list[str]:
        """Flags that point the config at this demo's folders."""
        held_out = sorted(path.parent for path in self.corpus.glob("*/header.json") if path.parent.name != "train")
        flags = [
            f"--config={CONFIG}",
            f"--config.data.train={self.corpus / 'train'}",
            f"--config.data.evaluation={tuple(map(str, held_out))!r}",
            f"--config.train.eval_splits={tuple(path.name for path in held_out)!r}",
            f"--config.labels.path={self.labels('mfcc')}",
        ]
        return flags + list(SMOKE if self.smoke else ())

    def report(self, seconds: float) -> dict[str, Any]:
        """The results: the JSON object that is printed last."""
        records = read_records(self.run / "metrics.jsonl")
        last = {name: value for record in records for name, value in record.items()}
        trained = [record for record in records if "masked_loss" in record]
        headers = {name: LabelHeader.load(self.labels(name)) for name in ("mfcc", "layer")}
        unigram = {split: unigram_accuracy(self.labels("mfcc"), split) for split in headers["mfcc"].splits}
        draw({"": records}, self.out / "curves.png", {"always the most frequent label": unigram["valid"]})
        held_out = {
            f"{measure}_{split}": last.get(f"{split}/{measure}") if measure == "masked_accuracy" else unigram[split]
            for split in unigram
            if split not in ("train", "valid")
            for measure in ("masked_accuracy", "unigram_accuracy")
        }
        return {
            "masked_accuracy": last["valid/masked_accuracy"],
            "unigram_accuracy": unigram["valid"],
            **held_out,
            "loss_first": trained[0]["masked_loss"],
            "loss_last": trained[-1]["masked_loss"],
            "pnmi_mfcc": headers["mfcc"].splits["train"].quality["pnmi"],
            "pnmi_layer": headers["layer"].splits["train"].quality["pnmi"],
            "audio_seconds_per_second": float(np.median([r["audio_seconds_per_second"] for r in trained])),
            "updates": trained[-1]["step"],
            "seconds": round(seconds, 1),
            "export": str(self.export),
            "curves": str(self.out / "curves.png"),
        }


def unigram_accuracy(labels: Path, split: str) -> float:
    """Accuracy in `split` of always predicting the most frequent label of training."""
    header = LabelHeader.load(labels)
    train = np.bincount(LabelStore.open(labels, "train").flat, minlength=header.num_clusters)
    counts = np.bincount(LabelStore.open(labels, split).flat, minlength=header.num_clusters)
    return float(counts[train.argmax()] / counts.sum())


def main() -> None:
    """All stages, then the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=named, required=True, help="folder for everything that the demo makes")
    parser.add_argument("--data", help="anyone's audio instead of the embedded speech: whatever wavlm_jax.data takes")
    parser.add_argument("--smoke", action="store_true", help="every stage for real, but only seconds of each")
    arguments = parser.parse_args()
    demo = Demo(arguments.out, arguments.data, arguments.smoke)
    began = time.monotonic()
    demo.prepare()
    settings = demo.settings()
    python("train.py", *settings, f"--workdir={demo.run}")
    layer = ("--teacher", str(demo.run), "--layer", str(LAYER), "--out", str(demo.labels("layer")))
    python("-m", "pretrain.make_labels", *settings, *layer)
    python("-m", "wavlm_jax.convert", "export", str(demo.run), str(demo.export), "--to", "huggingface")
    used = use(Use(demo.corpus, demo.run, demo.out, demo.smoke))
    print("\n" + json.dumps({**demo.report(time.monotonic() - began), **used}), flush=True)


if __name__ == "__main__":
    main()
