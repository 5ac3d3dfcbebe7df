"""What the demo's model is good for: fine-tuned for recognition and for speakers, it is asked about new recordings.

Only where the corpus says what was said, and by whom: anyone's audio need not (`make demo DATA=folder`).
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from pretrain.commands import python
from pretrain.curves import read_records

SMOKE = (
    "--config.train.num_steps=4",
    "--config.optim.warmup_steps=2",
    "--config.train.eval_every=4",
    "--config.checkpoint.every=4",
    "--config.metrics.log_every=2",
)
"""Overrides for `--smoke`, of every fine-tuning config."""


class Use(NamedTuple):
    """Where things are."""

    corpus: Path
    body: Path
    """The pre-trained run."""
    out: Path
    smoke: bool

    def column(self, split: str, name: str) -> list[str]:
        """What the corpus says of each utterance: "" where it says nothing."""
        return list(datasets.load_from_disk(str(self.corpus / split))[name])

    def train(self, config: str, run: Path, split: str, *flags: str) -> dict[str, Any]:
        """Fine-tunes, evaluates on a split, and gives the last value of every metric."""
        python(
            "train.py",
            f"--config={config}",
            f"--workdir={run}",
            f"--config.init.path={self.body}",
            f"--config.data.train={self.corpus / 'train'}",
            f"--config.data.evaluation={(str(self.corpus / split),)!r}",
            f"--config.train.eval_splits={(split,)!r}",
            *flags,
            *(SMOKE if self.smoke else ()),
        )
        return {name: value for record in read_records(run / "metrics.jsonl") for name, value in record.items()}

    def write_out(self, split: str, chosen: Sequence[int]) -> dict[Path, str]:
        """These utterances as FLAC files, named after their ids, each with its text."""
        rows = datasets.load_from_disk(str(self.corpus / split))
        (self.out / "new").mkdir(parents=True, exist_ok=True)
        said = {}
        for row in (rows[index] for index in chosen):
            file = self.out / "new" / f"{row['id'].replace('/', '-')}.flac"
            file.write_bytes(row["audio"]["bytes"])
            said[file] = row["text"]
        return said


def use(where: Use) -> dict[str, Any]:
    """Everything that the corpus allows; what came out, for the report."""
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
"""Less than half of what the preset takes, and one program to compile: the demo has minutes."""
MOST_TRIED = 40
"""Utterances that are compared, each with each; those of the triple come on top."""


def triple(voices: Sequence[str]) -> tuple[int, int, int] | None:
    """Numbers of two utterances of the first voice that has two, and of one of another voice; None: there are none."""
    for index, voice in enumerate(voices):
        same = [number for number, found in enumerate(voices) if found == voice and number > index]
        others = [number for number, found in enumerate(voices) if found != voice]
        if voice and same and others:
            return index, same[0], others[0]
    return None
