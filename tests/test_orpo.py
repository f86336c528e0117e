import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefalign_jax.data.trees import Layout
from prefalign_jax.losses import make_loss
from prefalign_jax.losses.orpo import asft, log_odds, orpo, orpo_beta
from prefalign_jax.losses.sft import sft
from prefalign_jax.types import Pair, PairLogps
from small import MODEL, first, hidden_of, logps_of, make_pairs, make_params, packed
from test_losses import draw


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


@pytest.mark.parametrize("lam", [0.1, 1.0])
def test_a_beta_of_1_is_orpo_to_the_bit(lam):
    policy, _ = draw(64, dtype=np.float32)

    def both(loss, **hyper):
        f = lambda w, l: loss(policy._replace(chosen=w, rejected=l), lam=lam, **hyper)  # noqa: E731
        slopes = jax.grad(lambda w, l: f(w, l)[0].sum(), (0, 1))(policy.chosen, policy.rejected)
        return *f(policy.chosen, policy.rejected), slopes

    (loss, metrics, slopes), (other, others, other_slopes) = both(orpo), both(orpo_beta, beta=1.0)
    np.testing.assert_array_equal(loss, other)
    np.testing.assert_array_equal(slopes, other_slopes)
    for name in ("logps/chosen", "logps/rejected", "nll_loss", "log_odds_ratio", "log_odds_chosen"):
        np.testing.assert_array_equal(metrics[name], others[name])


@pytest.mark.parametrize("loss", [orpo_beta, asft])
def test_one_stage_is_two_added(loss):
    policy, _ = draw(16, dtype=np.float32)
    after = loss(policy, sft_weight=0.0, lam=0.4)[0]
    np.testing.assert_allclose(loss(policy, lam=0.4)[0], after + sft(policy, mean="pair")[0], rtol=1e-6)


def test_asft_with_a_beta_of_1_is_the_cross_entropy_of_which_response_is_which():
    """arXiv 2502.01237, section 3.1.1: -log P_w - log(1 - P_l); and it bounds ORPO's from above."""
    p_w, p_l = jnp.float32([0.3, 0.9, 0.02]), jnp.float32([0.2, 0.95, 0.5])
    loss = asft(means(jnp.log(p_w), jnp.log(p_l)), sft_weight=0.0)[0]
    np.testing.assert_allclose(loss, -np.log(p_w) - np.log1p(-p_l), rtol=1e-5)
    assert (loss >= orpo_beta(means(jnp.log(p_w), jnp.log(p_l)), beta=1.0, sft_weight=0.0)[0]).all()


def test_asft_moves_each_response_whatever_the_other_does():
    slope = jax.grad(lambda w, l: asft(means(w, l), beta=0.3)[0].sum(), (0, 1))
    chosen, rejected = slope(jnp.float32([-1.0, -1.0]), jnp.float32([-0.2, -5.0]))
    assert chosen[0] == chosen[1] < 0 < rejected[1] < rejected[0]


def test_three_options_together_are_the_authors_code():
    """Their mask takes in the first pad, which is the end token; their NLL takes no end token at all, in one mean."""
    params, eos, lam = make_params(), 7, 0.3
    pairs = [
        Pair(p.prompt, np.append(p.chosen, eos).astype(np.int32), np.append(p.rejected, eos).astype(np.int32))
        for p in make_pairs(4, longest=8)
    ]
    width = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs) + 1  # no row is full

    def rows(side):
        texts = [np.concatenate([p.prompt, getattr(p, side)]) for p in pairs]
        inputs = np.stack([np.pad(text, (0, width - len(text)), constant_values=eos) for text in texts])
        attention = np.arange(width) < np.array([[len(text)] for text in texts])
        zeros = np.zeros_like(inputs)
        hidden = hidden_of(MODEL, params, inputs, zeros + np.arange(width), zeros + 1, zeros)
        logps = jax.nn.log_softmax(np.asarray(hidden) @ np.asarray(MODEL.head(params)).T)[:, :-1]
        return inputs, attention, np.take_along_axis(np.asarray(logps), inputs[:, 1:, None], 2)[..., 0]

    prompts = np.arange(width) < np.array([[len(p.prompt)] for p in pairs])

    def mean_logp(side):
        _, attention, logps = rows(side)
        mask = attention[:, :-1].astype(int) - prompts[:, 1:]
        return (logps * mask).sum(1) / mask.sum(1)

    chosen, rejected = mean_logp("chosen"), mean_logp("rejected")
    log_odds_ratio = (chosen - rejected) - (np.log1p(-np.exp(chosen)) - np.log1p(-np.exp(rejected)))
    inputs, _, logps = rows("chosen")
    wanted = inputs[:, 1:] != eos
    nll = -(logps * wanted).sum() / wanted.sum()
    theirs = np.mean(nll - lam * np.log(1 / (1 + np.exp(-log_odds_ratio))))

    loss = make_loss("orpo", lam=lam, nll_over="text", nll_mean="batch", extra_eos=True)
    batch = first(packed(pairs, layout=Layout(prompt=True, after=True)))
    np.testing.assert_allclose(loss(logps_of(MODEL, params, batch, needs=loss.needs))[0].mean(), theirs, rtol=1e-5)
