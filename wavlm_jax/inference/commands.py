"""The commands of `python -m wavlm_jax`: options, files in, records out.

A command is a row of `COMMANDS`: its help, its options and the function that does it. What all share stands first:
options, device, files, progress, and what happens to answers when the work is stopped.
"""

import argparse
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from tqdm import tqdm

import wavlm_jax.files
from wavlm_jax.audio.recordings import ChunkSettings, Recording, first_of, open_recordings, renamed
from wavlm_jax.command_line import plain_number
from wavlm_jax.inference import recognition
from wavlm_jax.inference.diarization import TurnSettings, diarize, error_table, pieces_of
from wavlm_jax.inference.features import FeatureSettings, write_features
from wavlm_jax.inference.running import InferenceSettings, UsageError, geometry_of, model_for, vocabulary_of
from wavlm_jax.inference.utterances import Answer, Embedding, classify, embed
from wavlm_jax.loading import load
from wavlm_jax.metrics import equal_error_rate, minimum_detection_cost
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
from wavlm_jax.weights import Model

Options = argparse.Namespace
T = TypeVar("T")
_FROM_STDIN = "-"
_FORMATS = {"json": recognition.as_json, "ctm": recognition.as_ctm, "tsv": recognition.as_tsv}


@dataclass(frozen=True)
class Command:
    """A command of `python -m wavlm_jax`."""

    help: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Options], None]
    """Raises ValueError or OSError, with a message, for whatever cannot be done."""


# What all commands share


def _add_shared(
    parser: argparse.ArgumentParser,
    files: str = "audio files; - reads their names from stdin",
    chunk: str = "30",
    overlap: str = "a fifth of a piece",
) -> None:
    """The options of every command; `chunk` and `overlap` are the defaults of the lengths, in words."""
    add = parser.add_argument
    add("files", nargs="+", metavar="FILES", help=files)
    add("--model", type=Path, required=True, help="folder of the model: a run of ours or a Hugging Face folder")
    add("--step", type=int, help="checkpoint of a run; the newest if not given")
    add("--out", type=_writable, help="where to write; stdout if not given")
    add("--device", choices=("cpu", "gpu", "tpu"), help="where to compute; the fastest there is if not given")
    add("--resample", action="store_true", help="take files at other rates than 16 kHz")
    add("--batch-seconds", type=plain_number, default=60.0, help="most audio in a batch (default: 60)")
    add("--chunk-seconds", type=plain_number, help=f"longer files are cut into pieces (default: {chunk})")
    add("--overlap-seconds", type=plain_number, help=f"of two pieces (default: {overlap})")
    add("--quiet", action="store_true", help="no progress bar")


