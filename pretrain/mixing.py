"""Utterance and noise mixing, pure and inside the jitted step (paper Algorithm 1, FACTS C7).

A share of the rows gets a second voice, or noise, laid over at most half of its samples. The labels stay those of the
first voice, so the model learns to follow one speaker through another.

Decisions against the authors' code (FACTS E25-E28), all undone by `reference_quirks`: a partner is never the row
itself, comes from the unmixed copy, and a span has at least one sample; the energy of noise is that of the piece that
was read, not of its whole clip, and the ends of a clip are used a little less often than its middle. Partners come
from the row's own group of `group` consecutive rows, which never crosses a device or a micro-batch, so mixing needs no
communication.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from wavlm_jax.shapes import NumSamples, RowKeys, Waveform

Normalize: TypeAlias = Callable[[Waveform, NumSamples], Waveform]


@dataclass(frozen=True, kw_only=True)
class MixingSettings:
    """The config section `mixing`."""

    prob: float
    """Share of rows that are mixed (0.2 in every WavLM)."""
    group: int
    """Consecutive rows among which partners are found; divides the rows of a device and micro-batch."""
    snr_db: tuple[float, float]
    """Energy ratio, row over partner, uniform in this range (-5, 5)."""
    noise_corpus: str | None
    """A corpus of noise prepared by `python -m wavlm_jax.data`, or None."""
    noise_prob_given_mix: float
    """Share of the *mixed* rows that get noise instead of a voice (0 for Base, 0.1 for Base+ and Large)."""
    noise_snr_db: tuple[float, float]
    """As `snr_db`, for noise (-5, 20)."""
    reference_quirks: bool = False
    """The authors' form: in row order and in place (and normalised there again, where the model normalises), self and
    already mixed partners allowed, span 0 allowed, noise by the energy of its whole clip and from any place of it."""

    def __post_init__(self) -> None:
        for name in ("prob", "noise_prob_given_mix"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected a probability in [0, 1]")
        for name in ("snr_db", "noise_snr_db"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: found ({low}, {high}), expected (low, high) with low <= high")
        if self.group < 1 or (self.group == 1 and self.prob > 0 and not self.reference_quirks):
            raise ValueError(f"group: found {self.group}, expected at least 2 rows so that a row has a partner")
        if self.noise_prob_given_mix > 0 and self.noise_corpus is None:
            raise ValueError(f"noise_prob_given_mix is {self.noise_prob_given_mix} but noise_corpus is None: name one")


class Provenance(NamedTuple):
    """What was done to each row; for debugging, metrics and separation probes. All arrays are (rows,)."""

    mixed: Bool[Array, "rows"]
    noise: Bool[Array, "rows"]
    """The partner was the row's noise clip; `partner` then means nothing."""
    partner: Int[Array, "rows"]
    """Position of the partner in the batch that was given."""
    snr_db: Float[Array, "rows"]
    scale: Float[Array, "rows"]
    """Factor on the partner; 0 where either of the two is silent."""
    start: Int[Array, "rows"]
    """First sample of the row that was changed."""
    length: Int[Array, "rows"]
    source_start: Int[Array, "rows"]
    """Sample of the partner that landed on `start`."""


class _Draws(NamedTuple):
    """The random numbers of one row; their use depends on lengths that may only be known later."""

    mixed: Bool[Array, "*rows"]
    offset: Int[Array, "*rows"]
    snr_unit: Float[Array, "*rows"]
    span_unit: Float[Array, "*rows"]
    source_unit: Float[Array, "*rows"]
    target_unit: Float[Array, "*rows"]


