import jax
import numpy as np

from prefalign_jax.losses.simpo import repo, simper, simpo
from test_losses import draw

POLICY, _ = draw(16, dtype=np.float32)


def slope(loss, **hyper):
    return jax.grad(lambda w: loss(POLICY._replace(chosen=w), **hyper)[0].sum())(POLICY.chosen)


def test_repo_is_simpo_as_beta_grows():
    """arXiv 2503.07426, lemma 3.1, of the gradient over beta; gamma / beta is RePO's gamma."""
    beta, gamma = 1e5, 0.4
    limit = simpo(POLICY, beta=beta, gamma=beta * gamma)[0] / beta
    np.testing.assert_allclose(repo(POLICY, gamma=gamma)[0], limit, rtol=1e-5, atol=1e-5)
    pulls = slope(repo, gamma=gamma)
    np.testing.assert_allclose(pulls, slope(simpo, beta=beta, gamma=beta * gamma) / beta, rtol=1e-5, atol=1e-7)
    assert 0 < (pulls == 0).sum() < 16 and np.unique(np.round(pulls * POLICY.chosen_tokens, 5)).size == 2


def test_simper_lies_between_its_bounds_and_pulls_by_the_likelihood_per_token():
    loss = simper(POLICY)[0]
    assert (np.abs(loss) <= 1).all()
    inverse_perplexity = np.exp(POLICY.chosen / POLICY.chosen_tokens)
    np.testing.assert_allclose(slope(simper), -inverse_perplexity / POLICY.chosen_tokens, rtol=1e-5)
