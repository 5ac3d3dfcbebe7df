"""What all commands share: options, files from the command line or stdin, the device, progress, and messages.

`python -m wavlm_jax transcribe|align|embed|verify|classify`: options, files in, records out.

`python -m wavlm_jax diarize`: turns as RTTM, and their errors against a reference.

`python -m wavlm_jax features`: hidden states to npy shards.
"""

import argparse
import dataclasses
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import jax
import numpy as np
from tqdm import tqdm

from wavlm_jax.audio.recordings import ChunkSettings, Recording, open_recordings
from wavlm_jax.config import WavLMConfig
from wavlm_jax.files import write_text as write_file
from wavlm_jax.inference import recognition
from wavlm_jax.inference.diarization import TurnSettings, diarize, pieces_of
from wavlm_jax.inference.features import FeatureSettings, write_features
from wavlm_jax.inference.recognition import Heard, Recognizer
from wavlm_jax.inference.running import (
    AnyAnswer,
    RunSettings,
    UsageError,
    geometry_of,
    labels_of,
    open_model,
    vocabulary_of,
)
from wavlm_jax.inference.utterances import Answer, Embedding, classify, embed, scores
from wavlm_jax.metrics import diarization_error, equal_error_rate, minimum_detection_cost, one_speaker, one_voice
from wavlm_jax.shapes import SAMPLE_RATE
from wavlm_jax.text.beam import BeamSearch, BeamSettings, read_lexicon
from wavlm_jax.text.records import (
    RecordError,
    Region,
    Trial,
    Turn,
    read_lines,
    read_rttm,
    read_trials,
    read_uem,
    trial_files,
    write_rttm,
)

FROM_STDIN = "-"


_LENGTHS = ("30", "a fifth of a piece")


def add_shared(
    parser: argparse.ArgumentParser,
    files: str = "audio files; - reads their names from stdin",
    lengths: tuple[str, str] = _LENGTHS,
) -> None:
    """The options of every command; `lengths` says what pieces and overlap are without the options for them."""
    running = RunSettings()
    add = parser.add_argument
    add("files", nargs="+", metavar="FILES", help=files)
    add("--model", type=Path, required=True, help="folder of the model: a run of ours or a Hugging Face folder")
    add("--step", type=int, help="checkpoint of a run; the newest if not given")
    add("--out", type=_writable, help="where to write; stdout if not given")
    add("--device", choices=("cpu", "gpu", "tpu"), help="where to compute; the fastest there is if not given")
    add("--resample", action="store_true", help="take files at other rates than 16 kHz")
    add("--batch-seconds", type=float, default=running.batch_seconds, help="most audio in a batch (default: 60)")
    add("--chunk-seconds", type=float, help=f"longer files are cut into pieces (default: {lengths[0]})")
    add("--overlap-seconds", type=float, help=f"of two pieces (default: {lengths[1]})")
    add("--quiet", action="store_true", help="no progress bar")


