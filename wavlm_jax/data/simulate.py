"""Conversations laid out from single utterances: who says which one when, a pure function of (seed, number).

Two layouts. In turns: one voice after another, with pauses and with as much overlap as is asked for, never more than
two voices at once. Independent: every speaker on a time line of his own, with exponential pauses, as in EEND's
simulation (arXiv 1909.06247); then overlap follows from pauses and speakers. All times are multiples of 10 ms.

`python -m wavlm_jax.data simulate`: conversations mixed from a corpus of single utterances, with their exact turns.

A conversation is a function of (seed, its number) alone: any number of workers, stopped and started again, make the
same corpus.

Options of `python -m wavlm_jax.data simulate`.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64

from wavlm_jax.audio.wave import FULL_SCALE, encode_flac, to_int16
from wavlm_jax.data.augment import noise_below, with_echoes
from wavlm_jax.data.corpus import Corpus, attach_turns
from wavlm_jax.data.prepare import Preparation, Result, prepare, unordered
from wavlm_jax.data.sources import Entry, Source, SourceError
from wavlm_jax.shapes import SAMPLE_RATE
from wavlm_jax.text.records import Turn

GRID = 160
"""Samples (10 ms)."""
_STREAM = 7
_OFTEN = 0.75
"""Of the turns that could overlap, the share that does where overlap is wanting; the others leave a pause."""


@dataclass(frozen=True, kw_only=True)
class ConversationSettings:
    """What a conversation is like."""

    speakers: tuple[int, ...] = (2, 3, 4)
    """Numbers of speakers, each as likely as the others."""
    seconds: float = 60.0
    """After so long nobody begins to speak any more."""
    pause_seconds: float = 1.0
    """Mean of the pauses, which are exponential."""
    overlap: float | None = 0.15
    """Share of the time in which anybody speaks that has two voices, aimed at turn by turn; None: independent."""
    level_db: float = 5.0
    """Speakers differ in loudness by up to so much either way."""

    def __post_init__(self) -> None:
        if not self.speakers or min(self.speakers) < 1:
            raise ValueError(f"speakers: found {self.speakers}, expected numbers of 1 or more")
        for name in ("seconds", "pause_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected more than 0")
        if self.overlap is not None and not 0 <= self.overlap < 1:
            raise ValueError(f"overlap: found {self.overlap}, expected a share in [0, 1), or None")
        if not 0 <= self.level_db < math.inf:
            raise ValueError(f"level_db: found {self.level_db}, expected 0 or more")


class Speech(NamedTuple):
    """Where there is speech in the utterances that can be used."""

    utterances: Mapping[str, Sequence[int]]
    """Speaker -> numbers of his utterances, none without speech."""
    spans: Mapping[int, Int64[np.ndarray, "spans 2"]]
    """Utterance -> starts and ends of its speech in samples, ascending, on the grid."""

    def extent(self, utterance: int) -> tuple[int, int]:
        """First sample of its speech, and the one behind the last."""
        spans = self.spans[utterance]
        return int(spans[0, 0]), int(spans[-1, 1])


class Placed(NamedTuple):
    """An utterance in a conversation."""

    speaker: str
    utterance: int
    start: int
    """Sample of the conversation at which its speech begins."""
    samples: int
    """From the first to the last sample of its speech."""

    @property
    def end(self) -> int:
        """Exclusive."""
        return self.start + self.samples


class Draws:
    """Random numbers one after the other, from raw Philox output, which numpy promises for ever."""

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
        """Samples on the grid, exponential."""
        return on_grid(-math.log1p(-self.uniform()) * mean_seconds)


def on_grid(seconds: float) -> int:
    """Samples, the nearest multiple of 10 ms."""
    return round(seconds * SAMPLE_RATE / GRID) * GRID


def speech_spans(
    wave: Float32[np.ndarray, "samples"], below_db: float = 30.0, gap_seconds: float = 0.2
) -> Int64[np.ndarray, "spans 2"]:
    """Where somebody speaks in a recording of one person: where it is loud, short gaps filled.

    Loud is a stretch of 10 ms whose power is not more than `below_db` under that of the loud ones (95th percentile); a
    span is at least 50 ms long. Silence has none.
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
    kept = [span for span in merged if span[1] - span[0] >= _LEAST]
    return np.array(kept, np.int64).reshape(-1, 2) * GRID


