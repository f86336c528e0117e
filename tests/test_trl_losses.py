"""Values and gradients of the losses against TRL 1.16.0's own, stored in goldens/trl_losses.

Where TRL is right ours are the same but for rounding. Where it is not (NaN, infinity, an option that it ignores) a test
of its own names the case, and holds ours to the formula. Trainers whose figures are not stored are written down again
in NumPy at the end of this file.
"""

import inspect
import json
import pathlib
import re
from decimal import Decimal, localcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefalign_jax.losses import LOSSES, make_loss
from prefalign_jax.losses.orpo import log_odds
from prefalign_jax.types import PairLogps, Responses, Sides, UserError

# What TRL calls it, trainer first: what it is called here. test_every_claim_of_parity_is_tested holds both to it.
TRL_NAMES = {
    "DPOTrainer sigmoid": "dpo",
    "DPOTrainer sigmoid_norm": "ln_dpo",
    "DPOTrainer hinge": "hinge",
    "DPOTrainer ipo": "ipo",
    "DPOTrainer exo_pair": "exo",
    "DPOTrainer nca_pair": "nca",
    "DPOTrainer robust": "robust_dpo",
    "DPOTrainer bco_pair": "bco",
    "DPOTrainer sppo_hard": "sppo",
    "DPOTrainer aot": "aot",
    "DPOTrainer aot_unpaired": "aot_unpaired",
    "DPOTrainer apo_zero": "apo_zero",
    "DPOTrainer apo_down": "apo_down",
    "DPOTrainer discopop": "discopop",
    "DPOTrainer sft": "sft",
    "DPOTrainer f_divergence_type": "f_dpo",
    "DPOTrainer ld_alpha": "ld_dpo",
    "DPOTrainer use_weighting": "wpo",
    "CPOTrainer sigmoid": "cpo",
    "CPOTrainer hinge": "cpo",
    "CPOTrainer ipo": "cpo",
    "CPOTrainer simpo": "simpo",
    "CPOTrainer alphapo": "alphapo",
    "ORPOTrainer": "orpo",
    "SFTTrainer": "sft",
    "KTOTrainer kto": "kto",
    "KTOTrainer apo_zero_unpaired": "apo_zero_unpaired",
    "BCOTrainer": "bco_unpaired",
    "RewardTrainer": "bradley_terry",
    "TPOTrainer sigmoid": "tpo",
    "TPOTrainer tpo-l": "tpo_l",
}
DIVERGENCES = {"forward_kl": "forward_kl", "js_divergence": "js", "alpha_divergence": "alpha_trl"}

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "trl_losses"
DPO, ORPO, CPO, TPO = (json.loads((GOLDENS / f"{name}.json").read_text()) for name in ("dpo", "orpo", "cpo", "tpo"))
RESULTS = {"dpo": {"dtype", "loss", "per_pair_loss", "grad_per_token", "metrics"}}
RESULTS["cpo"] = {"chosen", "rejected", "losses", "chosen_rewards", "rejected_rewards", "grad_chosen", "grad_rejected"}


def options(case: dict, kind: str) -> dict:
    """What TRL was told, without what it was asked of and what it answered."""
    return {key: value for key, value in case.items() if key not in RESULTS[kind]}


def named(cases: list[dict], kind: str) -> dict[str, dict]:
    """{readable name: case}."""
    names = []
    for case in cases:
        told = options(case, kind)
        types = np.atleast_1d(told.pop("loss_type"))
        names.append(" ".join(["+".join(types), *(f"{key}={value}" for key, value in told.items())]))
    assert len(set(names)) == len(names)
    return dict(zip(names, cases, strict=True))


DPO_CASES, CPO_CASES = named(DPO["cases"], "dpo"), named(CPO["cases"], "cpo")
# Cases in which TRL ignores an option, and the test that has them.
IGNORED = {
    "sigmoid label_smoothing=0.1": "test_label_smoothing_of_sigmoid_which_trl_ignores",
    "sft ld_alpha=0.0": "test_ld_alpha_of_sft_which_trl_ignores",
    "sft ld_alpha=0.5": "test_ld_alpha_of_sft_which_trl_ignores",
    "sft ld_alpha=1.0": "test_ld_alpha_of_sft_which_trl_ignores",
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


# DPOTrainer


def dpo_spellings(case: dict) -> list[tuple[str, str, dict]]:
    """[(TRL's name, ours, hyper-parameters)]: every way in which the case can be written here."""
    told = options(case, "dpo")
    types, weights = told.pop("loss_type"), told.pop("loss_weights", None)
    beta = told.pop("beta", 0.1)
    if weights is not None:
        assert (types, weights, told) == (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], {})
        return [("DPOTrainer sigmoid", "0.8*dpo + 0.2*bco(shift=none) + 1.0*sft", {"beta": beta})]
    name = TRL_NAMES[f"DPOTrainer {types}"]
    hyper = {"beta": beta}
    if name == "ipo":
        hyper = {"tau": beta, "per_token": True}
    elif name == "bco":
        hyper["shift"] = "none"
    elif name == "discopop":
        hyper["temperature"] = told.pop("discopop_tau", 0.05)
    elif name == "sft":
        hyper = {"over": "chosen", "mean": "batch"}
    smoothing = told.pop("label_smoothing", 0.0)
    if smoothing or name == "robust_dpo":  # whose default is not TRL's
        hyper["label_smoothing"] = smoothing
    changes, alias = {}, None
    if "f_divergence_type" in told:
        changes["divergence"] = DIVERGENCES[told.pop("f_divergence_type")]
        if changes["divergence"] == "alpha_trl":
            changes["divergence_alpha"] = told.pop("f_alpha_divergence_coef", 0.5)
        alias = "f_divergence_type"
    if "ld_alpha" in told:
        changes["ld_alpha"] = told.pop("ld_alpha")
        alias = "ld_alpha"
    if told.pop("use_weighting", False):
        changes["weighting"] = "wpo_unclipped"
        alias = "use_weighting"
    assert not told and len(changes) <= 2, "an option of TRL's that this file does not translate"
    spellings = [(f"DPOTrainer {types}", name, hyper | changes)]
    if alias and name == "dpo":
        if alias == "use_weighting":
            changes = {"clip": False}
        spellings.append((f"DPOTrainer {alias}", TRL_NAMES[f"DPOTrainer {alias}"], hyper | changes))
    return spellings