def _writable(text: str) -> Path:
    """A path whose folder is there: what is computed for hours is not lost for a slip of the pen."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent}: no such folder; make it first")
    return path


def choose_device(options: argparse.Namespace) -> None:
    """Compute on the device that was asked for, or not at all.

    Raises:
        UsageError: there is none of that kind.

    """
    if options.device is None:
        return
    jax.config.update("jax_platforms", {"gpu": "cuda"}.get(options.device, options.device))
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX only asserts where no plugin for the device is installed
        reason = f" ({str(error).splitlines()[0]})" if str(error) else ""
        raise UsageError(
            f"--device {options.device}: JAX finds none{reason}; is JAX's package for it installed?"
        ) from error


def run_settings(options: argparse.Namespace, chunks: ChunkSettings | None = None) -> RunSettings:
    """Batches and chunks as asked for; where nothing is, pieces of `chunks`, and its share of a piece as overlap.

    Raises:
        ValueError: lengths that cannot be.

    """
    chunks = ChunkSettings() if chunks is None else chunks
    length, overlap = options.chunk_seconds, options.overlap_seconds
    length = chunks.seconds if length is None else length
    overlap = chunks.overlap_seconds * length / chunks.seconds if overlap is None else overlap
    chunks = ChunkSettings(seconds=length, overlap_seconds=overlap)
    if not options.batch_seconds > 0:
        raise UsageError(f"--batch-seconds: found {options.batch_seconds}, expected more than 0")
    return RunSettings(chunks=chunks, batch_seconds=options.batch_seconds, resampling=options.resample)


def paths_of(words: Sequence[str]) -> list[Path]:
    """The files that are named; `-` stands for those on stdin, one a line.

    Raises:
        UsageError: stdin names none.

    """
    paths: list[Path] = []
    for word in words:
        if word == FROM_STDIN:
            named = [Path(line.rstrip("\r\n")) for line in sys.stdin if line.strip()]
            if not named:
                raise UsageError("-: stdin has no file name, expected one a line")
            paths += named
        else:
            paths.append(Path(word))
    return paths


def recordings_of(
    options: argparse.Namespace, config: WavLMConfig, paths: Sequence[Path] | None = None
) -> list[Recording]:
    """The recordings that a command works on with a model: those of its command line, or `paths`.

    Raises:
        RecordingError: files that cannot be used.

    """
    paths = paths_of(options.files) if paths is None else paths
    return open_recordings(paths, resampling=options.resample, geometry=geometry_of(config))


def progress_bar(recordings: Sequence[Recording], options: argparse.Namespace) -> Callable[[int], Any]:
    """A function that is told how many samples were done."""
    total = sum(recording.num_samples for recording in recordings) / SAMPLE_RATE
    hidden = options.quiet or not sys.stderr.isatty()
    bar = tqdm(total=round(total, 1), unit="s", unit_scale=True, disable=hidden, desc="audio")
    return lambda samples: bar.update(samples / SAMPLE_RATE)


@contextmanager
def kept_if_stopped(
    recordings: Sequence[Recording], text_of: Callable[[dict[Recording, AnyAnswer]], str], options: argparse.Namespace
) -> Iterator[dict[Recording, AnyAnswer]]:
    """A dict to fill with answers as they come. Whatever stops the work, those that are there go to OUT.partial."""
    done: dict[Recording, AnyAnswer] = {}
    try:
        with _ended_by_sigterm():
            yield done
    except BaseException:  # a damaged file, no memory, Ctrl-C, SIGTERM
        if done:
            text = text_of({recording: done[recording] for recording in recordings if recording in done})
            partial = None if options.out is None else options.out.with_name(options.out.name + ".partial")
            _write(text, partial)
            place = "above" if partial is None else f"in {partial}"
            print(f"stopped; answers of {len(done)} of {len(recordings)} recordings are {place}", file=sys.stderr)
        raise


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the work as an exception; outside the main thread Python allows no handlers."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)  # as shells tell it

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def write_text(text: str, options: argparse.Namespace) -> None:
    """Results to the file that was named, replaced at once, or to stdout."""
    _write(text, options.out)


def _write(text: str, path: Path | None) -> None:
    if path is None:
        sys.stdout.write(text)
    else:
        write_file(path, text)


_FORMATS = {"json": recognition.as_json, "ctm": recognition.as_ctm, "tsv": recognition.as_tsv}


def add_transcribe(parser: argparse.ArgumentParser) -> None:
    """Options of `transcribe`."""
    defaults = BeamSettings()
    add_shared(parser)
    add = parser.add_argument
    add("--format", choices=tuple(_FORMATS), default="json", help="json: a line a file, with times (default)")
    add("--lm", type=Path, help="n-gram model (ARPA or KenLM): of characters, or of words with --lexicon")
    add("--lexicon", type=Path, help="words that can be heard, one a line, with or without spelling")
    add("--beam", type=int, help="beam search of this width, without a language model too")
    add("--lm-weight", type=float, help=f"with --lm; default: {defaults.lm_weight}")
    add("--word-score", type=float, help=f"with --lexicon; default: {defaults.word_score}")
    add("--lm-unknown", choices=("refuse", "allow"), default="refuse", help="tokens or words that the model lacks")
    parser.set_defaults(command=_transcribe)


def add_align(parser: argparse.ArgumentParser) -> None:
    """Options of `align`."""
    add_shared(parser)
    parser.add_argument("--format", choices=("json", "ctm"), default="json")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--text", help="what is said in the one file")
    given.add_argument("--texts", type=Path, help="a line a file: its name as in FILES or without ending, tab, text")
    parser.set_defaults(command=_align)


def add_embed(parser: argparse.ArgumentParser) -> None:
    """Options of `embed`."""
    add_shared(parser)
    parser.set_defaults(command=_embed)


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Options of `verify`."""
    add_shared(parser, files="two audio files, or one trial list (`1|0 path path` a line)")
    parser.add_argument("--root", type=Path, default=Path(), help="folder that the list's paths are relative to")
    parser.set_defaults(command=_verify)