_LEAST = 5


def lay_out(speech: Speech, settings: ConversationSettings, draws: Draws) -> list[Placed]:
    """The utterances of a conversation, by start. Nobody overlaps himself; everybody who takes part speaks.

    Raises:
        SourceError: fewer speakers than the settings may ask for.

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
    """A speaker: his utterances in random order, round and round, and when he has said the last one."""

    def __init__(self, name: str, speech: Speech, draws: Draws) -> None:
        self._name, self._speech = name, speech
        self._order = [speech.utterances[name][place] for place in draws.shuffled(len(speech.utterances[name]))]
        self._said = 0
        self.end = 0

    @property
    def next_samples(self) -> int:
        """Of what he says next."""
        start, end = self._speech.extent(self._next)
        return end - start

    def say(self, start: int) -> Placed:
        """The next utterance, from sample `start` of the conversation on."""
        placed = Placed(self._name, self._next, start, self.next_samples)
        self._said, self.end = self._said + 1, placed.end
        return placed

    @property
    def _next(self) -> int:
        return self._order[self._said % len(self._order)]


def _independent(voices: Sequence[_Voice], settings: ConversationSettings, draws: Draws) -> list[Placed]:
    placed = []
    for voice in voices:
        start = draws.pause(settings.pause_seconds)
        while start < on_grid(settings.seconds) or not voice.end:
            placed.append(voice.say(start))
            start = voice.end + draws.pause(settings.pause_seconds)
    return placed


def _in_turns(voices: Sequence[_Voice], settings: ConversationSettings, draws: Draws) -> list[Placed]:
    wanted = settings.overlap or 0.0
    placed: list[Placed] = []
    # from `alone_from` to `end` one voice speaks; the next may begin there, so never more than two speak at once
    end = alone_from = spoken = overlapped = 0
    while len(placed) < len(voices) or end < on_grid(settings.seconds):
        waiting = voices[len(placed) :] or [voice for voice in voices if voice.end < end] or voices
        voice = waiting[0 if len(placed) < len(voices) else draws.below(len(waiting))]
        length = voice.next_samples
        # with an overlap of d the share becomes (overlapped + d) / (spoken + length - d)
        lacking = (wanted * (spoken + length) - overlapped) / (1 + wanted)
        shared = on_grid(2 * draws.uniform() * max(lacking, 0) / SAMPLE_RATE) if draws.uniform() < _OFTEN else 0
        shared = min(shared, length, end - max(alone_from, voice.end))
        start = end - shared if shared > 0 else end + draws.pause(settings.pause_seconds)
        alone_from = max(end, start) if start + length > end else start + length
        placed.append(voice.say(start))
        end = max(end, start + length)
        spoken, overlapped = spoken + length - shared, overlapped + shared
    return placed


Wave = Float32[np.ndarray, "samples"]

_LOUDNESS = 0.05
"""Root mean square of speech at 0 dB: 26 dB below full scale."""
_TAIL = on_grid(0.5)
_PEAK = 0.99
_CHUNK = 256
_MIXING = 1 << 63
"""Added to the seed, so that levels and noise draw from other numbers than the layout."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """What else can be heard; both are prepared corpora."""

    noise: Corpus | None = None
    snr_db: tuple[float, float] = (10.0, 25.0)
    """Of all speech together against the noise, uniform."""
    responses: Corpus | None = None
    """Room impulse responses: every speaker has one of them throughout a conversation, its direct sound in time."""

    def __post_init__(self) -> None:
        if self.snr_db[0] > self.snr_db[1]:
            raise ValueError(f"snr_db: found {self.snr_db}, expected the smaller number first")


@dataclass(frozen=True)
class Mixer:
    """Number of a conversation -> its audio. Travels to worker processes; an `AudioReader` of `data.sources`."""

    corpus: Corpus
    speech: Speech
    settings: ConversationSettings
    room: Room
    seed: int

    def __call__(self, entry: Entry) -> bytes:
        """A FLAC file."""
        return encode_flac(to_int16(self.wave(int(entry.audio))))

    def layout(self, number: int) -> list[Placed]:
        """Who says what when."""
        return lay_out(self.speech, self.settings, Draws(self.seed, number))

    def wave(self, number: int) -> Wave:
        """All voices at their levels and in their rooms, and the noise; made softer where it would clip."""
        placed = self.layout(number)
        draws = Draws(self.seed ^ _MIXING, number)
        names = sorted({one.speaker for one in placed})
        gains = {name: 10 ** (self.settings.level_db * (2 * draws.uniform() - 1) / 20) for name in names}
        responses = {name: self._response(draws) for name in names}
        mixed = np.zeros(max(one.end for one in placed) + _TAIL, np.float32)
        for one in placed:
            heard = _in_room(gains[one.speaker] * self.voice(one), responses[one.speaker])[: len(mixed) - one.start]
            mixed[one.start : one.start + len(heard)] += heard
        mixed += self._noise(mixed, draws)
        peak = float(np.abs(mixed).max())
        return mixed if peak <= _PEAK else (mixed * np.float32(_PEAK / peak)).astype(np.float32)

    def voice(self, one: Placed) -> Wave:
        """The speech of an utterance at 0 dB, what is before and behind it cut off."""
        start, end = self.speech.extent(one.utterance)
        wave = self.corpus.wave(one.utterance, start, end - start).astype(np.float32) / FULL_SCALE
        spans = self.speech.spans[one.utterance] - start
        loud = np.concatenate([wave[first:last] for first, last in spans])
        return wave * np.float32(_LOUDNESS / np.sqrt(np.mean(np.square(loud, dtype=np.float64))))

    def turns(self, number: int, name: str) -> list[Turn]:
        """The speech of a conversation, exact to the sample."""
        return [
            Turn(name, (one.start + first) / SAMPLE_RATE, (last - first) / SAMPLE_RATE, one.speaker)
            for one in self.layout(number)
            for first, last in (self.speech.spans[one.utterance] - self.speech.extent(one.utterance)[0]).tolist()
        ]

    def _response(self, draws: Draws) -> Wave | None:
        if self.room.responses is None:
            return None
        response = self.room.responses.wave(draws.below(len(self.room.responses))).astype(np.float32)
        return response / np.float32(max(np.sqrt(np.sum(np.square(response, dtype=np.float64))), 1e-9))

    def _noise(self, mixed: Wave, draws: Draws) -> Wave:
        """A clip of noise from anywhere on, round and round, as loud as the drawn ratio says; silence without any."""
        if self.room.noise is None:
            return np.zeros_like(mixed)
        clip = self.room.noise.wave(draws.below(len(self.room.noise))).astype(np.float32) / FULL_SCALE
        noise = np.resize(np.roll(clip, -draws.below(len(clip))), len(mixed))
        low, high = self.room.snr_db
        return noise_below(mixed, noise, low + (high - low) * draws.uniform())


def open_mixer(corpus: Path, settings: ConversationSettings, room: Room, seed: int, workers: int) -> Mixer:
    """What mixes conversations from the utterances of a prepared corpus, all of which are looked at for speech.

    Raises:
        CorpusError: there is none.
        SourceError: it names no speaker.
        AudioFault: an utterance that cannot be decoded.

    """
    opened = Corpus.open(corpus)
    return Mixer(opened, find_speech(opened, workers), settings, room, seed)


def open_room(noise: Path | None, snr_db: tuple[float, float], responses: Path | None) -> Room:
    """A room from the folders of prepared corpora; None: without.

    Raises:
        CorpusError: a folder that holds none.
        ValueError: see `Room`.

    """
    opened = [None if path is None else Corpus.open(path) for path in (noise, responses)]
    return Room(noise=opened[0], snr_db=snr_db, responses=opened[1])


def simulate(
    mixer: Mixer, conversations: int, out: Path, workers: int, *, progress: bool = False
) -> tuple[Result, list[Turn]]:
    """The corpus `out` with so many conversations and their turns; resumable, and nothing to do a second time.

    Raises:
        PrepareError: `out` holds something else, or was begun with other settings.
        SourceError: too few speakers.

    """
    names = [f"conversation-{number:06d}" for number in range(conversations)]
    stamp = _recipe(mixer)
    entries = [Entry(id=name, audio=number, stamp=stamp) for number, name in enumerate(names)]
    turns = [turn for number, name in enumerate(names) for turn in mixer.turns(number, name)]
    source = Source(f"{conversations} conversations simulated from {mixer.corpus.header.name}", entries, mixer)
    result = prepare(source, out, Preparation(name=out.name, workers=workers, progress=progress))
    attach_turns(Corpus.open(out), turns)
    return result, turns


def find_speech(corpus: Corpus, workers: int) -> Speech:
    """Looks for speech in every utterance of a corpus.

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
    """Of the time in which anybody speaks, the share in which several do."""
    alone = several = 0.0
    for recording in _by_recording(turns):
        edges = sorted([(turn.start, 1) for turn in recording] + [(turn.end, -1) for turn in recording])
        speaking, since = 0, 0.0
        for time, change in edges:
            alone += (time - since) * (speaking == 1)
            several += (time - since) * (speaking > 1)
            speaking, since = speaking + change, time
    return several / max(alone + several, 1e-9)


