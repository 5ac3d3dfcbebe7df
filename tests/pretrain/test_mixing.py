"""Utterance mixing does what the paper says, per row, whatever the batch is cut into."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import stats

from pretrain.mixing import MixingSettings, Provenance, WholeClips, mix
from wavlm_jax.model.frontend import normalize_waveform

SETTINGS = MixingSettings(
    prob=0.2, group=4, snr_db=(-5.0, 5.0), noise_corpus=None, noise_prob_given_mix=0.0, noise_snr_db=(-5.0, 20.0)
)
ALWAYS = dataclasses.replace(SETTINGS, prob=1.0)


def rows_of_noise(rows: int, samples: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(0, 0.1, (rows, samples)).astype(np.float32))


def keys(rows: int, seed: int = 0) -> jax.Array:
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(rows))


def run(waveform: jax.Array, row_keys: jax.Array, how: MixingSettings, lengths: jax.Array | None = None):
    lengths = jnp.full(waveform.shape[0], waveform.shape[1], jnp.int32) if lengths is None else lengths
    mixed, provenance = jax.jit(mix, static_argnums=3)(waveform, lengths, row_keys, how)
    return np.asarray(mixed), jax.tree.map(np.asarray, provenance)


def test_twenty_thousand_rows_follow_the_config():
    rows = 20_000
    _, did = run(rows_of_noise(rows, 64), keys(rows), SETTINGS)
    share, sigma = did.mixed.mean(), np.sqrt(0.2 * 0.8 / rows)
    assert abs(share - 0.2) < 3 * sigma
    assert stats.kstest(did.snr_db[did.mixed], stats.uniform(-5, 10).cdf).pvalue > 1e-3
    assert (did.partner != np.arange(rows)).all()
    assert (did.partner // 4 == np.arange(rows) // 4).all()
    offsets = (did.partner - np.arange(rows)) % 4
    assert stats.chisquare(np.bincount(offsets, minlength=4)[1:]).pvalue > 1e-3
    lengths = did.length[did.mixed]
    assert lengths.min() >= 1
    assert lengths.max() == 32
    assert stats.chisquare(np.bincount(lengths, minlength=33)[1:]).pvalue > 1e-3


def test_only_the_span_changes_and_gets_the_partner_at_the_drawn_energy_ratio():
    clean = np.asarray(rows_of_noise(64, 1000))
    mixed, did = run(jnp.asarray(clean), keys(64), ALWAYS)
    power = (clean**2).mean(axis=1)
    for row in range(64):
        start, stop = did.start[row], did.start[row] + did.length[row]
        np.testing.assert_array_equal(mixed[row, :start], clean[row, :start])
        np.testing.assert_array_equal(mixed[row, stop:], clean[row, stop:])
        source = clean[did.partner[row], did.source_start[row] :][: did.length[row]]
        np.testing.assert_allclose(mixed[row, start:stop] - clean[row, start:stop], did.scale[row] * source, atol=1e-6)
        ratio = power[row] / (did.scale[row] ** 2 * power[did.partner[row]])
        np.testing.assert_allclose(10 * np.log10(ratio), did.snr_db[row], atol=1e-3)


def test_a_row_does_not_depend_on_how_the_batch_is_cut():
    clean, row_keys = rows_of_noise(16, 400), keys(16)
    whole, _ = run(clean, row_keys, ALWAYS)
    for start in range(0, 16, 4):
        part, _ = run(clean[start : start + 4], row_keys[start : start + 4], ALWAYS)
        # Powers are sums, whose order XLA picks by shape: one unit in the last place.
        np.testing.assert_allclose(part, whole[start : start + 4], rtol=0, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=4, max_size=4),
    seed=st.integers(0, 10**6),
    quirks=st.booleans(),
)
def test_ragged_rows_stay_finite_and_inside_their_samples(lengths, seed, quirks):
    real = jnp.asarray(lengths, jnp.int32)
    clean = jnp.where(jnp.arange(300)[None, :] < real[:, None], rows_of_noise(4, 300, seed), 0.0)
    mixed, did = run(clean, keys(4, seed), dataclasses.replace(ALWAYS, reference_quirks=quirks), real)
    assert np.isfinite(mixed).all()
    for row, length in enumerate(lengths):
        assert (mixed[row, length:] == 0).all()
        assert did.length[row] <= length // 2
        assert 0 <= did.start[row] <= length - did.length[row]


def test_silence_mixes_with_nothing():
    clean = rows_of_noise(4, 200).at[1].set(0.0).at[2].set(0.0)
    mixed, did = run(clean, keys(4), ALWAYS)
    np.testing.assert_array_equal(mixed[1:3], 0.0)
    assert np.isfinite(mixed).all()
    for row in (0, 3):
        if did.partner[row] in (1, 2):
            np.testing.assert_array_equal(mixed[row], np.asarray(clean)[row])


def test_noise_replaces_the_voice_where_a_clip_is_dealt():
    how = dataclasses.replace(ALWAYS, noise_corpus="noise", noise_prob_given_mix=0.5, noise_snr_db=(10.0, 10.0))
    clean, clips = np.asarray(rows_of_noise(8, 400)), np.asarray(rows_of_noise(8, 150, seed=1))
    dealt = jnp.asarray([150, 0, 100, 0, 0, 150, 0, 20], jnp.int32)
    clips = np.where(np.arange(150)[None, :] < np.asarray(dealt)[:, None], clips, 0.0)
    mixed, did = jax.tree.map(
        np.asarray, mix(jnp.asarray(clean), jnp.full(8, 400, jnp.int32), keys(8), how, jnp.asarray(clips), dealt)
    )
    assert isinstance(did, Provenance)
    np.testing.assert_array_equal(did.noise, np.asarray(dealt) > 0)
    for row in range(8):
        source = clips[row] if did.noise[row] else clean[did.partner[row]]
        start, length = did.start[row], did.length[row]
        assert length <= (int(dealt[row]) or 200)
        added = did.scale[row] * source[did.source_start[row] :][:length]
        np.testing.assert_allclose(
            mixed[row, start : start + length], clean[row, start : start + length] + added, atol=1e-6
        )
    np.testing.assert_allclose(did.snr_db[did.noise], 10.0)


@pytest.mark.parametrize("normalized", [False, True])
def test_the_quirks_are_the_authors_loop(normalized):
    """Replayed in numpy, row after row and in place: later rows receive what earlier ones became."""
    how = dataclasses.replace(ALWAYS, reference_quirks=True, group=8)
    clean = np.asarray(rows_of_noise(64, 300))
    again = normalize_waveform if normalized else None
    mixed, did = jax.jit(lambda wave: mix(wave, jnp.full(64, 300), keys(64), how, normalize=again))(clean)
    mixed, did = jax.tree.map(np.asarray, (mixed, did))
    expected = clean.copy()
    for row in range(64):
        source = expected[did.partner[row]].copy()
        scale = np.sqrt((expected[row] ** 2).mean() / ((source**2).mean() * 10 ** (did.snr_db[row] / 10)))
        start, length, begin = did.start[row], did.length[row], did.source_start[row]
        expected[row, start : start + length] += scale * source[begin : begin + length]
        if normalized:
            expected[row] = (expected[row] - expected[row].mean()) / np.sqrt(expected[row].var() + 1e-5)
    np.testing.assert_allclose(mixed, expected, rtol=1e-4, atol=1e-5)
    assert (did.partner == np.arange(64)).any()
    assert (did.length == 0).any() or (did.length > 0).all()


def test_the_authors_noise_has_the_energy_of_its_whole_clip_and_comes_from_any_place_of_it():
    """The piece is cut where `place` says, by `Corpus.random_piece`, and the span in it likewise."""
    rows, size, clip = 4000, 50, 120
    how = dataclasses.replace(ALWAYS, reference_quirks=True, noise_corpus="noise", noise_prob_given_mix=1.0)
    place = np.random.default_rng(0).random(rows).astype(np.float32)
    first = (place * (clip - size + 1)).astype(int)
    pieces = jnp.asarray(0.1 * np.sin(first[:, None] + np.arange(size)), jnp.float32)
    whole = WholeClips(jnp.full(rows, 0.25), jnp.asarray(place))
    lengths, clean = jnp.full(rows, 100, jnp.int32), rows_of_noise(rows, 100)
    given = pieces, jnp.full(rows, size, jnp.int32)
    _, did = jax.tree.map(np.asarray, mix(clean, lengths, keys(rows), how, *given, whole_clips=whole))
    power = (np.asarray(clean) ** 2).mean(axis=1)
    np.testing.assert_allclose(did.scale, np.sqrt(power / (0.25 * 10 ** (did.snr_db / 10))), rtol=1e-4)
    start, last = first + did.source_start, clip - did.length
    assert (start <= last).all()
    assert stats.kstest((start + 0.5) / (last + 1), stats.uniform.cdf).pvalue > 1e-3
    plain = dataclasses.replace(how, reference_quirks=False)
    ours, theirs = (mix(clean, lengths, keys(rows), plain, *given, whole_clips=one)[0] for one in (whole, None))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prob": 1.2}, "prob: found 1.2"),
        ({"group": 1}, "group: found 1, expected at least 2"),
        ({"snr_db": (5.0, -5.0)}, "expected .low, high."),
        ({"noise_prob_given_mix": 0.1}, "noise_corpus is None"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **changes)


def test_rows_that_do_not_fill_the_groups_are_refused():
    with pytest.raises(ValueError, match="6 rows cannot be cut into groups of 4"):
        run(rows_of_noise(6, 50), keys(6), SETTINGS)


def test_mixing_moves_nothing_between_devices():
    """The compiled program has no collective; one gather over all rows brought the whole batch to every device."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec("data"))
    clean, lengths = rows_of_noise(64, 1000), jnp.full(64, 1000, jnp.int32)
    arguments = jax.device_put((clean, lengths, keys(64)), spread)
    program = jax.jit(mix, static_argnums=3, out_shardings=spread).lower(*arguments, ALWAYS).compile()
    assert re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", program.as_text()) == []
    np.testing.assert_allclose(program(*arguments)[0], mix(clean, lengths, keys(64), ALWAYS)[0], atol=1e-6)
