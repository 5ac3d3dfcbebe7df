"""Preparation: a source becomes a corpus, shard by shard in several processes, resumable after any interruption.

Work goes on in OUT.partial. A shard is written by one worker, completely or not at all, with a report beside it; the
header comes last, and then the folder is renamed to OUT. A second call with the same source and options finds the
finished shards and does the rest, or nothing.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import datasets
import pyarrow as pa
import soundfile
from tqdm import tqdm

from wavlm_jax.audio.wave import AudioFault
from wavlm_jax.data.conform import Conformed, Policy, conform
from wavlm_jax.data.corpus import FORMAT, CorpusHeader, CorpusShard, is_corpus, read_header, sha256_of, write_header
from wavlm_jax.data.entries import AudioReader, Entry, PhoneTimes, UtteranceSource, digest
from wavlm_jax.files import printable, read_json, write_json, write_text
from wavlm_jax.settings import SettingsError
from wavlm_jax.shapes import SAMPLE_RATE
from wavlm_jax.version import __version__

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")

FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "audio": datasets.Audio(decode=False),
        "samples": datasets.Value("int64"),
        "speaker": datasets.Value("string"),
        "text": datasets.Value("string"),
        "mean": datasets.Value("float32"),
        "variance": datasets.Value("float32"),
        "phones": {
            "symbols": [datasets.Value("string")],
            "starts": [datasets.Value("int32")],
            "ends": [datasets.Value("int32")],
        },
    }
)
"""Columns of a corpus. `audio` is {bytes: FLAC 16 kHz mono 16 bit, path}; `samples` are counted, not claimed ones;
`mean` and `variance` (population) are of the whole utterance in [-1, 1] scale; `phones` is null if there are none."""
SCHEMA: pa.Schema = FEATURES.arrow_schema
FREE_FAULTS = 5
"""Bad files that are always tolerated, however small the corpus."""
BAD_FILES = "bad_files.jsonl"
_PLAN = "plan.json"
_SHARD_ROWS = (64, 4096)
"""Fewest and most utterances of a shard; in between, a corpus has a thousand shards."""
_BATCH_BYTES = 1 << 25
"""FLAC bytes in one record batch: bounds the memory of a worker, and stays far below Arrow's 2 GiB of offsets."""
_DROPPED = ("too_short", "too_long")


class PrepareError(RuntimeError):
    """Preparation cannot go on; says why, and what to do."""


class WorkerError(RuntimeError):
    """A worker process died; says what to do."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How a source becomes a corpus."""

    name: str
    policy: Policy = field(default_factory=Policy)
    fault_cap: float = 0.001
    """Share of bad files above which preparation stops (`FREE_FAULTS` are always tolerated)."""
    workers: int = 1
    progress: bool = False


class PreparedCorpus(NamedTuple):
    """The header of a corpus, and whether it was made just now."""

    header: CorpusHeader
    fresh: bool


def prepare(source: UtteranceSource, out: Path, preparation: Preparation) -> PreparedCorpus:
    """Make the corpus folder `out` from `source`.

    Raises:
        PrepareError: too many bad files, no usable utterance, or `out` or its partial work belongs to another source.
        WorkerError: a worker process died.
        TakenError: another process makes this corpus.

    """
    from wavlm_jax.training.lease import held  # noqa: PLC0415 worker processes need not import it

    options = json.dumps(asdict(preparation.policy), sort_keys=True)
    state = digest(source.entries, options, stamps=True)
    if is_corpus(out):
        return PreparedCorpus(_same_corpus(out, state), fresh=False)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PrepareError(f"{out}: exists and is no corpus; give another --out, or remove it")
    partial = out.with_name(out.name + ".partial")
    with held(partial):
        if not is_corpus(partial):
            _claim(partial, source, options)
            jobs = _jobs(source, partial)
            reports = _write_shards(jobs, source.reader, preparation, partial)
            _write_bad_files(partial, [row for report in reports for row in report.bad_files])
            header = _header(jobs, reports, source, preparation, state)
            _write_dataset_info(partial, [job.file.name for job in jobs])
            write_header(partial, header)
        header = _same_corpus(partial, state)
        for leftover in (partial / _PLAN, *partial.glob("data-*.json"), *partial.glob(".*.partial")):
            leftover.unlink(missing_ok=True)
    partial.rename(out)
    return PreparedCorpus(header, fresh=True)


