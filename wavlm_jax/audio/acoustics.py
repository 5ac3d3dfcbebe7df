"""What happens to a voice on its way: noise, a room, another speed. Pure functions of samples."""

from fractions import Fraction

import numpy as np
from jaxtyping import Float32

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
