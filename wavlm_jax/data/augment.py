"""Augmentation of training rows: another speed, room reverberation, noise, in this order.

Noise comes last, so that the signal-to-noise ratio is exact for what is heard. Everything runs on the host, row by row,
from random bits that belong to the row: nothing depends on workers, hosts or devices. Evaluation is never augmented.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32

from wavlm_jax.data.corpus import Corpus
from wavlm_jax.settings import SettingsError

Samples = Float32[np.ndarray, "samples"]

_FINEST_SPEED = 100
"""Speeds are fractions with at most this denominator."""
_STREAM = 0x4155_474D
"""Part of the key beside the row's bits, so that nothing else draws the same numbers."""
_PEAK = 0.99
"""Of full scale: the new peak of a row that would clip."""


MOST_DB = 100.0
"""Either way: beyond, one of two sounds is less than a 16-bit sample has."""
RANGE_DB = f"low <= high, both within +-{MOST_DB:.0f}"


def noise_below(wave: Samples, noise: Float32[np.ndarray, "noise"], snr_db: float) -> Samples:
    """`noise`, repeated to the length of `wave` and scaled to an SNR of `snr_db`; silence if either is silent."""
    laid = np.resize(noise, len(wave))
    power, noise_power = _power(wave), _power(laid)
    if power == 0 or noise_power == 0:
        return np.zeros_like(wave)
    return np.asarray(laid * np.sqrt(power / (noise_power * 10 ** (snr_db / 10))), np.float32)


def with_echoes(wave: Samples, response: Float32[np.ndarray, "response"]) -> Float32[np.ndarray, "heard"]:
    """`wave` convolved with a room impulse response, to the end of the last echo; the direct sound stays in time."""
    from scipy.signal import fftconvolve  # noqa: PLC0415 a second, for those who augment

    direct = int(np.argmax(np.abs(response)))
    return np.asarray(fftconvolve(wave, response)[direct:], np.float32)


def in_room(wave: Samples, response: Float32[np.ndarray, "response"]) -> Samples:
    """`with_echoes`, with the length and power of `wave`; `wave` itself if the result is silent."""
    heard = with_echoes(wave, response)[: len(wave)]
    heard = np.pad(heard, (0, len(wave) - len(heard)))
    power = _power(heard)
    return np.asarray(heard * np.sqrt(_power(wave) / power), np.float32) if power > 0 else wave


def change_speed(wave: Float32[np.ndarray, "source"], speed: float) -> Samples:
    """`wave` played `speed` times as fast; the pitch changes too (scipy's `resample_poly`)."""
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
    """The most samples from which `change_speed` makes at most `num_samples`."""
    ratio = _ratio(speed)
    return num_samples * ratio.numerator // ratio.denominator


def _ratio(speed: float) -> Fraction:
    return Fraction(speed).limit_denominator(_FINEST_SPEED)


def _power(wave: Samples) -> float:
    return float(np.mean(np.square(wave, dtype=np.float64)))


@dataclass(frozen=True, kw_only=True)
class AugmentationSettings:
    """The config section `augmentation`, for training only. Without a corpus or speeds that part is off."""

    noise_corpus: str | None
    """A corpus of noise, music or babble, prepared by `python -m wavlm_jax.data`."""
    noise_prob: float
    """Share of the rows that get noise, over their whole length; a clip that is too short is repeated."""
    noise_snr_db: tuple[float, float]
    """Signal-to-noise ratio, uniform in this range."""
    room_corpus: str | None
    """A corpus of room impulse responses, prepared like any other (`--min-seconds 0`)."""
    room_prob: float
    """Share of the rows that get reverberation."""
    speeds: tuple[float, ...]
    """One is drawn for each row: 1.1 is faster and higher. (0.9, 1.0, 1.1) is usual; (): off."""
    speed_makes_speakers: bool
    """Whether a speaker at another speed is a class of its own (as in Kaldi, three times as many speakers)."""

    def __post_init__(self) -> None:
        for name in ("noise", "room"):
            share, corpus = getattr(self, f"{name}_prob"), getattr(self, f"{name}_corpus")
            if not 0 <= share <= 1:
                raise ValueError(f"{name}_prob: found {share}, expected a share in [0, 1]")
            if share > 0 and corpus is None:
                raise ValueError(f"{name}_prob: found {share} without {name}_corpus; name a corpus, or set it to 0")
        if not -MOST_DB <= self.noise_snr_db[0] <= self.noise_snr_db[1] <= MOST_DB:
            raise ValueError(f"noise_snr_db: found {self.noise_snr_db}, expected (low, high), {RANGE_DB}")
        if len({*self.speeds}) < len(self.speeds) or any(not 0.5 <= speed <= 2 for speed in self.speeds):  # noqa: PLR2004
            raise ValueError(f"speeds: found {self.speeds}, expected different ones, each from 0.5 to 2")
        if self.speed_makes_speakers and 1.0 not in self.speeds:
            raise ValueError(f"speed_makes_speakers: found True with speeds {self.speeds}, expected 1.0 among them")

    @property
    def wanted(self) -> bool:
        """Whether any augmentation is on."""
        return self.noise_prob > 0 or self.room_prob > 0 or any(speed != 1 for speed in self.speeds)


@dataclass(frozen=True)
class Augment:
    """Augments a row, as a function of the row's random bits. Picklable, for worker processes."""

    settings: AugmentationSettings

    def speed_number(self, bits: int) -> int:
        """Index of the row's speed; 0 if there are no speeds."""
        return int(_draws(bits)[0] * max(len(self.settings.speeds), 1))

    def speed(self, bits: int) -> float:
        """The speed of a row."""
        speeds = self.settings.speeds
        return speeds[self.speed_number(bits)] if speeds else 1.0

    def __call__(self, wave: Float32[np.ndarray, "source"], speed: float, bits: int) -> Samples:
        """The augmented row; scaled down as a whole if it would clip.

        Args:
            wave: the recording, in [-1, 1].
            speed: of the row; the result has `after_speed(len(wave), speed)` samples.
            bits: of the row.

        Raises:
            AudioFault: noise or impulse response cannot be decoded.

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
        return heard * np.float32(_PEAK / peak) if peak > 1 else heard

    @cached_property
    def _noises(self) -> Corpus | None:
        return None if self.settings.noise_corpus is None else Corpus.open(Path(self.settings.noise_corpus))

    @cached_property
    def _rooms(self) -> Corpus | None:
        return None if self.settings.room_corpus is None else Corpus.open(Path(self.settings.room_corpus))

    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the corpora in use; a resumed run must have the same.

        Raises:
            CorpusError: one of them does not exist.

        """
        found = {"corpus.noise": self._noises, "corpus.rooms": self._rooms}
        return {name: corpus.fingerprint for name, corpus in found.items() if corpus is not None}

    def __getstate__(self) -> dict[str, AugmentationSettings]:
        return {"settings": self.settings}


def augment_for(settings: AugmentationSettings, *, by_frame: bool, own_classes: bool) -> Augment | None:
    """The augmentation of a task's rows; None: off.

    Args:
        settings: of the config.
        by_frame: whether labels belong to frames, so that another speed would shift them.
        own_classes: whether the task's labels support `speed_makes_speakers`.

    Raises:
        SettingsError: a setting that the task does not support.

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
