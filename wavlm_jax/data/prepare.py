"""Work shared out to processes that come up fresh, and go when their parent goes.

One shard of a corpus: written by one worker in one go, or not at all.

A corpus from a source: shards written by several processes, resumable after any interruption, the header last.

Work goes on in OUT.partial, shard by shard, and that folder becomes OUT in one rename. A second call with the same
source and options finds what is done and does the rest, or nothing.
"""

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
from hashlib import sha256
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import soundfile
from tqdm import tqdm

from wavlm_jax.audio.wave import AudioFault
from wavlm_jax.data.conform import Conformed, Policy, conform
from wavlm_jax.data.corpus import FORMAT, CorpusHeader, Shard, is_corpus, read_header, sha256_of, write_header
from wavlm_jax.data.sources import SCHEMA, Alignment, AudioReader, Entry, Source, digest, printable, write_dataset_info
from wavlm_jax.files import read_json, write_json, write_text
from wavlm_jax.shapes import SAMPLE_RATE
from wavlm_jax.version import __version__

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")


class WorkerError(RuntimeError):
    """A worker process died without a word; says what to do."""


def unordered(
    work: Callable[[Job], Outcome], jobs: Sequence[Job], workers: int, jobs_per_process: int | None = None
) -> Iterator[tuple[Job, Outcome]]:
    """(job, work(job)) of all jobs, as they come ready.

    Args:
        work: a picklable function; an exception in it ends the whole.
        jobs: picklable arguments.
        workers: processes; with one, or one job, the work is done here.
        jobs_per_process: after so many a process is replaced by a fresh one; then no work is done here.

    Raises:
        WorkerError: a process was killed, or ran out of memory.

    """
    workers = min(workers, len(jobs))
    if workers <= 1 and jobs_per_process is None:
        for job in jobs:
            yield job, work(job)
        return
    pool = ProcessPoolExecutor(
        max(workers, 1),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_leave_with_parent,
        max_tasks_per_child=jobs_per_process,
    )
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


def _leave_with_parent() -> None:
    """A worker whose parent was killed outright would wait for work for ever; this one leaves too."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


DROPPED = ("too_short", "too_long")
_BATCH_BYTES = 1 << 25
"""Of FLAC in one record batch: bounds the memory of a worker, and stays far below Arrow's 2 GiB of offsets."""


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What came of a shard's utterances; stands next to the Arrow file until the corpus is whole."""

    digest: str
    """Of the entries and the state of their files."""
    rows: int = 0
    samples: int = 0
    speakers: list[str] = field(default_factory=list)
    utterances: list[str] = field(default_factory=list)
    """SHA-256 of each row's id, length and samples."""
    bad_files: list[dict[str, str]] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    warnings: dict[str, int] = field(default_factory=dict)
    size: int = 0
    sha256: str = ""

    @classmethod
    def read(cls, file: Path) -> "ShardReport | None":
        """The report in `file`, None where there is none that can be read."""
        try:
            return cls(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError):
            return None


