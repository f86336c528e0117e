import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefalign_jax.losses.dpo import dpo
from prefalign_jax.losses.gaps import DISTANCES, odpo, rebel, reward_aware_rpo
from prefalign_jax.losses.margin import exo, ipo
from test_dpo import logps
from test_losses import draw


def test_a_greater_gap_asks_for_a_greater_margin():
    gaps = logps([-4] * 3, [-7] * 3)._replace(margin=np.float32([0.5, 1.0, 4.0]))
    loss = odpo(gaps, logps([-5] * 3, [-6] * 3))[0]
    np.testing.assert_allclose(loss[1], dpo(gaps, logps([-5] * 3, [-6] * 3))[0][1], rtol=1e-6)  # log 1 = 0
    assert loss[0] < loss[1] < loss[2]


POLICY, REFERENCE = draw(8, dtype=np.float32)


def slope(loss, policy=POLICY, **hyper):
    return jax.grad(lambda w: loss(policy._replace(chosen=w), REFERENCE, **hyper)[0].sum())(policy.chosen)


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_margin_that_is_the_gap_costs_nothing_and_any_other_something(distance):
    h = np.linspace(-3, 3, 7, dtype=np.float32)
    policy = logps(h, np.zeros(7))._replace(margin=np.full(7, 1.0, np.float32))
    loss, zeros = reward_aware_rpo, logps(np.zeros(7), np.zeros(7))
    values = loss(policy, zeros, beta=0.5, eta=0.5, distance=distance)[0]  # 0.5 h = 0.5 where h = 1
    np.testing.assert_allclose(values[4], 0.0, atol=1e-6)
    assert (np.delete(values, 4) > 1e-3).all() and (np.diff(values[:5]) < 0).all() and (np.diff(values[4:]) > 0).all()


def test_a_gap_is_how_certain_a_label_of_dpo_is():
    """KL(label || policy) is conservative DPO less a constant, and DPO where the gap is large."""
    e = 0.2
    certain = POLICY._replace(margin=np.full(8, np.log((1 - e) / e), np.float32))
    np.testing.assert_allclose(slope(reward_aware_rpo, certain), slope(dpo, label_smoothing=e), rtol=1e-5, atol=1e-7)
    sure = POLICY._replace(margin=np.full(8, 100.0, np.float32))
    np.testing.assert_allclose(reward_aware_rpo(sure, REFERENCE)[0], dpo(POLICY, REFERENCE)[0], rtol=1e-5)


def test_the_other_direction_is_exos():
    e = 0.2
    certain = POLICY._replace(margin=np.full(8, np.log((1 - e) / e), np.float32))
    loss = reward_aware_rpo(certain, REFERENCE, distance="forward_kl")[0]
    np.testing.assert_allclose(loss, exo(POLICY, REFERENCE, label_smoothing=e)[0], rtol=1e-4, atol=1e-6)


def test_a_gap_of_one_half_is_ipo():
    """(beta h - 1/2)^2 = beta^2 (h - 1 / (2 beta))^2."""
    half = POLICY._replace(margin=np.full(8, 0.5, np.float32))
    wanted = 0.3**2 * ipo(POLICY, REFERENCE, tau=0.3)[0]
    np.testing.assert_allclose(rebel(half, REFERENCE, beta=0.3)[0], wanted, rtol=1e-4)


def test_the_optimum_of_rebel_is_that_of_the_rewards_under_the_pull_to_the_reference():
    """Over all pairs of three responses, gradient steps arrive at pi_ref exp(score / beta) / Z."""
    beta, scores = 0.5, jnp.array([1.0, 0.2, -0.4])
    reference = jnp.log(jnp.array([0.2, 0.5, 0.3]))
    better, worse = jnp.array([0, 0, 1]), jnp.array([1, 2, 2])

    def loss(logits):
        policy = jax.nn.log_softmax(logits)
        pair = lambda x: logps(0, 0)._replace(chosen=x[better], rejected=x[worse])  # noqa: E731
        gaps = pair(policy)._replace(margin=scores[better] - scores[worse])
        return rebel(gaps, pair(reference), beta=beta)[0].mean()

    logits = jax.lax.fori_loop(0, 300, lambda _, x: x - 1.0 * jax.grad(loss)(x), reference)
    np.testing.assert_allclose(jax.nn.log_softmax(logits), jax.nn.log_softmax(reference + scores / beta), atol=1e-4)
