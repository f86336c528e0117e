import jax
import numpy as np

from prefalign_jax.losses.dpo import dpo
from prefalign_jax.losses.robust import dr_dpo, robust_dpo
from test_losses import draw

POLICY, REFERENCE = draw(8, dtype=np.float32)


def test_robust_dpo_of_flipped_labels_is_dpo_of_the_true_ones_on_average():
    e, flipped = 0.3, POLICY._replace(chosen=POLICY.rejected, rejected=POLICY.chosen)
    other = REFERENCE._replace(chosen=REFERENCE.rejected, rejected=REFERENCE.chosen)
    right, wrong = (robust_dpo(p, r, label_smoothing=e)[0] for p, r in ((POLICY, REFERENCE), (flipped, other)))
    np.testing.assert_allclose((1 - e) * right + e * wrong, dpo(POLICY, REFERENCE)[0], rtol=1e-4)


def test_dr_dpo_is_the_mean_where_labels_are_trusted_and_the_least_loss_where_they_are_not():
    losses = dpo(POLICY, REFERENCE, beta=0.5)[0]
    np.testing.assert_allclose(dr_dpo(POLICY, REFERENCE, beta=0.5, beta_prime=1e3)[0], losses.mean(), rtol=1e-2)
    np.testing.assert_allclose(dr_dpo(POLICY, REFERENCE, beta=0.5, beta_prime=1e-4)[0], losses.min(), atol=1e-3)


def test_dr_dpo_weighs_dpos_gradient_and_its_weights_have_mean_1():
    weight = np.float32([1, 2, 0.5, 1, 1, 3, 1, 0])  # the last is filler
    policy = POLICY._replace(weight=weight)

    def slope(loss):
        mean = lambda w: (loss(policy._replace(chosen=w), REFERENCE)[0] * weight).sum() / weight.sum()  # noqa: E731
        return jax.grad(mean)(policy.chosen)

    shares = dr_dpo(policy, REFERENCE)[1]["dr_weight"]
    np.testing.assert_allclose(np.average(shares, weights=weight), 1.0, rtol=1e-5)
    losses = np.asarray(dpo(policy, REFERENCE)[0])
    np.testing.assert_allclose(shares[:7] / shares[0], np.exp(losses[0] - losses[:7]), rtol=1e-5)
    np.testing.assert_allclose(slope(dr_dpo), shares * slope(dpo), rtol=1e-4, atol=1e-9)


def test_dr_dpo_of_filler_alone_is_finite():
    assert np.isfinite(dr_dpo(POLICY._replace(weight=np.zeros(8, np.float32)), REFERENCE, beta_prime=5.0)[0]).all()
