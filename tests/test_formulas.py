"""Every loss against its formula, written out once more in plain numbers, pair by pair and from the paper's page."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefalign_jax.losses import LOSSES, make_loss
from prefalign_jax.types import PairLogps, Responses, Sides

# Three pairs: chosen, rejected under policy (lw, ll) and reference (rw, rl), tokens (nw, nl), and the rest by name.
PAIRS = [
    dict(lw=-4.0, ll=-7.0, rw=-5.0, rl=-6.0, nw=2, nl=5, np=3, lp=-6.0, m=2.0, label=1),
    dict(lw=-9.0, ll=-3.5, rw=-7.5, rl=-4.0, nw=6, nl=3, np=1, lp=-1.0, m=0.5, label=0),
    dict(lw=-2.5, ll=-2.0, rw=-2.2, rl=-2.6, nw=4, nl=4, np=2, lp=-3.0, m=1.0, label=1),
]
for p in PAIRS:
    p |= dict(a=p["lw"] - p["rw"], b=p["ll"] - p["rl"])
    p |= dict(h=p["a"] - p["b"], mw=p["lw"] / p["nw"], ml=p["ll"] / p["nl"])
    # Sums over the first tokens and over tokens drawn, the reference's too; divergences; squares; after the end; text.
    p |= dict(sw=0.8 * p["lw"], sl=0.7 * p["ll"], srw=0.6 * p["rw"], srl=0.9 * p["rl"])
    p |= dict(dw=0.5 * p["lw"], dl=0.4 * p["ll"], drw=0.3 * p["rw"], drl=0.2 * p["rl"])
    p |= dict(kw=0.3 * p["nw"], kl=0.7 * p["nl"], qw=-0.9 * p["nw"], ql=-1.1 * p["nl"])
    p |= dict(ew=-0.4, el=-0.9, text=p["lp"] + 0.9 * p["lw"], text_n=p["np"] + p["nw"] - 1)
    # A group of three: log-probability, the reference's, tokens, score; the second is best, the last worst.
    p["group"] = [(p["ll"], p["rl"], p["nl"], 0.5), (p["lw"], p["rw"], p["nw"], 1.0), (p["lp"], -4.5, p["np"], 0.2)]


def column(*names):
    columns = tuple(np.array([float(pair[name]) for pair in PAIRS]) for name in names)
    return columns[0] if len(columns) == 1 else Sides(*columns)


def responses(logp):
    """All groups, with one more response that is filler."""
    logps, tokens, scores = (np.array([[float(one[x]) for one in p["group"]] for p in PAIRS]) for x in (logp, 2, 3))
    filled = [np.pad(values, ((0, 0), (0, 1)), constant_values=-1.0) for values in (logps, tokens, scores)]
    return Responses(*filled, present=np.array([[1.0, 1.0, 1.0, 0.0]] * 3))


MEAN_PROMPT, MEAN_CHOSEN = column("np").mean(), column("nw").mean()
POLICY = PairLogps(
    chosen=column("lw"),
    rejected=column("ll"),
    chosen_tokens=column("nw"),
    rejected_tokens=column("nl"),
    prompt=column("lp"),
    prompt_tokens=column("np"),
    mean_tokens=np.array([MEAN_PROMPT, MEAN_CHOSEN]),
    weight=np.ones(3),
    margin=column("m"),
    label=column("label"),
    shared=column("sw", "sl"),
    sampled=column("dw", "dl"),
    token_kl=column("kw", "kl"),
    sum_squares=column("qw", "ql"),
    after=column("ew", "el"),
    text=column("text"),
    text_tokens=column("text_n"),
    responses=responses(0),
    running={
        **{"shift": np.array(0.05), "steps": np.array(1.0), "mean_margin": np.array(0.3)},
        **{"gap_mean": np.array(0.1), "gap_std": np.array(0.4), "gap_seen": np.array(0.8)},
    },
)
REFERENCE = PairLogps(
    chosen=column("rw"),
    rejected=column("rl"),
    chosen_tokens=column("nw"),
    rejected_tokens=column("nl"),
    shared=column("srw", "srl"),
    sampled=column("drw", "drl"),
    responses=responses(1),
)


def s(x):
    return 1 / (1 + math.exp(-x))


def ls(x):
    return math.log(s(x))


def odds(x):
    return math.log(math.exp(x) / (1 - math.exp(x)))


def wpo_weight(p):
    return min(1, unclipped(p))


def unclipped(p):
    return math.exp((p["lw"] - p["qw"]) / p["nw"]) * math.exp((p["ll"] - p["ql"]) / p["nl"])


def rank_of(values, number):
    return sorted(values).index(values[number])


def aot_reference(p):
    """The reference margin of the rank that this pair's margin has among the policy's."""
    margins = [q["lw"] - q["ll"] for q in PAIRS]
    return sorted(q["rw"] - q["rl"] for q in PAIRS)[rank_of(margins, PAIRS.index(p))]


def matched_rejected(p):
    return sorted(q["b"] for q in PAIRS)[rank_of([q["a"] for q in PAIRS], PAIRS.index(p))]


def mean(values):
    return sum(values) / len(values)


Z = max(0.0, mean([p["b"] for p in PAIRS]))  # KTO's: the rejected side is the mismatched completion
KL_W, KL_L = (max(0.0, mean([p[x] for p in PAIRS])) for x in "ab")


def beta_dpo(p, beta=0.1, alpha=0.6, running=0.3):
    """Two of the three pairs are kept, those nearest to the running mean."""
    kept = sorted(PAIRS, key=lambda q: abs(q["h"] - running))[:2]
    adapted = max(1e-3, beta * (1 + alpha * (mean([q["h"] for q in kept]) - running)))
    return -ls(adapted * p["h"]) * 3 / 2 if p in kept else 0.0


def dr_dpo(p, beta=0.1, beta_prime=0.5):
    """The same for every pair: a mean of the powers of the preferences' chances."""
    return -beta_prime * math.log(mean([s(beta * q["h"]) ** (1 / beta_prime) for q in PAIRS]))


