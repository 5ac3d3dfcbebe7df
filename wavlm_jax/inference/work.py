"""What all commands share: options, device, files, progress, and what happens to answers when the work is stopped."""

import argparse
import os
import re
import signal
import sys
import threading
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import jax
from tqdm import tqdm

from wavlm_jax.audio.folders import walk
from wavlm_jax.audio.recordings import ChunkSettings, OnFault, Recording, first_of, open_recordings, renamed
from wavlm_jax.audio.wave import MOST_SECONDS
from wavlm_jax.command_line import plain_number
from wavlm_jax.files import check_writable, named, printable, write_text
from wavlm_jax.inference.answers import Answers, AsFault, Journal, stamp_of
from wavlm_jax.inference.diarization import pieces_of
from wavlm_jax.inference.running import InferenceSettings, UsageError, digest_of, model_for
from wavlm_jax.loading import load
from wavlm_jax.shapes import SAMPLE_RATE
from wavlm_jax.weights import Model

Options = argparse.Namespace
T = TypeVar("T")
FROM_STDIN = "-"


class Work(NamedTuple):
    """What a command works on."""

    model: Model
    paths: list[Path]
    """All files that were named, in order."""
    recordings: list[Recording]
    """Those that can be used."""
    settings: InferenceSettings
    faults: dict[Path, tuple[str, str]]
    """Name and fault of each file that cannot; grows while the others are read."""


def writable(text: str) -> Path:
    """A path that can be written: a typing error is found before hours of computing, not after."""
    path = named(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent}: no such folder; make it first")
    try:
        check_writable(path)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path}: {error.strerror}") from error
    return path


def add_shared(
    parser: argparse.ArgumentParser,
    files: str = "audio files or folders of them; - reads their names from stdin, one per line",
    chunk: str = "30",
    overlap: str = "a fifth of a piece",
    out: Callable[[str], Path] = writable,
) -> None:
    """The options of every command: `chunk` and `overlap` are defaults of lengths in words, `out` reads --out."""
    add = parser.add_argument
    add("files", nargs="+", metavar="FILES", help=files)
    add("--model", type=Path, required=True, help="folder of the model: a run of ours or a Hugging Face folder")
    add("--step", type=int, help="checkpoint of a run; the newest if not given")
    add("--out", type=out, help="where to write; stdout if not given")
    add("--device", choices=("cpu", "gpu", "tpu"), help="where to compute; the fastest there is if not given")
    add("--resample", action="store_true", help="take files at other rates than 16 kHz")
    add("--batch-seconds", type=plain_number, default=60.0, help="most audio in a batch (default: 60)")
    limit = "most samples of a file, as seconds at 16 kHz (default: 24 h)"
    add("--max-seconds", type=plain_number, default=MOST_SECONDS, help=limit)
    add("--chunk-seconds", type=plain_number, help=f"of the pieces that longer files are cut into (default: {chunk})")
    add("--overlap-seconds", type=plain_number, help=f"that neighbouring pieces share (default: {overlap})")
    add("--strict", action="store_true", help="a file that cannot be used ends the work; else it is skipped (exit 3)")
    add("--quiet", action="store_true", help="no progress bar")


def open_work(options: Options, command: str, paths: Sequence[Path] | None = None) -> Work:
    """The model, the recordings (`paths`, or those of the command line), and how they are cut and batched.

    Raises:
        UsageError: no such device, another kind of model, lengths that cannot be.
        RecordingError: files that cannot be used, with --strict.

    """
    if options.device is not None:
        _choose_device(options.device)
    model = model_for(load(options.model, step=options.step), command)
    chunks = pieces_of(model.weights.origin.trained_seconds) if command == "diarize" else ChunkSettings()
    length, overlap = options.chunk_seconds, options.overlap_seconds
    length = chunks.seconds if length is None else length
    overlap = chunks.overlap_seconds * length / chunks.seconds if overlap is None else overlap
    chunks = ChunkSettings(seconds=length, overlap_seconds=overlap)
    for option, seconds in (("--batch-seconds", options.batch_seconds), ("--max-seconds", options.max_seconds)):
        if not seconds > 0:
            raise UsageError(f"{option}: found {seconds}, expected more than 0")
    faults = dict[Path, tuple[str, str]]()

    def on_fault(name: str, path: Path, fault: ValueError) -> None:
        faults[path] = name, printable(fault)
        tqdm.write(f"left out: {faults[path][1]}", file=sys.stderr)

    kept = None if options.strict else on_fault
    settings = InferenceSettings(
        chunks=chunks,
        batch_seconds=options.batch_seconds,
        resampling=options.resample,
        max_seconds=options.max_seconds,
        on_fault=kept,
    )
    paths = _paths_of(options.files, kept) if paths is None else paths
    recordings = open_recordings(
        [path for path in paths if path not in faults],
        resampling=options.resample,
        geometry=model.config.geometry,
        max_seconds=options.max_seconds,
        on_fault=kept,
    )
    if not recordings:
        raise UsageError("no file could be used; each is named above")
    if others := renamed(recordings):
        print(f"named otherwise than their files, as RTTM, CTM and TSV need it: {first_of(others)}", file=sys.stderr)
    return Work(model, list(paths), recordings, settings, faults)