def add_classify(parser: argparse.ArgumentParser) -> None:
    """Options of `classify`."""
    add_shared(parser)
    parser.add_argument("--top", type=int, default=5, help="classes to print (default: 5)")
    parser.set_defaults(command=_classify)


def _transcribe(options: argparse.Namespace) -> None:
    choose_device(options)
    running, recognizer = run_settings(options), _recognizer(options)
    search = _search(options, recognizer)
    recordings = recordings_of(options, recognizer.module.config)
    bar = progress_bar(recordings, options)
    with kept_if_stopped(recordings, _written(options), options) as done:
        heard = recognition.transcribe(recognizer, recordings, running, search, bar, done)
    write_text(_FORMATS[options.format](heard), options)


def _written(options: argparse.Namespace) -> Callable[[Mapping[Recording, Heard]], str]:
    return lambda found: _FORMATS[options.format](found.values())


def _recognizer(options: argparse.Namespace) -> Recognizer:
    opened = open_model(options, "transcribe")
    return Recognizer(opened.module, opened.params, vocabulary_of(opened))


def _search(options: argparse.Namespace, recognizer: Recognizer) -> BeamSearch | None:
    for name, needed in (("lm_weight", "lm"), ("word_score", "lexicon")):
        if getattr(options, name) is not None and getattr(options, needed) is None:
            raise UsageError(f"--{name.replace('_', '-')}: found without --{needed}, where it counts nothing")
    if options.lm is None and options.lexicon is None and options.beam is None:
        return None
    numbers = {name: getattr(options, name) for name in ("beam", "lm_weight", "word_score")}
    given = {name: value for name, value in numbers.items() if value is not None}
    settings = BeamSettings(lm_unknown=options.lm_unknown, **given)
    lexicon = None if options.lexicon is None else read_lexicon(options.lexicon, recognizer.vocabulary)
    return BeamSearch(recognizer.vocabulary, settings, options.lm, lexicon)


def _align(options: argparse.Namespace) -> None:
    choose_device(options)
    running, recognizer = run_settings(options), _recognizer(options)
    recordings = recordings_of(options, recognizer.module.config)
    texts = _texts(options, recordings)
    bar = progress_bar(recordings, options)
    with kept_if_stopped(recordings, _written(options), options) as done:
        heard = recognition.align_texts(recognizer, texts, running, bar, done)
    write_text(_FORMATS[options.format](heard), options)


def _texts(options: argparse.Namespace, recordings: list[Recording]) -> dict[Recording, str]:
    if options.text is not None:
        if len(recordings) != 1:
            raise UsageError(f"--text: is of one file, found {len(recordings)}; give --texts")
        return {recordings[0]: options.text}
    given: dict[str, str] = {}
    for number, line in read_lines(options.texts):
        name, tab, text = line.rstrip("\r\n").partition("\t")
        if line.strip() and not tab:
            raise UsageError(f"{options.texts}, line {number}: found {name[:60]!r}, expected name, tab, text")
        if name in given and text != given[name]:
            raise UsageError(f"{options.texts}, line {number}: found a second text of {name}, expected one")
        given[name] = text
    texts = {}
    for recording in recordings:
        named = [name for name in (recording.name, str(recording.path)) if name in given]
        if not named:
            raise UsageError(f"{options.texts}: has no text for {recording.path} (as {recording.name} or as its path)")
        texts[recording] = given[named[0]]
    return texts


def _embed(options: argparse.Namespace) -> None:
    choose_device(options)
    running, opened = run_settings(options), open_model(options, "embed")
    recordings = recordings_of(options, opened.module.config)
    bar = progress_bar(recordings, options)
    with kept_if_stopped(recordings, _embeddings, options) as done:
        found = embed(opened.module, opened.params, recordings, running, bar, done)
    if options.out is not None and options.out.suffix == ".npy":
        np.save(options.out, np.stack(list(found.values())))
        options.out.with_suffix(".json").write_text(json.dumps([str(one.path) for one in found], indent=1) + "\n")
        return
    write_text(_embeddings(found), options)


def _embeddings(found: Mapping[Recording, Embedding]) -> str:
    return _json_lines(
        {"name": one.name, "path": str(one.path), "embedding": value.tolist()} for one, value in found.items()
    )


