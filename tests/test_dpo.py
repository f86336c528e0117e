import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefalign_jax.losses import make_loss
from prefalign_jax.losses.dpo import dpo, r_dpo, tdpo1, tdpo2, wpo
from prefalign_jax.losses.loss import ties_as_trl
from prefalign_jax.types import PairLogps, Sides


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


def test_a_tie_is_half_a_success_and_none_as_trl_counts():
    tie = logps(-4, -7)
    assert dpo(tie, tie)[1]["rewards/accuracies"] == 0.5
    loss = ties_as_trl(make_loss("dpo"))
    for policy, expected in ((tie, 0), (logps(-3, -7), 1), (logps(-5, -7), 0)):
        assert loss(policy, tie)[1]["rewards/accuracies"] == expected


@pytest.mark.parametrize("reference_free", [False, True])
def test_a_missing_or_superfluous_reference_is_an_error(reference_free):
    with pytest.raises(ValueError, match="reference"):
        dpo(logps(-1, -2), logps(-1, -2) if reference_free else None, reference_free=reference_free)


def test_reference_free_is_a_uniform_reference():
    np.testing.assert_allclose(
        dpo(logps(-4, -7), None, reference_free=True)[0], dpo(logps(-4, -7), logps(0, 0))[0], rtol=1e-6
    )


def test_length_that_explains_a_preference_weakens_what_is_learned_from_it():
    """R-DPO: the longer the chosen response, the smaller the pull."""
    slope = lambda tokens: jax.grad(  # noqa: E731
        lambda w: r_dpo(logps(0, -7, tokens)._replace(chosen=w), logps(-5, -6), alpha=0.5)[0].sum()
    )(jnp.float32([-4.0]))
    assert slope((9, 2)) > slope((4, 4)) > slope((2, 9))


def test_tdpo2_does_not_push_the_divergence_of_the_chosen():
    reference = logps(-5, -6)

    def slopes(loss, **hyper):
        f = lambda kl: loss(logps(-4, -7)._replace(token_kl=kl), reference, **hyper)[0].sum()  # noqa: E731
        return jax.grad(f)(Sides(jnp.float32([0.5]), jnp.float32([0.8])))

    one, two = slopes(tdpo1), slopes(tdpo2, alpha=1.0)
    assert one.chosen < 0 < one.rejected
    assert two.chosen == 0 and two.rejected == one.rejected


def test_the_weight_of_wpo_is_a_constant_and_clipped_where_the_authors_do():
    reference = logps(-5, -6, (2, 2))
    policy = logps(-4, -7, (2, 2))._replace(sum_squares=Sides(np.float32([-4.4]), np.float32([-6.0])))
    weight = np.exp((-4 + 4.4) / 2 + (-7 + 6) / 2)

    def slope(loss, **hyper):
        return jax.grad(lambda w: loss(policy._replace(chosen=w), reference, **hyper)[0].sum())(jnp.float32([-4.0]))

    np.testing.assert_allclose(slope(wpo), weight * slope(dpo), rtol=1e-6)
    likely = policy._replace(sum_squares=Sides(np.float32([-9]), np.float32([-9])))
    np.testing.assert_allclose(wpo(likely, reference)[0], dpo(likely, reference)[0], rtol=1e-6)
    assert wpo(likely, reference, clip=False)[0] > 10 * wpo(likely, reference)[0]
