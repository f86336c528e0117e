import jax
import jax.numpy as jnp
import numpy as np

from prefalign_jax.data.trees import Layout
from prefalign_jax.losses import make_loss
from prefalign_jax.losses.orpo import log_odds, orpo
from prefalign_jax.types import Pair, PairLogps
from small import MODEL, first, hidden_of, logps_of, make_pairs, make_params, packed


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