def token_gap(p):
    return p["a"] / p["nw"] - p["b"] / p["nl"]


def chi(ratio):
    return math.exp(ratio) + ratio


def kl(x, y):
    """Between two chances, given by their log-odds."""
    return s(x) * math.log(s(x) / s(y)) + s(-x) * math.log(s(-x) / s(-y))


def ratios(p, beta=1.0):
    """beta times the log-ratios of the best, the second and the worst response of the group."""
    one, best, worst = (beta * (logp - ref) for logp, ref, _, _ in p["group"])
    return best, one, worst


def plackett_luce(best, one, worst):
    """Minus the log of the chance to draw the best first, then the second."""
    first = math.exp(best) / (math.exp(best) + math.exp(one) + math.exp(worst))
    return -math.log(first) - math.log(math.exp(one) / (math.exp(one) + math.exp(worst)))


def lipo(p, beta=0.05):
    r, scores = ratios(p, beta), (1.0, 0.5, 0.2)
    discounts = [1 / math.log2(2 + sum(other > x for other in r)) for x in r]
    return -sum(
        (2 ** scores[i] - 2 ** scores[j]) * abs(discounts[i] - discounts[j]) * ls(r[i] - r[j])
        for i, j in ((0, 1), (0, 2), (1, 2))
    )


def softmax(values):
    return [math.exp(x) / sum(math.exp(y) for y in values) for x in values]


def sppo(p, beta=0.1):
    scores = (1.0, 0.5, 0.2)
    rates = [mean([s(x - y) for y in scores]) for x in scores]
    return sum((a - (rate - 0.5) / beta) ** 2 for a, rate in zip(ratios(p), rates, strict=True))


