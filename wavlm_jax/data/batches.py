"""Data sets that `datasets` loads as a source: hub, parquet, Arrow. It hands out bytes, undecoded.

Which utterances make up which batch: pure numpy, the same on every host, and a function of (seed, epoch) alone.

A bucket is a number of frames, and a batch holds one bucket: so the shapes of a run are known before it starts (USERS
#25). Each bucket has its own number of rows, which keeps the seconds of audio in an update constant.

Two ways to fit an utterance in: "crop" (pre-training) takes the largest bucket that is not longer, and nothing is
padded; "pad" (fine-tuning, evaluation) takes the smallest that is not shorter, and nothing is cut.

Order comes from raw Philox output, sorted: numpy promises these bits for ever, and shuffling not.

Buckets that suit a corpus, and what they waste.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt64

from wavlm_jax.data.sources import (
    ID_COLUMNS,
    SPEAKER_COLUMNS,
    TEXT_COLUMNS,
    Entry,
    Source,
    SourceError,
    audio_column,
    kept_inside,
    load_dataset,
)
from wavlm_jax.shapes import SAMPLE_RATE, num_frames, samples_for


@dataclass(frozen=True)
class Rows:
    """Rows of a data set; those that hold a path instead of bytes may only point below `root`."""

    dataset: Any
    column: str
    root: Path

    def __call__(self, entry: Entry) -> bytes | Path:
        """The bytes of one row, or its file."""
        audio = self.dataset[int(entry.audio)][self.column]
        if audio["bytes"] is not None:
            return bytes(audio["bytes"])
        path = self.root / str(audio["path"])
        return kept_inside(path, self.root, f"row {entry.audio} has no bytes and points to {path}, which")


def from_datasets(source: str, subset: str | None = None, split: str | None = None) -> Source:
    """The utterances of a data set (see `corpus.load_dataset`); ids are row numbers where no id column is known.

    Raises:
        SourceError: it cannot be loaded, has no single audio column, or repeats an id.

    """
    try:
        dataset = load_dataset(source, subset, split)
        column = audio_column(dataset)
    except (OSError, ValueError, ConnectionError, RuntimeError) as error:
        raise SourceError(
            f"{source}: not a folder of audio or a manifest, and `datasets` cannot load it either: {error}"
        ) from error
    ids = _texts(dataset, ID_COLUMNS) or [f"{row:08d}" for row in range(len(dataset))]
    speakers = _texts(dataset, SPEAKER_COLUMNS) or [""] * len(dataset)
    texts = _texts(dataset, TEXT_COLUMNS) or [""] * len(dataset)
    seen: dict[str, int] = {}
    for row, name in enumerate(ids):
        if seen.setdefault(name, row) != row:
            raise SourceError(f"{source}: rows {seen[name]} and {row} have the same id {name!r}; ids have to be unique")
    entries = [
        Entry(id=name, audio=row, speaker=speaker, text=text)
        for row, (name, speaker, text) in enumerate(zip(ids, speakers, texts, strict=True))
    ]
    version = getattr(dataset, "_fingerprint", "")
    return Source(
        f"data set {source} {split or ''} {version}".strip(), entries, Rows(dataset, column, Path(source).resolve())
    )


def _texts(dataset: Any, names: tuple[str, ...]) -> list[str] | None:
    """The first known column as texts."""
    for name in names:
        if name in dataset.column_names:
            return ["" if value is None else str(value) for value in dataset[name]]
    return None


Fit = Literal["crop", "pad"]
Lengths = Int64[np.ndarray, "utterances"]

FILLER = -1
"""In place of an utterance: a row of weight 0."""
DEPARTURE = 0.2
"""Share by which the seconds of an update may differ from the config before it is worth a warning (USERS #39)."""


class PlanError(ValueError):
    """Batches that cannot be made; the message prints the arithmetic."""


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """How batches are cut out of a corpus."""

    buckets: tuple[int, ...]
    """Frames, ascending; multiples of 128 suit accelerators. The waveform of a bucket has 320 * frames + 80 samples."""
    seconds_per_update: float
    """Audio in a global batch, all micro-batches together."""
    seconds_per_device: float
    """Most audio in a micro-batch on one device: what its memory holds."""
    row_multiple: int
    """Rows of a batch are a multiple of it: of devices x rows that stay together, and of what suits other machines."""

    def __post_init__(self) -> None:
        if not self.buckets or list(self.buckets) != sorted(set(self.buckets)) or self.buckets[0] < 1:
            raise ValueError(f"buckets: found {self.buckets}, expected numbers of frames, ascending")
        for name in ("seconds_per_update", "seconds_per_device", "row_multiple"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected more than 0")


class PlannedBatch(NamedTuple):
    """One global batch."""

    bucket: int
    """Frames."""
    indices: Int64[np.ndarray, "rows"]
    """Utterances by number; `FILLER` (in evaluation only) for a row of weight 0."""


class Census(NamedTuple):
    """What a plan does to a corpus, epoch after epoch the same."""

    batches: dict[int, int]
    """Bucket -> batches an epoch; only buckets that have any."""
    rows: dict[int, int]
    """Bucket -> rows of its batches."""
    left_out: int
    """Utterances that no bucket takes: shorter than the smallest ("crop"), longer than the largest ("pad")."""
    cut: int
    """Utterances that are longer than the largest bucket and give their start alone (evaluation)."""
    repeats: int
    """Rows of an epoch that show an utterance again, to fill the last batch."""
    fillers: int
    """Rows of weight 0 (evaluation)."""

    @property
    def num_batches(self) -> int:
        """Batches an epoch."""
        return sum(self.batches.values())

    def describe(self) -> str:
        """One line for people."""
        parts = [f"{count} batches of {self.rows[b]} rows x {b} frames" for b, count in sorted(self.batches.items())]
        notes = {
            "utterances fit no bucket and are left out": self.left_out,
            "utterances are cut to the largest bucket": self.cut,
            "rows are repeats": self.repeats,
            "rows are fillers": self.fillers,
        }
        return "; ".join([", ".join(parts), *(f"{count} {what}" for what, count in notes.items() if count)])


def seconds_of(bucket: int) -> float:
    """Audio in one row of a bucket."""
    return samples_for(bucket) / SAMPLE_RATE


def rows_per_bucket(settings: BatchSettings) -> dict[int, int]:
    """Bucket -> rows of a global batch: as near to the seconds per update as multiples allow, at least one multiple."""
    multiple = settings.row_multiple
    wanted = {bucket: settings.seconds_per_update / seconds_of(bucket) / multiple for bucket in settings.buckets}
    return {bucket: max(round(share), 1) * multiple for bucket, share in wanted.items()}


def microbatches(rows: int, bucket: int, settings: BatchSettings, devices: int, group: int) -> int:
    """The smallest number of micro-batches that keeps each device within its seconds.

    Args:
        rows: of the global batch.
        bucket: frames.
        settings: seconds per device.
        devices: that share the rows.
        group: consecutive rows that stay on one device and in one micro-batch.

    Raises:
        PlanError: rows do not divide, or not even one group fits a device.

    """
    unit = devices * group
    if rows % unit:
        raise PlanError(
            f"{rows} rows of {bucket} frames cannot be shared by {devices} devices x groups of {group} rows; make "
            f"row_multiple ({settings.row_multiple}) a multiple of {devices} x {group} = {unit}"
        )
    steps = rows // unit
    for count in range(1, steps + 1):
        if steps % count == 0 and rows / (count * devices) * seconds_of(bucket) <= settings.seconds_per_device:
            return count
    raise PlanError(
        f"a group of {group} rows x {seconds_of(bucket):.2f} s ({bucket} frames) is {group * seconds_of(bucket):.2f} s "
        f"on one device, seconds_per_device is {settings.seconds_per_device}; raise it, or lower the group or buckets"
    )


def describe(settings: BatchSettings, devices: int, group: int) -> list[str]:
    """The arithmetic of an update, a line a bucket, with a warning where it departs far from the config (USERS #39)."""
    lines = []
    for bucket, rows in rows_per_bucket(settings).items():
        accumulation = microbatches(rows, bucket, settings, devices, group)
        total = rows * seconds_of(bucket)
        line = (
            f"{total / devices / accumulation:.1f} s/device x {devices} devices x accumulation {accumulation} "
            f"= {total:.0f} s per update (config: {settings.seconds_per_update:.0f}), {rows} rows x {bucket} frames"
        )
        departure = total / settings.seconds_per_update - 1
        if abs(departure) > DEPARTURE:
            line += f"; warning: {departure:+.0%}, because rows come in multiples of {settings.row_multiple}"
        lines.append(line)
    return lines


def random_bits(seed: int, number: int, stream: int, count: int) -> UInt64[np.ndarray, "count"]:
    """`count` random 64-bit words that depend on the three numbers alone; element i does not depend on `count`."""
    key = np.array([seed % 2**64, number], np.uint64)
    philox = np.random.Philox(key=key, counter=np.array([0, 0, 0, stream], np.uint64))
    bits: UInt64[np.ndarray, "count"] = philox.random_raw(count)
    return bits


def plan(lengths: Lengths, settings: BatchSettings, seed: int, epoch: int, fit: Fit = "crop") -> list[PlannedBatch]:
    """All batches of an epoch, in random order; each full, each utterance that fits in exactly once (but for repeats).

    What does not fill a batch of its bucket goes on to the next smaller ("crop") or larger ("pad") one; the last batch
    is filled by repeating utterances. The number of batches is the same in every epoch.

    Args:
        lengths: samples of each utterance.
        settings: buckets and rows.
        seed: of the run.
        epoch: 0, 1, ...
        fit: how utterances go into buckets.

    Raises:
        PlanError: no utterance fits.

    """
    order = _shuffled(np.arange(len(lengths)), seed, epoch, stream=0)
    home = _homes(lengths, settings, fit)[order]
    rows = rows_per_bucket(settings)
    batches: list[PlannedBatch] = []
    left = order[:0]
    cascade = _cascade(settings, fit)
    for bucket in cascade:
        pool = np.concatenate([left, order[home == bucket]])
        full = len(pool) // rows[bucket] * rows[bucket]
        batches += [PlannedBatch(bucket, part) for part in pool[:full].reshape(-1, rows[bucket])]
        left = pool[full:]
    if len(left):
        batches.append(_filled(cascade[-1], left, order[home >= 0], rows[cascade[-1]]))
    if not batches:
        raise PlanError(_nothing_fits(lengths, settings, fit))
    return [batches[number] for number in _shuffled(np.arange(len(batches)), seed, epoch, stream=1)]


def census(lengths: Lengths, settings: BatchSettings, fit: Fit = "crop") -> Census:
    """What `plan` makes of a corpus in any epoch."""
    batches = plan(lengths, settings, seed=0, epoch=0, fit=fit)
    left_out = int(np.sum(_homes(lengths, settings, fit) < 0))
    shown = sum(len(batch.indices) for batch in batches)
    return _census(batches, left_out=left_out, cut=0, repeats=shown - (len(lengths) - left_out))


def evaluation_plan(lengths: Lengths, settings: BatchSettings) -> tuple[list[PlannedBatch], Census]:
    """Batches that hold every utterance exactly once, padded up to its bucket, longest first.

    A bucket's utterances are spread evenly over as few batches as its rows allow; rows that stay open go to the longest
    of the shorter ones, and at the very end to `FILLER`. An utterance longer than the largest bucket gives its start
    alone, and is counted (`Census.cut`): make the buckets larger where that matters.

    Raises:
        PlanError: no utterance at all.

    """
    if not len(lengths):
        raise PlanError("evaluation: the corpus has no utterance")
    home = _homes(lengths, settings, "pad")
    cut = home < 0
    home[cut] = settings.buckets[-1]
    longest_first = np.argsort(-lengths, kind="stable")
    batches, placed = [], 0
    for bucket, most in reversed(rows_per_bucket(settings).items()):
        own = int(np.sum(home[longest_first[placed:]] == bucket))
        if own:
            count = -(-own // most)
            rows = -(-own // (count * settings.row_multiple)) * settings.row_multiple
            taken = longest_first[placed : placed + count * rows]
            filled = np.pad(taken, (0, count * rows - len(taken)), constant_values=FILLER)
            batches += [PlannedBatch(bucket, part) for part in filled.reshape(count, rows)]
            placed += len(taken)
    return batches, _census(batches, left_out=0, cut=int(cut.sum()), repeats=0)


def of_corpus(batches: list[PlannedBatch], chosen: Int64[np.ndarray, "chosen"] | None) -> list[PlannedBatch]:
    """Batches that were planned for the utterances number `chosen` of a corpus, with their numbers in the corpus."""
    if chosen is None:
        return batches
    numbers = np.append(chosen, FILLER)
    return [PlannedBatch(batch.bucket, numbers[batch.indices]) for batch in batches]


def _census(batches: list[PlannedBatch], left_out: int, cut: int, repeats: int) -> Census:
    counts: dict[int, int] = {}
    for batch in batches:
        counts[batch.bucket] = counts.get(batch.bucket, 0) + 1
    rows = {batch.bucket: len(batch.indices) for batch in batches}
    fillers = sum(int(np.sum(batch.indices == FILLER)) for batch in batches)
    return Census(counts, rows, left_out, cut, repeats, fillers)


def _homes(lengths: Lengths, settings: BatchSettings, fit: Fit) -> Int64[np.ndarray, "utterances"]:
    """The bucket of each utterance, -1 where none takes it."""
    sizes = np.array([samples_for(bucket) for bucket in settings.buckets])
    if fit == "crop":
        place = np.searchsorted(sizes, lengths, side="right") - 1
    else:
        place = np.searchsorted(sizes, lengths, side="left")
        place[place == len(sizes)] = -1
    return np.where(place < 0, -1, np.array(settings.buckets)[place])


def _cascade(settings: BatchSettings, fit: Fit) -> list[int]:
    """Buckets in the order in which leftovers move on."""
    return list(settings.buckets) if fit == "pad" else list(reversed(settings.buckets))


def _shuffled(items: Int64[np.ndarray, "items"], seed: int, epoch: int, stream: int) -> Int64[np.ndarray, "items"]:
    return items[np.argsort(random_bits(seed, epoch, stream, len(items)), kind="stable")]


def _filled(
    bucket: int, left: Int64[np.ndarray, "left"], everyone: Int64[np.ndarray, "utterances"], rows: int
) -> PlannedBatch:
    """A last batch: what is left, then others in the order of the epoch, round and round if there are too few."""
    others = everyone[~np.isin(everyone, left)]
    return PlannedBatch(bucket, np.resize(np.concatenate([left, others]), rows))


def _nothing_fits(lengths: Lengths, settings: BatchSettings, fit: Fit) -> str:
    edge, side = (settings.buckets[0], "shorter") if fit == "crop" else (settings.buckets[-1], "longer")
    found = (
        f"the {len(lengths)} utterances last {lengths.min()} to {lengths.max()} samples" if len(lengths) else "empty"
    )
    return (
        f"nothing to train on: {found}, all {side} than the bucket of {edge} frames = {samples_for(edge)} samples; "
        "change the buckets"
    )


def fit_buckets(lengths: Lengths, count: int, multiple: int) -> tuple[int, ...]:
    """At most `count` buckets that hold every utterance with the least padding.

    Exact: the cheapest way to cut the sorted list of multiples of `multiple` frames into `count` runs, by dynamic
    programming over the run that ends at each one.

    Args:
        lengths: samples, each at least one frame.
        count: buckets, that is, compilations.
        multiple: of frames; 128 suits accelerators best, small ones waste less.

    """
    needed = -(-np.maximum(_frames(lengths), 1) // multiple)
    held = np.bincount(needed)
    ends = np.flatnonzero(held)
    total = np.concatenate([[0], np.cumsum(held[ends])])
    cost = np.where(np.arange(len(ends) + 1) == 0, 0.0, np.inf)
    chosen: list[np.ndarray] = []
    for _ in range(min(count, len(ends))):
        # of a run that starts after candidate i and ends with candidate j: all its utterances at the length of j
        run = ends[None, :] * (total[None, 1:] - total[:-1, None])
        run = np.where(np.arange(len(ends))[:, None] <= np.arange(len(ends))[None, :], run, np.inf)
        paths = cost[:-1, None] + run
        chosen.append(paths.argmin(axis=0))
        cost = np.concatenate([[0.0], paths.min(axis=0)])
    buckets, end = [], len(ends)
    for choice in reversed(chosen):
        if end == 0:
            break
        buckets.append(int(ends[end - 1]) * multiple)
        end = int(choice[end - 1])
    return tuple(sorted(buckets))


def padding_share(lengths: Lengths, batches: list[PlannedBatch]) -> float:
    """Share of the samples in `batches` that is padding or filler."""
    held = sum(len(batch.indices) * samples_for(batch.bucket) for batch in batches)
    real = 0
    for batch in batches:
        chosen = lengths[batch.indices[batch.indices != FILLER]]
        real += int(np.minimum(chosen, samples_for(batch.bucket)).sum())
    return 1 - real / held


def _frames(lengths: Lengths) -> Lengths:
    """The fewest frames whose bucket holds each utterance whole, the samples behind its last frame included."""
    frames = num_frames(lengths)
    return frames + (lengths > samples_for(1) + 320 * (frames - 1))
