"""The papers' theorems, held against the losses on tables so small that every expectation is a plain sum.

Three prompts (X), five responses (K) to each. A policy is its logits [X, K]. Labels are weights [X, K, K]: entry
(x, y, y') is how often the pair y, y' of prompt x is drawn with y preferred, so that a sum takes in both orders.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, log_softmax, logit, softmax, xlogy

from prefalign_jax.analysis import tabular
from prefalign_jax.losses import make_loss
from prefalign_jax.losses.orpo import log_odds
from prefalign_jax.types import PairLogps

PROBLEM = tabular.make_problem()
X, K = PROBLEM.reward.shape
REWARD, REFERENCE, DRAWN = PROBLEM.reward, PROBLEM.reference, PROBLEM.drawn
both_orders = functools.partial(tabular.both_orders, PROBLEM)
expected_reward = functools.partial(tabular.expected_reward, PROBLEM)
divergence = functools.partial(tabular.divergence, PROBLEM)
frontier = functools.partial(tabular.frontier, PROBLEM)
BRADLEY_TERRY = tabular.bradley_terry(PROBLEM)
# One pair of each prompt has a label, always the same: response 0 beats response 1.
CERTAIN = np.zeros((X, K, K))
CERTAIN[:, 0, 1] = 1 / X


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def population(loss, weights, reference=None):
    """The expected loss as a function of the policy's logits."""
    # ORPO's P is a mean over tokens: a response's own probability where it has one.
    tokens = PROBLEM.tokens if reference is not None else np.ones_like(PROBLEM.tokens)
    return tabular.population(loss, weights, tokens, reference)


def minimum(f, shape=(X, K)) -> np.ndarray:
    """Log-probabilities at the minimum of f, by Newton's method from the uniform policy."""

    @jax.jit
    def look(theta):
        return f(theta), jnp.ravel(jax.grad(f)(theta)), jax.hessian(f)(theta).reshape(theta.size, theta.size)

    theta = np.zeros(shape)
    value, gradient, curvature = look(theta)
    for _ in range(50):
        # The pseudo-inverse leaves alone what f does not see: a constant added to a prompt's logits.
        step = np.reshape(np.linalg.pinv(curvature, rcond=1e-11, hermitian=True) @ gradient, shape)
        if np.abs(step).max() < 1e-12:
            least, *_, most = np.linalg.eigvalsh(curvature)
            assert least > -1e-12 * most, "a saddle or a maximum"
            return log_softmax(theta, axis=-1)
        while (there := look(theta - step))[0] > value + 1e-14 * abs(value) and np.abs(step).max() > 1e-9:
            step = step / 2
        theta, (value, gradient, curvature) = theta - step, there
    raise AssertionError("Newton's method finds no minimum")


def descend(f, steps: int, rate: float) -> np.ndarray:
    """Log-probabilities [1 + steps, X, K] along gradient descent from the reference."""
    return tabular.descend(f, REFERENCE, steps, rate)


def margin(logps: np.ndarray, reference: np.ndarray = REFERENCE) -> np.ndarray:
    """h of response 0 over response 1, [..., X]."""
    log_ratios = logps - reference
    return log_ratios[..., 0] - log_ratios[..., 1]


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_dpo_finds_the_optimum_of_reward_under_a_kl_penalty(beta):
    """arXiv 2305.18290 Eq. 4 and 5: the policy is pi_ref exp(r / beta) / Z, its implicit reward r up to a constant."""
    f = population(make_loss("dpo", beta=beta), both_orders(BRADLEY_TERRY), REFERENCE)
    optimum = minimum(f)
    np.testing.assert_allclose(np.exp(optimum), softmax(REFERENCE + REWARD / beta, axis=-1), rtol=0, atol=1e-8)
    assert np.ptp(beta * (optimum - REFERENCE) - REWARD, axis=-1).max() < 1e-7
    # A likelihood: what is left is the labels' own entropy.
    np.testing.assert_allclose(f(optimum), -both_orders(xlogy(BRADLEY_TERRY, BRADLEY_TERRY)).sum(), rtol=1e-10)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_dpo_pulls_at_no_prompt_of_the_closed_form_and_back_to_it_from_beside_it(beta):
    f = population(make_loss("dpo", beta=beta), both_orders(BRADLEY_TERRY), REFERENCE)
    closed = REFERENCE + REWARD / beta
    assert np.abs(jax.grad(f)(closed)).max() < 1e-14
    beside = closed + np.random.default_rng(1).normal(size=(X, K)) / beta
    assert (np.sum(jax.grad(f)(beside) * (beside - closed), axis=-1) > 1e-3).all()


