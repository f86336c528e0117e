import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import longer
from prefalign_jax.models.decoder import make_decoder
from prefalign_jax.models.lora import Lora, init_adapters, join
from prefalign_jax.models.quantize import NF4, QUANTIZATIONS, dequantize, dequantize_params, quantize, quantize_params
from small import CONFIG, MODEL, first, logps_of, make_pairs, make_params, packed

RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(2, 128, 24)).astype(np.float32)


def round_trip(kernel, kind):
    stored = quantize(kernel, kind)
    return np.asarray(dequantize(stored[kind], stored["scales"], jnp.float32)), stored


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_every_weight_is_the_nearest_level_of_its_block(kind):
    found, stored = round_trip(KERNEL, kind)
    blocks = KERNEL.reshape(2, 2, 64, 24)
    top = np.abs(blocks).max(2, keepdims=True)
    np.testing.assert_allclose(stored["scales"], top[:, :, 0])
    levels = (np.arange(-127, 128) / 127 if kind == "int8" else NF4).astype(np.float32)
    nearest = np.abs(blocks[..., None] / top[..., None] - levels).min(-1) * top
    np.testing.assert_allclose(np.abs(found.reshape(blocks.shape) - blocks), nearest, atol=1e-5)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_levels_come_back_exactly_zeros_and_the_largest_among_them(kind):
    levels = np.float32([0, 1, -1] if kind == "int8" else NF4)
    kernel = np.resize(levels, (64, 3)) * np.float32([1.0, 0.25, 0.0])
    np.testing.assert_array_equal(round_trip(kernel, kind)[0], kernel)


def test_bytes_are_one_or_a_half_for_each_weight_and_a_scale_for_each_block():
    for kind, share in (("int8", 1.0), ("nf4", 0.5)):
        _, stored = round_trip(KERNEL, kind)
        assert stored[kind].nbytes == share * KERNEL.size
        assert stored["scales"].nbytes == KERNEL.size / 64 * 4


@pytest.mark.parametrize("kind", ["nf4", longer("int8")])
def test_a_decoder_computes_with_them_as_with_the_kernels_they_stand_for(kind):
    params, lora = make_params(0), Lora(rank=2)
    small = quantize_params(params, kind)
    plain = dequantize_params(small)
    batch = first(packed(make_pairs(3)))
    model = make_decoder(CONFIG, lora=lora)
    found = logps_of(model, small, batch).chosen
    wanted = logps_of(MODEL, plain, batch).chosen
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert not np.allclose(wanted, logps_of(MODEL, params, batch).chosen, rtol=1e-5)
    adapters = init_adapters(jax.random.key(0), small, lora)
    grads = jax.jit(jax.grad(lambda a: logps_of(model, join(small, a), batch).chosen.sum()))(adapters)
    assert any(np.any(g) for g in jax.tree.leaves(grads))


def test_int8_is_close_and_nf4_within_its_coarse_levels():
    for kind, most in (("int8", 0.01), ("nf4", 0.12)):
        found, _ = round_trip(KERNEL, kind)
        assert np.sqrt(np.square(found - KERNEL).mean() / np.square(KERNEL).mean()) < most
