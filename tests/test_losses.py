"""What every loss promises, asked of each entry of LOSSES."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from conftest import longer
from prefalign_jax.losses import LOSSES, MIXTURES, NEEDS, Loss, hyper_of, make_loss
from prefalign_jax.losses.ratios import log_ratios
from prefalign_jax.types import PairLogps, Responses, Sides, UserError

# Every loss with its defaults, and every option that changes what is computed.
CASES = {
    "dpo": {},
    "dpo label_smoothing": {"label_smoothing": 0.1, "beta": 0.5},
    "dpo reference_free": {"reference_free": True},
    "dpo ld_alpha": {"ld_alpha": 0.3},
    "dpo sampled": {"sampled": True},
    "dpo forward_kl": {"divergence": "forward_kl"},
    "robust_dpo": {"label_smoothing": 0.2},
    "dr_dpo": {"beta_prime": 0.5},
    "ln_dpo": {},
    "r_dpo": {"alpha": 0.1},
    "ld_dpo": {},
    "sampo": {},
    "odpo": {"alpha": 0.5},
    "reward_aware_rpo": {"eta": 0.7},
    "reward_aware_rpo forward": {"distance": "forward_kl"},
    "reward_aware_rpo squared": {"distance": "squared"},
    "rebel": {"beta": 0.5},
    "dpop": {"lam": 5.0},
    "rpo": {"alpha": 0.5},
    "cal_dpo": {"beta": 0.1},
    "beta_dpo": {},
    "alpha_dpo": {"gamma": 0.5, "alpha": 0.3, "momentum": 0.8},
    "beta_dpo all": {"keep": 1.0, "alpha": 0.3, "momentum": 0.5},
    "tdpo1": {},
    "tdpo2": {},
    "f_dpo": {},
    "f_dpo forward_kl": {"divergence": "forward_kl"},
    "f_dpo chi_squared": {"divergence": "chi_squared"},
    "f_dpo alpha": {"divergence": "alpha", "divergence_alpha": 0.3},
    "f_dpo alpha_trl": {"divergence": "alpha_trl", "divergence_alpha": 1.5},
    "chi_po": {"reward_max": 0.5},
    "dpo_shift": {"lam": 0.6},
    "wpo": {},
    "wpo unclipped": {"clip": False},
    "ipo": {"tau": 0.3},
    "ipo per_token": {"per_token": True},
    "ipo forward_kl": {"divergence": "forward_kl"},
    "ipo weighting": {"weighting": "wpo"},
    "hinge": {},
    "exo": {},
    "discopop": {"temperature": 0.5},
    "focal_po": {"gamma": 0.5},
    "gpo": {},
    **{
        f"gpo {name}": {"surrogate": name} for name in ("logistic", "hinge", "squared", "truncated_quadratic", "savage")
    },
    "nca": {},
    "bco": {},
    "bco without shift": {"shift": "none"},
    "sppo": {"beta": 0.1},
    "apo_zero": {},
    "apo_down": {},
    "kto_pair": {},
    "aot": {},
    "aot label_smoothing": {"label_smoothing": 0.1},
    "aot_unpaired": {},
    "orpo": {"lam": 0.5},
    "orpo as TRL": {"nll_over": "prompt+chosen", "nll_mean": "batch"},
    "orpo as its authors": {"nll_over": "text", "nll_mean": "batch", "extra_eos": True},
    "orpo probability": {"ratio": "probability"},
    "orpo_beta": {},
    "orpo_beta after sft": {"sft_weight": 0.0, "lam": 0.3},
    "asft": {"beta": 0.3},
    "asft after sft": {"sft_weight": 0.0},
    "simpo": {"gamma": 0.5},
    "repo": {"gamma": 0.3},
    "simper": {},
    "alphapo": {"reward_alpha": 0.5},
    "cpo": {},
    "cpo hinge": {"surrogate": "hinge", "reward_alpha": 0.25},
    "cpo ipo": {"surrogate": "ipo", "alpha": 0.0},
    "slic": {"delta": 2.0},
    "rrhf": {},
    "unlikelihood": {},
    "sft": {},
    "sft prompt": {"over": "prompt+chosen", "mean": "pair"},
    "kto": {"desirable_weight": 1.5, "undesirable_weight": 0.5},
    "apo_zero_unpaired": {},
    "bco_unpaired": {},
    "bradley_terry": {},
    "bradley_terry margin": {"margin": 0.5, "centre": 0.1},
    "plackett_luce": {},
    "lipo": {"beta": 0.5},
    "lipo score": {"gain": "score"},
    "lipo unweighted": {"gain": "none", "discount": "none"},
    "info_nca": {"alpha": 0.5},
    "nca_group": {"alpha": 2.0},
    "sppo_group": {"beta": 0.1},
    "sppo_group ranks": {"beta": 0.1, "win_rate": "ranks", "own": False},
    "rrhf_group": {"lam": 0.5},
    "tpo": {"beta": 0.1},
    "tpo as TRL": {"beta": 0.1, "nll_mean": "batch"},
    "tpo_l": {"gamma": 0.5},
    "reward_ranking": {"centre": 0.1},
    "reward_ranking comparisons": {"likelihood": "comparisons"},
    "mpo": {"beta": 0.2},
}
BOUND = {case: make_loss(case.split()[0], **hyper) for case, hyper in CASES.items()}
all_losses = pytest.mark.parametrize("case", [longer(case) if " " in case else case for case in CASES])
PAIRED = [case for case in CASES if "group" not in BOUND[case].needs]  # what groups do is in test_group_losses.py

LENGTHS = ("chosen_tokens", "rejected_tokens", "prompt_tokens", "text_tokens")


def draw(pairs: int, seed: int = 0, dtype=np.float64, filler: int = 0) -> tuple[PairLogps, PairLogps]:
    """Everything that a loss may need, of pairs and then of filler; the policy likes both sides less than the other.

    Tests draw 12 rows in float32 and 6 in float64: each operation compiles anew for each size.
    """
    rng = np.random.default_rng(seed)
    size = pairs + filler
    tokens = rng.integers(1, 9, (3, size)).astype(dtype)

    def sides(values) -> Sides:
        return Sides(*np.asarray(values, dtype))

    def one(scale: float) -> PairLogps:
        chosen, rejected, prompt = -rng.gamma(2.0, scale, (3, size)).astype(dtype)
        others = -np.random.default_rng(seed + 1).gamma(2.0, scale, (2, size)).astype(dtype)
        return PairLogps(
            chosen=chosen,
            rejected=rejected,
            chosen_tokens=tokens[0],
            rejected_tokens=tokens[1],
            prompt=prompt,
            prompt_tokens=tokens[2],
            mean_tokens=np.array([tokens[2, :pairs].mean(), tokens[0, :pairs].mean()], dtype),
            weight=np.repeat([1.0, 0.0], [pairs, filler]).astype(dtype),
            margin=rng.uniform(0.1, 3, size).astype(dtype),
            label=rng.integers(0, 2, size).astype(dtype),
            shared=sides([chosen, rejected] * rng.uniform(0.3, 1, (2, size))),
            sampled=sides([chosen, rejected] * rng.uniform(0.3, 1, (2, size))),
            token_kl=sides(rng.gamma(1.0, 1.0, (2, size))),
            sum_squares=sides([chosen, rejected] * rng.uniform(0.5, 1.5, (2, size))),
            after=sides(-rng.gamma(1.0, 1.0, (2, size))),
            text=(prompt + chosen * 0.8).astype(dtype),
            text_tokens=tokens[2] + tokens[0] - 1,
            responses=Responses(np.stack([chosen, rejected, *others], axis=1), **of_groups(size, tokens)),
        )

    return one(4.0), one(1.0)


def of_groups(size: int, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """What groups of 2 to 4 responses have besides log-probabilities; the best comes first, some are alike."""
    scores = np.resize([[1.5, 0.5, 0.25, 0.0], [1.0, 0.0, 0.0, -1.0], [2.0, -1.0, 0.0, 0.0]], (size, 4))
    present = np.resize([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], (size, 4))
    lengths = np.stack([tokens[0], tokens[1], tokens[2], tokens[0] + 1], axis=1)
    return {
        "tokens": lengths,
        "scores": (scores * present).astype(tokens.dtype),
        "present": present.astype(tokens.dtype),
    }


def call(loss, policy, reference, **changes):
    """The loss of these records, with what it carries from step to step in the middle of a run."""
    running = {name: jnp.asarray(0.2 + index) for index, name in enumerate(loss.running)}
    if "group" in changes:
        changes = {"responses": policy.responses._replace(logps=changes["group"])}
    policy = policy._replace(running=running, **changes)
    return loss(policy, reference if "reference" in loss.needs else None)


def live(loss, policy: PairLogps) -> dict:
    """The fields that gradients pass through, which are those of the model that the loss reads."""
    if "group" in loss.needs:
        return {"group": jnp.asarray(policy.responses.logps)}
    names = {"chosen", *({"rejected", "prompt", "shared", "sampled", "token_kl"} & loss.needs)}
    names |= {"after", "text"} if "after" in loss.needs else set()
    return {name: jax.tree.map(jnp.asarray, getattr(policy, name)) for name in names}


@pytest.mark.parametrize(
    "case",
    [longer(case) if " " in case else case for case in CASES if "beta_dpo" not in case],  # see test_dpo.py
)
def test_gradients_are_those_of_the_function(case):
    loss = BOUND[case]
    with jax.enable_x64(True):
        policy, reference = draw(6)
        free = live(loss, policy)
        if case == "kto":
            del free["rejected"]  # the mismatched completion only estimates a constant

        def f(free):
            if "sum_squares" in loss.needs:  # they move along, so that the weight, which is a constant, stays
                moved = (getattr(policy.sum_squares, s) + free[s] - getattr(policy, s) for s in Sides._fields)
                free = {**free, "sum_squares": Sides(*moved)}
            held = reference
            if case == "alpha_dpo":  # so that the gap to the reference, which is a constant, stays
                moved = {s: getattr(reference, s) + free[s] - getattr(policy, s) for s in Sides._fields}
                held = reference._replace(**moved)
            if case == "tdpo2":
                free["token_kl"] = free["token_kl"]._replace(chosen=policy.token_kl.chosen)
            return call(loss, policy, held, **free)[0]

        # The corners have measure zero. The mean log-ratios of kto_pair are negative here, so its points are 0.
        check_grads(f, (free,), order=1, modes=("fwd", "rev"), atol=1e-6, rtol=1e-6)


# Losses with a finite target turn beyond it, anchored ones push a side to where it is to stay, a label pushes either
# way: see their own tests.
TARGETS = (
    "apo_down",
    "bradley_terry margin",
    "ipo",
    "cpo ipo",
    "sppo",
    "cal_dpo",
    "gpo squared",
    "exo",
    "nca",
    "robust_dpo",
    "rebel",
    "reward_aware_rpo",
    "smoothing",
    "beta_dpo",
)


@pytest.mark.parametrize(
    "case", [c for c in PAIRED if "label" not in BOUND[c].needs and not any(word in c for word in TARGETS)]
)
def test_raising_the_chosen_never_raises_the_loss_and_lowering_the_rejected_neither(case):
    loss = BOUND[case]
    policy, reference = draw(12, dtype=np.float32)
    free = live(loss, policy)
    grads = jax.grad(lambda free: call(loss, policy, reference, **free)[0].sum())(free)

    def slope(side):
        parts = [grads[side]] if side in grads else []
        parts += [getattr(grads[name], side) for name in ("shared", "sampled") if name in grads]
        return np.sum(parts, axis=0)

    assert (slope("chosen") <= 1e-7).all() and (slope("chosen") < 0).any()
    if "rejected" in loss.needs:
        assert (slope("rejected") >= -1e-7).all() and (slope("rejected") > 0).any()


@pytest.mark.parametrize(
    "case", [longer(case) if " " in case else case for case in CASES if "reference" in BOUND[case].needs]
)
def test_no_gradient_reaches_the_reference(case):
    loss = BOUND[case]
    policy, reference = draw(12, dtype=np.float32)
    grads = jax.grad(lambda r: call(loss, policy, r)[0].sum())(reference)
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0.0), grads)
    lower = {name: getattr(reference, name) for name in ("chosen", "shared", "sampled", "responses")}
    moved = call(loss, policy, reference._replace(**jax.tree.map(lambda x: 2 * x, lower)))[0]
    assert (moved != call(loss, policy, reference)[0]).any()  # and yet it is read


@all_losses
def test_finite_value_and_gradient_for_every_finite_log_probability(case):
    loss = BOUND[case]
    grid = np.array([0, -1e-30, -1e-12, -1e-8, -1e-7, -1e-4, -1e-2, -1, -10, -100, -1e3, -1e4], np.float32)
    chosen, rejected, ref_chosen, ref_rejected = (x.ravel() for x in np.meshgrid(grid, grid, grid[::3], grid[::3]))
    size = chosen.size
    for length in (1.0, 3.0, 1000.0):
        tokens = np.full(size, length, np.float32)
        sides = Sides(chosen, rejected)
        policy = PairLogps(
            chosen=chosen,
            rejected=rejected,
            chosen_tokens=tokens,
            rejected_tokens=tokens,
            prompt=chosen,
            prompt_tokens=tokens,
            mean_tokens=np.array([length, length], np.float32),
            weight=np.ones(size, np.float32),
            margin=np.resize(np.float32([0, 1e-30, 1e-3, 1, 100]), size),
            label=np.resize(np.float32([0, 1, 1]), size),
            shared=Sides(chosen / 2, rejected),
            sampled=Sides(chosen, rejected / 2),
            token_kl=Sides(-rejected, -chosen),
            # A square sum is at most 1 and at least 1 / V at each token.
            sum_squares=Sides(np.maximum(chosen, -12 * tokens), np.maximum(rejected, -12 * tokens)),
            after=sides,
            text=chosen,
            text_tokens=tokens,
            responses=Responses(
                np.stack([chosen, rejected, (chosen + rejected) / 2, np.full(size, np.nan, np.float32)], axis=1),
                tokens=np.stack([tokens] * 4, axis=1),
                scores=np.resize(np.float32([[2, 1, 0, 9], [1, 1, 1, 1], [0, 90, -90, 0], [0, 0, 1, 0]]), (size, 4)),
                present=np.resize(np.float32([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0]]), (size, 4)),
            ),
        )
        reference = policy._replace(
            chosen=ref_chosen,
            rejected=ref_rejected,
            shared=Sides(ref_chosen / 2, ref_rejected),
            sampled=Sides(ref_chosen, ref_rejected / 2),
            responses=policy.responses._replace(
                logps=np.stack([ref_chosen, ref_rejected, ref_chosen, np.full(size, np.nan, np.float32)], axis=1)
            ),
        )

        def f(free, policy=policy, reference=reference):
            losses, metrics = call(loss, policy, reference, **free)
            return losses.sum(), (losses, metrics)

        grads, (losses, metrics) = jax.grad(f, has_aux=True)(live(loss, policy))
        assert np.isfinite(losses).all()
        jax.tree.map(lambda g: np.testing.assert_array_equal(np.isfinite(g), True), grads)
        for name, value in metrics.items():
            # The metric is of the other label, or of comparisons that a group has none of.
            silent = np.isnan(value) if {"label", "group"} & loss.needs else False
            assert (np.isfinite(value) | silent).all(), name


@all_losses
def test_jit_permutation_filler_and_shapes(case):
    loss = BOUND[case]
    policy, reference = draw(9, dtype=np.float32, filler=3)
    losses, metrics = call(loss, policy, reference)
    assert losses.shape == (12,) and losses.dtype == np.float32
    assert all(value.shape == (12,) for value in metrics.values())
    jitted = jax.jit(lambda p, r: call(loss, p, r)[0])(policy, reference)
    np.testing.assert_allclose(jitted, losses, rtol=1e-5)

    order = np.random.default_rng(1).permutation(12)
    shuffle = lambda record: jax.tree.map(lambda x: x[order] if len(x) == 12 else x, record)  # noqa: E731
    np.testing.assert_allclose(call(loss, shuffle(policy), shuffle(reference))[0], losses[order], rtol=1e-5)

    # What filler holds matters to no pair; neither does whether it is there.
    real = policy.weight > 0
    worse = lambda record: jax.tree.map(  # noqa: E731
        lambda x: np.where(real.reshape(-1, *[1] * (x.ndim - 1)), x, -77) if len(x) == 12 else x, record
    )
    filled = worse(policy)._replace(weight=policy.weight)
    np.testing.assert_array_equal(call(loss, filled, worse(reference))[0][:9], losses[:9])
    without = [jax.tree.map(lambda x: x[:9] if len(x) == 12 else x, record) for record in (policy, reference)]
    np.testing.assert_allclose(call(loss, *without)[0], losses[:9], rtol=1e-5)
    grads = jax.grad(lambda free: jnp.sum(call(loss, policy, reference, **free)[0] * policy.weight))(live(loss, policy))
    jax.tree.map(lambda g: np.testing.assert_array_equal(g[9:], 0.0), grads)


@all_losses
def test_vmap_over_batches_and_over_pairs(case):
    loss = BOUND[case]
    batches = [draw(12, seed, np.float32) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    together = jax.vmap(lambda p, r: call(loss, p, r)[0])(*stacked)
    np.testing.assert_allclose(together, [call(loss, *batch)[0] for batch in batches], rtol=1e-5)
    if "batch" not in loss.needs:
        policy, reference = batches[0]
        axes = jax.tree.map(lambda x: 0 if len(x) == 12 else None, policy)
        single = jax.vmap(lambda p, r: call(loss, p, r)[0], in_axes=(axes, axes))(policy, reference)
        np.testing.assert_allclose(single, call(loss, policy, reference)[0], rtol=1e-5)


NAMES = ("shared", "sampled", "token_kl", "sum_squares", "after")


def swapped(record: PairLogps) -> PairLogps:
    turned = {name: Sides(*getattr(record, name)[::-1]) for name in NAMES}
    return record._replace(
        chosen=record.rejected,
        rejected=record.chosen,
        chosen_tokens=record.rejected_tokens,
        rejected_tokens=record.chosen_tokens,
        **turned,
    )


# Of these the loss is a function of h alone, so that what pulls the chosen up pushes the rejected down.
MARGIN_ONLY = (
    "dpo",
    "dpo label_smoothing",
    "robust_dpo",
    "reward_aware_rpo",
    "reward_aware_rpo forward",
    "rebel",
    "hinge",
    "exo",
    "discopop",
    "focal_po",
    "gpo",
    "gpo savage",
    "ipo",
    "aot",
)


@pytest.mark.parametrize("case", MARGIN_ONLY)
def test_a_loss_of_the_margin_alone_pulls_both_sides_alike(case):
    with jax.enable_x64(True):
        policy, reference = draw(6)
        grads = jax.grad(lambda free: call(BOUND[case], policy, reference, **free)[0].sum())(live(BOUND[case], policy))
        np.testing.assert_allclose(grads["chosen"], -grads["rejected"], rtol=1e-9, atol=1e-12)
        both = policy._replace(chosen=policy.chosen - 3, rejected=policy.rejected - 3)
        np.testing.assert_allclose(
            call(BOUND[case], both, reference)[0], call(BOUND[case], policy, reference)[0], rtol=1e-9
        )


@pytest.mark.parametrize("case", (*MARGIN_ONLY[:-1], "bco without shift", "sppo", "apo_zero", "cal_dpo"))
def test_the_loss_is_the_same_where_both_log_ratios_change_places_and_sign(case):
    with jax.enable_x64(True):
        policy, reference = draw(6)
        turned = policy._replace(
            chosen=reference.chosen - (policy.rejected - reference.rejected),
            rejected=reference.rejected - (policy.chosen - reference.chosen),
        )
        np.testing.assert_allclose(
            call(BOUND[case], turned, reference)[0], call(BOUND[case], policy, reference)[0], rtol=1e-9
        )


@pytest.mark.parametrize("case", [c for c in PAIRED if "rejected" in BOUND[c].needs and "label" not in BOUND[c].needs])
def test_swapping_the_sides_turns_the_margin_and_the_accuracy(case):
    loss = BOUND[case]
    policy, reference = draw(12, dtype=np.float32)
    metrics, turned = call(loss, policy, reference)[1], call(loss, swapped(policy), swapped(reference))[1]
    np.testing.assert_allclose(metrics["rewards/margins"], -turned["rewards/margins"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(metrics["rewards/accuracies"] + turned["rewards/accuracies"], 1.0)
    np.testing.assert_array_equal(
        metrics["rewards/accuracies"], np.asarray(metrics["rewards/chosen"] > metrics["rewards/rejected"], np.float32)
    )


@pytest.mark.parametrize(
    ("name", "hyper", "says"),
    [
        ("dpoo", {}, "did you mean 'dpo'"),
        ("orpo", {"beta": 0.1}, "it has lam, nll_over, nll_mean"),
        ("dpo", {"tau": 0.1}, "no hyper-parameter 'tau'"),
        ("dpo", {"beta": -1.0}, "beta=-1.0 is out of range"),
        ("dpo", {"label_smoothing": 0.5}, r"\[0, 0.5\)"),
        ("dpo_shift", {"lam": 1.5}, r"\(0, 1\]"),
        ("simper", {"beta": 1.0}, "no hyper-parameter 'beta'; it has none"),
        ("reward_aware_rpo", {"distance": "kl"}, "one of backward_kl, forward_kl, squared"),
        ("exo", {"label_smoothing": 0.0}, r"\(0, 0.5\)"),
        ("sft", {"over": "all"}, "chosen, prompt"),
        ("sft", {"over": "text"}, "one of chosen, prompt"),
        ("sft", {"ld_alpha": 0.5}, "no hyper-parameter 'ld_alpha'"),
        ("nca", {"divergence": "js"}, "no hyper-parameter 'divergence'"),
        ("dpo", {"divergence_alpha": 0.3}, "applies to divergence=alpha or alpha_trl, and divergence is 'reverse_kl'"),
        ("cpo", {"surrogate": "hinge", "label_smoothing": 0.1}, "applies to surrogate=sigmoid"),
        ("dpo", {"reference_free": True, "divergence": "js"}, "compares with a reference, and it has none"),
        ("0.5*dpo+kto", {}, "different kinds of data"),
        ("plackett_luce+dpo", {}, "'dpo' compares two responses and 'plackett_luce' all of a group; add losses of"),
        ("plackett_luce+reward_ranking", {}, "different kinds of data"),
        ("info_nca", {"alpha": 0.0}, "alpha=0.0 is out of range"),
        ("lipo", {"gain": "linear"}, "one of exponential, score, none"),
        ("0.5*dpo+*", {}, r"cannot read '\*'"),
        ("0.5*dpo+sft", {"tau": 0.1}, "no term has a hyper-parameter 'tau'"),
        ("0.5*dpo+sfft", {}, "did you mean 'sft'"),
        ("0.5*dpo(beta=-1)+sft", {}, "beta=-1.0 is out of range"),
        ("0.5*dpo(beta=abc)+sft", {}, "dpo's beta='abc' is not of type float"),
        ("ipo(per_token=no)", {}, "per_token='no' is not of type bool"),
        ("dpo(beta=0.1, beta=0.2)", {}, "an option twice"),
        ("1e999*dpo", {}, "cannot read"),
        ("dpo(beta=0.5)", {"beta": 0.1}, "every term with a 'beta' sets its own"),
        ("dpo", {"beta": "abc"}, "beta='abc' is not of type float"),
        ("dpo", {"reference_free": 1}, "reference_free=1 is not of type bool"),
        ("dpo", {"beta": True}, "beta=True is not of type float"),
        ("unlikelihood", {"alpha": 3.0}, r"\[0, 1\]"),
        ("r_dpo", {"sampled": True}, "no hyper-parameter 'sampled'"),
    ],
)
def test_mistakes_are_named(name, hyper, says):
    with pytest.raises(UserError, match=says) as error:
        make_loss(name, **hyper)
    assert "\n" not in str(error.value)


def test_needs_say_what_is_read():
    assert make_loss("dpo").needs == {"rejected", "reference"}
    assert make_loss("dpo", reference_free=True).needs == {"rejected"}
    assert make_loss("dpo", ld_alpha=0.5).needs == {"rejected", "reference", "shared"}
    assert make_loss("ipo", weighting="wpo").needs == {"rejected", "reference", "sum_squares"}
    assert make_loss("sft").needs == set()
    assert make_loss("orpo", nll_over="prompt+chosen").needs == {"rejected", "prompt"}
    assert make_loss("mpo").needs == {"rejected", "reference", "batch"}


@all_losses
def test_a_loss_reads_nothing_but_what_it_declares(case):
    loss = BOUND[case]
    policy, reference = draw(12, dtype=np.float32)
    fields = {
        "prompt": ("prompt", "prompt_tokens"),
        "rejected": ("rejected", "rejected_tokens"),
        "after": ("after", "text", "text_tokens"),
        "batch": ("weight",),
        "group": ("responses",),
        **{name: (name,) for name in ("shared", "sampled", "token_kl", "sum_squares", "margin", "label")},
    }
    unread = {field: None for need in fields.keys() - loss.needs for field in fields[need]}
    if "rejected" in unread:
        unread = {**unread, "rejected": policy.rejected, "rejected_tokens": policy.rejected_tokens}
    np.testing.assert_array_equal(call(loss, policy, reference, **unread)[0], call(loss, policy, reference)[0])
    assert loss.needs <= NEEDS.keys()


def test_every_hyper_parameter_has_a_case_and_every_loss_too():
    assert {case.split()[0] for case in CASES} == LOSSES.keys() | MIXTURES.keys()
    tried = {key for hyper in CASES.values() for key in hyper}
    assert {key for name in LOSSES for key in hyper_of(name)} <= tried


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("dpo+exo", [1, 1]),
        ("dpo+1e-3*sft", [1, 1e-3]),
        ("1e+3*dpo + .5 * ipo(per_token=true)", [1e3, 0.5]),
        ("2*mpo + hinge", [1.6, 0.4, 2.0, 1]),
    ],
)
def test_sums_are_read_however_they_are_spaced(text, weights):
    policy, reference = draw(12, dtype=np.float32)
    loss = make_loss(text)
    names = dict.fromkeys(key.partition(".")[0] for key in loss.hyper)
    parts = [make_loss(name, per_token=True) if name == "ipo" else make_loss(name) for name in names]
    wanted = sum(w * call(part, policy, reference)[0] for w, part in zip(weights, parts, strict=True))
    policy = policy._replace(running={"bco.shift": jnp.asarray(0.2), "bco.steps": jnp.asarray(1.2)})
    np.testing.assert_allclose(loss(policy, reference)[0], wanted, rtol=1e-5)


def test_two_terms_of_one_loss_keep_their_own_options_metrics_and_state():
    policy, reference = draw(12, dtype=np.float32)
    loss = make_loss("dpo + dpo(beta=0.5) + bco + bco(beta=0.5)")
    assert (loss.hyper["dpo.1.beta"], loss.hyper["dpo.2.beta"]) == (0.1, 0.5)
    running = loss.advance(policy._replace(running=loss.running), reference)
    assert float(running["bco.2.shift"]) == pytest.approx(5 * float(running["bco.1.shift"]), rel=1e-5)
    metrics = loss(policy._replace(running=running), reference)[1]
    np.testing.assert_allclose(metrics["loss/dpo.2"], call(make_loss("dpo", beta=0.5), policy, reference)[0])


def own(function, **fields):
    """The result, on a few pairs, of a loss that a user adds to the table."""
    policy, reference = draw(12, dtype=np.float32)
    LOSSES["own"] = Loss(function, **fields) if callable(function) else function
    try:
        return call(make_loss("own"), policy, reference)
    finally:
        del LOSSES["own"]


@pytest.mark.parametrize(
    ("function", "fields", "says"),
    [
        (3, {}, r"write LOSSES\['own'\] = Loss\(function\)"),
        (lambda p, r: (p.chosen, {}), {"needs": "rejected"}, "no set of names"),
        (lambda p, r: (p.chosen, {}), {"needs": {"lengths"}}, "needs lengths; what there is"),
        (lambda p, r: (p.chosen, {}), {"needs": {"token_kl"}}, "and so reference too"),
        (lambda p, r: (p.chosen, {}), {"modifiers": ("foo",)}, "modifier 'foo' is unknown"),
        (lambda p, r, beta=0.1: (p.chosen, {}), {}, r"write \* before 'beta'"),
        (lambda p, r, *, beta: (p.chosen, {}), {}, "'beta' has no default"),
        (lambda p, r, *, beta=None: (p.chosen, {}), {}, "'beta' has no default"),
        (lambda p, r: p.chosen, {}, "returned a "),
        (lambda p, r: (p.chosen[:, None], {}), {}, r"the loss has shape \(12, 1\) where one number per pair is due"),
        (lambda p, r: (p.chosen.mean(), {}), {}, r"the loss has shape \(\)"),
        (lambda p, r: (p.chosen, {"x": 1.0}), {}, "metric 'x' has shape float"),
        (lambda p, r: (p.chosen, {"loss": p.chosen}), {}, "a metric is called 'loss', which the step writes"),
        (lambda p, r: (p.token_kl.chosen, {}), {}, r"test_losses.py, line \d+: AttributeError: .*it declares needs="),
        (lambda p, r: (p.rejected + p.chosen, {}), {"needs": {"reference"}}, "what it does not is None"),
        (lambda p, r: (p.chosen, {}), {"running": lambda hyper: {"n": 0.0}}, "no function `advance`"),
    ],
)
def test_what_is_wrong_with_a_loss_of_ones_own_is_said_in_one_line(function, fields, says):
    with pytest.raises(UserError, match=says) as error:
        own(function, **fields)
    assert "\n" not in str(error.value)


def test_a_reference_that_a_loss_did_not_declare_is_not_taken_for_a_uniform_one():
    with pytest.raises(ValueError, match="there is none; declare needs="):
        own(lambda p, r: (log_ratios(p, r)[0], {}), needs={"rejected"})


def test_what_a_loss_carries_makes_it_one_of_the_whole_batch():
    fields = {"running": lambda hyper: {"n": 0.0}, "advance": lambda p, r: {"n": p.running["n"] + 1}}
    LOSSES["own"] = Loss(lambda p, r: (p.chosen, {}), needs=set(), **fields)
    try:
        assert make_loss("own").needs == {"batch"}
    finally:
        del LOSSES["own"]


def test_a_mixture_is_the_weighted_sum_of_its_terms():
    policy, reference = draw(12, dtype=np.float32)
    mixture = make_loss("0.8*dpo + 2e-1*bco(shift=none, beta=0.5) + sft", beta=0.3)
    losses, metrics = call(mixture, policy, reference)
    parts = [make_loss("dpo", beta=0.3), make_loss("bco", shift="none", beta=0.5), make_loss("sft")]
    values = [call(part, policy, reference)[0] for part in parts]
    np.testing.assert_allclose(losses, 0.8 * values[0] + 0.2 * values[1] + values[2], rtol=1e-6)
    np.testing.assert_allclose(metrics["loss/bco"], values[1], rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards/chosen"], call(parts[0], policy, reference)[1]["rewards/chosen"])
    assert "nll_loss" in metrics


@pytest.mark.parametrize("case", ["bco", "bco_unpaired", "mpo"])
def test_the_shift_is_the_mean_reward_of_all_steps(case):
    loss, beta = BOUND[case], BOUND[case].hyper.get("beta", 0.2)
    running, seen = dict(loss.running), []
    for seed in range(3):
        policy, reference = draw(9, seed, np.float32, filler=3)
        running = loss.advance(policy._replace(running=running), reference)
        a, b = policy.chosen - reference.chosen, policy.rejected - reference.rejected
        seen.append(beta * (a if case == "bco_unpaired" else (a + b) / 2)[:9].mean())
        shift = next(value for name, value in running.items() if name.endswith("shift"))
        np.testing.assert_allclose(shift, np.mean(seen), rtol=1e-5)
    metrics = loss(policy._replace(running=running), reference)[1]
    np.testing.assert_allclose(metrics["bco_shift"], np.mean(seen), rtol=1e-5)
