"""One shard of a corpus: written by one worker in one go, or not at all."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from wavlm_jax.audio.wave import AudioFault
from wavlm_jax.data.conform import Conformed, Policy, conform
from wavlm_jax.data.header import sha256_of
from wavlm_jax.data.hub import SCHEMA
from wavlm_jax.data.sources import Alignment, AudioReader, Entry, digest, printable
from wavlm_jax.shapes import SAMPLE_RATE
from wavlm_jax.whole_file import write_text

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
    write_text(report_file(file), json.dumps(asdict(report)))
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
