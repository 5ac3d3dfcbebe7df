"""Simulated conversations for diarisation: single utterances laid out in time and mixed, with their exact turns.

Two layouts (who says which utterance when). In turns: one voice after another, with pauses and as much overlap as is
asked for, never more than two voices at once. Independent: every speaker on their own time line with exponential
pauses, as in EEND's simulation (arXiv 1909.06247); the overlap follows from pauses and speakers.
All times are multiples of 10 ms.

A conversation is a function of (seed, its number): any number of workers, interrupted and started again, make the same
corpus. The command is `python -m wavlm_jax.data simulate`.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from wavlm_jax.audio.wave import FULL_SCALE, encode_flac, to_int16
from wavlm_jax.command_line import plain_number
from wavlm_jax.data.augment import MOST_DB, RANGE_DB, Samples, noise_below, with_echoes
from wavlm_jax.data.corpus import Corpus, attach_turns
from wavlm_jax.data.entries import Entry, SourceError, UtteranceSource
from wavlm_jax.data.prepare import Preparation, PreparedCorpus, available_cores, prepare, unordered
from wavlm_jax.files import named
from wavlm_jax.shapes import SAMPLE_RATE
from wavlm_jax.text.records import Turn

GRID = 160
"""Samples (10 ms)."""
_STREAM = 7
_OVERLAPPING_TURNS = 0.75
"""Of the turns that could overlap, the share that does while there is too little overlap; the others leave a pause."""
_LEAST_SPEECH = 5
"""Blocks of 10 ms in the shortest span of speech."""
_SPEECH_RMS = 0.05
"""Root mean square of speech at 0 dB: 26 dB below full scale."""
_PEAK = 0.99
_LONGEST = 36_000.0
"""Seconds: a conversation is mixed in memory (10 h: 2.3 GB)."""
_CHUNK = 256
"""Utterances per job when speech is searched."""
_MIXING = 1 << 63
"""Added to the seed, so that levels and noise do not draw the same numbers as the layout."""


@dataclass(frozen=True, kw_only=True)
class ConversationSettings:
    """How conversations are laid out."""

    speakers: tuple[int, ...] = (2, 3, 4)
    """Numbers of speakers, drawn with equal probability."""
    seconds: float = 60.0
    """No utterance begins after this time."""
    pause_seconds: float = 1.0
    """Mean of the pauses, which are exponentially distributed."""
    overlap: float | None = 0.15
    """Share of overlapped speech in all speech (the target, approached turn by turn); None: independent layout."""
    level_db: float = 5.0
    """The level of each speaker is uniform within +- this."""

    def __post_init__(self) -> None:
        if not self.speakers or min(self.speakers) < 1:
            raise ValueError(f"speakers: found {self.speakers}, expected numbers of 1 or more")
        for name in ("seconds", "pause_seconds"):
            if not 0 < getattr(self, name) <= _LONGEST:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected more than 0, at most {_LONGEST:.0f}")
        if self.overlap is not None and not 0 <= self.overlap < 1:
            raise ValueError(f"overlap: found {self.overlap}, expected a share in [0, 1), or None")
        if not 0 <= self.level_db <= MOST_DB:
            raise ValueError(f"level_db: found {self.level_db}, expected 0 to {MOST_DB:.0f}")


class Speech(NamedTuple):
    """Where there is speech in the utterances of a corpus."""

    utterances: Mapping[str, Sequence[int]]
    """Speaker -> numbers of their utterances that have speech."""
    spans: Mapping[int, Int64[np.ndarray, "spans 2"]]
    """Utterance -> starts and ends of its speech in samples, ascending, on the grid."""

    def extent(self, utterance: int) -> tuple[int, int]:
        """First sample of its speech, and one past the last."""
        spans = self.spans[utterance]
        return int(spans[0, 0]), int(spans[-1, 1])


class PlacedUtterance(NamedTuple):
    """An utterance in a conversation."""

    speaker: str
    utterance: int
    start: int
    """Sample of the conversation at which its speech begins."""
    samples: int
    """Length of its speech, pauses included."""

    @property
    def end(self) -> int:
        """Sample of the conversation at which its speech ends, exclusive."""
        return self.start + self.samples


class Draws:
    """A stream of random numbers from raw Philox output, which numpy keeps stable over versions."""

    def __init__(self, seed: int, number: int) -> None:
        key = np.array([seed % 2**64, number], np.uint64)
        self._bits = np.random.Philox(key=key, counter=np.array([0, 0, 0, _STREAM], np.uint64))

    def uniform(self) -> float:
        """In [0, 1)."""
        return (int(self._bits.random_raw()) >> 11) / 2**53

    def below(self, count: int) -> int:
        """0 ... count - 1."""
        return int(self._bits.random_raw()) % count

    def shuffled(self, count: int) -> list[int]:
        """0 ... count - 1 in random order."""
        bits = np.atleast_1d(self._bits.random_raw(count))
        return np.argsort(bits, kind="stable").tolist()

    def pause(self, mean_seconds: float) -> int:
        """An exponentially distributed pause, in samples on the grid."""
        return on_grid(-math.log1p(-self.uniform()) * mean_seconds)


def on_grid(seconds: float) -> int:
    """Samples in the nearest multiple of 10 ms."""
    return round(seconds * SAMPLE_RATE / GRID) * GRID


def speech_spans(wave: Samples, below_db: float = 30.0, gap_seconds: float = 0.2) -> Int64[np.ndarray, "spans 2"]:
    """Voice activity by energy, for a recording of one person: starts and ends in samples.

    Active are blocks of 10 ms whose power is within `below_db` of the loud ones' (95th percentile). Gaps below
    `gap_seconds` are filled, spans below 50 ms dropped.
    """
    count = len(wave) // GRID
    power = np.square(wave[: count * GRID], dtype=np.float64).reshape(count, GRID).mean(axis=1)
    loud = power > max(np.quantile(power, 0.95) * 10 ** (-below_db / 10), 1e-9) if count else np.zeros(0, bool)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], loud, [0]])))
    merged: list[list[int]] = []
    for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        if merged and (start - merged[-1][1]) * GRID < gap_seconds * SAMPLE_RATE:
            merged[-1][1] = end
        else:
            merged.append([start, end])
    kept = [span for span in merged if span[1] - span[0] >= _LEAST_SPEECH]
    return np.array(kept, np.int64).reshape(-1, 2) * GRID


def lay_out(speech: Speech, settings: ConversationSettings, draws: Draws) -> list[PlacedUtterance]:
    """The utterances of a conversation, sorted by start. Nobody overlaps themselves; every speaker has an utterance.

    Raises:
        SourceError: the corpus has fewer speakers than the settings may draw.

    """
    names = sorted(speech.utterances)
    if len(names) < max(settings.speakers):
        most = max(settings.speakers)
        raise SourceError(f"speakers: found {len(names)} with speech, expected {most} or more; lower --speakers")
    count = settings.speakers[draws.below(len(settings.speakers))]
    voices = [_Voice(names[place], speech, draws) for place in draws.shuffled(len(names))[:count]]
    placed = _independent(voices, settings, draws) if settings.overlap is None else _in_turns(voices, settings, draws)
    return sorted(placed, key=lambda one: (one.start, one.speaker))


class _Voice:
    """A speaker: their utterances in random order, again and again, and the end of the latest one."""

    def __init__(self, name: str, speech: Speech, draws: Draws) -> None:
        self._name, self._speech = name, speech
        self._order = [speech.utterances[name][place] for place in draws.shuffled(len(speech.utterances[name]))]
        self._said = 0
        self.end = 0

    @property
    def next_samples(self) -> int:
        """Length of the next utterance."""
        start, end = self._speech.extent(self._next)
        return end - start

    def say(self, start: int) -> PlacedUtterance:
        """Place the next utterance at sample `start` of the conversation."""
        placed = PlacedUtterance(self._name, self._next, start, self.next_samples)
        self._said, self.end = self._said + 1, placed.end
        return placed

    @property
    def _next(self) -> int:
        return self._order[self._said % len(self._order)]


def _independent(voices: Sequence[_Voice], settings: ConversationSettings, draws: Draws) -> list[PlacedUtterance]:
    placed = []
    for voice in voices:
        start = draws.pause(settings.pause_seconds)
        while start < on_grid(settings.seconds) or not voice.end:
            placed.append(voice.say(start))
            start = voice.end + draws.pause(settings.pause_seconds)
    return placed


def _in_turns(voices: Sequence[_Voice], settings: ConversationSettings, draws: Draws) -> list[PlacedUtterance]:
    wanted = settings.overlap or 0.0
    placed: list[PlacedUtterance] = []
    # from `alone_from` to `end` one voice speaks; the next may begin there, so never more than two speak at once
    end = alone_from = spoken = overlapped = 0
    while len(placed) < len(voices) or end < on_grid(settings.seconds):
        waiting = voices[len(placed) :] or [voice for voice in voices if voice.end < end] or voices
        voice = waiting[0 if len(placed) < len(voices) else draws.below(len(waiting))]
        length = voice.next_samples
        # with an overlap of d the share becomes (overlapped + d) / (spoken + length - d)
        lacking = (wanted * (spoken + length) - overlapped) / (1 + wanted)
        shared = (
            on_grid(2 * draws.uniform() * max(lacking, 0) / SAMPLE_RATE) if draws.uniform() < _OVERLAPPING_TURNS else 0
        )
        shared = min(shared, length, end - max(alone_from, voice.end))
        start = end - shared if shared > 0 else end + draws.pause(settings.pause_seconds)
        alone_from = max(end, start) if start + length > end else start + length
        placed.append(voice.say(start))
        end = max(end, start + length)
        spoken, overlapped = spoken + length - shared, overlapped + shared
    return placed


@dataclass(frozen=True, kw_only=True)
class Room:
    """Noise and reverberation; both are prepared corpora."""

    noise: Corpus | None = None
    snr_db: tuple[float, float] = (10.0, 25.0)
    """Signal-to-noise ratio of all speech together, uniform in this range."""
    responses: Corpus | None = None
    """Room impulse responses: each speaker has one throughout a conversation; the direct sound stays in time."""

    def __post_init__(self) -> None:
        if not -MOST_DB <= self.snr_db[0] <= self.snr_db[1] <= MOST_DB:
            raise ValueError(f"snr_db: found {self.snr_db}, expected (low, high), {RANGE_DB}")


@dataclass(frozen=True)
class Mixer:
    """Number of a conversation -> its audio. An `AudioReader` of `data.sources`."""

    corpus: Corpus
    speech: Speech
    settings: ConversationSettings
    room: Room
    seed: int

    def __call__(self, entry: Entry) -> bytes:
        """A FLAC file."""
        return encode_flac(to_int16(self.wave(int(entry.audio))))

    def layout(self, number: int) -> list[PlacedUtterance]:
        """The layout of a conversation."""
        return lay_out(self.speech, self.settings, Draws(self.seed, number))

    def wave(self, number: int) -> Samples:
        """All voices at their levels and in their rooms, plus noise; scaled down if it would clip."""
        placed = self.layout(number)
        draws = Draws(self.seed ^ _MIXING, number)
        names = sorted({one.speaker for one in placed})
        gains = {name: 10 ** (self.settings.level_db * (2 * draws.uniform() - 1) / 20) for name in names}
        responses = {name: self._response(draws) for name in names}
        mixed = np.zeros(max(one.end for one in placed) + on_grid(0.5), np.float32)
        for one in placed:
            heard, response = gains[one.speaker] * self.voice(one), responses[one.speaker]
            heard = heard if response is None else with_echoes(heard, response)
            heard = heard[: len(mixed) - one.start]
            mixed[one.start : one.start + len(heard)] += heard
        mixed += self._noise(mixed, draws)
        peak = float(np.abs(mixed).max())
        return mixed if peak <= _PEAK else (mixed * np.float32(_PEAK / peak)).astype(np.float32)

    def voice(self, one: PlacedUtterance) -> Samples:
        """The speech of an utterance at 0 dB, silence before and after it cut off."""
        start, end = self.speech.extent(one.utterance)
        wave = self.corpus.wave(one.utterance, start, end - start).astype(np.float32) / FULL_SCALE
        spans = self.speech.spans[one.utterance] - start
        loud = np.concatenate([wave[first:last] for first, last in spans])
        return wave * np.float32(_SPEECH_RMS / np.sqrt(np.mean(np.square(loud, dtype=np.float64))))

    def turns(self, number: int, name: str) -> list[Turn]:
        """The turns of a conversation, exact to the sample."""
        return [
            Turn(name, (one.start + first) / SAMPLE_RATE, (last - first) / SAMPLE_RATE, one.speaker)
            for one in self.layout(number)
            for first, last in (self.speech.spans[one.utterance] - self.speech.extent(one.utterance)[0]).tolist()
        ]

    def _response(self, draws: Draws) -> Samples | None:
        if self.room.responses is None:
            return None
        response = self.room.responses.wave(draws.below(len(self.room.responses))).astype(np.float32)
        return response / np.float32(max(np.sqrt(np.sum(np.square(response, dtype=np.float64))), 1e-9))

    def _noise(self, mixed: Samples, draws: Draws) -> Samples:
        """A clip of noise from a random start, repeated, at a random SNR; silence if there is no noise corpus."""
        if self.room.noise is None:
            return np.zeros_like(mixed)
        clip = self.room.noise.wave(draws.below(len(self.room.noise))).astype(np.float32) / FULL_SCALE
        noise = np.resize(np.roll(clip, -draws.below(len(clip))), len(mixed))
        low, high = self.room.snr_db
        return noise_below(mixed, noise, low + (high - low) * draws.uniform())


def open_mixer(corpus: Path, settings: ConversationSettings, room: Room, seed: int, workers: int) -> Mixer:
    """A mixer of the utterances in the corpus folder `corpus`; speech is searched in all of them.

    Raises:
        CorpusError: there is no corpus.
        SourceError: it names no speaker.
        AudioFault: an utterance that cannot be decoded.

    """
    opened = Corpus.open(corpus)
    return Mixer(opened, find_speech(opened, workers), settings, room, seed)


def simulate(
    mixer: Mixer, conversations: int, out: Path, workers: int, *, progress: bool = False
) -> tuple[PreparedCorpus, list[Turn]]:
    """Make the corpus `out` of that many conversations, and their turns; resumable, and nothing to do a second time.

    Raises:
        PrepareError: `out` holds something else, or was begun with other settings.
        SourceError: too few speakers.

    """
    names = [f"conversation-{number:06d}" for number in range(conversations)]
    stamp = _recipe(mixer)
    entries = [Entry(id=name, audio=number, stamp=stamp) for number, name in enumerate(names)]
    turns = [turn for number, name in enumerate(names) for turn in mixer.turns(number, name)]
    source = UtteranceSource(f"{conversations} conversations simulated from {mixer.corpus.header.name}", entries, mixer)
    result = prepare(source, out, Preparation(name=out.name, workers=workers, progress=progress))
    attach_turns(Corpus.open(out), turns)
    return result, turns


def find_speech(corpus: Corpus, workers: int) -> Speech:
    """Search for speech in every utterance of a corpus.

    Raises:
        SourceError: the corpus names no speaker.
        AudioFault: an utterance that cannot be decoded.

    """
    speakers = [str(speaker) for speaker in corpus.speakers]
    if not any(speakers):
        raise SourceError(
            f"{corpus.path}: names no speaker, and a conversation needs several; expected a `speaker` column in the "
            "manifest that the corpus is prepared from"
        )
    spans: dict[int, Int64[np.ndarray, "spans 2"]] = {}
    chunks = [range(first, min(first + _CHUNK, len(corpus))) for first in range(0, len(corpus), _CHUNK)]
    for _, found in unordered(functools.partial(_spans, corpus), chunks, workers):
        spans |= {index: one for index, one in found if len(one)}
    utterances: dict[str, list[int]] = {}
    for index in sorted(spans):
        if speakers[index]:
            utterances.setdefault(speakers[index].replace(" ", "_"), []).append(index)
    return Speech(utterances, spans)


def overlap_share(turns: Sequence[Turn]) -> float:
    """Share of overlapped speech in all speech."""
    recordings: dict[str, list[Turn]] = {}
    for turn in turns:
        recordings.setdefault(turn.recording, []).append(turn)
    alone = several = 0.0
    for recording in recordings.values():
        edges = sorted([(turn.start, 1) for turn in recording] + [(turn.end, -1) for turn in recording])
        speaking, since = 0, 0.0
        for time, change in edges:
            alone += (time - since) * (speaking == 1)
            several += (time - since) * (speaking > 1)
            speaking, since = speaking + change, time
    return several / max(alone + several, 1e-9)


def _spans(corpus: Corpus, indices: Sequence[int]) -> list[tuple[int, Int64[np.ndarray, "spans 2"]]]:
    return [(index, speech_spans(corpus.wave(index).astype(np.float32) / FULL_SCALE)) for index in indices]


def _recipe(mixer: Mixer) -> str:
    """A digest of everything that a conversation depends on besides its number."""
    room = mixer.room
    others = [corpus.fingerprint if corpus is not None else "" for corpus in (room.noise, room.responses)]
    parts = [dataclasses.asdict(mixer.settings), mixer.seed, mixer.corpus.fingerprint, others, room.snr_db]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


_DESCRIPTION = """Mixes conversations from a corpus of utterances of one speaker each, for training of diarisation: a
corpus of its own, with turns.rttm. The turns are where the mixed voices are loud, exact to 10 ms."""


def command(words: Sequence[str]) -> tuple[PreparedCorpus, Path]:
    """Run `python -m wavlm_jax.data simulate` with these options; the corpus and its folder.

    Raises:
        SystemExit: impossible options.
        SourceError: a corpus without speakers, or with too few.

    """
    defaults, room = ConversationSettings(), Room()
    parser = argparse.ArgumentParser(prog="python -m wavlm_jax.data simulate", description=_DESCRIPTION)
    add = parser.add_argument
    add("corpus", type=named, metavar="CORPUS", help="utterances with speakers, prepared")
    add("--out", type=named, required=True, metavar="CORPUS", help="the conversations; made, resumed, or left alone")
    add("--conversations", type=int, default=100, help="default: 100")
    add(
        "--speakers",
        type=int,
        nargs="+",
        default=list(defaults.speakers),
        help="how many, drawn at random (default: 2 3 4)",
    )
    add("--seconds", type=plain_number, default=defaults.seconds, help="length of each, about (default: 60)")
    add("--pause-seconds", type=plain_number, default=defaults.pause_seconds, help="mean pause (default: 1)")
    add("--overlap", type=plain_number, default=defaults.overlap, help="share of overlapped speech (default: 0.15)")
    add("--independent", action="store_true", help="speakers on time lines of their own, as in EEND; ignores --overlap")
    add(
        "--level-db",
        type=plain_number,
        default=defaults.level_db,
        help="levels of speakers differ by up to +- (default: 5)",
    )
    add("--noise", type=named, metavar="CORPUS", help="noise to mix in")
    add("--snr-db", type=plain_number, nargs=2, default=list(room.snr_db), help="range of the SNR (default: 10 25)")
    add("--rirs", type=named, metavar="CORPUS", help="room impulse responses, one per speaker and conversation")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=available_cores(), help="processes (default: one per core)")
    options = parser.parse_args(words)
    if options.conversations < 1:
        parser.error(f"--conversations: found {options.conversations}, expected 1 or more")
    try:
        settings = ConversationSettings(
            speakers=tuple(options.speakers),
            seconds=options.seconds,
            pause_seconds=options.pause_seconds,
            overlap=None if options.independent else options.overlap,
            level_db=options.level_db,
        )
        noise, responses = (None if path is None else Corpus.open(path) for path in (options.noise, options.rirs))
        room = Room(noise=noise, snr_db=tuple(options.snr_db), responses=responses)
    except ValueError as error:
        parser.error(str(error))
    mixer = open_mixer(options.corpus, settings, room, options.seed, options.workers)
    show = sys.stderr.isatty()
    result, turns = simulate(mixer, options.conversations, options.out, options.workers, progress=show)
    print(f"{len(turns)} turns; of the time in which anybody speaks, {overlap_share(turns):.1%} has several voices")
    return result, options.out