class ShardWriter:
    """Rows on their way into an Arrow file, and the counts for its report."""

    def __init__(self, file: Path, policy: Policy) -> None:
        self.policy = policy
        self.rows: list[dict[str, Any]] = []
        self.bytes = 0
        self.samples = 0
        self.speakers: set[str] = set()
        self.utterances: list[str] = []
        self.bad_files: list[dict[str, str]] = []
        self.dropped: Counter[str] = Counter()
        self.warnings: Counter[str] = Counter()
        self._stream = pa.ipc.new_stream(str(file), SCHEMA)

    def add(self, entry: Entry, reader: AudioReader) -> None:
        """Bring one utterance in, or note why not."""
        try:
            pieces, warnings = conform(reader(entry), self.policy, entry.samples)
            phones = _checked(entry.phones, pieces)
        except AudioFault as fault:
            if fault.fault in DROPPED:
                self.dropped[fault.fault] += 1
            else:
                names = {"id": entry.id, "path": printable(str(entry.audio))}
                self.bad_files.append({**names, "fault": fault.fault, "detail": printable(fault.detail)})
            return
        self.warnings.update(warnings)
        for number, piece in enumerate(pieces):
            whole = len(pieces) == 1
            self._row(entry if whole else entry._replace(id=f"{entry.id}#{number:04d}", text=""), piece, phones)
        if self.bytes >= _BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what has gathered as one record batch."""
        if self.rows:
            self._stream.write_batch(pa.RecordBatch.from_pylist(self.rows, SCHEMA))
        self.rows, self.bytes = [], 0

    def close(self) -> None:
        """Write the rest."""
        self.flush()
        self._stream.close()

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
        self.rows.append(row)
        self.bytes += len(piece.flac)
        self.samples += piece.num_samples
        self.speakers.add(entry.speaker)
        self.utterances.append(hashlib.sha256(f"{entry.id}\0{piece.num_samples}\0".encode() + piece.digest).hexdigest())


def write_shard(file: Path, entries: Sequence[Entry], reader: AudioReader, policy: Policy) -> ShardReport:
    """Bring `entries` into the Arrow file `file`, and its report next to it; both appear whole or not at all."""
    draft = file.with_suffix(".tmp")
    writer = ShardWriter(draft, policy)
    for entry in entries:
        writer.add(entry, reader)
    writer.close()
    report = ShardReport(
        digest=digest(entries, stamps=True),
        rows=len(writer.utterances),
        samples=writer.samples,
        speakers=sorted(writer.speakers - {""}),
        utterances=writer.utterances,
        bad_files=writer.bad_files,
        dropped=dict(writer.dropped),
        warnings=dict(writer.warnings),
        size=draft.stat().st_size,
        sha256=sha256_of(draft),
    )
    draft.replace(file)
    write_json(report_file(file), asdict(report))
    return report


def report_file(file: Path) -> Path:
    """Where the report of the shard `file` stands."""
    return file.with_suffix(".json")


def _checked(phones: Alignment | None, pieces: Sequence[Conformed]) -> dict[str, Any] | None:
    """Phones of an utterance that was not split; they are in samples of 16 kHz."""
    if phones is None or len(pieces) > 1:
        return None
    if phones.ends and phones.ends[-1] > pieces[0].num_samples:
        found, length = phones.ends[-1], pieces[0].num_samples
        raise AudioFault("length_mismatch", f"phones end at sample {found}, the audio has {length} at {SAMPLE_RATE} Hz")
    return phones._asdict()


FREE_FAULTS = 5
"""Bad files that are always tolerated, however small the corpus."""
BAD_FILES = "bad_files.jsonl"
_PLAN = "plan.json"
_SHARD_ROWS = (64, 4096)
"""Fewest and most utterances of a shard; in between, a corpus has a thousand shards."""


class PrepareError(RuntimeError):
    """Preparation cannot go on; says why, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How a source becomes a corpus."""

    name: str
    policy: Policy = dataclasses.field(default_factory=Policy)
    fault_cap: float = 0.001
    """Share of bad files above which it stops (`FREE_FAULTS` are always tolerated)."""
    workers: int = 1
    progress: bool = False


class Result(NamedTuple):
    """A corpus, and whether it was there already."""

    header: CorpusHeader
    fresh: bool


class _Job(NamedTuple):
    file: Path
    entries: Sequence[Entry]


def prepare(source: Source, out: Path, preparation: Preparation) -> Result:
    """Make the corpus folder `out` of `source`.

    Raises:
        PrepareError: too many bad files, nothing usable, or `out` or its partial work belongs to another source.
        WorkerError: a worker process died.

    """
    state = digest(source.entries, _options(preparation.policy), stamps=True)
    if is_corpus(out):
        return Result(_same_corpus(out, state), fresh=False)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PrepareError(f"{out}: exists and is no corpus; give another --out, or remove it")
    partial = out.with_name(out.name + ".partial")
    if not is_corpus(partial):
        _claim(partial, source, preparation.policy)
        jobs = _jobs(source, partial)
        reports = _run(jobs, source.reader, preparation, partial)
        _complete(jobs, reports, _header(jobs, reports, source, preparation, state), partial)
    header = _same_corpus(partial, state)
    _publish(partial, out)
    return Result(header, fresh=True)


def split(source: Source, share: float) -> tuple[Source, Source]:
    """(train, held out): about `share` of the utterances by the hash of their ids, never none.

    An utterance stays on its side whatever else the source holds.

    Raises:
        PrepareError: fewer than two utterances.

    """
    if len(source.entries) < 2:  # noqa: PLR2004
        raise PrepareError(f"{source.description}: {len(source.entries)} utterance, a held-out share needs two")
    places = [int.from_bytes(sha256(entry.id.encode()).digest()[:8]) / 2**64 for entry in source.entries]
    ranked = sorted(places)
    edge = min(max(share, ranked[0]), ranked[-2])
    held_out = [entry for entry, place in zip(source.entries, places, strict=True) if place <= edge]
    kept = [entry for entry, place in zip(source.entries, places, strict=True) if place > edge]
    return dataclasses.replace(source, entries=kept), dataclasses.replace(source, entries=held_out)


def _options(policy: Policy) -> str:
    return json.dumps(dataclasses.asdict(policy), sort_keys=True)


def _same_corpus(out: Path, state: str) -> CorpusHeader:
    header = read_header(out)
    if header.source_digest != state:
        raise PrepareError(
            f"{out}: holds the corpus {header.name!r} made from {header.source}, from other files or with other "
            "options than now; give another --out, or remove it"
        )
    return header


def _claim(partial: Path, source: Source, policy: Policy) -> None:
    """Take the work folder, or go on in it if it belongs to this source and these options."""
    plan = {"listing": digest(source.entries), "options": _options(policy), "source": source.description}
    file = partial / _PLAN
    if file.is_file():
        found = read_json(file)
        for key, what in (("listing", "the source has changed since"), ("options", "it was begun with other options")):
            if found[key] != plan[key]:
                raise PrepareError(
                    f"{partial}: cannot be resumed, {what} (begun: {found['source']}, {found['options']}); remove this "
                    "folder to start over"
                )
        return
    partial.mkdir(parents=True, exist_ok=True)
    write_json(file, plan)


def _jobs(source: Source, partial: Path) -> list[_Job]:
    count = len(source.entries)
    fewest, most = _SHARD_ROWS
    rows = min(max(fewest, -(-count // 1000)), most)
    shards = -(-count // rows)
    return [
        _Job(
            partial / f"data-{number:05d}-of-{shards:05d}.arrow",
            source.entries[number * rows : (number + 1) * rows],
        )
        for number in range(shards)
    ]


def _run(jobs: Sequence[_Job], reader: AudioReader, preparation: Preparation, partial: Path) -> list[ShardReport]:
    """Reports of all shards in order; those that were done before are taken as they are."""
    done = {job.file: report for job in jobs if (report := _finished(job)) is not None}
    pending = [job for job in jobs if job.file not in done]
    total = sum(len(job.entries) for job in jobs)
    allowed = max(FREE_FAULTS, int(preparation.fault_cap * total))
    bar = tqdm(total=total, unit="file", desc=preparation.name, disable=not preparation.progress)
    with bar:
        bar.update(total - sum(len(job.entries) for job in pending))
        _check_cap(done.values(), allowed, total, partial)
        work = functools.partial(_write_one, reader=reader, policy=preparation.policy)
        for job, report in unordered(work, pending, preparation.workers):
            done[job.file] = report
            bar.update(len(job.entries))
            _check_cap(done.values(), allowed, total, partial)
    return [done[job.file] for job in jobs]


def _finished(job: _Job) -> ShardReport | None:
    report = ShardReport.read(report_file(job.file))
    if report is None or not job.file.is_file() or job.file.stat().st_size != report.size:
        return None
    return report if report.digest == digest(job.entries, stamps=True) else None


def _write_one(job: _Job, reader: AudioReader, policy: Policy) -> ShardReport:
    return write_shard(job.file, job.entries, reader, policy)


def _check_cap(reports: Iterable[ShardReport], allowed: int, total: int, partial: Path) -> None:
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
    jobs: Sequence[_Job], reports: Sequence[ShardReport], source: Source, preparation: Preparation, state: str
) -> CorpusHeader:
    rows = sum(report.rows for report in reports)
    if not rows:
        raise PrepareError(
            f"{source.description}: no usable utterance: {_sum(_fault_counts(reports))} bad, "
            f"{_sum(report.dropped for report in reports)} dropped"
        )
    everything = sha256("".join(name for report in reports for name in report.utterances).encode())
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
        faults=_sum(_fault_counts(reports)),
        dropped=_sum(report.dropped for report in reports),
        warnings=_sum(report.warnings for report in reports),
        versions=_versions(),
        shards=tuple(
            Shard(file=job.file.name, rows=report.rows, size=report.size, sha256=report.sha256)
            for job, report in zip(jobs, reports, strict=True)
        ),
    )


def _fault_counts(reports: Iterable[ShardReport]) -> Iterator[Counter[str]]:
    return (Counter(row["fault"] for row in report.bad_files) for report in reports)


def _sum(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total.most_common())


def _versions() -> dict[str, str]:
    names = ("soundfile", "soxr", "datasets", "pyarrow", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names}
    return {"wavlm_jax": __version__, "libsndfile": soundfile.__libsndfile_version__, **versions}


def _complete(jobs: Sequence[_Job], reports: Sequence[ShardReport], header: CorpusHeader, partial: Path) -> None:
    """Everything that makes the work folder a corpus, the header last."""
    _write_bad_files(partial, [row for report in reports for row in report.bad_files])
    write_dataset_info(partial, [job.file.name for job in jobs])
    write_header(partial, header)


def _publish(partial: Path, out: Path) -> None:
    """Deletes what only a resumption needs, and what a killed worker left half written; renames the folder."""
    for leftover in (partial / _PLAN, *partial.glob("data-*.json"), *partial.glob(".*.partial")):
        leftover.unlink(missing_ok=True)
    partial.rename(out)
