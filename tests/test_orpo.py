import jax
import jax.numpy as jnp
import numpy as np

from prefalign_jax.losses.orpo import log_odds, orpo
from prefalign_jax.types import PairLogps


def means(chosen, rejected) -> PairLogps:
    """Responses of one token, so that sums are means."""
    ones = jnp.ones_like(chosen)
    return PairLogps(chosen, rejected, ones, ones)


def test_orpo_is_the_formula():
    chosen, rejected = np.array([0.3]), np.array([0.2])
    ratio = np.log(chosen / (1 - chosen)) - np.log(rejected / (1 - rejected))
    loss, metrics = orpo(means(jnp.log(chosen), jnp.log(rejected)), lam=0.7)
    np.testing.assert_allclose(metrics["log_odds_chosen"], ratio, rtol=1e-5)
    np.testing.assert_allclose(metrics["log_odds_ratio"], -np.log1p(np.exp(-ratio)), rtol=1e-5)
    np.testing.assert_allclose(loss, -np.log(chosen) + 0.7 * np.log1p(np.exp(-ratio)), rtol=1e-5)


def test_gradient_is_minus_delta_h():
    """arXiv 2403.07691 Eq. 8 to 10 with the sign mended: -delta (g_w / (1 - P_w) - g_l / (1 - P_l))."""
    with jax.enable_x64(True):
        p_w, p_l = 0.3, 0.6
        delta = 1 / (1 + (p_w / (1 - p_w)) / (p_l / (1 - p_l)))
        log_odds_ratio = lambda w, l: orpo(means(w, l), lam=1.0)[1]["log_odds_ratio"].sum()  # noqa: E731
        g_w, g_l = jax.grad(lambda w, l: -log_odds_ratio(w, l), (0, 1))(
            jnp.log(jnp.array([p_w])), jnp.log(jnp.array([p_l]))
        )
        np.testing.assert_allclose(g_w, -delta / (1 - p_w), rtol=1e-10)
        np.testing.assert_allclose(g_l, delta / (1 - p_l), rtol=1e-10)


def test_log_odds_is_accurate_where_the_plain_formula_is_not():
    x = jnp.float32([-1e-9, -1e-7, -1e-3, -1.0, -50.0])
    exact = np.float64(x) - np.log(-np.expm1(np.float64(x)))
    np.testing.assert_allclose(log_odds(x), exact, rtol=2e-6)
    slope = jax.vmap(jax.grad(lambda x: log_odds(x)))(x)
    np.testing.assert_allclose(slope, 1 / -np.expm1(np.float64(x)), rtol=2e-6)


def test_a_certain_response_can_still_be_pushed_down():
    slope = jax.grad(lambda l: orpo(means(jnp.float32([-1.0]), l))[0].sum())(jnp.float32([0.0]))
    assert np.isfinite(slope).all() and (slope > 0).all()


def test_an_empty_response_leaves_the_batch_finite():
    policy = PairLogps(jnp.zeros(1), jnp.float32([-3.0]), jnp.zeros(1), jnp.ones(1))
    loss, _ = orpo(policy)
    assert np.isfinite(loss).all()
