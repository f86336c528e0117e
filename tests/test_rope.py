import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefalign_jax.models.rope import RopeScaling, frequencies, rotate, rotation

LLAMA3 = RopeScaling("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64)
YARN = RopeScaling("yarn", 4.0, original_max_position=64, beta_fast=32.0, beta_slow=1.0)


def test_rotation_keeps_lengths_and_turns_by_the_angle():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 2, 8)), jnp.float32)
    cos, sin = rotation(jnp.array([[0, 1, 5]]), jnp.ones((1, 3), int), 8, 100.0, None)
    y = rotate(x, cos, sin)
    np.testing.assert_allclose(jnp.square(y).sum(-1), jnp.square(x).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(y[:, 0], x[:, 0], rtol=1e-6)
    as_complex = (np.asarray(x[..., :4]) + 1j * np.asarray(x[..., 4:]))[0, 2]
    turned = as_complex * np.exp(1j * 5 * 100.0 ** (-np.arange(4) / 4))
    np.testing.assert_allclose(
        np.asarray(y[0, 2]), np.concatenate([turned.real, turned.imag], -1), rtol=1e-4, atol=1e-5
    )


def test_linear_divides_every_frequency():
    plain, _ = frequencies(16, 10000.0, None)
    np.testing.assert_allclose(frequencies(16, 10000.0, RopeScaling("linear", 4.0))[0], plain / 4, rtol=1e-6)


@pytest.mark.parametrize("scaling", [LLAMA3, YARN], ids=["llama3", "yarn"])
def test_banded_scalings_keep_the_fast_and_divide_the_slow(scaling):
    plain, _ = frequencies(64, 10000.0, None)
    scaled, _ = frequencies(64, 10000.0, scaling)
    ratio = plain / scaled
    np.testing.assert_allclose(ratio[0], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[-1], scaling.factor, rtol=1e-5)
    assert (np.diff(ratio) >= -1e-6).all()


def test_yarn_scales_cos_and_sin_by_its_attention_factor():
    assert frequencies(64, 10000.0, YARN)[1] == pytest.approx(0.1 * math.log(4.0) + 1)


LONGROPE = RopeScaling(
    "longrope", 4.0, original_max_position=8, short_factor=(1.0, 1.5, 2.0, 3.0), long_factor=(2.0, 4.0, 8.0, 16.0)
)


def test_yarns_band_begins_and_ends_between_dimensions_where_it_is_not_truncated():
    """By the paper's formula: divided by the factor below 1 turn over the original context, kept above 32."""
    plain, _ = frequencies(64, 10000.0, None)
    edges = [64 * math.log(64 / (turns * 2 * math.pi)) / (2 * math.log(10000.0)) for turns in (32.0, 1.0)]
    edges[0] = max(edges[0], 0.0)
    share = np.clip((np.arange(32) - edges[0]) / (edges[1] - edges[0]), 0, 1)
    scaled, _ = frequencies(64, 10000.0, dataclasses.replace(YARN, truncate=False))
    np.testing.assert_allclose(scaled, plain * (1 - share) + plain / 4 * share, rtol=1e-6)
    assert np.abs(scaled / frequencies(64, 10000.0, YARN)[0] - 1).max() > 0.01


def test_dynamic_is_the_plain_embedding_within_the_context():
    np.testing.assert_array_equal(frequencies(16, 1e4, RopeScaling("dynamic", 4.0))[0], frequencies(16, 1e4, None)[0])
    assert frequencies(16, 1e4, RopeScaling("dynamic", 4.0))[1] == 1.0


def test_longrope_divides_every_frequency_by_its_own_number():
    plain, _ = frequencies(8, 100.0, None)
    np.testing.assert_allclose(plain / frequencies(8, 100.0, LONGROPE)[0], LONGROPE.short_factor, rtol=1e-6)
    np.testing.assert_allclose(plain / frequencies(8, 100.0, LONGROPE, long=True)[0], LONGROPE.long_factor, rtol=1e-6)
    assert frequencies(8, 100.0, LONGROPE)[1] == pytest.approx(math.sqrt(1 + math.log(4) / math.log(8)))
    assert frequencies(8, 100.0, dataclasses.replace(LONGROPE, attention_factor=1.25))[1] == 1.25
    assert frequencies(8, 100.0, dataclasses.replace(LONGROPE, factor=1.0))[1] == 1.0


def test_longrope_turns_a_segment_by_how_far_it_reaches_and_no_other():
    """Segment 1 ends at the last position of the original context, segment 2 reaches one beyond on one branch only."""
    positions = np.array([[*range(8), 0, 0, *range(7), 7, 8, 7, 0]])
    segments = np.array([[1] * 8 + [3, 0] + [2] * 10 + [0]])
    cos, sin = rotation(jnp.asarray(positions), jnp.asarray(segments), 8, 100.0, LONGROPE)
    divisors = np.where(segments[..., None] == 2, LONGROPE.long_factor, LONGROPE.short_factor)
    angles = positions[..., None] * 100.0 ** (-np.arange(4) / 4) / divisors
    multiplier = math.sqrt(1 + math.log(4) / math.log(8))
    np.testing.assert_allclose(cos, multiplier * np.cos(angles), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sin, multiplier * np.sin(angles), rtol=1e-5, atol=1e-6)


def test_unknown_scaling_is_named():
    with pytest.raises(ValueError, match="linear, llama3, yarn"):
        frequencies(8, 1e4, RopeScaling("ntk", 2.0))


def test_interleaved_pairs_turn_as_halves_do_once_they_are_put_apart():
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 10))
    cos, sin = rotation(jnp.arange(3)[None], jnp.ones((1, 3), jnp.int32), 6, 100.0, None)
    apart = jnp.array([0, 2, 4, 1, 3, 5, 6, 7, 8, 9])  # the first 6 of each head turn
    halves = rotate(x[..., apart], cos, sin)
    np.testing.assert_array_equal(rotate(x, cos, sin, interleaved=True)[..., apart], halves)