def _writable(text: str) -> Path:
    """A path whose folder exists: a typing error is found before hours of computing, not after."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent}: no such folder; make it first")
    return path


def _open(
    options: Options, command: str, paths: Sequence[Path] | None = None
) -> tuple[Model, list[Recording], InferenceSettings]:
    """The model, the recordings (`paths`, or those of the command line), and how they are cut and batched.

    Raises:
        UsageError: no such device, another kind of model, lengths that cannot be.
        RecordingError: files that cannot be used.

    """
    if options.device is not None:
        _choose_device(options.device)
    model = model_for(load(options.model, step=options.step), command)
    chunks = pieces_of(model.weights.origin.trained_seconds) if command == "diarize" else ChunkSettings()
    length, overlap = options.chunk_seconds, options.overlap_seconds
    length = chunks.seconds if length is None else length
    overlap = chunks.overlap_seconds * length / chunks.seconds if overlap is None else overlap
    chunks = ChunkSettings(seconds=length, overlap_seconds=overlap)
    if not options.batch_seconds > 0:
        raise UsageError(f"--batch-seconds: found {options.batch_seconds}, expected more than 0")
    settings = InferenceSettings(chunks=chunks, batch_seconds=options.batch_seconds, resampling=options.resample)
    paths = _paths_of(options.files) if paths is None else paths
    recordings = open_recordings(paths, resampling=options.resample, geometry=geometry_of(model.config))
    if others := renamed(recordings):
        print(f"named otherwise than their files, as RTTM, CTM and TSV need it: {first_of(others)}", file=sys.stderr)
    return model, recordings, settings


def _choose_device(name: str) -> None:
    """Computes on the device that was asked for, or not at all."""
    jax.config.update("jax_platforms", {"gpu": "cuda"}.get(name, name))
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX only asserts where no plugin for the device is installed
        reason = f" ({str(error).splitlines()[0]})" if str(error) else ""
        raise UsageError(f"--device {name}: JAX finds none{reason}; is JAX's package for it installed?") from error


def _paths_of(words: Sequence[str]) -> list[Path]:
    """The files that are named; `-` stands for those on stdin, one per line."""
    paths: list[Path] = []
    for word in words:
        if word == _FROM_STDIN:
            named = [Path(line.rstrip("\r\n")) for line in sys.stdin if line.strip()]
            if not named:
                raise UsageError("-: stdin has no file name, expected one a line")
            paths += named
        else:
            paths.append(Path(word))
    return paths


def progress_bar(recordings: Sequence[Recording], options: Options) -> Callable[[int], Any]:
    """A function to call with the number of samples that were done."""
    total = sum(recording.num_samples for recording in recordings) / SAMPLE_RATE
    hidden = options.quiet or not sys.stderr.isatty()
    bar = tqdm(total=round(total, 1), unit="s", unit_scale=True, disable=hidden, desc="audio")
    return lambda samples: bar.update(samples / SAMPLE_RATE)


def _collect(
    answers: Iterable[tuple[Recording, T]],
    recordings: Sequence[Recording],
    as_text: Callable[[Mapping[Recording, T]], str],
    options: Options,
) -> dict[Recording, T]:
    """The answers in the order of the recordings. Whatever stops the work, those that are there go to OUT.partial."""
    done: dict[Recording, T] = {}
    progress = progress_bar(recordings, options)
    try:
        with _ended_by_sigterm():
            for recording, answer in answers:
                done[recording] = answer
                progress(recording.num_samples)
    except BaseException:  # a damaged file, no memory, Ctrl-C, SIGTERM
        if done:
            partial = None if options.out is None else options.out.with_name(options.out.name + ".partial")
            _write(as_text({recording: done[recording] for recording in recordings if recording in done}), partial)
            place = "above" if partial is None else f"in {partial}"
            print(f"stopped; answers of {len(done)} of {len(recordings)} recordings are {place}", file=sys.stderr)
        raise
    return {recording: done[recording] for recording in recordings}


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the work as an exception; outside the main thread Python allows no handlers."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)  # as shells report it

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _write(text: str, path: Path | None) -> None:
    """To the file, replaced at once, or to stdout."""
    if path is None:
        sys.stdout.write(text)
    else:
        wavlm_jax.files.write_text(path, text)


def _json_lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


# transcribe, align


def _transcribe_options(parser: argparse.ArgumentParser) -> None:
    defaults = BeamSettings()
    _add_shared(parser)
    add = parser.add_argument
    add("--format", choices=tuple(_FORMATS), default="json", help="json: one line per file, with times (default)")
    add("--lm", type=Path, help="n-gram model (ARPA or KenLM): of characters, or of words with --lexicon")
    add("--lexicon", type=Path, help="words that can be heard, one per line, with or without spelling")
    add("--beam", type=int, help="beam search of this width, without a language model too")
    add("--lm-weight", type=plain_number, help=f"with --lm; default: {defaults.lm_weight}")
    add("--word-score", type=plain_number, help=f"with --lexicon; default: {defaults.word_score}")
    add("--lm-unknown", choices=("refuse", "allow"), default="refuse", help="tokens or words that the model lacks")


def _transcribe(options: Options) -> None:
    model, recordings, settings = _open(options, "transcribe")
    answers = recognition.transcribe(model, recordings, settings, _search(options, model))
    _write_transcripts(answers, recordings, options)


def _search(options: Options, model: Model) -> BeamSearch | None:
    for name, needed in (("lm_weight", "lm"), ("word_score", "lexicon")):
        if getattr(options, name) is not None and getattr(options, needed) is None:
            raise UsageError(f"--{name.replace('_', '-')}: found without --{needed}, where it counts nothing")
    if options.lm is None and options.lexicon is None and options.beam is None:
        return None
    numbers = {name: getattr(options, name) for name in ("beam", "lm_weight", "word_score")}
    given = {name: value for name, value in numbers.items() if value is not None}
    vocabulary, settings = vocabulary_of(model), BeamSettings(lm_unknown=options.lm_unknown, **given)
    lexicon = None if options.lexicon is None else read_lexicon(options.lexicon, vocabulary)
    return BeamSearch(vocabulary, settings, options.lm, lexicon)


def _align_options(parser: argparse.ArgumentParser) -> None:
    _add_shared(parser)
    parser.add_argument("--format", choices=("json", "ctm"), default="json")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--text", help="what is said in the one file")
    given.add_argument(
        "--texts", type=Path, help="one line per file: its name as in FILES or without ending, tab, text"
    )


def _align(options: Options) -> None:
    model, recordings, settings = _open(options, "align")
    answers = recognition.align_texts(model, _texts(options, recordings), settings)
    _write_transcripts(answers, recordings, options)


def _texts(options: Options, recordings: Sequence[Recording]) -> dict[Recording, str]:
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


def _write_transcripts(
    answers: Iterator[tuple[Recording, recognition.TranscribedRecording]],
    recordings: Sequence[Recording],
    options: Options,
) -> None:
    def as_text(found: Mapping[Recording, recognition.TranscribedRecording]) -> str:
        return _FORMATS[options.format](found.values())

    _write(as_text(_collect(answers, recordings, as_text, options)), options.out)


# embed, verify


def _embed(options: Options) -> None:
    model, recordings, settings = _open(options, "embed")
    found = _collect(embed(model, recordings, settings), recordings, _as_embeddings, options)
    if options.out is not None and options.out.suffix == ".npy":
        np.save(options.out, np.stack(list(found.values())))
        options.out.with_suffix(".json").write_text(json.dumps([str(one.path) for one in found], indent=1) + "\n")
        return
    _write(_as_embeddings(found), options.out)


def _as_embeddings(found: Mapping[Recording, Embedding]) -> str:
    return _json_lines(
        {"name": one.name, "path": str(one.path), "embedding": value.tolist()} for one, value in found.items()
    )


def _verify_options(parser: argparse.ArgumentParser) -> None:
    _add_shared(parser, files="two audio files, or one trial list (one trial per line: `1|0 path path`)")
    parser.add_argument("--root", type=Path, default=Path(), help="folder that the list's paths are relative to")


def _verify(options: Options) -> None:
    files = [str(path) for path in _paths_of(options.files)]
    pair = 2
    if len(files) not in (1, pair):
        raise UsageError(f"FILES: found {len(files)}, expected two recordings or one trial list")
    trials = _only_trials(Path(files[0])) if len(files) == 1 else []
    paths = trial_files(trials, options.root) if trials else {name: Path(name) for name in files}
    model, recordings, settings = _open(options, "verify", list(dict.fromkeys(paths.values())))
    found = _collect(embed(model, recordings, settings), recordings, _as_embeddings, options)
    by_path = {recording.path: value for recording, value in found.items()}
    if not trials:
        left, right = (by_path[Path(name)] for name in files)
        _write(f"{float(left @ right):.6f}\t{files[0]}\t{files[1]}\n", options.out)
        return
    scores = np.array([float(by_path[paths[trial.left]] @ by_path[paths[trial.right]]) for trial in trials])
    lines = zip(scores, trials, strict=True)
    _write("".join(f"{v:.6f}\t{int(t.same)}\t{t.left}\t{t.right}\n" for v, t in lines), options.out)
    same = np.array([trial.same for trial in trials])
    if 0 < same.sum() < len(same):
        equal, cost = equal_error_rate(scores, same), minimum_detection_cost(scores, same)
        print(f"EER {100 * equal.rate:.2f} % at {equal.threshold:.4f}, minDCF(0.01) {cost:.4f}", file=sys.stderr)
    else:
        print(f"no error rate: all {len(same)} trials are of one kind", file=sys.stderr)


def _only_trials(path: Path) -> list[Trial]:
    """The trials of the only file that was named."""
    try:
        return read_trials(path)
    except RecordError as error:
        raise RecordError(f"{error}; one file is taken for a trial list, to compare recordings name two") from error


# classify


def _classify_options(parser: argparse.ArgumentParser) -> None:
    _add_shared(parser)
    parser.add_argument("--top", type=int, default=5, help="classes to print (default: 5)")


def _classify(options: Options) -> None:
    if options.top < 1:
        raise UsageError(f"--top: found {options.top}, expected 1 or more")
    model, recordings, settings = _open(options, "classify")
    numbers = model.module.head.function_to_apply == "none"

    def said(answers: list[Answer]) -> dict[str, Any]:
        values = {answer.label: round(answer.probability, 6) for answer in answers[: None if numbers else options.top]}
        return {"values": values} if numbers else {"label": answers[0].label, "classes": values}

    def as_text(found: Mapping[Recording, list[Answer]]) -> str:
        return _json_lines({"name": one.name, "path": str(one.path), **said(answers)} for one, answers in found.items())

    _write(as_text(_collect(classify(model, recordings, settings), recordings, as_text, options)), options.out)


# diarize


def _diarize_options(parser: argparse.ArgumentParser) -> None:
    turns = TurnSettings()
    _add_shared(parser, chunk="as long as the rows it was trained on, 30 if unknown", overlap="half a piece")
    add = parser.add_argument
    add("--threshold", type=plain_number, default=turns.threshold, help=f"default: {turns.threshold}")
    add(
        "--fill-seconds",
        type=plain_number,
        default=turns.fill_seconds,
        help=f"shorter gaps go; default: {turns.fill_seconds}",
    )
    add(
        "--least-seconds",
        type=plain_number,
        default=turns.least_seconds,
        help=f"of a turn; default: {turns.least_seconds}",
    )
    add("--reference", type=Path, nargs="+", metavar="RTTM", help="the truth: a table of errors goes to stderr")
    add("--uem", type=Path, help="what is scored (default: whole files); with --reference")
    add("--collar", type=plain_number, default=0.0, help="seconds left out on each side of a boundary of the reference")
    add(
        "--score-windows",
        type=plain_number,
        metavar="SECONDS",
        help="a second table: each window with its own best speakers",
    )


def _diarize(options: Options) -> None:
    if options.reference is None and (options.uem is not None or options.score_windows is not None):
        raise UsageError("--uem, --score-windows: say how to score; --reference, with what, is missing")
    if not options.collar >= 0 or (options.score_windows is not None and not options.score_windows > 0):
        given = f"{options.collar}, {options.score_windows}"
        raise UsageError(f"--collar, --score-windows: found {given}, expected 0 or more, more than 0")
    turn_settings = TurnSettings(
        threshold=options.threshold, fill_seconds=options.fill_seconds, least_seconds=options.least_seconds
    )
    model, recordings, settings = _open(options, "diarize")
    reference, regions = _reference(options, {recording.name: recording.seconds for recording in recordings})
    found = _collect(diarize(model, recordings, settings, turn_settings), recordings, _as_rttm, options)
    _write(_as_rttm(found), options.out)
    if reference:
        everything = [turn for turns in found.values() for turn in turns]
        table = error_table(reference, everything, regions, options.collar, options.score_windows)
        print(table, file=sys.stderr)


def _as_rttm(found: Mapping[Any, list[Turn]]) -> str:
    return "".join(map(write_rttm, found.values()))


def _reference(options: Options, seconds: Mapping[str, float]) -> tuple[dict[str, list[Turn]], list[Region]]:
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
    turns = {str(file): [turn for turn in read_rttm(file) if turn.recording in names] for file in options.reference}
    if silent := sorted(names - {turn.recording for found in turns.values() for turn in found}):
        raise UsageError(
            f"--reference: has no turn of {silent[0]}; its second column is the file's name without ending"
        )
    return turns, regions


# features


def _features_options(parser: argparse.ArgumentParser) -> None:
    _add_shared(parser)
    parser.add_argument(
        "--layer",
        required=True,
        type=_layer,
        help="0: the input of the first Transformer layer; l: the raw output of layer l; all: every one, on axis 1",
    )
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of the files")


def _layer(text: str) -> int | Literal["all"]:
    if text == "all":
        return "all"
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number or all") from error


def _features(options: Options) -> None:
    if options.out is None:
        raise UsageError("--out: missing; expected a folder for the features")
    model, recordings, running = _open(options, "features")
    settings = FeatureSettings(layer=options.layer, dtype=options.dtype)
    progress = progress_bar(recordings, options)
    shards = write_features(recordings, model, options.out, settings, running, progress)
    frames = sum(sum(shard.frames) for shard in shards)
    print(f"{options.out}: {len(recordings)} recordings, {frames} frames in {len(shards)} shards", file=sys.stderr)


COMMANDS = {
    "transcribe": Command("what is said, with the times of words", _transcribe_options, _transcribe),
    "align": Command("when the words of a given text are said", _align_options, _align),
    "embed": Command("speaker embeddings", _add_shared, _embed),
    "verify": Command("whether two recordings are of one speaker; a whole trial list", _verify_options, _verify),
    "diarize": Command("who speaks when, as RTTM", _diarize_options, _diarize),
    "classify": Command("which class a recording belongs to", _classify_options, _classify),
    "features": Command("hidden states of one layer or all, to npy shards", _features_options, _features),
}
