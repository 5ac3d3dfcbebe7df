"""The main job from nothing to a model, in minutes on a laptop.

python -m pretrain.demo --out runs/demo [--data FOLDER]

Every stage is a command that a person could type; it is printed before it runs, and what it leaves behind is reused
when the demo is started again. The last line on stdout is one JSON object with what came out.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.commands import python
from pretrain.curves import draw, read_records
from pretrain.demo_use import Use, use
from pretrain.labels import LabelHeader, LabelStore

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
    """Where everything of one demo lives."""

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
        """What came out, as the last line says it."""
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
            "pnmi_mfcc": headers["mfcc"].quality["train"]["pnmi"],
            "pnmi_layer": headers["layer"].quality["train"]["pnmi"],
            "audio_seconds_per_second": float(np.median([r["audio_seconds_per_second"] for r in trained])),
            "updates": trained[-1]["step"],
            "seconds": round(seconds, 1),
            "export": str(self.export),
            "curves": str(self.out / "curves.png"),
        }


def unigram_accuracy(labels: Path, split: str) -> float:
    """How often the label that is the most frequent one in training is right in `split`."""
    header = LabelHeader.load(labels)
    train = np.bincount(LabelStore.open(labels, "train").flat, minlength=header.num_clusters)
    counts = np.bincount(LabelStore.open(labels, split).flat, minlength=header.num_clusters)
    return float(counts[train.argmax()] / counts.sum())


def main() -> None:
    """All stages, then the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that the demo makes")
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
