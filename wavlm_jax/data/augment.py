"""What happens to a voice on its way: noise, a room, another speed. Pure functions of samples.

Speech made harder: another speed, a room, noise. On the host, row by row, from bits that belong to the row.

In this order: speed, room, noise, so that the noise has its exact ratio to what is heard. Nothing here depends on
workers, hosts or devices; evaluation never comes here.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32

from wavlm_jax.data.corpus import Corpus
from wavlm_jax.settings import SettingsError

Wave = Float32[np.ndarray, "samples"]

_FINEST_SPEED = 100


def noise_below(wave: Wave, noise: Float32[np.ndarray, "noise"], snr_db: float) -> Wave:
    """Noise, repeated to the length of `wave`, with `snr_db` less power; silence where either is silent."""
    laid = np.resize(noise, len(wave))
    power, noise_power = _power(wave), _power(laid)
    if power == 0 or noise_power == 0:
        return np.zeros_like(wave)
    return np.asarray(laid * np.sqrt(power / (noise_power * 10 ** (snr_db / 10))), np.float32)


def with_echoes(wave: Wave, response: Float32[np.ndarray, "response"]) -> Float32[np.ndarray, "heard"]:
    """`wave` in the room of an impulse response, to the end of the last echo; its direct sound is where it was."""
    from scipy.signal import fftconvolve  # noqa: PLC0415 a second of every launch, for those who augment

    direct = int(np.argmax(np.abs(response)))
    return np.asarray(fftconvolve(wave, response)[direct:], np.float32)


def in_room(wave: Wave, response: Float32[np.ndarray, "response"]) -> Wave:
    """`with_echoes`, as long and with as much power as `wave`; silence in a silent room stays what it was."""
    heard = with_echoes(wave, response)[: len(wave)]
    heard = np.pad(heard, (0, len(wave) - len(heard)))
    power = _power(heard)
    return np.asarray(heard * np.sqrt(_power(wave) / power), np.float32) if power > 0 else wave


def change_speed(wave: Float32[np.ndarray, "source"], speed: float) -> Wave:
    """`wave` played `speed` times as fast, pitch and all: band-limited interpolation (scipy's `resample_poly`)."""
    if speed == 1:
        return wave
    from scipy.signal import resample_poly  # noqa: PLC0415 as above

    ratio = _ratio(speed)
    return np.asarray(resample_poly(wave, ratio.denominator, ratio.numerator), np.float32)


def after_speed(num_samples: int, speed: float) -> int:
    """Samples that `change_speed` makes of `num_samples`."""
    ratio = _ratio(speed)
    return -(-num_samples * ratio.denominator // ratio.numerator)


def before_speed(num_samples: int, speed: float) -> int:
    """The most samples of which `change_speed` makes no more than `num_samples`."""
    ratio = _ratio(speed)
    return num_samples * ratio.numerator // ratio.denominator


def _ratio(speed: float) -> Fraction:
    return Fraction(speed).limit_denominator(_FINEST_SPEED)


def _power(wave: Wave) -> float:
    return float(np.mean(np.square(wave, dtype=np.float64)))


Samples = Float32[np.ndarray, "samples"]

_STREAM = 0x4155_474D
"""Beside the row's bits in the key, so that nothing else draws the same numbers."""
_MOST = 0.99
"""Of full scale: where a sum above it is brought down to."""


@dataclass(frozen=True, kw_only=True)
class AugmentationSettings:
    """The config section `augmentation`; of training alone. What has no corpus or speed is not done."""

    noise_corpus: str | None
    """A corpus of noise, music or babble, prepared by `python -m wavlm_jax.data`."""
    noise_prob: float
    """Share of the rows that get noise from beginning to end; a clip that is too short is repeated."""
    noise_snr_db: tuple[float, float]
    """Power of the speech over that of the noise, uniform in this range."""
    room_corpus: str | None
    """A corpus of room impulse responses, prepared like any other (`--min-seconds 0`)."""
    room_prob: float
    """Share of the rows that are heard in a room."""
    speeds: tuple[float, ...]
    """One of them is drawn for each row: 1.1 is faster and higher. (0.9, 1.0, 1.1) is the field's choice; (): none."""
    speed_makes_speakers: bool
    """Whether a speaker at another speed is another speaker, with a class of its own (Kaldi's three-fold speakers)."""

    def __post_init__(self) -> None:
        for name in ("noise", "room"):
            share, corpus = getattr(self, f"{name}_prob"), getattr(self, f"{name}_corpus")
            if not 0 <= share <= 1:
                raise ValueError(f"{name}_prob: found {share}, expected a share in [0, 1]")
            if share > 0 and corpus is None:
                raise ValueError(f"{name}_prob: found {share} without {name}_corpus; name a corpus, or set it to 0")
        if self.noise_snr_db[0] > self.noise_snr_db[1]:
            raise ValueError(f"noise_snr_db: found {self.noise_snr_db}, expected (low, high) with low <= high")
        if len({*self.speeds}) < len(self.speeds) or any(not 0.5 <= speed <= 2 for speed in self.speeds):  # noqa: PLR2004
            raise ValueError(f"speeds: found {self.speeds}, expected different ones, each from 0.5 to 2")
        if self.speed_makes_speakers and 1.0 not in self.speeds:
            raise ValueError(f"speed_makes_speakers: found True with speeds {self.speeds}, expected 1.0 among them")

    @property
    def wanted(self) -> bool:
        """Whether anything is done at all."""
        return self.noise_prob > 0 or self.room_prob > 0 or any(speed != 1 for speed in self.speeds)


@dataclass(frozen=True)
class Augment:
    """What happens to a row, from its bits. Travels to worker processes."""

    settings: AugmentationSettings

    def speed_number(self, bits: int) -> int:
        """Which of the speeds a row has; 0 where there are none."""
        return int(_draws(bits)[0] * max(len(self.settings.speeds), 1))

    def speed(self, bits: int) -> float:
        """The speed of a row."""
        speeds = self.settings.speeds
        return speeds[self.speed_number(bits)] if speeds else 1.0

    def __call__(self, wave: Float32[np.ndarray, "source"], speed: float, bits: int) -> Samples:
        """The row as it is heard; what would be above full scale is made quieter as a whole.

        Args:
            wave: as it was recorded, in [-1, 1].
            speed: of the row; gives about len(wave) / speed samples (`after_speed`).
            bits: of the row.

        Raises:
            AudioFault: noise or room cannot be decoded.

        """
        settings, draws = self.settings, _draws(bits)
        heard = change_speed(wave, speed)
        if self._rooms is not None and draws[1] < settings.room_prob:
            heard = in_room(heard, self._rooms.random_piece(draws[2], 0.0, len(heard)).astype(np.float32))
        if self._noises is not None and draws[3] < settings.noise_prob:
            low, high = settings.noise_snr_db
            noise = self._noises.random_piece(draws[4], draws[5], len(heard))
            heard = heard + noise_below(heard, noise.astype(np.float32), low + draws[6] * (high - low))
        peak = float(np.abs(heard).max(initial=0.0))
        return heard * np.float32(_MOST / peak) if peak > 1 else heard

    @cached_property
    def _noises(self) -> Corpus | None:
        return None if self.settings.noise_corpus is None else Corpus.open(Path(self.settings.noise_corpus))

    @cached_property
    def _rooms(self) -> Corpus | None:
        return None if self.settings.room_corpus is None else Corpus.open(Path(self.settings.room_corpus))

    def fingerprints(self) -> dict[str, str]:
        """Of the corpora that are used: a resume insists on them.

        Raises:
            CorpusError: one of them is not there.

        """
        found = {"corpus.noise": self._noises, "corpus.rooms": self._rooms}
        return {name: corpus.fingerprint for name, corpus in found.items() if corpus is not None}

    def __getstate__(self) -> dict[str, AugmentationSettings]:
        return {"settings": self.settings}


def augment_for(settings: AugmentationSettings, *, by_frame: bool, own_classes: bool) -> Augment | None:
    """What a task does to its rows; None: nothing.

    Args:
        settings: of the config.
        by_frame: whether the labels belong to frames, so that another speed would shift them.
        own_classes: whether the labels know `speed_makes_speakers`.

    Raises:
        SettingsError: what the task cannot take.

    """
    if by_frame and any(speed != 1 for speed in settings.speeds):
        raise SettingsError(
            f"config.augmentation.speeds: found {settings.speeds}, expected () for this task: its labels belong to "
            "frames"
        )
    if settings.speed_makes_speakers and not own_classes:
        raise SettingsError("config.augmentation.speed_makes_speakers: found True, expected it in speaker tasks alone")
    return Augment(settings) if settings.wanted else None


def _draws(bits: int) -> Float[np.ndarray, "draws"]:
    key = np.array([bits, _STREAM], np.uint64)
    drawn: Float[np.ndarray, "draws"] = np.random.Generator(np.random.Philox(key=key)).random(7)
    return drawn
