import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefalign_jax.losses.dpo import dpo, hinge, ipo
from prefalign_jax.types import PairLogps


def logps(chosen, rejected, tokens=(1.0, 1.0)) -> PairLogps:
    chosen, rejected = np.atleast_1d(np.float32(chosen)), np.atleast_1d(np.float32(rejected))
    return PairLogps(chosen, rejected, np.full_like(chosen, tokens[0]), np.full_like(chosen, tokens[1]))


def test_dpo_is_the_formula():
    loss, metrics = dpo(logps(-4, -7), logps(-5, -6), beta=0.2)
    h = (-4 + 5) - (-7 + 6)
    np.testing.assert_allclose(loss, np.log1p(np.exp(-0.2 * h)), rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards/chosen"], 0.2, rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards/rejected"], -0.2, rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards/margins"], 0.4, rtol=1e-6)


def test_label_smoothing_mixes_the_two_orders():
    policy, reference, e = logps(-4, -7), logps(-5, -6), 0.3
    smoothed = dpo(policy, reference, label_smoothing=e)[0]
    swapped = dpo(logps(-7, -4), logps(-6, -5))[0]
    np.testing.assert_allclose(smoothed, (1 - e) * dpo(policy, reference)[0] + e * swapped, rtol=1e-6)


def test_label_smoothing_has_its_least_at_the_log_odds_of_a_true_label():
    e = 0.2  # sigmoid(beta h) = 1 - e there
    slope = jax.grad(lambda w: dpo(logps(0, 0)._replace(chosen=w), logps(0, 0), beta=1.0, label_smoothing=e)[0].sum())
    np.testing.assert_allclose(slope(jnp.log(jnp.float32([(1 - e) / e]))), 0.0, atol=1e-6)


def test_swapping_the_sides_of_every_pair_turns_the_margin():
    policy, reference = logps(-4, -7), logps(-5, -6)
    forward, backward = dpo(policy, reference)[1], dpo(logps(-7, -4), logps(-6, -5))[1]
    np.testing.assert_allclose(forward["rewards/margins"], -backward["rewards/margins"])
    # sigma(x) + sigma(-x) = 1
    total = np.exp(-dpo(policy, reference)[0]) + np.exp(-dpo(logps(-7, -4), logps(-6, -5))[0])
    np.testing.assert_allclose(total, 1.0, rtol=1e-6)


def test_gradient_is_the_papers_weighting():
    """arXiv 2305.18290, the gradient under Eq. 7: -beta sigma(r_l - r_w) (grad log pi_w - grad log pi_l)."""
    reference, beta = logps(-5, -6), 0.2
    grad = jax.grad(lambda w, l: dpo(logps(0, 0)._replace(chosen=w, rejected=l), reference, beta=beta)[0].sum(), (0, 1))
    chosen, rejected = grad(jnp.float32([-4.0]), jnp.float32([-7.0]))
    weight = beta / (1 + np.exp(0.4))
    np.testing.assert_allclose([chosen, rejected], [[-weight], [weight]], rtol=1e-6)


def test_a_tie_is_no_success_as_in_trl():
    assert dpo(logps(-4, -7), logps(-4, -7))[1]["rewards/accuracies"] == 0


@pytest.mark.parametrize("reference_free", [False, True])
def test_a_missing_or_superfluous_reference_is_an_error(reference_free):
    with pytest.raises(ValueError, match="reference"):
        dpo(logps(-1, -2), logps(-1, -2) if reference_free else None, reference_free=reference_free)


def test_reference_free_is_a_uniform_reference():
    np.testing.assert_allclose(
        dpo(logps(-4, -7), None, reference_free=True)[0], dpo(logps(-4, -7), logps(0, 0))[0], rtol=1e-6
    )


def test_ipo_regresses_the_margin_onto_its_target():
    tau = 0.25
    at_target = ipo(logps(-4, -7), logps(-5, -6), tau=tau)[0]  # h = 2 = 1 / (2 tau)
    np.testing.assert_allclose(at_target, 0.0, atol=1e-7)
    slope = jax.grad(lambda w: ipo(logps(0, -7)._replace(chosen=w), logps(-5, -6), tau=tau)[0].sum())
    assert slope(jnp.float32([-4.5])) < 0 < slope(jnp.float32([-3.5]))


def test_ipo_per_token_divides_each_side_by_its_own_length():
    policy, reference = logps(-4, -7, (2, 5)), logps(-5, -6, (2, 5))
    expected = (1 / 2 - (-1) / 5 - 1 / 0.2) ** 2
    np.testing.assert_allclose(ipo(policy, reference, tau=0.1, per_token=True)[0], expected, rtol=1e-6)


def test_hinge_leaves_pairs_beyond_the_margin_alone():
    reference = logps([-5, -5], [-6, -6])
    loss = hinge(logps([-4, 0], [-7, -100]), reference, beta=0.1)[0]
    np.testing.assert_allclose(loss, [1 - 0.1 * 2, 0.0], rtol=1e-6)
