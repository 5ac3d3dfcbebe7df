"""`python -m wavlm_jax transcribe|align|embed|verify|classify`: options, files in, records out."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wavlm_jax.audio.recordings import Recording
from wavlm_jax.inference import recognition
from wavlm_jax.inference.models import SPEAKERS, labels_of, open_model, vocabulary_of
from wavlm_jax.inference.options import (
    UsageError,
    add_shared,
    choose_device,
    kept_if_stopped,
    paths_of,
    progress_bar,
    recordings_of,
    run_settings,
    write_text,
)
from wavlm_jax.inference.recognition import Heard, Recognizer
from wavlm_jax.inference.utterances import Answer, Embedding, classify, embed, scores
from wavlm_jax.metrics.verification import equal_error_rate, minimum_detection_cost
from wavlm_jax.text.beam import BeamSearch, BeamSettings
from wavlm_jax.text.lexicon import read_lexicon
from wavlm_jax.text.lines import RecordError, read_lines
from wavlm_jax.text.trials import Trial, files_of, read_trials

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
    opened = open_model(options, "WavLMForCTC")
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
    running, opened = run_settings(options), open_model(options, *SPEAKERS)
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
    running, opened = run_settings(options), open_model(options, *SPEAKERS)
    trials = _trials_alone(Path(files[0])) if len(files) == 1 else []
    paths = files_of(trials, options.root) if trials else {name: Path(name) for name in files}
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
    running, opened = run_settings(options), open_model(options, "WavLMForSequenceClassification")
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
