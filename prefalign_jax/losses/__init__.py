"""Preference losses: pure functions of arrays, and the dictionary that configs choose from.

A loss is `f(policy, reference, *, hyper-parameters) -> (loss [B], {metric: [B]})`: unreduced, float32, finite and with
finite gradients for every finite log-probability <= 0. A new one is a function and a line in LOSSES; an experiment's
own file may add that line (see docs/own_losses.md).

Each is an attribute of its name, which checks what it is given: losses.ipo(policy, reference, tau=0.1). The name of a
module of this package, such as losses.dpo, is that module and can be called as the loss all the same.
"""

from __future__ import annotations

import functools
import math
import re
import sys
from collections.abc import Callable, Mapping, Set
from typing import TYPE_CHECKING, Any

from prefalign_jax.callable_module import make_callable
from prefalign_jax.losses import absolute, adaptive, gaps, groups, links, margin, reward, robust, transport, unpaired
from prefalign_jax.losses import dpo as _dpo
from prefalign_jax.losses import orpo as _orpo
from prefalign_jax.losses import sft as _sft
from prefalign_jax.losses import simpo as _simpo
from prefalign_jax.losses.absolute import SHIFTS
from prefalign_jax.losses.gaps import DISTANCES
from prefalign_jax.losses.groups import DISCOUNTS, GAINS, WIN_RATES
from prefalign_jax.losses.loss import NEEDS, WEIGHTINGS, BoundLoss, Loss, bind, known_hyper, ties_as_trl
from prefalign_jax.losses.margin import SURROGATES
from prefalign_jax.losses.mixture import Term, mix, terms
from prefalign_jax.losses.modifiers import DIVERGENCES, MODIFIERS
from prefalign_jax.losses.named import Call, named
from prefalign_jax.losses.orpo import RATIOS
from prefalign_jax.losses.reward import LIKELIHOODS
from prefalign_jax.losses.sft import MEAN, OVER
from prefalign_jax.losses.simpo import CPO_SURROGATES
from prefalign_jax.options import Checks, choose, did_you_mean, read_as
from prefalign_jax.types import UserError

if TYPE_CHECKING:  # modules that can be called
    dpo: Call
    orpo: Call
    sft: Call
    simpo: Call

__all__ = ["LOSSES", "MIXTURES", "MODIFIERS", "NEEDS", "BoundLoss", "Loss", "hyper_of", "make_loss", "ties_as_trl"]

_PAIR, _FREE = frozenset({"rejected", "reference"}), frozenset({"rejected"})
_BATCH, _UNPAIRED = _PAIR | {"batch"}, frozenset({"label", "reference"})
_GROUP, _FREE_GROUP = _PAIR | {"group"}, _FREE | {"group"}
_RATIOS = ("ld_alpha", "sampled", "weighting")  # for what reads log-ratios alone
_SUMS = _RATIOS[:2]  # where a weight would not stay with its pair
_MARGIN = (*_RATIOS, "divergence", "divergence_alpha")  # for what reads their difference alone


def _orpo_needs(hyper: Mapping[str, Any]) -> Set[str]:
    needs = set(_FREE)
    if hyper["nll_over"] != "chosen":
        needs.add("prompt")
    if hyper["nll_over"] == "text" or hyper["extra_eos"]:
        needs.add("after")
    if hyper["nll_over"] == "text" and hyper["nll_mean"] == "batch":
        needs.add("batch")
    return needs


def _shift(hyper: Mapping[str, Any]) -> Mapping[str, float]:
    return {"shift": 0.0, "steps": 0.0} if hyper.get("shift", "running") == "running" else {}


