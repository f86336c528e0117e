"""What every loss promises, asked of each entry of LOSSES."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from prefalign_jax.losses import LOSSES, make_loss
from prefalign_jax.names import hyper_parameters
from prefalign_jax.types import PairLogps, UserError

# Every loss with its defaults, and every option that changes what is computed.
CASES = {
    "dpo": {},
    "dpo label_smoothing": {"label_smoothing": 0.1, "beta": 0.5},
    "dpo reference_free": {"reference_free": True},
    "ipo": {"tau": 0.3},
    "ipo per_token": {"per_token": True},
    "hinge": {},
    "orpo": {"lam": 0.5},
    "orpo as TRL": {"nll_over": "prompt+chosen", "nll_mean": "batch"},
    "sft": {},
    "sft prompt": {"over": "prompt+chosen", "mean": "pair"},
}
BOUND = {case: make_loss(case.split()[0], **hyper) for case, hyper in CASES.items()}
all_losses = pytest.mark.parametrize("case", CASES)


def draw(pairs: int, seed: int = 0, dtype=np.float64) -> tuple[PairLogps, PairLogps]:
    rng = np.random.default_rng(seed)

    def one() -> PairLogps:
        tokens = rng.integers(1, 9, (3, pairs)).astype(dtype)
        chosen, rejected, prompt = -rng.gamma(2.0, 2.0, (3, pairs)).astype(dtype)
        means = np.array([tokens[2].mean(), tokens[0].mean()])
        return PairLogps(chosen, rejected, tokens[0], tokens[1], prompt, tokens[2], means)

    policy = one()
    return policy, one()._replace(chosen_tokens=policy.chosen_tokens, rejected_tokens=policy.rejected_tokens)


def call(loss, policy, reference):
    return loss(policy, reference if "reference" in loss.needs else None)


@all_losses
def test_gradients_are_those_of_the_function(case):
    loss = BOUND[case]
    with jax.enable_x64(True):
        policy, reference = draw(5)
        free = (policy.chosen, policy.rejected, policy.prompt)

        def f(chosen, rejected, prompt):
            moved = policy._replace(chosen=chosen, rejected=rejected, prompt=prompt)
            return call(loss, moved, reference)[0]

        # Only hinge has a corner; its second derivative is 0 on both sides.
        check_grads(f, tuple(map(jnp.asarray, free)), order=2, modes=("fwd", "rev"), atol=1e-6, rtol=1e-6)


# IPO and smoothed labels pull the margin to a finite target, beyond which their signs turn: see test_dpo.py.
@pytest.mark.parametrize("case", [case for case in CASES if "ipo" not in case and "smoothing" not in case])
def test_raising_the_chosen_never_raises_the_loss_and_lowering_the_rejected_neither(case):
    loss = BOUND[case]
    policy, reference = draw(64, dtype=np.float32)

    def total(chosen, rejected):
        return call(loss, policy._replace(chosen=chosen, rejected=rejected), reference)[0].sum()

    chosen, rejected = jax.grad(total, (0, 1))(policy.chosen, policy.rejected)
    assert (chosen <= 0).all() and (rejected >= 0).all()
    assert (chosen < 0).any()
    assert (rejected > 0).any() == ("rejected" in loss.needs)


@pytest.mark.parametrize("case", [case for case in CASES if "reference" in BOUND[case].needs])
def test_no_gradient_reaches_the_reference(case):
    policy, reference = draw(8, dtype=np.float32)
    grads = jax.grad(lambda r: BOUND[case](policy, r)[0].sum(), allow_int=True)(reference)
    for name in ("chosen", "rejected"):
        np.testing.assert_array_equal(getattr(grads, name), 0.0)
    moved = BOUND[case](policy, reference._replace(chosen=reference.chosen - 1))[0]
    assert (moved != BOUND[case](policy, reference)[0]).any()  # and yet it is read


@all_losses
def test_finite_value_and_gradient_for_every_finite_log_probability(case):
    loss = BOUND[case]
    grid = np.array([0, -1e-30, -1e-12, -1e-8, -1e-7, -1e-4, -1e-2, -1, -10, -100, -1e3, -1e4], np.float32)
    chosen, rejected, ref_chosen, ref_rejected = (x.ravel() for x in np.meshgrid(grid, grid, grid[::3], grid[::3]))
    for length in (1.0, 3.0, 1000.0):
        tokens = np.full(chosen.shape, length, np.float32)
        means = np.array([length, length], np.float32)
        policy = PairLogps(chosen, rejected, tokens, tokens, chosen, tokens, means)
        reference = PairLogps(ref_chosen, ref_rejected, tokens, tokens)

        def f(chosen, rejected, policy=policy, reference=reference):
            losses, metrics = call(loss, policy._replace(chosen=chosen, rejected=rejected), reference)
            return losses.sum(), (losses, metrics)

        grads, (losses, metrics) = jax.grad(f, (0, 1), has_aux=True)(chosen, rejected)
        for name, value in {"loss": losses, "grad": np.stack(grads), **metrics}.items():
            assert np.isfinite(value).all(), name


@all_losses
def test_jit_vmap_permutation_and_shapes(case):
    loss = BOUND[case]
    policy, reference = draw(12, dtype=np.float32)
    losses, metrics = call(loss, policy, reference)
    assert losses.shape == (12,) and losses.dtype == np.float32
    assert all(value.shape == (12,) for value in metrics.values())
    jitted = jax.jit(lambda p, r: call(loss, p, r)[0])(policy, reference)
    np.testing.assert_allclose(jitted, losses, rtol=1e-6)

    axes = PairLogps(0, 0, 0, 0, 0, 0, None)
    single = jax.vmap(lambda p, r: call(loss, p, r)[0], in_axes=(axes, axes))(policy, reference)
    np.testing.assert_allclose(single, losses, rtol=1e-6)

    order = np.random.default_rng(1).permutation(12)
    shuffled = [PairLogps(*(x[order] for x in side[:6]), side.mean_tokens) for side in (policy, reference)]
    np.testing.assert_allclose(call(loss, *shuffled)[0], losses[order], rtol=1e-6)


@pytest.mark.parametrize("name", ["dpo", "ipo", "hinge", "orpo"])
def test_preference_losses_carry_the_metrics_that_people_plot(name):
    loss = make_loss(name)
    _, metrics = call(loss, *draw(3, dtype=np.float32))
    kinds = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"}
    assert kinds <= metrics.keys()
    if name == "orpo":
        assert {"nll_loss", "log_odds_ratio", "log_odds_chosen"} <= metrics.keys()


@pytest.mark.parametrize(
    ("name", "hyper", "says"),
    [
        ("dpoo", {}, "did you mean 'dpo'"),
        ("orpo", {"beta": 0.1}, "it has lam, nll_over, nll_mean"),
        ("dpo", {"tau": 0.1}, "no hyper-parameter 'tau'"),
        ("dpo", {"beta": -1.0}, "beta=-1.0 is out of range"),
        ("dpo", {"label_smoothing": 0.5}, r"\[0, 0.5\)"),
        ("sft", {"over": "all"}, "chosen, prompt"),
    ],
)
def test_mistakes_are_named(name, hyper, says):
    with pytest.raises(UserError, match=says) as error:
        make_loss(name, **hyper)
    assert "\n" not in str(error.value)


def test_needs_say_what_is_read():
    assert make_loss("dpo").needs == {"rejected", "reference"}
    assert make_loss("dpo", reference_free=True).needs == {"rejected"}
    assert make_loss("sft").needs == set()
    assert make_loss("orpo", nll_over="prompt+chosen").needs == {"rejected", "prompt"}


def test_every_hyper_parameter_has_a_case_and_a_check():
    tried = {key for hyper in CASES.values() for key in hyper}
    assert {key for entry in LOSSES.values() for key in hyper_parameters(entry.function)} <= tried
