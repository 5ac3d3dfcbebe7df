"""Turns as labels: who speaks in which frame of a row, for at most so many speakers (FACTS B3, E31).

Frame i stands for samples 320 i up to 320 (i + 1), as in every time stamp of this library; whoever speaks at its middle
speaks in it. So a boundary moves by half a frame at most, and turns that lie on the grid come out as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int32, Int64

from wavlm_jax.data.corpora import Corpus
from wavlm_jax.data.turns import turns_of
from wavlm_jax.settings import SettingsError
from wavlm_jax.shapes import SAMPLE_RATE, STANDARD, samples_for
from wavlm_jax.text.rttm import Turn


class Recorded(NamedTuple):
    """The turns of a corpus in frames, those of one utterance after those of the one before."""

    offsets: Int64[np.ndarray, "bounds"]
    """Utterance i has the turns number offsets[i] up to offsets[i + 1]."""
    starts: Int32[np.ndarray, "turns"]
    ends: Int32[np.ndarray, "turns"]
    """Exclusive."""
    speakers: Int32[np.ndarray, "turns"]
    """Numbered within their recording, in the order of their first turns."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over all of it."""
        return sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in self)).hexdigest()

    @property
    def annotated(self) -> Int64[np.ndarray, "chosen"]:
        """The utterances that have turns."""
        return np.flatnonzero(np.diff(self.offsets))

    def describe(self, split: str) -> str:
        """One line for people."""
        chosen, total = self.annotated, len(self.offsets) - 1
        line = f"{split}: {len(chosen)} recordings with {len(self.starts)} turns"
        return line if len(chosen) == total else f"{line}; {total - len(chosen)} without turns, left out"


def recorded(corpus: Corpus) -> Recorded:
    """The turns of a corpus.

    Raises:
        FileNotFoundError: it has none (`data.turns.turns_of`).
        SettingsError: none of its recordings has any.

    """
    by_recording = turns_of(corpus)
    offsets, parts = np.zeros(len(corpus) + 1, np.int64), []
    for index, name in enumerate(corpus.ids):
        turns = sorted(by_recording[name]) if name in by_recording else []
        numbers = {speaker: number for number, speaker in enumerate(dict.fromkeys(turn.speaker for turn in turns))}
        parts += [(*frames_of(turn), numbers[turn.speaker]) for turn in turns]
        offsets[index + 1] = len(parts)
    if not parts:
        raise SettingsError(f"{corpus.path}: turns.rttm has no turn of any recording of this corpus; attach it again")
    starts, ends, speakers = np.array(parts, np.int32).T
    return Recorded(offsets, starts, ends, speakers)


def frames_of(turn: Turn) -> tuple[int, int]:
    """First frame, and the one behind the last, whose middles lie in a turn."""
    start, end = (-((STANDARD.hop // 2 - round(time * SAMPLE_RATE)) // STANDARD.hop) for time in (turn.start, turn.end))
    return start, end


def crops_an_epoch(lengths: Int64[np.ndarray, "recordings"], bucket: int) -> Int64[np.ndarray, "recordings"]:
    """How often an epoch shows each recording: as many crops as fit into it, so that long ones are heard in full."""
    return np.maximum(lengths // samples_for(bucket), 1)


@dataclass(frozen=True)
class ActivityLabels:
    """The labels of a row. Travels to worker processes."""

    turns: Recorded
    num_speakers: int
    """Most of a row."""

    def __call__(self, index: int, first_frame: int, frames: int, bits: int) -> Mapping[str, np.ndarray]:
        """`activity` uint8 (frames, speakers) and `others` uint8 (frames,).

        Of more speakers than there is room for, those who speak longest in the row are taken; `others` says how many
        of the rest speak in a frame. Speakers stand in the order in which they are first heard in the row.
        """
        del bits  # nothing is random
        active = self._active(index, first_frame, frames)
        spoken = active.sum(axis=0)
        longest = np.argsort(-spoken, kind="stable")
        kept, rest = longest[: self.num_speakers], longest[self.num_speakers :]
        kept = kept[spoken[kept] > 0]
        kept = kept[np.argsort(active[:, kept].argmax(axis=0), kind="stable")] if len(kept) else kept
        activity = np.zeros((frames, self.num_speakers), np.uint8)
        activity[:, : len(kept)] = active[:, kept]
        return {"activity": activity, "others": active[:, rest].sum(axis=1, dtype=np.uint8)}

    @staticmethod
    def shapes(num_speakers: int, frames: int) -> Mapping[str, jax.ShapeDtypeStruct]:
        """What a row of `frames` gets, of turns that are not there yet."""
        return {
            "activity": jax.ShapeDtypeStruct((frames, num_speakers), np.uint8),
            "others": jax.ShapeDtypeStruct((frames,), np.uint8),
        }

    def _active(self, index: int, first_frame: int, frames: int) -> Bool[np.ndarray, "frames everyone"]:
        """Each speaker of the recording in each frame of the row."""
        held = slice(self.turns.offsets[index], self.turns.offsets[index + 1])
        starts, ends = (times[held] - first_frame for times in (self.turns.starts, self.turns.ends))
        speakers = self.turns.speakers[held]
        active = np.zeros((frames, speakers.max(initial=-1) + 1), bool)
        for turn in np.flatnonzero((starts < frames) & (ends > 0)):
            active[max(starts[turn], 0) : ends[turn], speakers[turn]] = True
        return active