LOSSES: dict[str, Loss] = {
    # Pairs, with a reference.
    "dpo": Loss(_dpo.dpo, lambda h: _FREE if h["reference_free"] else _PAIR, _MARGIN),
    "robust_dpo": Loss(robust.robust_dpo, _PAIR, _MARGIN),
    "dr_dpo": Loss(robust.dr_dpo, _BATCH, _SUMS),
    "ln_dpo": Loss(_dpo.ln_dpo, _PAIR, _MARGIN),
    "r_dpo": Loss(_dpo.r_dpo, _PAIR, ("ld_alpha", "weighting")),  # sampling would take away the lengths it reads
    "ld_dpo": Loss(_dpo.ld_dpo, _PAIR | {"shared"}),
    "sampo": Loss(_dpo.sampo, _PAIR | {"sampled"}),
    "odpo": Loss(gaps.odpo, _PAIR | {"margin"}, _RATIOS),
    "reward_aware_rpo": Loss(gaps.reward_aware_rpo, _PAIR | {"margin"}, _MARGIN),
    "rebel": Loss(gaps.rebel, _PAIR | {"margin"}, _MARGIN),
    "dpop": Loss(_dpo.dpop, _PAIR, _RATIOS),
    "rpo": Loss(_dpo.rpo, _PAIR, ("weighting",)),
    "cal_dpo": Loss(_dpo.cal_dpo, _PAIR, _RATIOS),
    "beta_dpo": Loss(adaptive.beta_dpo, _BATCH, (), lambda h: {"mean_margin": 0.0}, adaptive.advance_beta_dpo),
    "alpha_dpo": Loss(
        adaptive.alpha_dpo,
        _BATCH,
        (),
        lambda h: {"gap_mean": 0.0, "gap_std": 0.0, "gap_seen": 0.0},
        adaptive.advance_alpha_dpo,
    ),
    "tdpo1": Loss(_dpo.tdpo1, _PAIR | {"token_kl"}),
    "tdpo2": Loss(_dpo.tdpo2, _PAIR | {"token_kl"}),
    "f_dpo": Loss(links.f_dpo, _PAIR, _RATIOS),
    "chi_po": Loss(links.chi_po, _PAIR, _RATIOS),
    "dpo_shift": Loss(links.dpo_shift, _PAIR, _RATIOS),
    "wpo": Loss(_dpo.wpo, _PAIR | {"sum_squares"}),
    "ipo": Loss(margin.ipo, _PAIR, _MARGIN),
    "hinge": Loss(margin.hinge, _PAIR, _MARGIN),
    "exo": Loss(margin.exo, _PAIR, _MARGIN),
    "discopop": Loss(margin.discopop, _PAIR, _MARGIN),
    "focal_po": Loss(margin.focal_po, _PAIR, _MARGIN),
    "gpo": Loss(margin.gpo, _PAIR, _MARGIN),
    "nca": Loss(absolute.nca, _PAIR, _RATIOS),
    "bco": Loss(
        absolute.bco, lambda h: _PAIR if h["shift"] == "none" else _BATCH, _RATIOS, _shift, absolute.advance_bco
    ),
    "sppo": Loss(absolute.sppo, _PAIR, _RATIOS),
    "apo_zero": Loss(absolute.apo_zero, _PAIR, _RATIOS),
    "apo_down": Loss(absolute.apo_down, _PAIR, _RATIOS),
    "kto_pair": Loss(absolute.kto_pair, _BATCH, _RATIOS),
    "aot": Loss(transport.aot, _BATCH, _SUMS),
    "aot_unpaired": Loss(transport.aot_unpaired, _BATCH, _SUMS),
    # Pairs, without one.
    "orpo": Loss(_orpo.orpo, _orpo_needs),
    "orpo_beta": Loss(_orpo.orpo_beta, _FREE),
    "asft": Loss(_orpo.asft, _FREE),
    "simpo": Loss(_simpo.simpo, _FREE),
    "repo": Loss(_simpo.repo, _FREE),
    "simper": Loss(_simpo.simper, _FREE),
    "alphapo": Loss(_simpo.alphapo, _FREE),
    "cpo": Loss(_simpo.cpo, _FREE),
    "slic": Loss(_simpo.slic, _FREE),
    "rrhf": Loss(_simpo.rrhf, _FREE),
    "unlikelihood": Loss(_simpo.unlikelihood, _FREE),
    "sft": Loss(_sft.sft, lambda h: {"prompt"} if h["over"] == "prompt+chosen" else set()),
    # Single completions with a label.
    "kto": Loss(unpaired.kto, _UNPAIRED | {"rejected", "mismatched", "batch"}),
    "apo_zero_unpaired": Loss(unpaired.apo_zero_unpaired, _UNPAIRED),
    "bco_unpaired": Loss(unpaired.bco_unpaired, _UNPAIRED | {"batch"}, (), _shift, unpaired.advance_bco_unpaired),
    # Groups of responses to one prompt.
    "plackett_luce": Loss(groups.plackett_luce, _GROUP),
    "lipo": Loss(groups.lipo, _GROUP),
    "info_nca": Loss(groups.info_nca, _GROUP),
    "nca_group": Loss(groups.nca_group, _GROUP),
    "sppo_group": Loss(groups.sppo_group, _GROUP),
    "rrhf_group": Loss(groups.rrhf_group, _FREE_GROUP),
    "tpo": Loss(groups.tpo, _FREE_GROUP),
    "tpo_l": Loss(groups.tpo_l, _FREE_GROUP),
    # Reward models.
    "bradley_terry": Loss(reward.bradley_terry, lambda h: {"rejected", "reward", *(["margin"] if h["margin"] else [])}),
    "reward_ranking": Loss(reward.reward_ranking, _FREE_GROUP | {"reward"}),
}

