"""`python -m wavlm_jax.data simulate`: conversations mixed from a corpus of single utterances, with their exact turns.

A conversation is a function of (seed, its number) alone: any number of workers, stopped and started again, make the
same corpus.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64

from wavlm_jax.audio.acoustics import noise_below, with_echoes
from wavlm_jax.audio.wave import FULL_SCALE, encode_flac, to_int16
from wavlm_jax.data.conversations import ConversationSettings, Draws, Placed, Speech, lay_out, on_grid, speech_spans
from wavlm_jax.data.corpora import Corpus
from wavlm_jax.data.pool import unordered
from wavlm_jax.data.prepare import Preparation, Result, prepare
from wavlm_jax.data.sources import Entry, Source, SourceError
from wavlm_jax.data.turns import attach_turns
from wavlm_jax.shapes import SAMPLE_RATE
from wavlm_jax.text.rttm import Turn

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