def split(source: UtteranceSource, share: float) -> tuple[UtteranceSource, UtteranceSource]:
    """(train, held out): about `share` of the utterances by the hash of their ids, at least one on each side.

    An utterance stays on its side whatever else the source has.

    Raises:
        PrepareError: fewer than two utterances.

    """
    if len(source.entries) < 2:  # noqa: PLR2004
        raise PrepareError(f"{source.description}: {len(source.entries)} utterance, a held-out share needs two")
    hashes = [int.from_bytes(hashlib.sha256(entry.id.encode()).digest()[:8]) / 2**64 for entry in source.entries]
    ranked = sorted(hashes)
    edge = min(max(share, ranked[0]), ranked[-2])
    held_out = [entry for entry, place in zip(source.entries, hashes, strict=True) if place <= edge]
    kept = [entry for entry, place in zip(source.entries, hashes, strict=True) if place > edge]
    return dataclasses.replace(source, entries=kept), dataclasses.replace(source, entries=held_out)


def _same_corpus(out: Path, state: str) -> CorpusHeader:
    header = read_header(out)
    if header.source_digest != state:
        raise PrepareError(
            f"{out}: holds the corpus {header.name!r} made from {header.source}, from other files or with other "
            "options than now; give another --out, or remove it"
        )
    return header


def _claim(partial: Path, source: UtteranceSource, options: str) -> None:
    """Begin the work folder, or go on in it if it belongs to this source and these options."""
    plan = {"listing": digest(source.entries), "options": options, "source": source.description}
    file = partial / _PLAN
    if file.exists():
        try:
            found = read_json(file)
        except SettingsError as error:
            raise PrepareError(f"{error}; remove {partial} to start over") from error
        for key, what in (("listing", "the source has changed since"), ("options", "it was begun with other options")):
            if found.get(key) != plan[key]:
                raise PrepareError(
                    f"{partial}: cannot be resumed, {what} (begun: {found.get('source')}, {found.get('options')}); "
                    "remove this folder to start over"
                )
        return
    write_json(file, plan)


@dataclass(frozen=True, kw_only=True)
class _ShardReport:
    """What came of a shard's utterances; stays beside the Arrow file until the corpus is complete."""

    digest: str
    """Of the entries and the state of their files."""
    rows: int
    samples: int
    speakers: list[str]
    utterances: list[str]
    """SHA-256 of each row's id, length and samples."""
    bad_files: list[dict[str, str]]
    dropped: dict[str, int]
    warnings: dict[str, int]
    size: int
    sha256: str


class _ShardJob(NamedTuple):
    """A shard to be written, and its utterances."""

    file: Path
    entries: Sequence[Entry]

    @property
    def report_file(self) -> Path:
        return self.file.with_suffix(".json")

    def finished(self) -> _ShardReport | None:
        """The report, if this shard was written before and no file of it has changed since."""
        try:
            report = _ShardReport(**read_json(self.report_file))
            complete = self.file.stat().st_size == report.size
        except (OSError, ValueError, TypeError):
            return None
        return report if complete and report.digest == digest(self.entries, stamps=True) else None