COUNTS = np.array([len(row) for row in DPO["policy"]])  # tokens; chosen responses first, then rejected


def padded(rows, dtype=np.float64) -> np.ndarray:
    """[2 B, T] of rows by token; a number stands for as many as the response has tokens."""
    out = np.zeros((len(rows), COUNTS.max()), dtype)
    for into, row, count in zip(out, rows, COUNTS, strict=True):
        into[:count] = row
    return out


def record(logps, counts, log_sum_squares) -> PairLogps:
    """Of log-probabilities by token [2 B, T], chosen first; what stands beyond `counts` [2 B] is not looked at."""
    place = np.arange(logps.shape[1])
    shorter = np.minimum(*np.split(counts, 2))

    def sums(values, counts) -> Sides:
        return Sides(*jnp.split(jnp.where(place < counts[:, None], values, 0).sum(1), 2))

    tokens = np.split(counts.astype(logps.dtype), 2)
    return PairLogps(
        *sums(logps, counts),
        *tokens,
        mean_tokens=np.array([np.nan, tokens[0].mean()], logps.dtype),  # no loss here may look at the prompt
        weight=np.ones(len(counts) // 2, logps.dtype),
        shared=sums(logps, np.tile(shorter, 2)),
        sum_squares=sums(log_sum_squares, counts),
    )


def on_tokens(loss, rows=slice(None), dtype=np.float64):
    """The mean loss, (losses, metrics) as a function of the policy's log-probabilities by token; and these."""
    policy, reference, squares = (padded(DPO[k], dtype)[rows] for k in ("policy", "reference", "log_sum_squares"))
    counts = COUNTS[rows]

    def mean(policy):
        frozen = record(reference, counts, squares) if "reference" in loss.needs else None
        losses, metrics = loss(record(policy, counts, squares), frozen)
        return losses.mean(), (losses, metrics)

    return mean, policy


DPO_PARAMETERS = [
    pytest.param(case, *spelling, id=f"{key} as {spelling[1]}")
    for key, case in DPO_CASES.items()
    if key not in IGNORED
    for spelling in dpo_spellings(case)
]
# Of the largest entry. Only what TRL cannot do in float64 is stored in float32: a rounding is 6e-8 there, and a sum of
# twelve tokens, times 1 / temperature, makes 1e-6 of it.
RTOL = 3e-6
TOLERANCE = {"float64": 1e-12, "float32": RTOL}
FLOAT32_EPSILON = 3e-7  # TRL takes the logarithm of exo_pair's label smoothing in float32 whatever the inputs


def close(got, want, rtol: float):
    np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * np.abs(want).max(initial=0.0))


def compared_metrics(name: str, hyper: dict) -> set[str]:
    """The metrics of TRL's names and meaning; those left out are in test_metrics_that_are_not_trls."""
    metrics = {f"rewards/{kind}" for kind in ("chosen", "rejected", "margins", "accuracies")}
    if name == "ln_dpo":  # of means per token
        metrics.clear()
    if hyper.get("divergence_alpha") != 1.0 and "divergence" in hyper:  # of f'(u), which keeps the order
        metrics &= {"rewards/accuracies"}
    if hyper.get("ld_alpha", 1.0) == 1.0:
        metrics |= {"logps/chosen", "logps/rejected"}
    return metrics


