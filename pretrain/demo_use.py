"""What the demo's model is good for: fine-tuned for recognition and for speakers, it is asked about new recordings.

Only where the corpus says what was said, and by whom: anyone's audio need not (`make demo DATA=folder`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from pretrain.commands import python
from pretrain.curves import read_records

SMOKE = (
    "--config.train.num_steps=4",
    "--config.optim.warmup_steps=2",
    "--config.train.eval_every=4",
    "--config.checkpoint.every=4",
    "--config.metrics.log_every=2",
)
"""Overrides for `--smoke`, of both configs."""


class Use(NamedTuple):
    """Where things are."""

    corpus: Path
    body: Path
    """The pre-trained run."""
    out: Path
    smoke: bool

    @property
    def has_texts(self) -> bool:
        """Whether anyone wrote down what is said."""
        return all(any(datasets.load_from_disk(str(self.corpus / split))["text"]) for split in ("train", "valid"))

    @property
    def flags(self) -> list[str]:
        """What a fine-tuning config is told."""
        flags = [
            f"--config.init.path={self.body}",
            f"--config.data.train={self.corpus / 'train'}",
            f"--config.data.evaluation={(str(self.corpus / 'valid'),)!r}",
            "--config.train.eval_splits=('valid',)",
        ]
        return flags + list(SMOKE if self.smoke else ())


def use(where: Use) -> dict[str, Any]:
    """Everything that the corpus allows; what came out, for the report."""
    return recognise(where) if where.has_texts else {}


def recognise(use: Use) -> dict[str, Any]:
    """Fine-tunes for recognition and transcribes two held-out utterances; what came out, for the report."""
    run, texts = use.out / "recognition", use.out / "transcripts.tsv"
    python("train.py", "--config=configs/finetune/ctc.py:demo", f"--workdir={run}", *use.flags)
    said = write_out(use.corpus / "valid", (0, 1), use.out / "new")
    ask = ("--model", str(run), "--format", "tsv", "--out", str(texts))
    python("-m", "wavlm_jax", "transcribe", *map(str, said), *ask)
    heard = [line.partition("\t")[2] for line in texts.read_text(encoding="utf-8").splitlines()]
    for text, found in zip(said.values(), heard, strict=True):
        print(f"said:  {text}\nheard: {found}", flush=True)
    last = {name: value for record in read_records(run / "metrics.jsonl") for name, value in record.items()}
    return {"cer": last["valid/cer"], "wer": last["valid/wer"], "said": list(said.values()), "heard": heard}


def write_out(corpus: Path, chosen: Sequence[int], folder: Path) -> dict[Path, str]:
    """These utterances as FLAC files, named after their ids, each with its text."""
    rows = datasets.load_from_disk(str(corpus))
    folder.mkdir(parents=True, exist_ok=True)
    said = {}
    for row in (rows[index] for index in chosen):
        file = folder / f"{row['id'].replace('/', '-')}.flac"
        file.write_bytes(row["audio"]["bytes"])
        said[file] = row["text"]
    return said
