"""What all commands share: options, files from the command line or stdin, the device, progress, and messages."""

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from tqdm import tqdm

from wavlm_jax.audio.chunks import ChunkSettings
from wavlm_jax.audio.recordings import Recording, open_recordings
from wavlm_jax.config import WavLMConfig
from wavlm_jax.inference.running import AnyAnswer, RunSettings, UsageError, geometry_of
from wavlm_jax.shapes import SAMPLE_RATE
from wavlm_jax.whole_file import write_text as write_file

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