def _choose_device(name: str) -> None:
    """Computes on the device that was asked for, or not at all."""
    platform = {"gpu": "cuda"}.get(name, name)
    jax.config.update("jax_platforms", platform)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX only asserts where no plugin for the device is installed
        reason = f" ({str(error).splitlines()[0]})" if str(error) else ""
        cure = f"is there one, and JAX's plugin for it (pip install 'wavlm-jax[{platform}]')?"
        raise UsageError(f"--device {name}: JAX finds none{reason}; {cure}") from error


def _paths_of(words: Sequence[str], on_fault: OnFault | None) -> list[Path]:
    """The files that are named, each once; a folder stands for the audio in it, `-` for the names on stdin.

    Raises:
        UsageError: nothing on stdin; without `on_fault` also a folder without audio, and what is no file of this
            machine.

    """
    paths: list[Path] = []
    for name in [name for word in words for name in (names_on_stdin() if word == FROM_STDIN else [word])]:
        try:
            paths += files_of(name)
        except UsageError as error:
            if on_fault is None:
                raise
            paths.append(Path(name))
            on_fault(printable(name), Path(name), error)
    once = list(dict.fromkeys(paths))
    if len(once) < len(paths):
        print(f"{len(paths) - len(once)} files are named more than once, and taken once", file=sys.stderr)
    return once


def names_on_stdin() -> list[str]:
    """The lines of stdin, whatever bytes they have.

    Raises:
        UsageError: none, or NUL between them.

    """
    content = sys.stdin.buffer.read()
    if b"\0" in content:
        raise UsageError("-: found NUL between the names on stdin, expected one per line (find without -print0)")
    names = [os.fsdecode(line.rstrip(b"\r")) for line in content.removeprefix(BOM_UTF8).split(b"\n") if line.strip()]
    if not names:
        raise UsageError("-: stdin has no file name, expected one per line")
    return names


def files_of(name: str) -> list[Path]:
    """The file of this name; of a folder the audio in it, by the rule of `python -m wavlm_jax.data`."""
    path = named(name)
    if path.is_dir():
        found = walk(path)
        for note in found.notes:
            print(note, file=sys.stderr)
        if not found.audio:
            raise UsageError(f"{path}: a folder without audio that can be read")
        return [path / file for file in found.audio]
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name):
        raise UsageError(f"{name}: an address, expected a file on this machine")
    if not path.exists() and re.search(r"[*?\[]", name):
        raise UsageError(f"{name}: a pattern that no file matches")
    return [path]


def progress_bar(recordings: Sequence[Recording], options: Options) -> Callable[[int], Any]:
    """A function to call with the number of samples that were done."""
    total = sum(recording.num_samples for recording in recordings) / SAMPLE_RATE
    hidden = options.quiet or not sys.stderr.isatty()
    bar = tqdm(total=round(total, 1), unit="s", unit_scale=True, disable=hidden, desc="audio")
    return lambda samples: bar.update(samples / SAMPLE_RATE)


def answer(
    work: Work,
    options: Options,
    compute: Callable[[list[Recording]], Iterator[tuple[Recording, T]]],
    as_text: Callable[[Recording, T], str],
    as_fault: AsFault,
    *,
    finish: Callable[[Mapping[Path, str]], None] | None = None,
    more: Callable[[Recording], str] = lambda _: "",
) -> Mapping[Path, str]:
    """Computes and writes the answers, in the order of the files; what is there outlives whatever stops the work.

    Args:
        work: of `open_work`.
        options: of the command.
        compute: recordings -> their answers, in any order.
        as_text: an answer as it stands in the output.
        as_fault: the line of a file that has none.
        finish: writes what comes of the answers, by path; None: the answers are the output.
        more: what an answer depends on besides its file and the options.

    Returns:
        the text of each answer, by path.

    """
    journal = None if options.out is None else Journal(options.out, _identity(work, options))
    answers = Answers(work.paths, work.faults, as_fault, journal, printed=journal is None and finish is None)
    with _ended_by_sigterm(), answers:
        answers.collect(work.recordings, compute, as_text, progress_bar(work.recordings, options), more)
        if not answers.texts:
            raise UsageError("no file could be used; each is named above")
        if finish is not None:
            finish(answers.texts)
        elif options.out is not None:
            write_text(options.out, answers.whole)
    return answers.texts


_NO_IDENTITY = {"name", "model", "step", "files", "out", "device", "batch_seconds", "quiet", "strict", "root", "text"}
_NO_IDENTITY |= {"max_seconds", "texts", "reference", "uem", "collar", "score_windows"}
"""Options on which no answer depends, or which the key of each answer has."""


def _identity(work: Work, options: Options) -> dict[str, str]:
    """What all answers depend on: the model and the options, files among them with their size and time."""
    task, files = work.model.weights.task, sorted(work.model.weights.origin.files.items())
    identity = {
        "weights": digest_of(work.model),
        "model": repr(work.model.module),
        "vocabulary or classes": repr((files, task and task.labels)),
        "chunks": repr(work.settings.chunks),
    }
    for name, value in vars(options).items():
        if name not in _NO_IDENTITY:
            there = isinstance(value, Path) and value.exists()
            identity[name] = f"{value} {stamp_of(value)}" if there else f"{value}"
    return identity


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
