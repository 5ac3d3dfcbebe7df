"""The embedded corpus: an hour of English by espeak-ng, with exact words, speakers and phones, and no network.

Three corpora come out: `train`, `valid` (other sentences of the same voices) and `unseen_voices`. The bytes are the
same every time: each voice is rendered by a fresh process, and nothing draws from a library's random stream.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from wavlm_jax.data.espeak import MANIFEST, EspeakError, Voice, VoiceJob, loader_module, to_json
from wavlm_jax.data.header import is_corpus, read_header
from wavlm_jax.data.manifests import from_manifest
from wavlm_jax.data.prepare import Preparation, PrepareError, Result, prepare
from wavlm_jax.data.sentences import sentence

SPLITS = ("train", "valid", "unseen_voices")
DONE = "demo.json"
ACCENTS = (
    "en-us",
    "en",
    "en-gb-scotland",
    "en-gb-x-rp",
    "en-us-nyc",
    "en-gb-x-gbclan",
    "en-029",
    "en-gb-x-gbcwmd",
)
_VARIANTS = """f1 m1 f2 m2 f3 m3 f4 m4 f5 m5 m6 m7 m8 Alex Alicia Andrea Andy Annie Denis Diogo Gene Gene2 Jacky Lee
    Marco Mario Michael Mike Nguyen adam anika antonio belinda boris david edward grandma gustave iven linda max michel
    paul rob shelby steph travis zac"""
VARIANTS = tuple(_VARIANTS.split())


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """How large the corpus is. The default has 44 voices and about an hour."""

    voices: int = 44
    unseen_voices: int = 4
    """Of `voices`; all their utterances go to the split of that name."""
    sentences: int = 40
    """Of each voice."""
    valid_sentences: int = 2
    """Of each seen voice, held out."""
    version: int = 1
    """Counts changes of the words or voices here."""

    def __post_init__(self) -> None:
        if not 0 < self.unseen_voices < self.voices <= len(VARIANTS):
            raise ValueError(
                f"found {self.voices} voices, {self.unseen_voices} unseen; there are {len(VARIANTS)} in all"
            )
        if not 0 < self.valid_sentences < self.sentences:
            raise ValueError(f"found {self.sentences} sentences with {self.valid_sentences} held out; expected fewer")


def voices(count: int) -> list[Voice]:
    """The first `count` voices: every accent, women and men, speeds and pitches spread out evenly."""
    return [
        Voice(
            name=f"{number:02d}-{variant.lower()}",
            accent=ACCENTS[number % len(ACCENTS)],
            variant=variant,
            speed=150 + 7 * number % 45,
            pitch=30 + 11 * number % 40,
            range=35 + 13 * number % 45,
        )
        for number, variant in enumerate(VARIANTS[:count])
    ]


def make_demo(out: Path, settings: DemoSettings, workers: int, *, progress: bool = False) -> dict[str, Result]:
    """The corpora `out`/train, `out`/valid and `out`/unseen_voices; resumable, and nothing to do a second time.

    Raises:
        EspeakError: `espeakng-loader` is missing, or a voice cannot be rendered.
        PrepareError: `out` holds something else.

    """
    done, recipe = out / DONE, json.dumps(dataclasses.asdict(settings), sort_keys=True)
    if done.is_file() and all(is_corpus(out / name) for name in SPLITS):
        if done.read_text() != recipe:
            raise PrepareError(f"{out}: holds a demo corpus of {done.read_text()}, asked for {recipe}; remove it first")
        return {name: Result(read_header(out / name), fresh=False) for name in SPLITS}
    loader_module()
    scratch = out.with_name(out.name + ".audio")
    jobs = _jobs(settings, scratch)
    _render_all(jobs, workers, progress=progress)
    _write_manifests(jobs, settings, scratch)
    results = {name: _prepare(scratch / f"{name}.jsonl", out / name) for name in SPLITS}
    done.write_text(recipe)
    shutil.rmtree(scratch)
    return results


def _jobs(settings: DemoSettings, scratch: Path) -> list[VoiceJob]:
    return [
        VoiceJob(
            voice=voice,
            sentences={
                f"{voice.name}-{number:03d}": sentence(f"{voice.name}-{number:03d}")
                for number in range(settings.sentences)
            },
            folder=scratch / voice.name,
        )
        for voice in voices(settings.voices)
    ]


def _render_all(jobs: Sequence[VoiceJob], workers: int, *, progress: bool) -> None:
    pending = [job for job in jobs if not (job.folder / MANIFEST).is_file()]
    pool = ThreadPoolExecutor(max(workers, 1))
    try:
        rendered = pool.map(_render, pending)
        for _ in tqdm(rendered, total=len(pending), unit="voice", desc="speaking", disable=not progress):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def _render(job: VoiceJob) -> None:
    """One voice, in a process of its own (see espeak.py)."""
    command = [sys.executable, "-m", "wavlm_jax.data.espeak"]
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.run(  # noqa: S603  (our own module, with data on stdin)
        command,
        input=to_json(job),
        text=True,
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )
    if process.returncode:
        raise EspeakError(
            f"voice {job.voice.name} failed (status {process.returncode}): {process.stderr.strip()[-500:]}"
        )


def _write_manifests(jobs: Sequence[VoiceJob], settings: DemoSettings, scratch: Path) -> None:
    lines: dict[str, list[str]] = {name: [] for name in SPLITS}
    seen = settings.voices - settings.unseen_voices
    for number, job in enumerate(jobs):
        rows = (job.folder / MANIFEST).read_text().splitlines(keepends=True)
        if number >= seen:
            lines["unseen_voices"] += rows
        else:
            lines["valid"] += rows[: settings.valid_sentences]
            lines["train"] += rows[settings.valid_sentences :]
    for name, rows in lines.items():
        (scratch / f"{name}.jsonl").write_text("".join(rows))


def _prepare(manifest: Path, out: Path) -> Result:
    """Stamps and paths of the scratch folder stay out of the corpus, so that it is the same every time.

    Done in this process: an hour of speech is ready before others have come up.
    """
    source = from_manifest(manifest, manifest.parent)
    entries = [entry._replace(stamp="") for entry in source.entries]
    named = dataclasses.replace(source, entries=entries, description=f"demo, spoken by espeak-ng: {out.name}")
    return prepare(named, out, Preparation(name=f"demo/{out.name}"))