@pytest.mark.parametrize(("case", "trl", "name", "hyper"), DPO_PARAMETERS)
def test_dpo_trainer(case, trl, name, hyper):
    loss = make_loss(name, **hyper)
    # What TRL can do in float32 alone is asked of float64 too, up to its rounding.
    for dtype in sorted({case["dtype"], "float64"}):
        rtol = max(TOLERANCE[case["dtype"]], FLOAT32_EPSILON if name == "exo" else 0.0)
        mean, policy = on_tokens(loss, dtype=np.dtype(dtype))
        (value, (_, metrics)), slopes = jax.value_and_grad(mean, has_aux=True)(policy)
        assert value.dtype == slopes.dtype == dtype
        close(value, case["loss"], rtol)
        close(slopes, padded(case["grad_per_token"]), rtol)
        for key in compared_metrics(name, hyper) & metrics.keys():
            # TRL averages accuracies in float32 whatever the inputs.
            close(metrics[key].mean(), case["metrics"][key], max(rtol, 1e-7) if "accuracies" in key else rtol)

        for pair, expected in enumerate(case.get("per_pair_loss", ())):
            alone, policy = on_tokens(loss, rows=np.array([pair, pair + len(COUNTS) // 2]), dtype=np.dtype(dtype))
            close(alone(policy)[0], expected, rtol)


def test_metrics_that_are_not_trls():
    """What compared_metrics leaves out: rewards are what the loss is of, log-probabilities stay what they are."""

    def metrics(name, **hyper):
        mean, policy = on_tokens(make_loss(name, **hyper))
        return mean(policy)[1][1]

    ratios = (padded(DPO["policy"]) - padded(DPO["reference"])).sum(1)
    of_means = metrics("ln_dpo", beta=0.1)
    chosen, rejected = np.split(0.1 * ratios / COUNTS, 2)
    for key, expected in {"chosen": chosen, "rejected": rejected, "accuracies": chosen > rejected}.items():
        close(of_means[f"rewards/{key}"], expected, 1e-12)
    chosen, rejected = np.split(-0.1 * np.exp(-ratios), 2)  # up to a constant
    close(metrics("f_dpo", divergence="forward_kl")["rewards/margins"], chosen - rejected, 1e-12)
    plain = DPO_CASES["sigmoid beta=0.1"]["metrics"]
    for key in ("logps/chosen", "logps/rejected"):  # TRL reports the shortened sums
        close(metrics("ld_dpo", ld_alpha=0.0)[key].mean(), plain[key], 1e-12)


def test_label_smoothing_of_sigmoid_which_trl_ignores():
    """A = -log sigmoid(x) is TRL's sigmoid; its robust is R = ((1 - e) A - e B) / (1 - 2 e), B = -log sigmoid(-x)."""
    plain, ignored, robust = (
        DPO_CASES[key] for key in ("sigmoid beta=0.1", "sigmoid label_smoothing=0.1", "robust label_smoothing=0.1")
    )
    mean, policy = on_tokens(make_loss("dpo", beta=0.1, label_smoothing=0.1))
    (value, (losses, _)), slopes = jax.value_and_grad(mean, has_aux=True)(policy)
    found = {"loss": value, "per_pair_loss": losses, "grad_per_token": slopes}
    for key, got in found.items():
        assert ignored[key] == plain[key], "TRL no longer ignores it"
        a, r = ((padded if key == "grad_per_token" else np.array)(case[key]) for case in (plain, robust))
        flipped = (0.9 * a - 0.8 * r) / 0.1
        close(got, 0.9 * a + 0.1 * flipped, 1e-12)


@pytest.mark.parametrize("ld_alpha", [0.0, 0.5, 1.0])
def test_ld_alpha_of_sft_which_trl_ignores(ld_alpha):
    plain, ignored = DPO_CASES["sft beta=0.1"], DPO_CASES[f"sft ld_alpha={ld_alpha}"]
    for key in ("loss", "per_pair_loss", "grad_per_token"):
        assert ignored[key] == plain[key], "TRL no longer ignores it"
    with pytest.raises(UserError, match="'sft' has no hyper-parameter 'ld_alpha'"):
        make_loss("sft", ld_alpha=ld_alpha)


def of_ratios(chosen, rejected) -> tuple[PairLogps, PairLogps]:
    """(policy, reference) of one-token responses whose log-ratios these are, float32."""
    chosen, rejected = jnp.atleast_1d(jnp.float32(chosen)), jnp.atleast_1d(jnp.float32(rejected))
    ones, zeros = jnp.ones_like(chosen), jnp.zeros_like(chosen)
    return PairLogps(chosen, rejected, ones, ones), PairLogps(zeros, zeros, ones, ones)


def discopop_in_trl(x, t):
    """TRL's order of operations."""
    with np.errstate(over="ignore", invalid="ignore"):
        modulation = 1 / (1 + np.exp(-x / t))
        return np.log1p(np.exp(-x)) * (1 - modulation) + np.exp(-x) * modulation


@pytest.mark.parametrize("t", [0.05, 1.0])
@pytest.mark.parametrize("x", [-88.0, -89.0, -100.0, -1e3, -1e4])
def test_discopop_where_trl_is_nan(x, t):
    """m exp(-x) is 0 * inf in float32 once -x exceeds 88; in truth it tends to 0 for t < 1 and to 1 for t = 1."""
    assert np.isnan(discopop_in_trl(np.float32(x), np.float32(t))) == (x < -88.5)
    assert np.isfinite(discopop_in_trl(np.float64(-88), t))
    with localcontext(prec=60):
        exact, odds = Decimal(x), (-Decimal(x)).exp()  # exp(-x)
        m = 1 / (1 + (-exact / Decimal(t)).exp())
        logistic = (1 + odds).ln()
        value = (1 - m) * logistic + m * odds
        slope_of_m = m * (1 - m) / Decimal(t)
        slope = slope_of_m * (odds - logistic) - (1 - m) * odds / (1 + odds) - m * odds
    loss = make_loss("discopop", beta=1.0, temperature=t)
    policy, reference = of_ratios(x, 0.0)
    got, got_slope = jax.value_and_grad(lambda chosen: loss(policy._replace(chosen=chosen), reference)[0].sum())(
        policy.chosen
    )
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, float(value), rtol=1e-6)
    np.testing.assert_allclose(got_slope, [float(slope)], rtol=1e-6)


@pytest.mark.parametrize(
    ("chosen", "rejected", "in_trl"),
    [
        (-2.0, -1.0, np.exp(1.0) - np.exp(2.0)),
        (-100.0, 0.0, -np.inf),
        (0.0, -100.0, np.inf),
        (-100.0, -100.0, np.nan),
        (-100.0, -120.0, np.nan),
        (-120.0, -100.0, np.nan),
    ],
)
def test_forward_kl_where_trl_overflows(chosen, rejected, in_trl):
    """1 - 1 / u exceeds float32 beyond log u = -88; ours goes on from -30 as its tangent."""
    with np.errstate(over="ignore", invalid="ignore"):
        of_trl = np.subtract(*(1 - np.exp(-np.float32(ratio)) for ratio in (chosen, rejected)))
    np.testing.assert_allclose(of_trl, in_trl, rtol=RTOL)
    link = lambda r: -np.exp(-r) if r > -30 else -np.exp(30.0) * (1 - r - 30)  # noqa: E731
    x = 0.1 * (link(chosen) - link(rejected))
    slope = [0.1 * np.exp(min(-r, 30.0)) / (1 + np.exp(x) if x < 700 else np.inf) for r in (chosen, rejected)]
    loss = make_loss("dpo", beta=0.1, divergence="forward_kl")
    policy, reference = of_ratios(chosen, rejected)
    got, slopes = jax.value_and_grad(lambda sides: loss(policy._replace(**sides), reference)[0].sum())(
        {"chosen": policy.chosen, "rejected": policy.rejected}
    )
    np.testing.assert_allclose(got, np.logaddexp(0, -x), rtol=1e-5)
    np.testing.assert_allclose(slopes["chosen"], [-slope[0]], rtol=1e-5)
    np.testing.assert_allclose(slopes["rejected"], [slope[1]], rtol=1e-5)


# ORPOTrainer: its odds-ratio term, float32 as it computes it whatever the model's type.


def of_means(chosen, rejected) -> PairLogps:
    """One-token responses, so that sums are means, float32."""
    return of_ratios(chosen, rejected)[0]


def odds_term(lam):
    """(chosen, rejected) -> (mean of -lam log sigmoid, metrics): ORPO without its likelihood."""
    loss = make_loss("orpo", lam=lam)

    def mean(chosen, rejected):
        losses, metrics = loss(of_means(chosen, rejected))
        return (losses - metrics["nll_loss"]).mean(), metrics

    return mean


def exact_log_odds(x):
    """(log odds, its slope) of a float32 log-probability, in float64; nearer to 0 than eps^2 counts as -eps^2."""
    x = np.minimum(np.float64(np.float32(x)), -(2.0**-46))
    return x - np.log(-np.expm1(x)), 1 / -np.expm1(x)


def exact_odds_term(chosen, rejected, lam):
    """(losses, slope of each in chosen, in rejected) in float64."""
    (w, slope_w), (l, slope_l) = exact_log_odds(chosen), exact_log_odds(rejected)
    delta = lam / (1 + np.exp(w - l))
    return lam * np.logaddexp(0, l - w), -delta * slope_w, delta * slope_l


@pytest.mark.parametrize("case", ORPO["cases"], ids=lambda case: f"beta={case['beta']}")
def test_orpo_trainer(case):
    lam = case["beta"]
    means = [np.float32(ORPO[f"{side}_mean_logps"]) for side in ("chosen", "rejected")]
    (value, metrics), slopes = jax.value_and_grad(odds_term(lam), (0, 1), has_aux=True)(*means)
    found = {"minus_mean": value, "losses": lam * metrics["log_odds_ratio"]}
    found |= {"grad_chosen": slopes[0], "grad_rejected": slopes[1]}
    found |= {key: metrics[key].mean() for key in ("log_odds_ratio", "log_odds_chosen")}
    found |= {f"{side}_rewards": metrics[f"rewards/{side}"] for side in ("chosen", "rejected")}
    assert found.keys() == case.keys() - {"beta"}
    for key, got in found.items():
        np.testing.assert_allclose(got, case[key], rtol=RTOL, err_msg=key)
    losses, *exact = exact_odds_term(*means, lam)
    np.testing.assert_allclose(-found["losses"], losses, rtol=RTOL)
    np.testing.assert_allclose(slopes, np.array(exact) / len(losses), rtol=RTOL)


@pytest.mark.parametrize("edge", ORPO["log1mexp_edges"], ids=lambda edge: f"x={edge['x']}")
def test_log_odds_at_trls_edges(edge):
    """TRL's log(1 - exp x) has a NaN slope from x = -1e-30 on, where torch.where multiplies an infinite one by 0."""
    x = jnp.float32(edge["x"])
    value, slope = jax.value_and_grad(log_odds)(x)
    # Near x = -log 2 the odds are even and their logarithm a difference of like numbers.
    np.testing.assert_allclose((value, slope), exact_log_odds(x), rtol=RTOL, atol=1e-7)
    theirs = float(edge["log1mexp"]), float(edge["grad"])
    assert np.isnan(theirs[1]) == (x > -3e-8)
    if x < -3e-8:
        np.testing.assert_allclose((value, slope), (x - theirs[0], 1 - theirs[1]), rtol=RTOL, atol=1e-7)


@pytest.mark.parametrize("x", [0.0, -1e-45, -1e-30, -1e-20, -1e-14, -1e-12, -1e-9, -1e-8, -2.9e-8])
def test_orpo_within_rounding_of_certainty_where_trl_is_nan(x):
    """A mean log-probability within 3e-8 of 0: exp rounds to 1, and the slope of log(1 - 1) is infinite."""
    assert np.exp(np.float32(x)) == 1
    sure, other = np.float32([x]), np.float32([-1.0])
    for sides in ((sure, other), (other, sure), (sure, sure)):
        value, slopes = jax.value_and_grad(lambda *sides: odds_term(0.1)(*sides)[0], (0, 1))(*sides)
        exact, *exact_slopes = exact_odds_term(*sides, 0.1)
        np.testing.assert_allclose(value, *exact, rtol=RTOL, atol=1e-30)
        np.testing.assert_allclose(slopes, exact_slopes, rtol=RTOL, atol=1e-30)
        assert np.isfinite([value, *np.ravel(slopes)]).all()


def test_orpo_of_an_empty_response_which_is_nan_in_trl():
    """TRL divides by the number of tokens; one response without any makes the whole batch NaN."""
    stored = ORPO["get_batch_logps"]
    logits, ids, labels = (np.array(stored[key]) for key in ("logits", "input_ids", "labels"))
    logps = np.asarray(jax.nn.log_softmax(logits))
    rows, places = np.indices(ids[:, 1:].shape)
    asked = labels[:, 1:] != -100
    sums = np.where(asked, logps[rows, places, ids[:, 1:]], 0).sum(1)
    counts = asked.sum(1)
    averages = np.array(stored["average"], float)
    np.testing.assert_allclose(sums, np.array(stored["sum"], float), rtol=RTOL)
    assert np.isnan(averages).tolist() == (counts == 0).tolist() == [False, False, False, True]

    policy = PairLogps(*(np.float32(x) for x in (sums, sums[::-1], counts, counts[::-1])))
    loss = make_loss("orpo", lam=0.1)
    slopes = jax.grad(lambda policy: loss(policy)[0].sum())(policy)
    losses, metrics = loss(policy)
    for side, order in (("chosen", slice(None)), ("rejected", slice(None, None, -1))):
        expected = np.where(counts == 0, 0.0, averages)[order]
        np.testing.assert_allclose(metrics[f"logps/{side}"], expected, rtol=RTOL)
        assert np.isfinite(getattr(slopes, side)).all()
    assert np.isfinite(losses).all()


# CPOTrainer, float32


def cpo_spellings(case: dict) -> list[tuple[str, str, dict]]:
    """[(TRL's name, ours, hyper-parameters)] of its loss without the likelihood."""
    told = options(case, "cpo")
    kind, alpha, gamma = (told.pop(key) for key in ("loss_type", "alpha", "simpo_gamma"))
    hyper = {"beta": told.pop("beta")}
    if smoothing := told.pop("label_smoothing"):
        hyper["label_smoothing"] = smoothing
    assert not told, "an option of TRL's that this file does not translate"
    if kind != "simpo":  # gamma is not for these
        return [(f"CPOTrainer {kind}", "cpo", hyper | {"surrogate": kind, "alpha": 0.0, "reward_alpha": alpha})]
    hyper["gamma"] = gamma
    spellings = [("CPOTrainer simpo", "simpo", hyper)] if alpha == 0 else []
    if not smoothing:
        spellings.append(("CPOTrainer alphapo", "alphapo", hyper | {"reward_alpha": alpha}))
    return spellings


CPO_PARAMETERS = [
    pytest.param(case, *spelling, id=f"{key} as {spelling[1]}")
    for key, case in CPO_CASES.items()
    for spelling in cpo_spellings(case)
]


def cpo_of(name, hyper, chosen, rejected, tokens=(1.0, 1.0)):
    """((losses, metrics), slopes of their mean) from means over so many tokens, chosen and rejected."""
    loss = make_loss(name, **hyper)
    chosen, rejected = jnp.float32(chosen), jnp.float32(rejected)
    tokens = [jnp.broadcast_to(jnp.float32(count), chosen.shape) for count in tokens]

    def mean(chosen, rejected):
        losses, metrics = loss(PairLogps(chosen * tokens[0], rejected * tokens[1], *tokens))
        return losses.mean(), (losses, metrics)

    slopes, result = jax.grad(mean, (0, 1), has_aux=True)(chosen, rejected)
    return result, slopes


@pytest.mark.parametrize(("case", "trl", "name", "hyper"), CPO_PARAMETERS)
def test_cpo_trainer(case, trl, name, hyper):
    """The stored numbers are what the trainer passes to its loss: for `simpo` means per token, else as they are."""
    tokens = np.float32(
        [[20, 7, 3, 1, 300, 2], [5, 9, 8, 11, 40, 1]] if case["loss_type"] == "simpo" else np.ones((2, 6))
    )
    (losses, metrics), slopes = cpo_of(name, hyper, case["chosen"], case["rejected"], tokens)
    # Differences of like powers: theirs and ours lie 5e-6 from the truth on either side.
    rtol = 1e-5 if case["alpha"] else RTOL
    np.testing.assert_allclose(losses, case["losses"], rtol=rtol, atol=1e-12)
    for side, slope in zip(("chosen", "rejected"), slopes, strict=True):
        np.testing.assert_allclose(metrics[f"rewards/{side}"], case[f"{side}_rewards"], rtol=rtol)
        np.testing.assert_allclose(metrics[f"logps/{side}"], case[side], rtol=RTOL)
        theirs = np.array(case[f"grad_{side}"], float)
        finite = np.isfinite(theirs)  # the others: test_alpha_rewards_whose_slope_overflows_in_trl
        np.testing.assert_allclose(slope[finite], theirs[finite], rtol=rtol, atol=1e-12)
        assert np.isfinite(slope).all()


def test_alpha_rewards_whose_slope_overflows_in_trl():
    """(1 - p^-alpha) / alpha has slope p^-alpha in log p; TRL takes it as p^(-alpha - 1) times p."""
    faulty = {
        (key, int(pair))
        for key, case in CPO_CASES.items()
        for side in ("chosen", "rejected")
        for pair in np.flatnonzero(~np.isfinite(np.array(case[f"grad_{side}"], float)))
    }
    told = "beta=2.0 simpo_gamma=1.0 alpha=0.25 label_smoothing=0.0"
    assert faulty == {(f"sigmoid {told}", 4), (f"hinge {told}", 4)}
    for key, pair in faulty:
        case = CPO_CASES[key]
        ((_, name, hyper),) = cpo_spellings(case)
        _, slopes = cpo_of(name, hyper, case["chosen"], case["rejected"])
        assert case["chosen"][pair] < case["rejected"][pair]  # so far that the loss is -x
        for side, slope, sign in zip(("chosen", "rejected"), slopes, (-1, 1), strict=True):
            exact = sign * 2.0 / len(case["chosen"]) * np.exp(-0.25 * case[side][pair])
            np.testing.assert_allclose(slope[pair], exact, rtol=RTOL)


def test_alpha_rewards_of_long_responses_which_are_nan_in_trl():
    """exp of a sum below -104 is 0 in float32, and its power infinite on both sides."""
    chosen, rejected = np.float32([-110.0]), np.float32([-111.0])
    with np.errstate(divide="ignore", invalid="ignore"):
        of_trl = np.power(np.exp(rejected), np.float32(-0.25)) - np.power(np.exp(chosen), np.float32(-0.25))
    assert np.isnan(of_trl)
    hyper = {"alpha": 0.0, "reward_alpha": 0.25, "beta": 1e-12}
    (losses, _), slopes = cpo_of("cpo", hyper, chosen, rejected)
    p_w, p_l = np.exp(0.25 * 110), np.exp(0.25 * 111)
    x = 1e-12 * 4 * (p_l - p_w)
    np.testing.assert_allclose(losses, np.logaddexp(0, -x), rtol=RTOL)
    np.testing.assert_allclose(np.ravel(slopes), 1e-12 / (1 + np.exp(x)) * np.array([-p_w, p_l]), rtol=1e-5)


# Trainers whose figures are not stored, written down again: arrays in, the mean loss out. A derivative is the imaginary
# part of the value at x + 1e-30 i, so NumPy needs no differences; what a trainer detaches is taken at the real part.


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def slopes_of(f, x):
    return np.array([f(x + 1e-30j * unit).imag for unit in np.eye(len(x))]) / 1e-30


def completions(label, seed=0, mismatch=0.0) -> tuple[PairLogps, PairLogps]:
    """(policy, reference) of completions with labels, float64; `mismatch` raises the policy's mismatched ones."""
    rng = np.random.default_rng(seed)
    label, count = np.array(label, float), rng.integers(1, 30, (2, len(label))).astype(float)
    chosen, rejected, frozen, frozen_rejected = -rng.gamma(4.0, 5.0, (4, len(label)))
    weight = np.ones_like(label)
    policy = PairLogps(
        chosen, rejected, *count, weight=weight, label=label, mean_tokens=np.array([np.nan, count[0].mean()])
    )
    reference = PairLogps(frozen, frozen_rejected, *count, weight=weight, label=label)
    return policy._replace(rejected=frozen_rejected + rng.normal(mismatch, 1.0, len(label))), reference


def holds(loss, policy, reference, f, rejected=False):
    """f(chosen, rejected) is the mean of the loss, with its slopes in `chosen` and, if asked, in `rejected`."""

    def mean(chosen, rejected):
        return loss(policy._replace(chosen=chosen, rejected=rejected), reference)[0].mean()

    value, slopes = jax.value_and_grad(mean, (0, 1))(policy.chosen, policy.rejected)
    np.testing.assert_allclose(value, f(policy.chosen, policy.rejected), rtol=1e-12)
    exact = slopes_of(lambda x: f(x, policy.rejected), policy.chosen)
    np.testing.assert_allclose(slopes[0], exact, rtol=1e-10, atol=1e-15)
    exact = slopes_of(lambda x: f(policy.chosen, x), policy.rejected) if rejected else np.zeros(len(policy.rejected))
    np.testing.assert_allclose(slopes[1], exact, rtol=1e-10, atol=1e-15)


LABELS = {"mixed": [1, 0, 0, 1, 1, 0, 1], "all desirable": [1, 1, 1], "all undesirable": [0, 0, 0, 0]}
by_labels = pytest.mark.parametrize("label", LABELS.values(), ids=LABELS)


@by_labels
@pytest.mark.parametrize("mismatch", [4.0, -4.0])
def test_kto_trainer(label, mismatch):
    policy, reference = completions(label, mismatch=mismatch)
    desirable = policy.label == 1
    kl = max((policy.rejected - reference.rejected).mean(), 0.0)
    assert (kl > 0) == (mismatch > 0)

    def of_trl(chosen, mismatched):  # without a slope in what is mismatched: no_grad there
        ratio = chosen - reference.chosen
        losses_chosen = 1 - sigmoid(0.3 * (ratio[desirable] - kl))
        losses_rejected = 1 - sigmoid(0.3 * (kl - ratio[~desirable]))
        return np.concatenate([1.2 * losses_chosen, 0.7 * losses_rejected]).mean()

    loss = make_loss("kto", beta=0.3, desirable_weight=1.2, undesirable_weight=0.7)
    holds(loss, policy, reference, of_trl)
    _, metrics = loss(policy, reference)
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-12)
    reward = 0.3 * (policy.chosen - reference.chosen)
    for side, rows in (("chosen", desirable), ("rejected", ~desirable)):
        assert np.isnan(metrics[f"rewards/{side}"][~rows]).all() and np.isnan(metrics[f"logps/{side}"][~rows]).all()
        np.testing.assert_allclose(metrics[f"rewards/{side}"][rows], reward[rows], rtol=1e-12)
        np.testing.assert_allclose(metrics[f"logps/{side}"][rows], policy.chosen[rows], rtol=1e-12)


@by_labels
def test_apo_zero_unpaired_of_kto_trainer(label):
    policy, reference = completions(label)
    desirable = policy.label == 1

    def of_trl(chosen, _):
        ratio = chosen - reference.chosen
        return np.concatenate([1 - sigmoid(0.3 * ratio[desirable]), sigmoid(0.3 * ratio[~desirable])]).mean()

    holds(make_loss("apo_zero_unpaired", beta=0.3), policy, reference, of_trl)


@by_labels
def test_bco_trainer(label):
    """As TRL had it up to 1.13: the shift is the mean of every reward so far, those of this batch included."""
    loss, rewards = make_loss("bco_unpaired", beta=0.3), []
    running = loss.running
    for step in range(3):
        policy, reference = completions(label, seed=step)
        rewards.extend(0.3 * (policy.chosen - reference.chosen))
        delta, desirable = np.mean(rewards), policy.label == 1

        def of_trl(chosen, _, reference=reference, delta=delta, desirable=desirable):
            reward = 0.3 * (chosen - reference.chosen)
            losses_chosen = -np.log(sigmoid(reward[desirable] - delta))
            return np.concatenate([losses_chosen, -np.log(sigmoid(-(reward[~desirable] - delta)))]).mean()

        running = loss.advance(policy._replace(running=running), reference)
        np.testing.assert_allclose(running["shift"], delta, rtol=1e-12)
        holds(loss, policy._replace(running=running), reference, of_trl)


def test_bco_trainer_on_pairs():
    """Each response is a completion of its own there: its mean over 2 B of them is half of ours over B pairs."""
    loss, rewards = make_loss("bco", beta=0.3), []
    running = loss.running
    for step in range(3):
        policy, reference = completions([1] * 5, seed=step, mismatch=-3.0)
        ratios = [policy.chosen - reference.chosen, policy.rejected - reference.rejected]
        rewards.extend(0.3 * np.ravel(ratios))
        delta = np.mean(rewards)

        def of_trl(chosen, rejected, reference=reference, delta=delta):
            chosen, rejected = 0.3 * (chosen - reference.chosen), 0.3 * (rejected - reference.rejected)
            return 2 * -np.log(np.concatenate([sigmoid(chosen - delta), sigmoid(-(rejected - delta))])).mean()

        running = loss.advance(policy._replace(running=running), reference)
        np.testing.assert_allclose(running["shift"], delta, rtol=1e-12)
        holds(loss, policy._replace(running=running), reference, of_trl, rejected=True)


@pytest.mark.parametrize("centre", [0.0, 0.01])
@pytest.mark.parametrize("margin", [None, [0.5, 2.0, 0.0, 1.0]])
def test_reward_trainer(margin, centre):
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(0.0, 2.0, (2, 4))
    policy = PairLogps(chosen, rejected, np.ones(4), np.ones(4), margin=np.array(margin or [np.nan] * 4))

    def of_trl(chosen, rejected):
        difference = chosen - rejected - (0.0 if margin is None else np.array(margin))
        return -np.log(sigmoid(difference)).mean() + centre * ((chosen + rejected) ** 2).mean()

    holds(
        make_loss("bradley_terry", margin=float(margin is not None), centre=centre), policy, None, of_trl, rejected=True
    )


def test_sft_trainer():
    """Cross-entropy over all completion tokens of the batch at once; the rejected responses are not seen."""
    policy, _ = completions([1] * 6)
    holds(make_loss("sft"), policy, None, lambda chosen, _: -chosen.sum() / policy.chosen_tokens.sum())


# TPOTrainer, of groups


TPO_CASES = [pytest.param(case, f"TPOTrainer {case['loss_type']}", id=str(n)) for n, case in enumerate(TPO["cases"])]


@pytest.mark.parametrize(("case", "trl"), TPO_CASES)
def test_tpo_trainer(case, trl):
    """The stored responses are chosen, rejected and gold, in this order; the scores here say so."""
    sides, count = 3, len(TPO["policy"]) // 3
    sums = np.array([sum(response) for response in TPO["policy"]]).reshape(sides, count).T
    tokens = np.array([float(len(response)) for response in TPO["policy"]]).reshape(sides, count).T
    scores, present = np.tile([1.0, 0.0, 2.0], (count, 1)), np.ones((count, sides))
    hyper = {"gamma": case["tpo_l_gamma"]} if "tpo_l_gamma" in case else {}
    loss = make_loss(TRL_NAMES[trl], beta=case["beta"], alpha=case["tpo_alpha"], nll_mean="batch", **hyper)

    def mean(sums):
        responses = Responses(sums, tokens, scores, present)
        sides = (sums[:, 2], sums[:, 0], tokens[:, 2], tokens[:, 0])
        mean_tokens = np.array([1.0, tokens[:, 2].mean()])
        return loss(PairLogps(*sides, mean_tokens=mean_tokens, responses=responses))[0].mean()

    with jax.enable_x64(True):
        value, slopes = jax.value_and_grad(mean)(jnp.asarray(sums))
    np.testing.assert_allclose(value, case["loss"], rtol=1e-12)
    np.testing.assert_allclose(slopes.T.ravel(), case["grad_per_token"], rtol=1e-9, atol=1e-15)


RESTATED = {
    "SFTTrainer": test_sft_trainer,
    "KTOTrainer kto": test_kto_trainer,
    "KTOTrainer apo_zero_unpaired": test_apo_zero_unpaired_of_kto_trainer,
    "BCOTrainer": test_bco_trainer,
    "RewardTrainer": test_reward_trainer,
}


# What is claimed and what is tested


def test_no_stored_case_is_left_out():
    for cases, parameters, ignored in ((DPO_CASES, DPO_PARAMETERS, IGNORED), (CPO_CASES, CPO_PARAMETERS, {})):
        assert {parameter.id.split(" as ")[0] for parameter in parameters} | ignored.keys() == cases.keys()
    assert all(callable(globals()[test]) for test in IGNORED.values())
    assert (len(DPO_CASES), len(CPO_CASES), len(TPO_CASES)) == (77, 14, 4)
    assert [len(ORPO[key]) for key in ("cases", "chosen_mean_logps", "log1mexp_edges")] == [2, 13, 13]
    assert {golden["versions"]["trl"] for golden in (DPO, ORPO, CPO, TPO)} == {"1.16.0"}


def claims() -> dict[str, str]:
    """{loss: what its docstring says of TRL} where it says equal."""
    said = {name: inspect.getdoc(entry.function) for name, entry in LOSSES.items()}
    said = {name: re.search(r"^TRL: (.*?)^Source: ", text, re.MULTILINE | re.DOTALL) for name, text in said.items()}
    assert all(said.values()), "every loss says how it stands to TRL"
    return {name: text[1] for name, text in said.items() if "equal" in text[1] and not text[1].startswith("none")}


def test_every_claim_of_parity_is_tested():
    stored = {parameter.values[1] for parameter in DPO_PARAMETERS + CPO_PARAMETERS + TPO_CASES} | {"ORPOTrainer"}
    assert stored | RESTATED.keys() == TRL_NAMES.keys()
    assert not stored & RESTATED.keys()
    found = claims()
    assert found.keys() == set(TRL_NAMES.values())
    # The names that a docstring gives are names in the table; DPOTrainer where it says no trainer.
    for name, text in found.items():
        trainers = set(re.findall(r"\w+Trainer", text)) or {"DPOTrainer"}
        assert trainers <= {trl.split()[0] for trl in TRL_NAMES}, name
        known = {trl for trl, ours in TRL_NAMES.items() if ours == name}
        assert {trl.split()[0] for trl in known} & (trainers | {"DPOTrainer"}), name
        assert all(trl.split()[-1] in text for trl in known), name