def _by_recording(turns: Sequence[Turn]) -> Iterator[list[Turn]]:
    found: dict[str, list[Turn]] = {}
    for turn in turns:
        found.setdefault(turn.recording, []).append(turn)
    yield from found.values()


def _spans(corpus: Corpus, indices: Sequence[int]) -> list[tuple[int, Int64[np.ndarray, "spans 2"]]]:
    return [(index, speech_spans(corpus.wave(index).astype(np.float32) / FULL_SCALE)) for index in indices]


def _in_room(wave: Wave, response: Float32[np.ndarray, "response"] | None) -> Float32[np.ndarray, "heard"]:
    """`wave` with its echoes, the direct sound where it was."""
    return wave if response is None else with_echoes(wave, response)


def _recipe(mixer: Mixer) -> str:
    """A digest of what a conversation follows from besides its number."""
    room = mixer.room
    others = [corpus.fingerprint if corpus is not None else "" for corpus in (room.noise, room.responses)]
    parts = [dataclasses.asdict(mixer.settings), mixer.seed, mixer.corpus.fingerprint, others, room.snr_db]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


_DESCRIPTION = """Mixes conversations from a corpus of utterances of one speaker each, for training of diarisation: a
corpus of its own, with turns.rttm. The turns are where the mixed voices are loud, exact to 10 ms."""