def mix(
    waveform: Waveform,
    num_samples: NumSamples,
    row_keys: RowKeys,
    settings: MixingSettings,
    noise: Float[Array, "rows noise_samples"] | None = None,
    num_noise_samples: NumSamples | None = None,
    *,
    whole_clips: "WholeClips | None" = None,
    normalize: Normalize | None = None,
) -> tuple[Waveform, Provenance]:
    """Mixed waveforms and what was done to them.

    Args:
        waveform: clean rows in [-1, 1]; zero beyond `num_samples`.
        num_samples: real samples of each row; energies are taken over these (silence included, FACTS E28).
        row_keys: one key per row; the result of a row depends on its key and on its group alone.
        settings: probabilities and ranges; rows must be a multiple of `settings.group`.
        noise: one noise clip per row; a row whose `num_noise_samples` is 0 has none. The loader deals clips to a share
            `noise_prob_given_mix` of all rows, so that the share among the mixed rows is that too.
        num_noise_samples: real samples of each clip.
        whole_clips: what the noise was cut from; counts with `reference_quirks` only.
        normalize: applied to a row when it was mixed, before it is a partner; with `reference_quirks` only.

    """
    rows, samples = waveform.shape
    if rows % settings.group:
        raise ValueError(f"mixing.group: {rows} rows cannot be cut into groups of {settings.group}")
    draws = jax.vmap(lambda key: _draw(key, settings))(row_keys)
    partner = _partners(draws.offset, settings)
    if noise is None or num_noise_samples is None:
        noise, num_noise_samples = jnp.zeros((rows, 0)), jnp.zeros(rows, jnp.int32)
    clips = _Clips(jnp.pad(noise, ((0, 0), (0, samples - noise.shape[1]))), num_noise_samples, jnp.full(rows, -1.0))
    snr = _snr_db(draws.snr_unit, num_noise_samples > 0, settings)
    if settings.reference_quirks:
        if whole_clips is not None:
            place = jnp.where(num_noise_samples > 0, whole_clips.place, draws.source_unit)
            draws, clips = draws._replace(source_unit=place), clips._replace(power=whole_clips.power)
        mixed, scale, span = _mix_in_order(waveform, num_samples, draws, partner, snr, clips, normalize)
    else:
        voices, lengths = (_of_partners(values, partner, settings.group) for values in (waveform, num_samples))
        sources = clips.instead_of(voices, lengths)
        overlaid, scale, span = _overlay(waveform, num_samples, *sources, _power(*sources), draws, snr, shortest=1)
        mixed = jnp.where(draws.mixed[:, None], overlaid, waveform)
    return mixed, Provenance(
        mixed=draws.mixed,
        noise=(num_noise_samples > 0) & draws.mixed,
        partner=partner,
        snr_db=snr,
        scale=jnp.where(draws.mixed, scale, 0.0),
        start=span.start,
        length=jnp.where(draws.mixed, span.length, 0),
        source_start=span.source_start,
    )


class WholeClips(NamedTuple):
    """The clips that the noise of each row is a piece of."""

    power: Float[Array, "rows"]
    """Mean square of the whole clip."""
    place: Float[Array, "rows"]
    """In [0, 1): where in the clip the piece was cut. Also places the span in it, which then starts anywhere in the
    clip with the same probability."""


class _Clips(NamedTuple):
    """One noise clip per row, padded to the rows' samples; 0 real samples: none."""

    waveform: Waveform
    num_samples: NumSamples
    power: Float[Array, "*rows"]
    """Of the whole clip; negative: unknown."""

    def instead_of(self, voices: Waveform, num_samples: NumSamples) -> tuple[Waveform, NumSamples]:
        """The clip where there is one, else the voice."""
        present = self.num_samples > 0
        return jnp.where(present[:, None], self.waveform, voices), jnp.where(present, self.num_samples, num_samples)


class _Span(NamedTuple):
    start: Int[Array, "*rows"]
    length: Int[Array, "*rows"]
    source_start: Int[Array, "*rows"]


def _draw(key: Key[Array, ""], settings: MixingSettings) -> _Draws:
    units = jax.random.uniform(key, (6,))
    choices = settings.group if settings.reference_quirks else max(settings.group - 1, 1)
    return _Draws(
        mixed=units[0] < settings.prob,
        offset=jnp.minimum((units[1] * choices).astype(jnp.int32), choices - 1),
        snr_unit=units[2],
        span_unit=units[3],
        source_unit=units[4],
        target_unit=units[5],
    )


