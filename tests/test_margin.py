import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefalign_jax.losses.dpo import dpo
from prefalign_jax.losses.margin import SURROGATES, discopop, exo, focal_po, hinge, ipo
from prefalign_jax.types import PairLogps


def logps(chosen, rejected, tokens=(1.0, 1.0)) -> PairLogps:
    chosen, rejected = np.atleast_1d(np.float32(chosen)), np.atleast_1d(np.float32(rejected))
    return PairLogps(chosen, rejected, np.full_like(chosen, tokens[0]), np.full_like(chosen, tokens[1]))


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


def test_exo_is_least_where_the_policy_prefers_as_the_labels_do():
    """The divergence of q from (1 - e, e) is 0 at beta h = log((1 - e) / e)."""
    e = 0.2
    h = jnp.log(jnp.float32([(1 - e) / e]))
    reference = logps(-1, -1)
    loss = lambda h: exo(reference._replace(chosen=reference.chosen + h), reference, beta=1.0, label_smoothing=e)[0]  # noqa: E731
    np.testing.assert_allclose(loss(h), 0.0, atol=1e-6)
    assert loss(h + 0.5) > 0 and loss(h - 0.5) > 0


def test_discopop_goes_from_the_exponential_to_the_logistic_loss():
    """Far to the right m = 1 and the loss is exp(-x); far to the left m = 0 and it is the logistic loss."""
    reference = logps([-500] * 2, [-500] * 2)
    x = np.array([3.0, -12.0])
    policy = reference._replace(chosen=(reference.chosen + x).astype(np.float32))
    loss = discopop(policy, reference, beta=1.0, temperature=0.05)[0]
    np.testing.assert_allclose(loss, [np.exp(-3.0), np.log1p(np.exp(12.0))], rtol=1e-5)


def test_focal_po_is_dpo_whose_slope_is_less_the_more_wrong_a_pair_is():
    """Its share of DPO's slope is p^gamma (1 + gamma log p), which changes sign at p = exp(-1 / gamma)."""
    reference, gamma = logps([-500] * 5, [-500] * 5), 0.25
    x = np.array([-8.0, -4.0, -1.0, 0.0, 6.0], np.float32)

    def slope(loss, **hyper):
        return jax.grad(
            lambda x: loss(reference._replace(chosen=reference.chosen + x), reference, beta=1.0, **hyper)[0].sum()
        )(x)

    log_p = -np.log1p(np.exp(-x))
    share = np.exp(gamma * log_p) * (1 + gamma * log_p)
    np.testing.assert_allclose(slope(focal_po, gamma=gamma) / slope(dpo), share, rtol=1e-4)
    assert share[0] < 0 < share[2] and (np.diff(share[1:]) > 0).all()
    np.testing.assert_allclose(slope(focal_po, gamma=0.0), slope(dpo), rtol=1e-6)


@pytest.mark.parametrize("name", SURROGATES)
def test_surrogates_bound_the_mistake_and_fall_where_the_margin_is_wrong(name):
    x = jnp.linspace(-3.0, 0.0, 31)
    f = SURROGATES[name]
    slopes = jax.vmap(jax.grad(lambda x: f(x)))(x)
    assert (slopes < 0).all()
    if name != "savage":  # which is bounded, and so neither convex nor above the 0-1 loss
        assert (f(x) >= 1 - 1e-6).all() and (jnp.diff(slopes) >= -1e-6).all()