def run(words: Sequence[str], workers: int) -> tuple[Result, Path]:
    """Make the corpus; what it is and where.

    Raises:
        SystemExit: options that cannot be right.
        SourceError: a corpus without speakers, or with too few.

    """
    defaults, room = ConversationSettings(), Room()
    parser = argparse.ArgumentParser(prog="python -m wavlm_jax.data simulate", description=_DESCRIPTION)
    add = parser.add_argument
    add("corpus", type=Path, metavar="CORPUS", help="utterances with speakers, prepared")
    add("--out", type=Path, required=True, metavar="CORPUS", help="the conversations; made, resumed, or left alone")
    add("--conversations", type=int, default=100, help="default: 100")
    add("--speakers", type=int, nargs="+", default=list(defaults.speakers), help="how many, drawn (default: 2 3 4)")
    add("--seconds", type=float, default=defaults.seconds, help="about, of each (default: 60)")
    add("--pause-seconds", type=float, default=defaults.pause_seconds, help="mean pause (default: 1)")
    add("--overlap", type=float, default=defaults.overlap, help="share of two voices in speech (default: 0.15)")
    add("--independent", action="store_true", help="speakers on time lines of their own, as in EEND; no --overlap")
    add("--level-db", type=float, default=defaults.level_db, help="speakers differ by up to +- (default: 5)")
    add("--noise", type=Path, metavar="CORPUS", help="noise to put under the speech")
    add("--snr-db", type=float, nargs=2, default=list(room.snr_db), help="speech against noise (default: 10 25)")
    add("--rirs", type=Path, metavar="CORPUS", help="room impulse responses, one a speaker and conversation")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=workers, help="processes (default: one a core)")
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
        room = open_room(options.noise, tuple(options.snr_db), options.rirs)
    except ValueError as error:
        parser.error(str(error))
    mixer = open_mixer(options.corpus, settings, room, options.seed, options.workers)
    show = sys.stderr.isatty()
    result, turns = simulate(mixer, options.conversations, options.out, options.workers, progress=show)
    print(f"{len(turns)} turns; of the time in which anybody speaks, {overlap_share(turns):.1%} has several voices")
    return result, options.out
