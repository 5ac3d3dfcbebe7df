"""espeak-ng as a source of speech with exact phone times, through ctypes and the wheel `espeakng-loader`.

The library keeps state from one sentence to the next, so a voice is always rendered by a process of its own, from the
start: `python -m wavlm_jax.data.espeak` reads a `VoiceJob` as JSON and writes FLAC files and a manifest. Its noise is
seeded from the clock unless told otherwise; here it is told.
"""

import ctypes
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int16

from wavlm_jax.audio.wave import FULL_SCALE, encode_flac, resample, to_int16
from wavlm_jax.shapes import SAMPLE_RATE

MANIFEST = "voice.jsonl"
PAUSE = "_"
"""The one symbol for every kind of silence."""

_SYNCHRONOUS, _PHONEME_EVENTS, _DONT_EXIT = 2, 1 << 0, 1 << 15
_UTF8, _PLAIN = 1, 1
_RATE, _PITCH, _RANGE = 1, 3, 4
_END_OF_LIST, _PHONEME = 0, 7
_STRESS = "',%="
_SEED = 1


class EspeakError(RuntimeError):
    """espeak-ng is missing or refuses; says what to install."""


@dataclass(frozen=True, kw_only=True)
class Voice:
    """A speaker: an accent, a timbre, and a way of speaking."""

    name: str
    accent: str
    """espeak's language, such as en-us."""
    variant: str
    """espeak's voice variant, such as f3."""
    speed: int
    """Words per minute, as espeak counts them."""
    pitch: int
    range: int
    """0 to 100, 50 is the voice's own."""


@dataclass(frozen=True, kw_only=True)
class VoiceJob:
    """What one process does."""

    voice: Voice
    sentences: dict[str, str]
    """Utterance id -> text."""
    folder: Path


class Spoken(NamedTuple):
    """One sentence as espeak says it."""

    samples: Int16[np.ndarray, "samples"]
    """16 kHz."""
    symbols: list[str]
    starts: list[int]
    ends: list[int]
    """Samples; the phones cover the utterance without gaps."""


class _Name(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Name),
    )


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


class Synthesizer:
    """espeak-ng with one voice."""

    def __init__(self, voice: Voice) -> None:
        loader = loader_module()
        self._library = ctypes.CDLL(loader.get_library_path())
        data = str(loader.get_data_path()).encode()
        self.rate = int(self._library.espeak_Initialize(_SYNCHRONOUS, 0, data, _PHONEME_EVENTS | _DONT_EXIT))
        if self.rate <= 0:
            raise EspeakError(f"espeak-ng does not start with its data in {loader.get_data_path()}")
        self._blocks: list[np.ndarray] = []
        self._marks: list[tuple[int, str]] = []
        self._callback = _Callback(self._collect)  # kept: C holds a pointer to it
        self._library.espeak_SetSynthCallback(self._callback)
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(_SEED))
        self._choose(voice, Path(loader.get_data_path()))

    def speak(self, text: str) -> Spoken:
        """Say one sentence."""
        self._blocks, self._marks = [], []
        encoded = text.encode()
        status = self._library.espeak_Synth(
            encoded, ctypes.c_size_t(len(encoded) + 1), ctypes.c_uint(0), _PLAIN, ctypes.c_uint(0), _UTF8, None, None
        )
        if status or not self._blocks:
            raise EspeakError(f"espeak-ng cannot say {text!r} (status {status})")
        samples = np.concatenate(self._blocks).astype(np.float32) / FULL_SCALE
        spoken = to_int16(resample(samples, self.rate))
        return Spoken(spoken, *_segments(self._marks, self.rate, len(spoken)))

    def _choose(self, voice: Voice, data: Path) -> None:
        name = f"{voice.accent}+{voice.variant}"
        known = (data / "voices" / "!v" / voice.variant).is_file()  # espeak itself passes over an unknown variant
        if not known or self._library.espeak_SetVoiceByName(name.encode()):
            raise EspeakError(f"espeak-ng has no voice {name}")
        for parameter, value in ((_RATE, voice.speed), (_PITCH, voice.pitch), (_RANGE, voice.range)):
            self._library.espeak_SetParameter(parameter, value, 0)

    def _collect(self, samples: Any, count: int, events: Any) -> int:
        if samples and count:
            self._blocks.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        number = 0
        while events[number].type != _END_OF_LIST:
            if events[number].type == _PHONEME:
                self._marks.append((events[number].sample, events[number].id.string.decode("utf-8", "replace")))
            number += 1
        return 0


def loader_module() -> ModuleType:
    """The wheel that holds espeak-ng's library and data.

    Raises:
        EspeakError: it is not installed.

    """
    try:
        import espeakng_loader  # noqa: PLC0415  (an optional extra, needed for the demo corpus alone)
    except ImportError as error:
        raise EspeakError('the demo corpus is spoken by espeak-ng; pip install "wavlm-jax[demo]"') from error
    module: ModuleType = espeakng_loader
    return module


def render(job: VoiceJob) -> None:
    """FLAC files and, last, the manifest of one voice."""
    synthesizer = Synthesizer(job.voice)
    job.folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, text in job.sentences.items():
        spoken = synthesizer.speak(text)
        file = job.folder / f"{name}.flac"
        file.write_bytes(encode_flac(spoken.samples))
        row = {
            "id": name,
            "path": f"{job.folder.name}/{file.name}",
            "samples": len(spoken.samples),
            "speaker": job.voice.name,
            "text": written(text),
            "phones": {"symbols": spoken.symbols, "starts": spoken.starts, "ends": spoken.ends},
        }
        lines.append(json.dumps(row) + "\n")
    draft = job.folder / "draft"
    draft.write_text("".join(lines))
    draft.rename(job.folder / MANIFEST)


def written(text: str) -> str:
    """A sentence as a transcript: upper case, A to Z, apostrophe and blank."""
    return " ".join("".join(letter for letter in text.upper() if letter.isalpha() or letter in "' ").split())


def to_json(job: VoiceJob) -> str:
    """A job as the text that a rendering process reads."""
    return json.dumps({**dataclasses.asdict(job), "folder": str(job.folder)})


def from_json(text: str) -> VoiceJob:
    """The job that `to_json` wrote."""
    values = json.loads(text)
    return VoiceJob(voice=Voice(**values["voice"]), sentences=values["sentences"], folder=Path(values["folder"]))


def _segments(marks: list[tuple[int, str]], rate: int, num_samples: int) -> tuple[list[str], list[int], list[int]]:
    """Phones from espeak's marks of where each one starts, in samples of 16 kHz; empty ones are left out."""
    bounds = [min(round(sample * SAMPLE_RATE / rate), num_samples) for sample, _ in marks] + [num_samples]
    symbols = [_plain(symbol) for _, symbol in marks]
    if bounds[0] > 0:
        symbols, bounds = [PAUSE, *symbols], [0, *bounds]
    kept = [
        (symbol, start, end) for symbol, start, end in zip(symbols, bounds[:-1], bounds[1:], strict=True) if end > start
    ]
    return [row[0] for row in kept], [row[1] for row in kept], [row[2] for row in kept]


def _plain(symbol: str) -> str:
    """A phone without stress marks; pauses of every length are one symbol."""
    return PAUSE if symbol.startswith("_") else symbol.strip(_STRESS) or PAUSE


if __name__ == "__main__":
    render(from_json(sys.stdin.read()))