# Weighted sums that have a name of their own.
MIXTURES = {
    "mpo": "0.8*dpo + 0.2*bco + 1.0*sft",  # Wang et al. (InternVL), arXiv 2411.10442, section 3.2
}


def _one_of(names) -> tuple[Callable[[Any], bool], str]:
    return (lambda x: x in names, f"one of {', '.join(names)}")


_POSITIVE = (lambda x: 0 < x < math.inf, "a positive number")
_AT_LEAST_0 = (lambda x: 0 <= x < math.inf, "a number >= 0")
_NUMBER = (math.isfinite, "a finite number")
# A hyper-parameter has one name and one range whichever loss takes it; where a loss needs another, LOSS.NAME has it.
VALID: Checks = {
    "beta": _POSITIVE,
    "beta_prime": _POSITIVE,
    "eta": _POSITIVE,
    "reward_max": _POSITIVE,
    "tau": _POSITIVE,
    "lam": _AT_LEAST_0,
    "dpo_shift.lam": (lambda x: 0 < x <= 1, "a number in (0, 1]"),
    "sft_weight": _AT_LEAST_0,
    "alpha": _AT_LEAST_0,
    "unlikelihood.alpha": (lambda x: 0 <= x <= 1, "a number in [0, 1]"),
    "info_nca.alpha": _POSITIVE,
    "nca_group.alpha": _POSITIVE,
    "gamma": _AT_LEAST_0,
    "delta": _AT_LEAST_0,
    "margin": _AT_LEAST_0,
    "centre": _AT_LEAST_0,
    "desirable_weight": _AT_LEAST_0,
    "undesirable_weight": _AT_LEAST_0,
    "reward_alpha": _NUMBER,
    "divergence_alpha": _NUMBER,
    "momentum": (lambda x: 0 <= x < 1, "a number in [0, 1)"),
    "keep": (lambda x: 0 < x <= 1, "a number in (0, 1]"),
    "ld_alpha": (lambda x: 0 <= x <= 1, "a number in [0, 1]"),
    "temperature": (lambda x: 0 < x <= 1, "a number in (0, 1]"),
    "label_smoothing": (lambda x: 0 <= x < 0.5, "a number in [0, 0.5)"),
    "exo.label_smoothing": (lambda x: 0 < x < 0.5, "a number in (0, 0.5)"),
    "over": _one_of(OVER[:2]),
    "mean": _one_of(MEAN),
    "nll_over": _one_of(OVER),
    "nll_mean": _one_of(MEAN),
    "ratio": _one_of(RATIOS),
    "divergence": _one_of(DIVERGENCES),
    "distance": _one_of(DISTANCES),
    "surrogate": _one_of(SURROGATES),
    "cpo.surrogate": _one_of(CPO_SURROGATES),
    "shift": _one_of(SHIFTS),
    "weighting": _one_of(WEIGHTINGS),
    "gain": _one_of(GAINS),
    "discount": _one_of(DISCOUNTS),
    "win_rate": _one_of(WIN_RATES),
    "likelihood": _one_of(LIKELIHOODS),
}