def rrhf(p):
    one, best, worst = (logp / tokens for logp, _, tokens, _ in p["group"])
    return max(0, one - best) + max(0, worst - best) + max(0, worst - one) - 0.3 * p["lw"]


# (loss, hyper-parameters, its formula of a pair)
FORMULAS = [
    ("dpo", {}, lambda p: -ls(0.1 * p["h"])),
    ("dpo", {"beta": 0.5, "label_smoothing": 0.2}, lambda p: -0.8 * ls(0.5 * p["h"]) - 0.2 * ls(-0.5 * p["h"])),
    ("dpo", {"reference_free": True}, lambda p: -ls(0.1 * (p["lw"] - p["ll"]))),
    ("dpo", {"weighting": "wpo"}, lambda p: -wpo_weight(p) * ls(0.1 * p["h"])),
    ("robust_dpo", {"beta": 0.3}, lambda p: (-0.9 * ls(0.3 * p["h"]) + 0.1 * ls(-0.3 * p["h"])) / 0.8),
    ("dr_dpo", {"beta_prime": 0.5}, dr_dpo),
    ("ln_dpo", {}, lambda p: -ls(5 * (p["a"] / p["nw"] - p["b"] / p["nl"]))),
    ("r_dpo", {"alpha": 0.2}, lambda p: -ls(0.1 * p["h"] + 0.2 * (p["nw"] - p["nl"]))),
    (
        "ld_dpo",
        {"ld_alpha": 0.3},
        lambda p: (
            -ls(
                0.1
                * (
                    (p["sw"] + 0.3 * (p["lw"] - p["sw"]) - p["srw"] - 0.3 * (p["rw"] - p["srw"]))
                    - (p["sl"] + 0.3 * (p["ll"] - p["sl"]) - p["srl"] - 0.3 * (p["rl"] - p["srl"]))
                )
            )
        ),
    ),
    ("sampo", {}, lambda p: -ls(0.1 * (p["dw"] - p["drw"] - p["dl"] + p["drl"]))),
    ("odpo", {"alpha": 0.5}, lambda p: -ls(0.1 * p["h"] - 0.5 * math.log(p["m"]))),
    ("reward_aware_rpo", {"eta": 0.7}, lambda p: kl(0.7 * p["m"], 0.1 * p["h"])),
    ("reward_aware_rpo", {"distance": "forward_kl", "beta": 0.3}, lambda p: kl(0.3 * p["h"], p["m"])),
    ("reward_aware_rpo", {"distance": "squared", "eta": 2.0}, lambda p: (0.1 * p["h"] - 2 * p["m"]) ** 2),
    ("rebel", {"beta": 0.5}, lambda p: (0.5 * p["h"] - p["m"]) ** 2),
    ("dpop", {"lam": 5.0}, lambda p: -ls(0.3 * (p["h"] - 5 * max(0, p["rw"] - p["lw"])))),
    ("rpo", {"alpha": 0.5}, lambda p: -ls(0.1 * p["h"]) - 0.5 * p["lw"] / p["nw"]),
    ("cal_dpo", {"beta": 0.1}, lambda p: -ls(p["h"]) + 0.5 * ((p["a"] - 5) ** 2 + (p["b"] + 5) ** 2)),
    ("beta_dpo", {}, beta_dpo),
    (
        "alpha_dpo",
        {"gamma": 0.5, "alpha": 0.3},
        lambda p: -ls(2.5 * (p["mw"] - p["ml"] - 0.3 * (token_gap(p) - 0.1 / 0.8) / (0.4 / 0.8)) - 0.5),
    ),
    ("tdpo1", {}, lambda p: -ls(0.1 * (p["h"] - (p["kl"] - p["kw"])))),
    ("tdpo2", {}, lambda p: -ls(0.1 * (p["h"] - 0.5 * (p["kl"] - p["kw"])))),
    ("f_dpo", {}, lambda p: -ls(0.1 * (ls(p["a"]) - ls(p["b"])))),
    ("f_dpo", {"divergence": "forward_kl"}, lambda p: -ls(0.1 * (math.exp(-p["b"]) - math.exp(-p["a"])))),
    (
        "f_dpo",
        {"divergence": "alpha", "divergence_alpha": 0.3},
        lambda p: -ls(0.1 * ((1 - math.exp(-0.3 * p["a"])) / 0.3 - (1 - math.exp(-0.3 * p["b"])) / 0.3)),
    ),
    (
        "f_dpo",
        {"divergence": "alpha_trl", "divergence_alpha": 1.5},
        lambda p: -ls(0.1 * (math.exp(0.5 * p["a"]) / 0.5 - math.exp(0.5 * p["b"]) / 0.5)),
    ),
    ("f_dpo", {"divergence": "alpha_trl", "divergence_alpha": 1.0}, lambda p: -ls(0.1 * p["h"])),
    ("f_dpo", {"divergence": "chi_squared"}, lambda p: -ls(0.1 * (chi(p["a"]) - chi(p["b"])))),
    ("chi_po", {}, lambda p: -ls(0.1 * (chi(p["a"]) - chi(p["b"])))),
    ("chi_po", {"reward_max": 0.1}, lambda p: -ls(min(max(0.1 * (chi(p["a"]) - chi(p["b"])), -0.2), 0.2))),
    ("dpo_shift", {}, lambda p: -ls(0.1 * (p["a"] - 0.7 * p["b"]))),
    ("wpo", {}, lambda p: -wpo_weight(p) * ls(0.1 * p["h"])),
    ("wpo", {"clip": False}, lambda p: -unclipped(p) * ls(0.1 * p["h"])),
    ("ipo", {"weighting": "wpo_unclipped"}, lambda p: unclipped(p) * (p["h"] - 5) ** 2),
    ("ipo", {"tau": 0.25}, lambda p: (p["h"] - 2) ** 2),
    ("ipo", {"per_token": True}, lambda p: (p["a"] / p["nw"] - p["b"] / p["nl"] - 5) ** 2),
    ("hinge", {}, lambda p: max(0, 1 - 0.1 * p["h"])),
    (
        "exo",
        {"label_smoothing": 0.1},
        lambda p: (
            s(0.1 * p["h"]) * (ls(0.1 * p["h"]) - math.log(0.9))
            + s(-0.1 * p["h"]) * (ls(-0.1 * p["h"]) - math.log(0.1))
        ),
    ),
    (
        "discopop",
        {"temperature": 0.5},
        lambda p: s(-0.1 * p["h"]) * -ls(0.05 * p["h"]) + s(0.1 * p["h"]) * math.exp(-0.05 * p["h"]),
    ),
    ("focal_po", {"gamma": 0.5}, lambda p: -(s(0.1 * p["h"]) ** 0.5) * ls(0.1 * p["h"])),
    ("gpo", {}, lambda p: math.exp(-0.1 * p["h"])),
    ("gpo", {"surrogate": "logistic"}, lambda p: math.log2(1 + math.exp(-0.1 * p["h"]))),
    ("gpo", {"surrogate": "hinge"}, lambda p: max(0, 1 - 0.1 * p["h"])),
    ("gpo", {"surrogate": "squared"}, lambda p: (1 - 0.1 * p["h"]) ** 2),
    ("gpo", {"surrogate": "truncated_quadratic", "beta": 2.0}, lambda p: max(0, 1 - 2 * p["h"]) ** 2),
    ("gpo", {"surrogate": "savage"}, lambda p: 1 / (1 + math.exp(0.1 * p["h"])) ** 2),
    ("nca", {}, lambda p: -ls(0.1 * p["a"]) - 0.5 * ls(-0.1 * p["a"]) - 0.5 * ls(-0.1 * p["b"])),
    ("bco", {"shift": "none"}, lambda p: -ls(0.1 * p["a"]) - ls(-0.1 * p["b"])),
    ("bco", {}, lambda p: -ls(0.1 * p["a"] - 0.05) - ls(-(0.1 * p["b"] - 0.05))),
    ("sppo", {"beta": 0.1}, lambda p: (p["a"] - 5) ** 2 + (p["b"] + 5) ** 2),
    ("apo_zero", {}, lambda p: 1 - s(0.1 * p["a"]) + s(0.1 * p["b"])),
    ("apo_down", {}, lambda p: s(0.1 * p["a"]) + 1 - s(0.1 * p["h"])),
    ("kto_pair", {}, lambda p: 2 - s(0.1 * (p["a"] - KL_L)) - s(0.1 * (KL_W - p["b"]))),
    ("aot", {}, lambda p: -ls(0.1 * (p["lw"] - p["ll"] - aot_reference(p)))),
    (
        "aot_unpaired",
        {"label_smoothing": 0.1},
        lambda p: -0.9 * ls(0.1 * (p["a"] - matched_rejected(p))) - 0.1 * ls(-0.1 * (p["a"] - matched_rejected(p))),
    ),
    ("orpo", {"lam": 0.5}, lambda p: -p["mw"] - 0.5 * ls(odds(p["mw"]) - odds(p["ml"]))),
    ("orpo", {"ratio": "probability"}, lambda p: -p["mw"] - 0.1 * ls(p["mw"] - p["ml"])),
    (
        "orpo",
        {"nll_over": "prompt+chosen", "nll_mean": "batch"},
        lambda p: -(p["lw"] + p["lp"]) / (MEAN_PROMPT + MEAN_CHOSEN) - 0.1 * ls(odds(p["mw"]) - odds(p["ml"])),
    ),
    (
        "orpo",
        {"nll_over": "text", "nll_mean": "batch", "extra_eos": True},
        lambda p: (
            -p["text"] / mean([q["text_n"] for q in PAIRS])
            - 0.1 * ls(odds((p["lw"] + p["ew"]) / (p["nw"] + 1)) - odds((p["ll"] + p["el"]) / (p["nl"] + 1)))
        ),
    ),
    (
        "orpo_beta",
        {"lam": 0.7, "sft_weight": 0.3},
        lambda p: -0.3 * p["mw"] - 0.7 * ls(0.5 * (odds(p["mw"]) - odds(p["ml"]))),
    ),
    (
        "asft",
        {"beta": 0.3, "lam": 0.7},
        lambda p: -p["mw"] - 0.7 * (ls(0.3 * odds(p["mw"])) + ls(-0.3 * odds(p["ml"]))),
    ),
    ("asft", {"sft_weight": 0.0}, lambda p: -p["mw"] - math.log(1 - math.exp(p["ml"]))),
    ("simpo", {"gamma": 0.5}, lambda p: -ls(2 * (p["mw"] - p["ml"]) - 0.5)),
    ("repo", {"gamma": 0.3}, lambda p: max(0, 0.3 - (p["mw"] - p["ml"]))),
    ("simper", {}, lambda p: math.exp(p["ml"]) - math.exp(p["mw"])),
    (
        "alphapo",
        {"reward_alpha": 0.5},
        lambda p: -ls(2.5 * ((1 - math.exp(-0.5 * p["mw"])) / 0.5 - (1 - math.exp(-0.5 * p["ml"])) / 0.5) - 0.1),
    ),
    ("cpo", {"alpha": 0.7}, lambda p: -ls(0.1 * (p["lw"] - p["ll"])) - 0.7 * p["mw"]),
    ("cpo", {"alpha": 0.0, "surrogate": "ipo"}, lambda p: (p["lw"] - p["ll"] - 5) ** 2),
    ("slic", {"delta": 2.0}, lambda p: max(0, 2 - p["lw"] + p["ll"]) - 0.1 * p["lw"]),
    ("rrhf", {"lam": 0.3}, lambda p: max(0, p["ml"] - p["mw"]) - 0.3 * p["lw"]),
    ("unlikelihood", {"alpha": 0.2}, lambda p: -p["lw"] + 0.2 * p["ll"]),
    ("sft", {}, lambda p: -p["lw"] / MEAN_CHOSEN),
    ("sft", {"mean": "pair", "over": "prompt+chosen"}, lambda p: -(p["lw"] + p["lp"]) / (p["nw"] + p["np"])),
    (
        "kto",
        {"desirable_weight": 1.5, "undesirable_weight": 0.7},
        lambda p: 1.5 * (1 - s(0.1 * (p["a"] - Z))) if p["label"] else 0.7 * (1 - s(0.1 * (Z - p["a"]))),
    ),
    (
        "apo_zero_unpaired",
        {"undesirable_weight": 0.5},
        lambda p: 1 - s(0.1 * p["a"]) if p["label"] else 0.5 * s(0.1 * p["a"]),
    ),
    ("bco_unpaired", {}, lambda p: -ls(0.1 * p["a"] - 0.05) if p["label"] else -ls(-(0.1 * p["a"] - 0.05))),
    (
        "bradley_terry",
        {"margin": 0.5, "centre": 0.01},
        lambda p: -ls(p["lw"] - p["ll"] - 0.5 * p["m"]) + 0.01 * (p["lw"] + p["ll"]) ** 2,
    ),
    ("plackett_luce", {"beta": 0.3}, lambda p: plackett_luce(*ratios(p, 0.3))),
    ("lipo", {}, lipo),
    (
        "info_nca",
        {"alpha": 0.4},
        lambda p: (
            -sum(w * math.log(q) for w, q in zip(softmax([2.5, 1.25, 0.5]), softmax(ratios(p, 0.1)), strict=True))
        ),
    ),
    (
        "nca_group",
        {"alpha": 0.4},
        lambda p: -sum(w * ls(r) + ls(-r) / 3 for w, r in zip(softmax([2.5, 1.25, 0.5]), ratios(p, 0.1), strict=True)),
    ),
    ("sppo_group", {"beta": 0.1}, sppo),
    ("rrhf_group", {"lam": 0.3}, rrhf),
    ("tpo", {"alpha": 0.7}, lambda p: -ls(0.01 * (p["ll"] - p["lp"])) - 0.7 * p["mw"]),
    ("tpo", {"nll_mean": "batch"}, lambda p: -ls(0.01 * (p["ll"] - p["lp"])) - p["lw"] / MEAN_CHOSEN),
    ("tpo_l", {"gamma": 0.5}, lambda p: -ls(2 * (p["ml"] - p["lp"] / p["np"]) - 0.5) - p["mw"]),
    ("reward_ranking", {}, lambda p: plackett_luce(p["lw"], p["ll"], p["lp"])),
    (
        "reward_ranking",
        {"likelihood": "comparisons"},
        lambda p: -(ls(p["lw"] - p["ll"]) + ls(p["lw"] - p["lp"]) + ls(p["ll"] - p["lp"])) / 3,
    ),
]


@pytest.mark.parametrize(("name", "hyper", "formula"), FORMULAS, ids=lambda x: x if isinstance(x, str) else "")
def test_the_loss_is_its_formula(name, hyper, formula):
    loss = make_loss(name, **hyper)
    with jax.enable_x64(True):
        found, _ = loss(jax.tree.map(jnp.asarray, POLICY), REFERENCE if "reference" in loss.needs else None)
        np.testing.assert_allclose(found, [formula(p) for p in PAIRS], rtol=1e-12)


def test_every_loss_has_a_formula_here():
    assert {name for name, _, _ in FORMULAS} == LOSSES.keys()