def _partners(offset: Int[Array, "rows"], settings: MixingSettings) -> Int[Array, "rows"]:
    """Each row's partner in its own group: any other row, or with the quirks any row."""
    row = jnp.arange(offset.shape[0], dtype=jnp.int32)
    first = (row // settings.group) * settings.group
    if settings.reference_quirks:
        return first + offset
    return first + (row - first + 1 + offset) % settings.group


def _of_partners(values: Shaped[Array, "rows *rest"], partner: Int[Array, "rows"], group: int) -> Any:
    """`values[partner]`, group by group: as one gather over all rows it would bring every row to every device."""
    grouped = values.reshape(-1, group, *values.shape[1:])
    within = (partner % group).reshape(-1, group)
    return jax.vmap(lambda rows, chosen: rows[chosen])(grouped, within).reshape(values.shape)


def _snr_db(
    unit: Float[Array, "rows"], has_noise: Bool[Array, "rows"], settings: MixingSettings
) -> Float[Array, "rows"]:
    low = jnp.where(has_noise, settings.noise_snr_db[0], settings.snr_db[0])
    high = jnp.where(has_noise, settings.noise_snr_db[1], settings.snr_db[1])
    return low + unit * (high - low)


def _between(unit: Float[Array, "*rows"], low: Int[Array, "*rows"], high: Int[Array, "*rows"]) -> Int[Array, "*rows"]:
    """Uniform integer in {low..high} (low where the range is empty)."""
    count = jnp.maximum(high - low + 1, 1)
    return low + jnp.minimum((unit * count).astype(jnp.int32), count - 1)


def _power(waveform: Float[Array, "*rows samples"], num_samples: Int[Array, "*rows"]) -> Float[Array, "*rows"]:
    return jnp.sum(waveform**2, axis=-1) / jnp.maximum(num_samples, 1)


def _span(num_samples: Int[Array, "*rows"], source_samples: Int[Array, "*rows"], draws: _Draws, shortest: int) -> _Span:
    """At most half of the row, never more than the source has; both ends drawn independently."""
    length = _between(draws.span_unit, jnp.full_like(num_samples, shortest), num_samples // 2)
    length = jnp.minimum(jnp.minimum(length, num_samples // 2), source_samples)
    source_end = _between(draws.source_unit, length, source_samples)
    end = _between(draws.target_unit, length, num_samples)
    return _Span(start=end - length, length=length, source_start=source_end - length)


def _overlay(
    waveform: Waveform,
    num_samples: NumSamples,
    sources: Waveform,
    source_samples: NumSamples,
    source_power: Float[Array, "rows"],
    draws: _Draws,
    snr_db: Float[Array, "rows"],
    *,
    shortest: int,
) -> tuple[Waveform, Float[Array, "rows"], _Span]:
    """Each row with its own source added, as if it were to be mixed; the factor on the source; where it landed."""
    span = _span(num_samples, source_samples, draws, shortest)
    power = _power(waveform, num_samples)
    heard = source_power > 0
    scale = jnp.where(heard, jnp.sqrt(power / (jnp.where(heard, source_power, 1.0) * 10 ** (snr_db / 10))), 0.0)
    added = jax.vmap(_place)(sources, span)
    return waveform + scale[:, None] * added, scale, span


def _place(source: Float[Array, "samples"], span: _Span) -> Float[Array, "samples"]:
    """The span of `source` in zeros, at its new place, with static shapes."""
    size = source.shape[0]
    shifted = jax.lax.dynamic_slice(jnp.pad(source, (size, size)), (size + span.source_start - span.start,), (size,))
    position = jnp.arange(size, dtype=jnp.int32)
    return jnp.where((position >= span.start) & (position < span.start + span.length), shifted, 0.0)


def _mix_in_order(
    waveform: Waveform,
    num_samples: NumSamples,
    draws: _Draws,
    partner: Int[Array, "rows"],
    snr_db: Float[Array, "rows"],
    clips: _Clips,
    normalize: Normalize | None,
) -> tuple[Waveform, Float[Array, "rows"], _Span]:
    """The authors' loop: row after row, in place, so that a later row may receive an already mixed one."""

    def one(wave: Waveform, row: Int[Array, ""]) -> tuple[Waveform, tuple[Float[Array, ""], _Span]]:
        def only(values: Array) -> Array:
            return values[row][None]

        voice = wave[partner[row]][None], num_samples[partner[row]][None]
        clip = _Clips(*map(only, clips))
        source = clip.instead_of(*voice)
        known = (clip.num_samples > 0) & (clip.power >= 0)
        power = jnp.where(known, clip.power, _power(*source))
        pick = _Draws(*map(only, draws))
        new, scale, span = _overlay(only(wave), only(num_samples), *source, power, pick, only(snr_db), shortest=0)
        new = new if normalize is None else normalize(new, only(num_samples))
        wave = wave.at[row].set(jnp.where(draws.mixed[row], new[0], wave[row]))
        return wave, (scale[0], _Span(*(value[0] for value in span)))

    rows = jnp.arange(waveform.shape[0], dtype=jnp.int32)
    wave, (scale, span) = jax.lax.scan(one, waveform, rows)
    return wave, scale, span