def _jobs(source: UtteranceSource, partial: Path) -> list[_ShardJob]:
    count = len(source.entries)
    fewest, most = _SHARD_ROWS
    rows = min(max(fewest, -(-count // 1000)), most)
    shards = -(-count // rows)
    return [
        _ShardJob(
            partial / f"data-{number:05d}-of-{shards:05d}.arrow",
            source.entries[number * rows : (number + 1) * rows],
        )
        for number in range(shards)
    ]


def _write_shards(
    jobs: Sequence[_ShardJob], reader: AudioReader, preparation: Preparation, partial: Path
) -> list[_ShardReport]:
    """Reports of all shards in order; shards that are finished already are not written again."""
    done = {job.file: report for job in jobs if (report := job.finished()) is not None}
    pending = [job for job in jobs if job.file not in done]
    total = sum(len(job.entries) for job in jobs)
    allowed = max(FREE_FAULTS, int(preparation.fault_cap * total))
    bar = tqdm(total=total, unit="file", desc=preparation.name, disable=not preparation.progress)
    with bar:
        bar.update(total - sum(len(job.entries) for job in pending))
        _check_cap(done.values(), allowed, total, partial)
        work = functools.partial(_write_shard, reader=reader, policy=preparation.policy)
        for job, report in unordered(work, pending, preparation.workers):
            done[job.file] = report
            bar.update(len(job.entries))
            _check_cap(done.values(), allowed, total, partial)
    return [done[job.file] for job in jobs]


def _check_cap(reports: Iterable[_ShardReport], allowed: int, total: int, partial: Path) -> None:
    bad = [row for report in reports for row in report.bad_files]
    if len(bad) <= allowed:
        return
    _write_bad_files(partial, bad)
    counts = ", ".join(f"{count} {name}" for name, count in Counter(row["fault"] for row in bad).most_common())
    raise PrepareError(
        f"{len(bad)} bad files ({counts}) of {total}, more than the {allowed} that --fault-cap allows; for example "
        f"{bad[0]['path']}: {bad[0]['detail']}. All are listed in {partial / BAD_FILES}. What was done is kept: mend "
        "the files or raise --fault-cap, and run the same command again"
    )


def _write_bad_files(folder: Path, bad: Iterable[dict[str, str]]) -> None:
    write_text(folder / BAD_FILES, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in bad))


def _header(
    jobs: Sequence[_ShardJob],
    reports: Sequence[_ShardReport],
    source: UtteranceSource,
    preparation: Preparation,
    state: str,
) -> CorpusHeader:
    rows = sum(report.rows for report in reports)
    faults = _summed(Counter(row["fault"] for row in report.bad_files) for report in reports)
    dropped = _summed(report.dropped for report in reports)
    if not rows:
        bad = next((row for report in reports for row in report.bad_files), None)
        example = "" if bad is None else f"; for example {bad['path']}: {bad['detail']} ({bad['fault']})"
        raise PrepareError(f"{source.description}: no usable utterance: {faults} bad, {dropped} dropped{example}")
    everything = hashlib.sha256("".join(name for report in reports for name in report.utterances).encode())
    packages = ("soundfile", "soxr", "datasets", "pyarrow", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return CorpusHeader(
        format=FORMAT,
        name=preparation.name,
        hours=round(sum(report.samples for report in reports) / SAMPLE_RATE / 3600, 6),
        count=rows,
        speakers=len({speaker for report in reports for speaker in report.speakers}),
        sample_rate=SAMPLE_RATE,
        fingerprint=everything.hexdigest(),
        source=source.description,
        source_digest=state,
        faults=faults,
        dropped=dropped,
        warnings=_summed(report.warnings for report in reports),
        versions={"wavlm_jax": __version__, "libsndfile": soundfile.__libsndfile_version__, **versions},
        shards=tuple(
            CorpusShard(file=job.file.name, rows=report.rows, size=report.size, sha256=report.sha256)
            for job, report in zip(jobs, reports, strict=True)
        ),
    )


def _summed(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total.most_common())


def _write_dataset_info(folder: Path, files: Sequence[str]) -> None:
    """Make the Arrow `files` in `folder` a data set that `datasets.load_from_disk` opens.

    `datasets` writes its two JSON files for an empty data set; then the list of files is filled in, so that no audio is
    copied.
    """
    scratch = folder / "dataset_info"
    with _no_progress_bars():
        datasets.Dataset(SCHEMA.empty_table()).save_to_disk(str(scratch))
    state = json.loads((scratch / "state.json").read_text())
    state["_data_files"] = [{"filename": name} for name in files]
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    (scratch / "dataset_info.json").replace(folder / "dataset_info.json")
    for leftover in scratch.iterdir():
        leftover.unlink()
    scratch.rmdir()


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


# One shard


def _write_shard(job: _ShardJob, reader: AudioReader, policy: Policy) -> _ShardReport:
    """Write the Arrow file of a shard, then its report; both appear complete or not at all."""
    draft = job.file.with_suffix(".tmp")
    rows = _ShardRows(draft, policy)
    for entry in job.entries:
        rows.add(entry, reader)
    rows.close()
    report = _ShardReport(
        digest=digest(job.entries, stamps=True),
        rows=len(rows.utterances),
        samples=rows.samples,
        speakers=sorted(rows.speakers - {""}),
        utterances=rows.utterances,
        bad_files=rows.bad_files,
        dropped=dict(rows.dropped),
        warnings=dict(rows.warnings),
        size=draft.stat().st_size,
        sha256=sha256_of(draft),
    )
    draft.replace(job.file)
    write_json(job.report_file, asdict(report))
    return report


class _ShardRows:
    """Writes the rows of a shard in record batches, and counts for its report."""

    def __init__(self, file: Path, policy: Policy) -> None:
        self.samples = 0
        self.speakers: set[str] = set()
        self.utterances: list[str] = []
        self.bad_files: list[dict[str, str]] = []
        self.dropped: Counter[str] = Counter()
        self.warnings: Counter[str] = Counter()
        self._policy = policy
        self._stream = pa.ipc.new_stream(str(file), SCHEMA)
        self._waiting: list[dict[str, Any]] = []
        self._bytes = 0

    def add(self, entry: Entry, reader: AudioReader) -> None:
        """Add the rows of one utterance, or note why it has none."""
        try:
            pieces, warnings = conform(reader(entry), self._policy, entry.samples)
            phones = _checked_phones(entry.phones, pieces)
        except AudioFault as fault:
            if fault.fault in _DROPPED:
                self.dropped[fault.fault] += 1
            else:
                names = {"id": entry.id, "path": printable(str(entry.audio))}
                self.bad_files.append({**names, "fault": fault.fault, "detail": printable(fault.detail)})
            return
        self.warnings.update(warnings)
        if pieces[0].piece is not None and (entry.text or entry.phones):
            self.warnings["cut_without_text"] += 1
        for piece in pieces:
            whole = piece.piece is None
            self._row(entry if whole else entry._replace(id=f"{entry.id}#{piece.piece:04d}", text=""), piece, phones)
        if self._bytes >= _BATCH_BYTES:
            self._flush()

    def close(self) -> None:
        """Write the rest."""
        self._flush()
        self._stream.close()

    def _flush(self) -> None:
        if self._waiting:
            self._stream.write_batch(pa.RecordBatch.from_pylist(self._waiting, SCHEMA))
        self._waiting, self._bytes = [], 0

    def _row(self, entry: Entry, piece: Conformed, phones: Mapping[str, Any] | None) -> None:
        row = {
            "id": entry.id,
            "audio": {"bytes": piece.flac, "path": printable(str(entry.audio))},
            "samples": piece.num_samples,
            "speaker": entry.speaker,
            "text": entry.text,
            "mean": piece.mean,
            "variance": piece.variance,
            "phones": phones,
        }
        self._waiting.append(row)
        self._bytes += len(piece.flac)
        self.samples += piece.num_samples
        self.speakers.add(entry.speaker)
        self.utterances.append(hashlib.sha256(f"{entry.id}\0{piece.num_samples}\0".encode() + piece.digest).hexdigest())


def _checked_phones(phones: PhoneTimes | None, pieces: Sequence[Conformed]) -> dict[str, Any] | None:
    """Phones of an utterance that was not cut; an `AudioFault` if they are longer than the audio."""
    if phones is None or pieces[0].piece is not None:
        return None
    if phones.ends and phones.ends[-1] > pieces[0].num_samples:
        found, length = phones.ends[-1], pieces[0].num_samples
        raise AudioFault("length_mismatch", f"phones end at sample {found}, the audio has {length} at {SAMPLE_RATE} Hz")
    return phones._asdict()


# Worker processes


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def unordered(work: Callable[[Job], Outcome], jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, Outcome]]:
    """(job, work(job)) of all jobs, in the order in which they finish.

    Args:
        work: a picklable function; an exception in it ends everything.
        jobs: picklable arguments.
        workers: processes; with one, or one job, the work is done in this process.

    Raises:
        WorkerError: a process was killed, or ran out of memory.

    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        for job in jobs:
            yield job, work(job)
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_exit_with_parent)
    try:
        futures = {pool.submit(work, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise WorkerError(
            "a worker process died (killed, or out of memory); finished work is kept: run the same command again, with "
            "fewer --workers if it was memory"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _exit_with_parent() -> None:
    """Exit when the parent is killed; otherwise a worker would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
