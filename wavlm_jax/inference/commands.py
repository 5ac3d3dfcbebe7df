"""The commands of `python -m wavlm_jax`: options, files in, records out.

A command is a row of `COMMANDS`: its help, its options and the function that does it. What all share is in `work`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float

from wavlm_jax.audio.recordings import Recording
from wavlm_jax.command_line import plain_number
from wavlm_jax.files import named, printable, replacing, write_text
from wavlm_jax.inference import recognition
from wavlm_jax.inference.answers import AsFault
from wavlm_jax.inference.diarization import TurnSettings, diarize, error_table
from wavlm_jax.inference.features import FeatureSettings, write_features
from wavlm_jax.inference.running import UsageError, vocabulary_of
from wavlm_jax.inference.utterances import Answer, Embedding, classify, embed
from wavlm_jax.inference.work import (
    FROM_STDIN,
    Options,
    Work,
    add_shared,
    answer,
    files_of,
    names_on_stdin,
    open_work,
    progress_bar,
    writable,
)
from wavlm_jax.metrics import equal_error_rate, minimum_detection_cost, scorer
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


@dataclass(frozen=True)
class Command:
    """A command of `python -m wavlm_jax`."""

    help: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Options], Work]
    """Raises ValueError or OSError, with a message, for whatever cannot be done at all."""


def _write(text: str, path: Path | None) -> None:
    """To the file, replaced at once, or to stdout."""
    if path is None:
        sys.stdout.write(text)
    else:
        write_text(path, text)


def _json_lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _json_fault(name: str, path: Path, fault: str) -> str:
    return _json_lines([{"name": name, "path": printable(path), "error": fault}])


def _comment_fault(_name: str, _path: Path, fault: str) -> str:
    """A comment of CTM and RTTM."""
    return f";; {' '.join(fault.split())}\n"


def _tsv_fault(name: str, _path: Path, fault: str) -> str:
    return f"{name}\t\t{' '.join(fault.split())}\n"


_FORMATS: dict[str, tuple[Callable[[Iterable[recognition.TranscribedRecording]], str], AsFault]] = {
    "json": (recognition.as_json, _json_fault),
    "ctm": (recognition.as_ctm, _comment_fault),
    "tsv": (recognition.as_tsv, _tsv_fault),
}


# transcribe, align


def _transcribe_options(parser: argparse.ArgumentParser) -> None:
    defaults = BeamSettings()
    add_shared(parser)
    add = parser.add_argument
    add("--format", choices=tuple(_FORMATS), default="json", help="json: one line per file, with times (default)")
    add("--lm", type=named, help="n-gram model (ARPA or KenLM): of characters, or of words with --lexicon")
    add("--lexicon", type=named, help="words that can be heard, one per line, with or without spelling")
    add("--beam", type=int, help="beam search of this width, without a language model too")
    add("--lm-weight", type=plain_number, help=f"with --lm; default: {defaults.lm_weight}")
    add("--word-score", type=plain_number, help=f"with --lexicon; default: {defaults.word_score}")
    add("--lm-unknown", choices=("refuse", "allow"), default="refuse", help="tokens or words that the model lacks")


def _transcribe(options: Options) -> Work:
    work = open_work(options, "transcribe")
    search = _search(options, work.model)
    return _write_transcripts(
        work, options, lambda some: recognition.transcribe(work.model, some, work.settings, search)
    )


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
    add_shared(parser)
    parser.add_argument("--format", choices=("json", "ctm"), default="json")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--text", help="what is said in the one file")
    given.add_argument(
        "--texts", type=named, help="one line per file: its name as in FILES or without ending, tab, text"
    )


def _align(options: Options) -> Work:
    work = open_work(options, "align")
    texts = _texts(options, work)
    return _write_transcripts(
        work._replace(recordings=list(texts)),
        options,
        lambda some: recognition.align_texts(work.model, {one: texts[one] for one in some}, work.settings),
        lambda recording: texts[recording],
    )


def _texts(options: Options, work: Work) -> dict[Recording, str]:
    if options.text is not None:
        if len(work.paths) != 1:
            raise UsageError(f"--text: is of one file, found {len(work.paths)}; give --texts")
        return {work.recordings[0]: options.text}
    given: dict[str, str] = {}
    for number, line in read_lines(options.texts):
        name, tab, text = line.rstrip("\r\n").partition("\t")
        if line.strip() and not tab:
            raise UsageError(f"{options.texts}, line {number}: found {name[:60]!r}, expected name, tab, text")
        if name in given and text != given[name]:
            raise UsageError(f"{options.texts}, line {number}: found a second text of {name}, expected one")
        given[name] = text
    texts = {}
    for recording in work.recordings:
        names = [name for name in (recording.name, printable(recording.path)) if name in given]
        if names:
            texts[recording] = given[names[0]]
            continue
        fault = UsageError(f"{options.texts}: has no text for {recording.path} (as {recording.name} or as its path)")
        if work.settings.on_fault is None:
            raise fault
        work.settings.on_fault(recording.name, recording.path, fault)
    return texts


def _write_transcripts(
    work: Work,
    options: Options,
    compute: Callable[[list[Recording]], Iterator[tuple[Recording, recognition.TranscribedRecording]]],
    more: Callable[[Recording], str] = lambda _: "",
) -> Work:
    as_text, as_fault = _FORMATS[options.format]
    answer(work, options, compute, lambda _, found: as_text([found]), as_fault, more=more)
    return work


# embed, verify


def _embed(options: Options) -> Work:
    array = options.out is not None and options.out.suffix == ".npy"
    if array:
        writable(str(options.out.with_suffix(".json")))
    work = open_work(options, "embed")
    finish = partial(_write_array, work, options.out) if array else None
    answer(work, options, _embeddings(work), _as_embedding, _json_fault, finish=finish)
    return work


def _embeddings(work: Work) -> Callable[[list[Recording]], Iterator[tuple[Recording, Embedding]]]:
    return lambda some: embed(work.model, some, work.settings)


def _as_embedding(one: Recording, value: Embedding) -> str:
    return _json_lines([{"name": one.name, "path": printable(one.path), "embedding": value.tolist()}])


def _vector(text: str) -> Embedding:
    return np.array(json.loads(text)["embedding"], np.float32)


def _write_array(work: Work, out: Path, texts: Mapping[Path, str]) -> None:
    """One row per file, NaN where there is no answer, and the files beside it."""
    some = _vector(next(iter(texts.values())))
    rows = [_vector(texts[path]) if path in texts else np.full_like(some, np.nan) for path in work.paths]
    with replacing(out) as draft, draft.open("wb") as file:
        np.save(file, np.stack(rows))
    write_text(out.with_suffix(".json"), json.dumps([printable(path) for path in work.paths], indent=1) + "\n")


def _verify_options(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, files="two audio files, or one trial list (one trial per line: `1|0 path path`)")
    parser.add_argument("--root", type=named, default=Path(), help="folder that the list's paths are relative to")


def _verify(options: Options) -> Work:
    files = names_on_stdin() if options.files == [FROM_STDIN] else options.files
    listed, pair = len(files) == 1, 2
    if not listed and len(files) != pair:
        raise UsageError(f"FILES: found {len(files)}, expected two recordings or one trial list")
    trials = _only_trials(named(files[0])) if listed else [Trial(False, *files)]
    paths = trial_files(trials, options.root) if listed else {name: path for name in files for path in files_of(name)}
    options.strict |= not listed
    work = open_work(options, "verify", list(dict.fromkeys(paths.values())))

    def scores(texts: Mapping[Path, str]) -> list[float]:
        vectors = {path: _vector(text) for path, text in texts.items()}
        unknown = np.full_like(next(iter(vectors.values())), np.nan)
        sides = ((vectors.get(paths[name], unknown) for name in (trial.left, trial.right)) for trial in trials)
        return [float(left @ right) for left, right in sides]

    def finish(texts: Mapping[Path, str]) -> None:
        kind = [f"{int(trial.same)}\t" if listed else "" for trial in trials]
        lines = (
            f"{score:.6f}\t{same}{printable(trial.left)}\t{printable(trial.right)}\n"
            for score, same, trial in zip(scores(texts), kind, trials, strict=True)
        )
        _write("".join(lines), options.out)

    texts = answer(work, options, _embeddings(work), _as_embedding, _json_fault, finish=finish)
    if listed:
        print(_error_rates(np.array(scores(texts)), np.array([trial.same for trial in trials])), file=sys.stderr)
    return work


def _error_rates(scores: Float[np.ndarray, "trials"], same: Bool[np.ndarray, "trials"]) -> str:
    """Error rates over the trials that have a score, in words."""
    known = np.isfinite(scores)
    some = "" if known.all() else f" of the {known.sum()} of {len(scores)} trials whose files could be used"
    scores, same = scores[known], same[known]
    if not 0 < same.sum() < len(same):
        return f"no error rate: all {len(same)} trials are of one kind"
    equal, cost = equal_error_rate(scores, same), minimum_detection_cost(scores, same)
    return f"EER {100 * equal.rate:.2f} % at {equal.threshold:.4f}, minDCF(0.01) {cost:.4f}{some}"


def _only_trials(path: Path) -> list[Trial]:
    """The trials of the only file that was named."""
    try:
        return read_trials(path)
    except RecordError as error:
        raise RecordError(f"{error}; one file is taken for a trial list, to compare recordings name two") from error


# classify


def _classify_options(parser: argparse.ArgumentParser) -> None:
    add_shared(parser)
    parser.add_argument("--top", type=int, default=5, help="classes to print (default: 5)")


def _classify(options: Options) -> Work:
    if options.top < 1:
        raise UsageError(f"--top: found {options.top}, expected 1 or more")
    work = open_work(options, "classify")

    numbers = work.model.module.head.function_to_apply == "none"

    def as_text(recording: Recording, answers: list[Answer]) -> str:
        values = {answer.label: round(answer.probability, 6) for answer in answers[: None if numbers else options.top]}
        said = {"values": values} if numbers else {"label": answers[0].label, "classes": values}
        return _json_lines([{"name": recording.name, "path": printable(recording.path), **said}])

    answer(work, options, lambda some: classify(work.model, some, work.settings), as_text, _json_fault)
    return work


# diarize


def _diarize_options(parser: argparse.ArgumentParser) -> None:
    turns = TurnSettings()
    add_shared(parser, chunk="as long as the rows it was trained on, 30 if unknown", overlap="half a piece")
    add = parser.add_argument
    add("--threshold", type=plain_number, default=turns.threshold, help=f"probability; default: {turns.threshold}")
    add(
        "--fill-seconds",
        type=plain_number,
        default=turns.fill_seconds,
        help=f"shorter gaps within a turn are filled; default: {turns.fill_seconds}",
    )
    add(
        "--least-seconds",
        type=plain_number,
        default=turns.least_seconds,
        help=f"shorter turns are dropped; default: {turns.least_seconds}",
    )
    add("--reference", type=named, nargs="+", metavar="RTTM", help="the truth: a table of errors goes to stderr")
    add("--uem", type=named, help="what is scored (default: whole files); with --reference")
    add("--collar", type=plain_number, default=0.0, help="seconds left out on each side of a boundary of the reference")
    add(
        "--score-windows",
        type=plain_number,
        metavar="SECONDS",
        help="a second table: each window with its own best speakers",
    )


def _diarize(options: Options) -> Work:
    if options.reference is None and (options.uem is not None or options.score_windows is not None):
        raise UsageError("--uem, --score-windows: say how to score; --reference, with what, is missing")
    if not options.collar >= 0 or (options.score_windows is not None and not options.score_windows > 0):
        given = f"{options.collar}, {options.score_windows}"
        raise UsageError(f"--collar, --score-windows: found {given}, expected 0 or more, more than 0")
    turn_settings = TurnSettings(
        threshold=options.threshold, fill_seconds=options.fill_seconds, least_seconds=options.least_seconds
    )
    if options.reference is not None:
        scorer()  # found to be missing now, not after the work
    work = open_work(options, "diarize")
    reference, regions = _reference(options, {recording.name: recording.seconds for recording in work.recordings})
    found: list[Turn] = []

    def as_text(_: Recording, turns: list[Turn]) -> str:
        found.extend(turns)
        return write_rttm(turns)

    texts = answer(
        work, options, lambda some: diarize(work.model, some, work.settings, turn_settings), as_text, _comment_fault
    )
    if regions:
        answered = {one.name for one in work.recordings if one.path in texts}
        turns = found if options.out is None else read_rttm(options.out)  # those of an earlier start, too
        reference = {file: [t for t in kept if t.recording in answered] for file, kept in reference.items()}
        regions = [region for region in regions if region.recording in answered]
        print(error_table(reference, turns, regions, options.collar, options.score_windows), file=sys.stderr)
    return work


def _reference(options: Options, seconds: Mapping[str, float]) -> tuple[dict[str, list[Turn]], list[Region]]:
    """The turns of each file of `--reference`, and what is scored, both of the recordings that have `seconds` only.

    A recording without a turn is one in which nobody speaks.
    """
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
    silent = sorted(names - {turn.recording for found in turns.values() for turn in found})
    if len(silent) == len(names):
        raise UsageError(
            f"--reference: has no turn of {silent[0]} nor of any other file; its second column is the file's name "
            "without ending"
        )
    for name in silent:
        print(f"--reference: has no turn of {name}, which is scored as without speech", file=sys.stderr)
    return turns, regions


# features


def _features_options(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, out=named)
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


def _features(options: Options) -> Work:
    if options.out is None:
        raise UsageError("--out: missing; expected a folder for the features")
    work = open_work(options, "features")
    settings = FeatureSettings(layer=options.layer, dtype=options.dtype)
    progress = progress_bar(work.recordings, options)
    shards = write_features(work.recordings, work.model, options.out, settings, work.settings, progress)
    frames = sum(sum(shard.frames) for shard in shards)
    print(f"{options.out}: {len(work.recordings)} recordings, {frames} frames in {len(shards)} shards", file=sys.stderr)
    if work.faults:
        wrong = (_json_fault(name, path, fault) for path, (name, fault) in work.faults.items())
        write_text(options.out / "bad_files.jsonl", "".join(wrong))
    return work


COMMANDS = {
    "transcribe": Command("what is said, with the times of words", _transcribe_options, _transcribe),
    "align": Command("when the words of a given text are said", _align_options, _align),
    "embed": Command("speaker embeddings", add_shared, _embed),
    "verify": Command("whether two recordings are of one speaker; a whole trial list", _verify_options, _verify),
    "diarize": Command("who speaks when, as RTTM", _diarize_options, _diarize),
    "classify": Command("which class a recording belongs to", _classify_options, _classify),
    "features": Command("hidden states of one layer or all, to npy shards", _features_options, _features),
}
