"""`header.json`, the last file that is written of a corpus: what the corpus is, and which files make it up."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from wavlm_jax.settings import SettingsError, read

FORMAT = 1
HEADER = "header.json"


class CorpusError(ValueError):
    """A folder that is not a whole corpus; the message names the file and the cure."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One Arrow file of a corpus."""

    file: str
    rows: int
    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True, kw_only=True)
class CorpusHeader:
    """What `header.json` says."""

    format: int
    name: str
    hours: float
    count: int
    """Utterances."""
    speakers: int
    """Distinct ones; 0 where the source names none."""
    sample_rate: int
    """Hz: 16,000."""
    fingerprint: str
    """SHA-256 over ids, lengths and decoded samples: the same on every machine and for every number of workers."""
    source: str
    """Where it came from, for people."""
    source_digest: str
    """SHA-256 over the source's list of utterances and the options that shaped the corpus."""
    faults: dict[str, int]
    """Name of a fault -> files left out for it; the files stand in bad_files.jsonl."""
    dropped: dict[str, int]
    """too_short, too_long -> utterances left out by --min-seconds and --max-seconds."""
    warnings: dict[str, int]
    """Name of a warning (down_mix_cancels, silent, clipped) -> files kept in spite of it."""
    versions: dict[str, str]
    shards: tuple[Shard, ...]


def is_corpus(path: Path) -> bool:
    """Whether `path` holds a whole corpus, as far as its header tells."""
    return (path / HEADER).is_file()


def write_header(folder: Path, header: CorpusHeader) -> None:
    """Write `header.json`, the last file of a corpus, whole or not at all."""
    draft = folder / "header.tmp"
    draft.write_text(json.dumps(asdict(header), indent=2, ensure_ascii=False) + "\n")
    draft.rename(folder / HEADER)


def sha256_of(file: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_header(path: Path) -> CorpusHeader:
    """The header of the corpus in folder `path`.

    Raises:
        CorpusError: no header there, or one that this version cannot read.

    """
    file = path / HEADER
    if not file.is_file():
        parts = sorted(inner.parent.name for inner in path.glob(f"*/{HEADER}"))
        if parts:
            raise CorpusError(f"{path}: no corpus itself; it holds the corpora {', '.join(parts)}: open one of them")
        raise CorpusError(
            f"{path}: no {HEADER}, so not a whole corpus; make it: python -m wavlm_jax.data SOURCE --out {path}"
        )
    try:
        values = json.loads(file.read_text())
        found = values["format"]
        if found != FORMAT:
            raise CorpusError(f"{file}: corpus format {found}, this version reads {FORMAT}; prepare the corpus again")
        return read(values, CorpusHeader, str(file))
    except (json.JSONDecodeError, TypeError, KeyError, SettingsError) as error:
        raise CorpusError(f"{file}: not a corpus header ({error}); prepare the corpus again") from error