def _json_lines(lines: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _trials_alone(path: Path) -> list[Trial]:
    """The trials of the only file that was named."""
    try:
        return read_trials(path)
    except RecordError as error:
        raise RecordError(f"{error}; one file is taken for a trial list, to compare recordings name two") from error


def _verify(options: argparse.Namespace) -> None:
    choose_device(options)
    files = [str(path) for path in paths_of(options.files)]
    pair = 2
    if len(files) not in (1, pair):
        raise UsageError(f"FILES: found {len(files)}, expected two recordings or one trial list")
    running, opened = run_settings(options), open_model(options, "embed")
    trials = _trials_alone(Path(files[0])) if len(files) == 1 else []
    paths = trial_files(trials, options.root) if trials else {name: Path(name) for name in files}
    recordings = recordings_of(options, opened.module.config, list(dict.fromkeys(paths.values())))
    bar = progress_bar(recordings, options)
    with kept_if_stopped(recordings, _embeddings, options) as done:
        found = embed(opened.module, opened.params, recordings, running, bar, done)
    by_path = {recording.path: value for recording, value in found.items()}
    if not trials:
        left, right = (by_path[Path(name)] for name in files)
        write_text(f"{float(left @ right):.6f}\t{files[0]}\t{files[1]}\n", options)
        return
    values = scores(trials, {name: by_path[path] for name, path in paths.items()})
    lines = zip(values, trials, strict=True)
    write_text("".join(f"{v:.6f}\t{int(t.same)}\t{t.left}\t{t.right}\n" for v, t in lines), options)
    same = np.array([trial.same for trial in trials])
    if 0 < same.sum() < len(same):
        equal, cost = equal_error_rate(values, same), minimum_detection_cost(values, same)
        print(f"EER {100 * equal.rate:.2f} % at {equal.threshold:.4f}, minDCF(0.01) {cost:.4f}", file=sys.stderr)
    else:
        print(f"no error rate: all {len(same)} trials are of one kind", file=sys.stderr)


def _classify(options: argparse.Namespace) -> None:
    if options.top < 1:
        raise UsageError(f"--top: found {options.top}, expected 1 or more")
    choose_device(options)
    running, opened = run_settings(options), open_model(options, "classify")
    recordings = recordings_of(options, opened.module.config)
    bar = progress_bar(recordings, options)

    def written(found: Mapping[Recording, list[Answer]]) -> str:
        return _json_lines(
            {
                "name": recording.name,
                "path": str(recording.path),
                "label": answers[0].label,
                "classes": {answer.label: round(answer.probability, 6) for answer in answers[: options.top]},
            }
            for recording, answers in found.items()
        )

    with kept_if_stopped(recordings, written, options) as done:
        found = classify(opened.module, opened.params, recordings, labels_of(opened), running, bar, done)
    write_text(written(found), options)


_COLUMNS = ("speech s", "missed", "false alarm", "confusion", "DER", "one speaker", "one voice")


def add_diarize(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    turns = TurnSettings()
    add_shared(parser, lengths=("as long as the rows it was trained on, 30 if unknown", "half a piece"))
    add = parser.add_argument
    add("--threshold", type=float, default=turns.threshold, help=f"default: {turns.threshold}")
    add(
        "--fill-seconds", type=float, default=turns.fill_seconds, help=f"shorter gaps go; default: {turns.fill_seconds}"
    )
    add("--least-seconds", type=float, default=turns.least_seconds, help=f"of a turn; default: {turns.least_seconds}")
    add("--reference", type=Path, nargs="+", metavar="RTTM", help="the truth: a table of errors goes to stderr")
    add("--uem", type=Path, help="what is scored (default: whole files); with --reference")
    add("--collar", type=float, default=0.0, help="seconds left out on each side of a boundary of the reference")
    add("--score-windows", type=float, metavar="SECONDS", help="a second table: each window with its own best speakers")
    parser.set_defaults(command=_diarize)


def _diarize(options: argparse.Namespace) -> None:
    if options.reference is None and (options.uem is not None or options.score_windows is not None):
        raise UsageError("--uem, --score-windows: say how to score; --reference, with what, is missing")
    if not options.collar >= 0 or (options.score_windows is not None and not options.score_windows > 0):
        given = f"{options.collar}, {options.score_windows}"
        raise UsageError(f"--collar, --score-windows: found {given}, expected 0 or more, more than 0")
    settings = TurnSettings(
        threshold=options.threshold, fill_seconds=options.fill_seconds, least_seconds=options.least_seconds
    )
    choose_device(options)
    opened = open_model(options, "diarize")
    running = run_settings(options, pieces_of(opened.weights.origin.trained_seconds))
    recordings = recordings_of(options, opened.module.config)
    truth, regions = _reference(options, {recording.name: recording.seconds for recording in recordings})
    bar = progress_bar(recordings, options)
    with kept_if_stopped(recordings, _as_rttm, options) as done:
        found = diarize(opened.module, opened.params, recordings, running, settings, bar, done)
    write_text(_as_rttm(found), options)
    if truth:
        heard = [turn for turns in found.values() for turn in turns]
        print(report(truth, heard, regions, options.collar, options.score_windows), file=sys.stderr)


def _as_rttm(found: Mapping[Any, list[Turn]]) -> str:
    return "".join(map(write_rttm, found.values()))


def _reference(options: argparse.Namespace, seconds: Mapping[str, float]) -> tuple[dict[str, list[Turn]], list[Region]]:
    """The turns of each file of `--reference`, and what is scored, both of the recordings that have `seconds` only."""
    if options.reference is None:
        return {}, []
    regions = [Region(name, 0.0, length) for name, length in seconds.items()]
    if options.uem is not None:
        regions = [region for region in read_uem(options.uem) if region.recording in seconds]
        if not regions:
            raise UsageError(
                f"{options.uem}: has no region of any of the files; its first column is a name without ending"
            )
    names = {region.recording for region in regions}
    truth = {str(file): [turn for turn in read_rttm(file) if turn.recording in names] for file in options.reference}
    if silent := sorted(names - {turn.recording for turns in truth.values() for turn in turns}):
        raise UsageError(
            f"--reference: has no turn of {silent[0]}; its second column is the file's name without ending"
        )
    return truth, regions


def report(
    truth: dict[str, list[Turn]],
    heard: Sequence[Turn],
    regions: Sequence[Region],
    collar: float = 0.0,
    window: float | None = None,
) -> str:
    """Tables of errors in per cent of the speech: of each recording, of those of each reference file, and of all.

    The last two columns are the rates of the two answers that know no speaker: one speaker all the time, and one
    wherever somebody speaks (which only the truth can tell).

    Args:
        truth: reference file -> its turns.
        heard: what was found.
        regions: what is scored.
        collar: see `diarization_error`.
        window: seconds; a second table, see `diarization_error`.

    """
    groups = {name: {name} for name in dict.fromkeys(region.recording for region in regions)}
    if len(truth) > 1:
        groups |= {Path(file).name: {turn.recording for turn in turns} for file, turns in truth.items() if turns}
    groups["all"] = {region.recording for region in regions}
    everything = [turn for turns in truth.values() for turn in turns]
    tables = []
    for length in (None,) if window is None else (None, window):
        title = "recordings" if length is None else f"windows of {length} s"
        lines: list[tuple[str, ...]] = [(title, *_COLUMNS)]
        for group, names in groups.items():
            wanted, found = ([turn for turn in turns if turn.recording in names] for turns in (everything, heard))
            scored = [region for region in regions if region.recording in names]
            errors, *trivial = (
                diarization_error(wanted, answer, scored, collar=collar, window=length)
                for answer in (found, one_speaker(scored), one_voice(wanted))
            )
            parts = (errors.missed, errors.false_alarm, errors.confusion)
            shares = [part / max(errors.total, 1e-9) for part in parts] + [one.rate for one in (errors, *trivial)]
            lines.append((group, f"{errors.total:.1f}", *(f"{100 * share:.2f}" for share in shares)))
        tables.append(_aligned(lines))
    return "\n\n".join(tables)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        "  ".join([line[0].ljust(first), *(cell.rjust(width) for cell, width in zip(line[1:], others, strict=True))])
        for line in lines
    )


def add_features(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_shared(parser)
    parser.add_argument(
        "--layer",
        required=True,
        type=_layer,
        help="0: the input of the first Transformer layer; l: the raw output of layer l; all: every one, on axis 1",
    )
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of the files")
    parser.set_defaults(command=features)


def features(options: argparse.Namespace) -> None:
    """Write the shards.

    Raises:
        ValueError: whatever cannot be done, with what to do instead.

    """
    if options.out is None:
        raise UsageError("--out: missing; expected a folder for the features")
    choose_device(options)
    running = run_settings(options)
    weights = options.load(options.model, options.step)
    config = dataclasses.replace(weights.config, padding="exact")
    recordings = recordings_of(options, config)
    settings = FeatureSettings(layer=options.layer, dtype=options.dtype)
    bar = progress_bar(recordings, options)
    shards = write_features(recordings, config, weights.params, options.out, settings, running, bar)
    frames = sum(sum(shard.frames) for shard in shards)
    print(f"{options.out}: {len(recordings)} recordings, {frames} frames in {len(shards)} shards", file=sys.stderr)


def _layer(text: str) -> int | Literal["all"]:
    if text == "all":
        return "all"
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number or all") from error
