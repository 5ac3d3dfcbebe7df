"""Conversations laid out from single utterances: who says which one when, a pure function of (seed, number).

Two layouts. In turns: one voice after another, with pauses and with as much overlap as is asked for, never more than
two voices at once. Independent: every speaker on a time line of his own, with exponential pauses, as in EEND's
simulation (arXiv 1909.06247); then overlap follows from pauses and speakers. All times are multiples of 10 ms.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64

from wavlm_jax.data.sources import SourceError
from wavlm_jax.shapes import SAMPLE_RATE

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
