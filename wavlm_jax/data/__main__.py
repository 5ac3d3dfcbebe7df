"""`python -m wavlm_jax.data`: prepare a corpus, verify one, make the demo corpus, or simulate conversations."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from wavlm_jax.command_line import EXIT_WRONG, plain_number, shortened
from wavlm_jax.data import simulate
from wavlm_jax.data.conform import Policy
from wavlm_jax.data.corpus import TURNS, Corpus, attach_turns
from wavlm_jax.data.demo_corpus import DemoSettings, EspeakError, make_demo
from wavlm_jax.data.entries import COLUMNS
from wavlm_jax.data.prepare import (
    BAD_FILES,
    FREE_FAULTS,
    Preparation,
    PreparedCorpus,
    PrepareError,
    WorkerError,
    available_cores,
    prepare,
    split,
)
from wavlm_jax.data.sources import open_source
from wavlm_jax.files import named
from wavlm_jax.shapes import SAMPLE_RATE, samples_for
from wavlm_jax.text.records import RecordError, read_rttm

DESCRIPTION = """Prepares speech once for training and evaluation: an Arrow data set of 16 kHz mono 16-bit FLAC, and a
header. SOURCE is a folder of audio (wav, flac, mp3, ogg, opus; with metadata.csv or metadata.jsonl, as an audiofolder
has it, or without), a corpus as it is handed out (LibriSpeech, Libri-Light, LJSpeech, VCTK, Common Voice, VoxCeleb,
TIMIT, a Kaldi data folder), a manifest (.tsv, .csv or .jsonl with id, path, samples, speaker, text; fairseq's .tsv; of
NeMo; cuts of lhotse), or anything that `datasets` loads (a name on the hub, .parquet, a folder from save_to_disk).
docs/data.md has all of them. The words `demo`, `verify` and `simulate` make the embedded corpus, check a finished one,
and mix conversations from one."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, 2 with a message on stderr, or 1 if a worker process died."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"demo": _demo, "verify": _verify, "simulate": _simulate}
    try:
        if words and words[0] in commands:
            commands[words[0]](words[1:])
        else:
            _prepare(words)
    except (ValueError, OSError, PrepareError, EspeakError, WorkerError) as error:
        print(f"error: {shortened(error)}", file=sys.stderr)
        return 1 if isinstance(error, WorkerError) else EXIT_WRONG
    except KeyboardInterrupt:
        print("stopped; what was done is kept, run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def _prepare(words: Sequence[str]) -> None:
    parser = _parser()
    options = parser.parse_args(words)
    try:
        policy = _policy(options)
    except ValueError as error:
        parser.error(str(error))
    if options.root is not None and not options.root.is_dir():
        parser.error(f"--root: {options.root}: no such folder")
    turns = [turn for file in _rttm_files(options.rttm) for turn in read_rttm(file)]
    source = open_source(
        str(named(options.source)),
        options.root,
        options.subset,
        options.split,
        _chosen(options),
        whole=bool(turns),
        plain=options.plain,
    )
    for note in source.notes:
        print(f"note: {note}", file=sys.stderr)
    name = options.name or Path(options.source).stem
    parts = {"": source}
    if options.holdout:
        parts = dict(zip(("train", "valid"), split(source, options.holdout), strict=True))
    for part, entries in parts.items():
        preparation = Preparation(
            name=f"{name}/{part}" if part else name,
            policy=policy,
            fault_cap=options.fault_cap,
            workers=options.workers,
            progress=sys.stderr.isatty(),
        )
        out = options.out / part
        report(prepare(entries, out, preparation), out)
        if turns:
            size = policy.max_samples if policy.long == "split" else None
            print(f"  {attach_turns(Corpus.open(out), turns, size)} recordings have turns ({out / TURNS})")


def _rttm_files(paths: Sequence[Path]) -> list[Path]:
    """The files, and those of folders.

    Raises:
        RecordError: a folder has none.

    """
    files = {path: sorted(path.glob("*.rttm")) if path.is_dir() else [path] for path in paths}
    if empty := [path for path, found in files.items() if not found]:
        raise RecordError(f"--rttm: {empty[0]} has no file *.rttm")
    return [file for found in files.values() for file in found]


def _chosen(options: argparse.Namespace) -> dict[str, str]:
    """The columns that were named."""
    return {key: name for key in COLUMNS if (name := getattr(options, f"{key}_column", None)) is not None}


def _policy(options: argparse.Namespace) -> Policy:
    return Policy(
        rate=options.rate_policy,
        min_samples=max(samples_for(1), round(options.min_seconds * SAMPLE_RATE)),
        max_samples=None if options.max_seconds is None else round(options.max_seconds * SAMPLE_RATE),
        long=options.long,
    )


def report(result: PreparedCorpus, out: Path) -> None:
    """Print the size of a corpus and what was left out."""
    header = result.header
    state = "made" if result.fresh else "nothing to do, it is there already"
    print(
        f"{out}: {state}: {header.count} utterances, {header.hours:.3f} h, {header.speakers} speakers, "
        f"fingerprint {header.fingerprint[:16]}"
    )
    for what, counts in (("bad", header.faults), ("dropped", header.dropped), ("warnings", header.warnings)):
        if counts:
            also = f" (listed in {out / BAD_FILES})" if what == "bad" else ""
            print(f"  {what}: " + ", ".join(f"{count} {name}" for name, count in counts.items()) + also)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m wavlm_jax.data", description=DESCRIPTION)
    add = parser.add_argument
    add("source", metavar="SOURCE")
    add("--out", type=named, required=True, metavar="CORPUS", help="folder of the corpus; made, resumed, or left alone")
    add("--name", help="in the header and in logs (default: the name of SOURCE)")
    add("--workers", type=int, default=available_cores(), help="processes (default: one per core)")
    add(
        "--min-seconds", type=_seconds, default=0.025, help="shorter utterances are dropped (default: 0.025, one frame)"
    )
    add("--max-seconds", type=_seconds, default=None, help="longer ones: see --long (default: no limit)")
    add(
        "--long",
        choices=("drop", "split"),
        default="drop",
        help="drop long ones, or cut them (a piece has its own turns and no text)",
    )
    add("--rate-policy", choices=("error", "resample"), default="error", help="what to do with rates other than 16 kHz")
    add(
        "--fault-cap",
        type=_share,
        default=0.001,
        help=f"share of bad files above which it stops (default: 0.001; {FREE_FAULTS} are always tolerated)",
    )
    add("--holdout", type=_share, default=0.0, help="share for CORPUS/valid, by hash of the id; the rest: CORPUS/train")
    add("--root", type=named, default=None, help="folder that has all audio, also by absolute paths and links")
    add(
        "--rttm",
        type=named,
        nargs="+",
        default=[],
        metavar="FILE",
        help="who speaks when, or folders of it; recordings are named by id or file name",
    )
    add("--subset", default=None, help="configuration of a hub data set, or folder of parquet files")
    add("--split", default=None, help="which of several splits: its name, or 'train*' for all that match")
    add("--plain", action="store_true", help="of a folder, the audio files alone, whatever stands beside them")
    for key, names in COLUMNS.items():
        if key in ("id", "path", "speaker", "text"):
            word = "audio" if key == "path" else key
            usual = f"default: the first of {', '.join(names)}"
            add(f"--{word}-column", dest=f"{key}_column", metavar="NAME", help=usual + "; a.b is b inside of a")
    return parser


def _share(text: str) -> float:
    share = plain_number(text)
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share; expected 0 to 1")
    return share


def _seconds(text: str) -> float:
    seconds = plain_number(text)
    if seconds < 0:
        raise argparse.ArgumentTypeError(f"{text} is no length; expected seconds, 0 or more")
    return seconds


def _verify(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m wavlm_jax.data verify", description="Compares every checksum.")
    parser.add_argument("corpus", type=named, metavar="CORPUS")
    corpus = Corpus.open(parser.parse_args(words).corpus)
    corpus.verify()
    print(f"{corpus.path}: whole, {len(corpus.header.shards)} shards")


def _simulate(words: Sequence[str]) -> None:
    report(*simulate.command(words))


def _demo(words: Sequence[str]) -> None:
    sizes = DemoSettings()
    parser = argparse.ArgumentParser(prog="python -m wavlm_jax.data demo", description="Makes the embedded corpus.")
    add = parser.add_argument
    add("--out", type=named, required=True, metavar="CORPUS", help="folder for train, valid and unseen_voices")
    add("--voices", type=int, default=sizes.voices, help=f"default: {sizes.voices}")
    add("--unseen-voices", type=int, default=sizes.unseen_voices, help=f"of these, default: {sizes.unseen_voices}")
    add("--sentences", type=int, default=sizes.sentences, help=f"per voice, default: {sizes.sentences}")
    add("--workers", type=int, default=available_cores(), help="processes (default: one per core)")
    options = parser.parse_args(words)
    try:
        settings = DemoSettings(voices=options.voices, unseen_voices=options.unseen_voices, sentences=options.sentences)
    except ValueError as error:
        parser.error(str(error))
    for name, result in make_demo(options.out, settings, options.workers, progress=sys.stderr.isatty()).items():
        report(result, options.out / name)


if __name__ == "__main__":
    sys.exit(main())