# Hyper-parameters that only some values of another give a meaning to: (name, the other, those values).
CONDITIONAL = {
    "divergence_alpha": ("divergence", ("alpha", "alpha_trl")),
    "cpo.label_smoothing": ("surrogate", ("sigmoid",)),
}


def make_loss(name: str, **hyper: Any) -> BoundLoss:
    """Looks a loss up by name and fills in its hyper-parameters.

    Args:
      name: a key of LOSSES or MIXTURES, or a weighted sum such as '0.8*dpo + 0.2*bco(shift=none) + sft'. What is in
        brackets is that term's own; other hyper-parameters go to every term that has them.
      **hyper: hyper-parameters of that loss; the rest keep their defaults.

    Returns:
      The bound loss.

    Raises:
      UserError: the name is unknown, a hyper-parameter does not apply to this loss, or its value is out of range.

    Example:
      >>> make_loss("dpo", beta=0.5).hyper["beta"]
      0.5
      >>> make_loss("sft", beta=0.5)
      Traceback (most recent call last):
      prefalign_jax.types.UserError: loss 'sft' has no hyper-parameter 'beta'; it has over, mean
    """
    if name in MIXTURES or (name not in LOSSES and re.search(r"[*+(]", name)):
        return _make_mixture(name, MIXTURES.get(name, name), hyper)
    entry = choose("loss.name", name, {**LOSSES, **MIXTURES})
    known = known_hyper(name, entry)
    checks = {key: check for key in known if (check := VALID.get(f"{name}.{key}", VALID.get(key)))}
    conditions = {key: c for key in known if (c := CONDITIONAL.get(f"{name}.{key}", CONDITIONAL.get(key)))}
    return bind(name, entry, hyper, checks, conditions)


def hyper_of(name: str) -> dict[str, Any]:
    """The hyper-parameters that a loss of LOSSES takes, its own first, with their defaults."""
    return known_hyper(name, choose("loss.name", name, LOSSES))


def _make_mixture(name: str, text: str, given: Mapping[str, Any]) -> BoundLoss:
    weights, parts = [], []
    used: set[str] = set()
    known: set[str] = set()
    for term in _expanded(text):
        defaults = hyper_of(term.name)
        known |= defaults.keys()
        own = {}
        for key, value in term.options.items():
            if key in defaults:  # another is refused by name in a moment
                try:
                    value = read_as(value, defaults[key])
                except ValueError:
                    kind = type(defaults[key]).__name__
                    raise UserError(
                        f"loss.name={text!r}: {term.name}'s {key}={value!r} is not of type {kind}"
                    ) from None
            own[key] = value
        shared = {key: value for key, value in given.items() if key in defaults and key not in own}
        used |= shared.keys()
        weights.append(term.weight)
        parts.append(make_loss(term.name, **shared, **own))
    for key in given:
        if key not in known:
            has = ", ".join(sorted(known))
            raise UserError(
                f"loss {name!r}: no term has a hyper-parameter {key!r}; {did_you_mean(key, known)}they have {has}"
            )
        if key not in used:
            raise UserError(f"loss {name!r}: every term with a {key!r} sets its own; leave loss.{key} unset")
    return mix(name, text, weights, parts)


def _expanded(text: str) -> list[Term]:
    """The terms of a sum, those that have a name as a sum themselves written out."""
    expanded = []
    for term in terms(text):
        inner = _expanded(MIXTURES[term.name]) if term.name in MIXTURES else [Term(1.0, term.name, {})]
        expanded += [Term(term.weight * t.weight, t.name, {**t.options, **term.options}) for t in inner]
    return expanded


@functools.cache
def _named(name: str, function: Callable[..., Any]) -> Call:
    return named(name, function, make_loss, hyper_of(name))


def __getattr__(name: str) -> Call:
    if name in LOSSES:
        return _named(name, LOSSES[name].function)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; {did_you_mean(name, LOSSES)}".rstrip("; "))


def __dir__() -> list[str]:
    return sorted({*globals(), *LOSSES})


for _name in LOSSES:
    if _module := sys.modules.get(f"{__name__}.{_name}"):
        make_callable(_module, functools.partial(__getattr__, _name))
