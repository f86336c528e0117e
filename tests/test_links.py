import jax
import jax.numpy as jnp
import numpy as np

from prefalign_jax.losses import make_loss
from prefalign_jax.losses.dpo import dpo
from prefalign_jax.losses.links import chi_po, dpo_shift, f_dpo
from test_dpo import logps
from test_losses import draw

POLICY, REFERENCE = draw(8, dtype=np.float32)


def slopes(loss, policy, reference, **hyper):
    f = lambda w, l: loss(policy._replace(chosen=w, rejected=l), reference, **hyper)[0].sum()  # noqa: E731
    return jax.grad(f, (0, 1))(jnp.asarray(policy.chosen), jnp.asarray(policy.rejected))


def test_chi_po_near_the_reference_is_dpo_of_twice_the_beta():
    """u + log u = 1 + 2 log u + O(log u)^2."""
    policy, reference = logps([-5.0, -5.002], [-6.0, -5.999]), logps([-5.001, -5.0], [-6.0, -6.0])
    chosen, rejected = slopes(chi_po, policy, reference, beta=0.1)
    wanted = slopes(dpo, policy, reference, beta=0.2)
    np.testing.assert_allclose([chosen, rejected], wanted, rtol=2e-3)


def test_chi_po_is_dpo_under_its_divergence_until_it_is_clipped():
    policy, reference = logps([-5.0, -4.0, -5.0], [-6.0, -6.0, -6.0]), logps([-5.5, -9.0, -9.0], [-5.5, -6.0, -3.0])
    free = f_dpo(policy, reference, divergence="chi_squared")[0]
    np.testing.assert_allclose(make_loss("dpo", divergence="chi_squared")(policy, reference)[0], free, rtol=1e-6)
    loss, margins = chi_po(policy, reference, reward_max=1.0)[0], chi_po(policy, reference)[1]["rewards/margins"]
    clipped = np.abs(margins) > 2
    assert list(clipped) == [False, True, True]
    np.testing.assert_allclose(loss[~clipped], free[~clipped], rtol=1e-6)
    np.testing.assert_allclose(loss[clipped], np.log1p(np.exp(-2.0)), rtol=1e-6)
    for slope in slopes(chi_po, policy, reference, reward_max=1.0):
        assert ((slope == 0) == clipped).all()


def test_chi_po_weighs_a_response_that_has_become_likely_by_how_likely():
    """d(u + log u) / d log pi = 1 + u."""
    policy, reference = logps([-4.0], [-6.0]), logps([-6.0], [-6.0])
    chosen, rejected = slopes(chi_po, policy, reference, beta=0.01)
    np.testing.assert_allclose(-chosen / rejected, (1 + np.exp(2.0)) / (1 + 1), rtol=1e-5)


def test_dpo_shift_without_a_shift_is_dpo_and_with_one_pushes_the_rejected_down_less():
    np.testing.assert_array_equal(dpo_shift(POLICY, REFERENCE, lam=1.0)[0], dpo(POLICY, REFERENCE)[0])
    chosen, rejected = slopes(dpo_shift, POLICY, REFERENCE, lam=0.6)
    np.testing.assert_allclose(rejected, -0.6 * chosen, rtol=1e-5)