RANKINGS = tabular.rankings(PROBLEM)


def test_rankings_are_drawn_as_often_as_their_pairs_are():
    """Of every two responses the first comes before the second as often as Bradley and Terry say."""
    np.testing.assert_allclose(RANKINGS.weights.sum(), 1.0, rtol=1e-12)
    place = np.argsort(RANKINGS.responses, axis=1)
    before = place[:, :, None] < place[:, None, :]
    for x, often in enumerate(PROBLEM.prompts):
        chance = np.tensordot(RANKINGS.weights * (RANKINGS.prompt == x), before, 1) / often
        np.testing.assert_allclose(chance, BRADLEY_TERRY[x] * (1 - np.eye(K)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_plackett_luce_finds_the_optimum_of_reward_under_a_kl_penalty(beta):
    """arXiv 2305.18290 appendix A.3: rankings lead to the same pi_ref exp(r / beta) / Z as pairs."""
    f = tabular.population_of_groups(make_loss("plackett_luce", beta=beta), RANKINGS, PROBLEM.tokens, REFERENCE)
    closed = REFERENCE + REWARD / beta
    assert np.abs(jax.grad(f)(closed)).max() < 1e-14
    optimum = minimum(f)
    np.testing.assert_allclose(np.exp(optimum), softmax(closed, axis=-1), rtol=0, atol=1e-8)
    # A likelihood: what is left is the rankings' own entropy.
    chance = RANKINGS.weights / PROBLEM.prompts[RANKINGS.prompt]
    np.testing.assert_allclose(f(optimum), -np.sum(RANKINGS.weights * np.log(chance)), rtol=1e-10)


def test_gradient_descent_on_rankings_ends_at_the_optimum():
    f = tabular.population_of_groups(make_loss("plackett_luce", beta=1.0), RANKINGS, PROBLEM.tokens, REFERENCE)
    path, wanted = descend(f, 300, 3.0), softmax(REFERENCE + REWARD, axis=-1)
    assert np.abs(np.exp(path[0]) - wanted).max() > 0.1
    np.testing.assert_allclose(np.exp(path[-1]), wanted, rtol=0, atol=1e-4)
    assert (expected_reward(path) <= frontier(divergence(path)) + 1e-9).all()


@pytest.mark.parametrize(("beta", "alpha"), [(1.0, 1.0), (0.5, 2.0)])
def test_info_nca_finds_the_optimum_from_the_rewards_themselves(beta, alpha):
    """arXiv 2402.05369: pi_ref exp(r / (alpha beta)) / Z, with no preferences between."""
    every = np.tile(np.arange(K), (X, 1))
    groups = tabular.Groups(np.arange(X), every, REWARD, PROBLEM.prompts)
    loss = make_loss("info_nca", beta=beta, alpha=alpha)
    optimum = minimum(tabular.population_of_groups(loss, groups, PROBLEM.tokens, REFERENCE))
    np.testing.assert_allclose(
        np.exp(optimum), softmax(REFERENCE + REWARD / (alpha * beta), axis=-1), rtol=0, atol=1e-8
    )


LEARNERS = {
    "dpo beta=0.05": ("dpo", {"beta": 0.05}, 4e3),
    "dpo beta=0.5": ("dpo", {"beta": 0.5}, 40.0),
    "dpo smoothed": ("dpo", {"beta": 0.1, "label_smoothing": 0.2}, 1e3),
    "ipo tau=0.05": ("ipo", {"tau": 0.05}, 0.5),
    "ipo tau=0.3": ("ipo", {"tau": 0.3}, 0.5),
    "hinge beta=0.05": ("hinge", {"beta": 0.05}, 50.0),
    "hinge beta=0.5": ("hinge", {"beta": 0.5}, 1.0),
    "orpo lam=0.1": ("orpo", {"lam": 0.1}, 0.5),
    "orpo lam=5": ("orpo", {"lam": 5.0}, 0.1),
}


@pytest.mark.parametrize("learner", LEARNERS)
def test_no_policy_on_the_way_lies_above_the_frontier(learner):
    name, hyper, rate = LEARNERS[learner]
    f = population(make_loss(name, **hyper), both_orders(BRADLEY_TERRY), None if name == "orpo" else REFERENCE)
    path = descend(f, 300, rate)
    reward, kl = expected_reward(path), divergence(path)
    assert kl[-1] > 0.05 and reward[-1] > reward[0] + 0.1, "learned nothing: this would pass whatever the loss"
    assert (reward <= frontier(kl) + 1e-9).all()


def test_dpo_ends_on_the_frontier_and_ipo_below_it():
    def excess(name, **hyper):
        optimum = minimum(population(make_loss(name, **hyper), both_orders(BRADLEY_TERRY), REFERENCE))
        reward, kl = expected_reward(optimum), divergence(optimum)
        assert reward > frontier(0.99 * kl) + 1e-4  # the bound is as tight as it is true
        return reward - frontier(kl)

    for beta in (0.3, 3.0):
        np.testing.assert_allclose(excess("dpo", beta=beta), 0.0, atol=1e-9)
    # IPO follows the chance to be preferred, which is no affine function of the reward.
    assert excess("ipo", tau=0.2) < -1e-4


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_certain_labels_push_dpos_margin_beyond_every_bound(beta):
    """Whatever beta is, as arXiv 2310.12036 warns; beta h grows by log 10 from n steps to 10 n."""
    n = 1000
    path = descend(population(make_loss("dpo", beta=beta), CERTAIN, REFERENCE), 10 * n, X / (2 * beta**2))
    h = margin(path)
    assert (np.diff(h, axis=0) > 0).all()
    np.testing.assert_allclose(h[10 * n] - h[n], np.log(10) / beta, rtol=0.01)
    # At this rate d(beta h) / dt = sigmoid(-beta h), so exp(beta h) + beta h - 1 is the number of steps, nearly.
    np.testing.assert_allclose(np.exp(beta * h[10 * n]) / (10 * n), 1.0, rtol=0.01)


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_certain_labels_bring_ipos_margin_to_its_target(tau):
    h = margin(descend(population(make_loss("ipo", tau=tau), CERTAIN, REFERENCE), 1000, X / 8))
    np.testing.assert_allclose(h[[100, 1000]], 1 / (2 * tau), rtol=0, atol=1e-8)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_certain_labels_leave_the_hinge_at_its_corner(beta):
    step = 0.03 / beta
    h = margin(descend(population(make_loss("hinge", beta=beta), CERTAIN, REFERENCE), 200, X * step / (2 * beta)))
    np.testing.assert_allclose(h[10], 10 * step, rtol=1e-9)
    assert (h[-1] >= 1 / beta).all() and (h[-1] < 1 / beta + step).all()


@pytest.mark.parametrize(("beta", "e"), [(0.1, 0.3), (1.0, 0.01)])
def test_smoothed_certain_labels_have_a_finite_optimum(beta, e):
    optimum = minimum(population(make_loss("dpo", beta=beta, label_smoothing=e), CERTAIN, REFERENCE))
    np.testing.assert_allclose(beta * margin(optimum), np.log((1 - e) / e), rtol=0, atol=1e-8)


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_ipos_optimum_is_tilted_by_the_chance_to_beat_the_data(tau):
    """The closed form of arXiv 2310.12036, Psi the identity, for preferences that follow no reward at all.

    The pairwise target (p(y, y') - 1/2) / tau is no difference of two numbers then; the least-squares fit to it is.
    """
    scores = np.random.default_rng(2).normal(size=(X, K, K))
    preference = expit(2 * (scores - scores.transpose(0, 2, 1)))
    beats = preference > 0.5
    assert np.einsum("xij,xjk,xki->", beats, beats, beats, dtype=int) > 0, "no cycle"
    optimum = minimum(population(make_loss("ipo", tau=tau), both_orders(preference), REFERENCE))
    wins = np.einsum("xij,xj->xi", preference, DRAWN)
    assert np.ptp(tau * (optimum - REFERENCE) - wins, axis=-1).max() < 1e-10
    np.testing.assert_allclose(np.exp(optimum), softmax(REFERENCE + wins / tau, axis=-1), rtol=0, atol=1e-8)


CHANCES = np.array([0.2, 0.6, 0.95])  # that response 0 is preferred to response 1, for three prompts of two responses


def two_responses(chance) -> np.ndarray:
    weights = np.zeros((len(chance), 2, 2))
    weights[:, 0, 1], weights[:, 1, 0] = chance, 1 - np.asarray(chance)
    return weights


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_ipo_is_least_squares_and_leaves_the_labels_variance(tau):
    reference = REFERENCE[:, :2]
    f = population(make_loss("ipo", tau=tau), two_responses(CHANCES), reference)
    optimum = minimum(f, (3, 2))
    np.testing.assert_allclose(margin(optimum, reference), (CHANCES - 0.5) / tau, rtol=1e-10)
    np.testing.assert_allclose(f(optimum), np.sum(CHANCES * (1 - CHANCES)) / tau**2, rtol=1e-10)


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("chance", CHANCES)
def test_hinge_knows_which_response_wins_but_not_how_often(beta, chance):
    h = np.linspace(-2, 2, 81) / beta
    f = population(make_loss("hinge", beta=beta), two_responses([chance]), np.zeros((1, 2)))
    risk = jax.vmap(f)(np.stack([h, np.zeros_like(h)], axis=-1)[:, None, :])
    np.testing.assert_allclose(h[np.argmin(risk)], np.sign(chance - 0.5) / beta)
    np.testing.assert_allclose(np.min(risk), 2 * min(chance, 1 - chance), rtol=1e-10)


@pytest.mark.parametrize("lam", [0.1, 5.0])
def test_orpos_optimum_over_two_responses(lam):
    """With z = logit P_0 the two log odds are z and -z, so the slope of the expected loss is 0 where
    p = (sigmoid(z) + 2 lambda sigmoid(2 z)) / (1 + 2 lambda)."""
    z = np.array([-3.0, 0.5, 2.0])
    chance = (expit(z) + 2 * lam * expit(2 * z)) / (1 + 2 * lam)
    optimum = minimum(population(make_loss("orpo", lam=lam), two_responses(chance)), (3, 2))
    np.testing.assert_allclose(logit(np.exp(optimum[:, 0])), z, rtol=1e-8)


def test_orpo_without_its_odds_ratio_imitates_the_chosen_responses():
    weights = both_orders(BRADLEY_TERRY)
    optimum = minimum(population(make_loss("orpo", lam=0.0), weights))
    chosen = weights.sum(axis=2)
    np.testing.assert_allclose(np.exp(optimum), chosen / chosen.sum(axis=1, keepdims=True), rtol=0, atol=1e-8)


@jax.jit
def odds_ratio_loss(pairs: PairLogps) -> jax.Array:
    """arXiv 2403.07691 Eq. 7, L_OR: what lambda multiplies."""
    return make_loss("orpo", lam=1.0)(pairs, None)[0] - make_loss("orpo", lam=0.0)(pairs, None)[0]


@pytest.mark.parametrize("seed", range(3))
def test_the_odds_ratio_gradient_has_the_opposite_of_the_published_sign(seed):
    """arXiv 2403.07691 Eq. 8 to 10 print grad L_OR = delta h; it is -delta h, so a step along delta h lowers L_OR."""
    theta, w, l = 2 * np.random.default_rng(seed).normal(size=K), 1, 3
    tokens_w, tokens_l = 2.0, 3.0  # P is a geometric mean over the tokens

    @jax.jit
    def f(theta):
        logps = jax.nn.log_softmax(theta)
        tokens = {"chosen_tokens": np.array([tokens_w]), "rejected_tokens": np.array([tokens_l])}
        return odds_ratio_loss(PairLogps(chosen=logps[None, w], rejected=logps[None, l], **tokens)).sum()

    pi = softmax(theta)
    p_w, p_l = pi[w] ** (1 / tokens_w), pi[l] ** (1 / tokens_l)
    g_w, g_l = (np.eye(K)[w] - pi) / tokens_w, (np.eye(K)[l] - pi) / tokens_l  # of log P_w and log P_l
    delta = 1 / (1 + p_w / (1 - p_w) / (p_l / (1 - p_l)))
    published = delta * (g_w / (1 - p_w) - g_l / (1 - p_l))
    np.testing.assert_allclose(jax.grad(f)(theta), -published, rtol=1e-9, atol=1e-12)
    # Without differentiation: the slope along the published direction.
    eps = 1e-5
    slope = (f(theta + eps * published) - f(theta - eps * published)) / (2 * eps)
    np.testing.assert_allclose(slope, -np.sum(published**2), rtol=1e-6)
    assert slope < 0


def test_an_improbable_response_is_not_amplified():
    """The factor 1 / (1 - P) tends to 1, where the odds ratio is the ratio: DPO without a reference, beta = 1."""
    p = 10.0 ** -np.arange(1, 13)
    ones, zeros = np.ones_like(p), np.zeros_like(p)

    def pairs(chosen, rejected):
        return PairLogps(chosen=chosen, rejected=rejected, chosen_tokens=ones, rejected_tokens=ones)

    def slopes(loss):
        return jax.grad(lambda w, l: loss(pairs(w, l)).sum(), (0, 1))(np.log(p), np.log(p / 3))

    delta = 1 / (1 + (p / (1 - p)) / (p / 3 / (1 - p / 3)))
    factor_w, factor_l = slopes(odds_ratio_loss) / np.array([-delta, delta])
    np.testing.assert_allclose(factor_w, 1 / (1 - p), rtol=1e-9)
    np.testing.assert_allclose(factor_l, 1 / (1 - p / 3), rtol=1e-9)
    np.testing.assert_allclose([factor_w[-1], factor_l[-1]], 1.0, rtol=1e-9)

    @jax.jit
    def dpo(policy):
        return make_loss("dpo", beta=1.0)(policy, pairs(zeros, zeros))[0]

    policy = pairs(np.log(p), np.log(p / 3))
    assert (np.abs(odds_ratio_loss(policy) - dpo(policy)) < p).all()
    for side, plain in zip(slopes(odds_ratio_loss), slopes(dpo), strict=True):
        assert (np.abs(side - plain) < p).all()


def test_log_odds_ratios_of_uniform_probabilities_spread_wider_than_log_ratios():
    """arXiv 2403.07691 appendix B, Fig. 6, in closed form: log P is exponential there and log odds logistic."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    u, weights = (nodes + 1) / 2, weights / 2
    p, weights = u**2 * (3 - 2 * u), weights * 6 * u * (1 - u)  # nodes crowd where the logarithms have their poles

    def spread(value):
        """Standard deviation of value(P_1) - value(P_2), whose mean is 0, over the square."""
        return np.sqrt(np.einsum("i,j,ij->", weights, weights, np.square(value[:, None] - value[None, :])))

    np.testing.assert_allclose(spread(np.log(p)), np.sqrt(2), rtol=1e-5)
    np.testing.assert_allclose(spread(np.asarray(log_odds(jnp.log(p)))), np.sqrt(2 * np.pi**2 / 3), rtol=1e-5)
