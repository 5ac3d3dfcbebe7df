"""A corpus from a source: shards written by several processes, resumable after any interruption, the header last.

Work goes on in OUT.partial, shard by shard, and that folder becomes OUT in one rename. A second call with the same
source and options finds what is done and does the rest, or nothing.
"""

import dataclasses
import functools
import importlib.metadata
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import soundfile
from tqdm import tqdm

from wavlm_jax.data.conform import Policy
from wavlm_jax.data.header import FORMAT, CorpusHeader, Shard, is_corpus, read_header, write_header
from wavlm_jax.data.hub import write_dataset_info
from wavlm_jax.data.pool import unordered
from wavlm_jax.data.shard import ShardReport, report_file, write_shard
from wavlm_jax.data.sources import AudioReader, Entry, Source, digest
from wavlm_jax.shapes import SAMPLE_RATE
from wavlm_jax.version import __version__
from wavlm_jax.whole_file import write_text

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
        found = json.loads(file.read_text())
        for key, what in (("listing", "the source has changed since"), ("options", "it was begun with other options")):
            if found[key] != plan[key]:
                raise PrepareError(
                    f"{partial}: cannot be resumed, {what} (begun: {found['source']}, {found['options']}); remove this "
                    "folder to start over"
                )
        return
    partial.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(plan, indent=2))


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
    """Take down the scaffolding of a whole corpus, and give it its name."""
    for leftover in (partial / _PLAN, *partial.glob("data-*.json")):
        leftover.unlink(missing_ok=True)
    partial.rename(out)
