"""Rows beyond the vocabulary: no probability, no gradient, not in an exported file."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from conftest import longer
from prefalign_jax.logps import token_logps
from prefalign_jax.models import hf_io
from prefalign_jax.models.decoder import make_decoder
from small import CONFIG


@pytest.mark.parametrize("tied", [longer(False), True])
def test_padding_gets_no_probability_and_no_gradient_and_is_not_written(tied, tmp_path):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    params = make_decoder(config).init(jax.random.key(0))
    padded, wider = hf_io.pad_vocabulary(params, config, 64)
    rows = -(-config.vocab_size // 64) * 64
    assert wider.vocab_padding == rows - config.vocab_size
    blank = jax.eval_shape(make_decoder(wider).init, jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, padded) == jax.tree.map(lambda x: x.shape, blank)
    tokens = np.arange(12).reshape(1, 12) % config.vocab_size
    zeros = np.zeros_like(tokens)

    @functools.partial(jax.jit, static_argnums=1)
    @functools.partial(jax.grad, has_aux=True)
    def slopes_and_logps(params, config):
        model = make_decoder(config)
        hidden = model.hidden(params, tokens, zeros + np.arange(12), zeros + 1, zeros)
        logps = token_logps(hidden[:, :-1], model.head(params), tokens[:, 1:], 16)
        return logps.sum(), logps

    (grads, found), (wanted, logps) = slopes_and_logps(padded, wider), slopes_and_logps(params, config)
    np.testing.assert_allclose(found, logps, rtol=1e-5, atol=1e-6)
    for name in ("embed", "head")[: 1 if tied else 2]:
        for key in wanted[name]:
            assert not np.any(grads[name][key][config.vocab_size :])
            np.testing.assert_allclose(grads[name][key][: config.vocab_size], wanted[name][key], rtol=1e-4, atol=1e-5)
    hf_io.save_params(padded, wider, tmp_path / "x")
    assert hf_io.load_config(tmp_path / "x") == config
    again = hf_io.load_params(tmp_path / "x", config)
    jax.tree.map(np.testing.assert_array_equal, again, params)
