"""Preference losses: pure functions of arrays, and the dictionary that configs choose from.

A loss is `f(policy, reference, *, hyper-parameters) -> (loss [B], {metric: [B]})`: unreduced, float32, finite with finite
gradients for every finite log-probability <= 0. A new one is a function and a line in LOSSES.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from prefalign_jax.losses.dpo import dpo, hinge, ipo
from prefalign_jax.losses.orpo import orpo
from prefalign_jax.losses.sft import MEAN, OVER, sft
from prefalign_jax.types import UserError


class Loss(NamedTuple):
    """A loss function and what it reads.

    Attributes:
      function: (policy, reference, **hyper-parameters) -> (loss [B], metrics).
      needs: hyper-parameters -> which of 'rejected', 'prompt', 'reference' it reads; what it does not is not computed.
    """

    function: Callable[..., Any]
    needs: Callable[[Mapping[str, Any]], set[str]]


LOSSES: dict[str, Loss] = {
    "dpo": Loss(dpo, lambda h: {"rejected"} if h["reference_free"] else {"rejected", "reference"}),
    "ipo": Loss(ipo, lambda h: {"rejected", "reference"}),
    "hinge": Loss(hinge, lambda h: {"rejected", "reference"}),
    "orpo": Loss(orpo, lambda h: {"rejected", "prompt"} if h["nll_over"] == "prompt+chosen" else {"rejected"}),
    "sft": Loss(sft, lambda h: {"prompt"} if h["over"] == "prompt+chosen" else set()),
}

# A hyper-parameter has one name and one meaning whichever loss takes it: its open or half-open interval, or its choices.
VALID: dict[str, tuple[Callable[[Any], bool], str]] = {
    "beta": (lambda x: 0 < x < math.inf, "a positive number"),
    "tau": (lambda x: 0 < x < math.inf, "a positive number"),
    "lam": (lambda x: 0 <= x < math.inf, "a number >= 0"),
    "label_smoothing": (lambda x: 0 <= x < 0.5, "a number in [0, 0.5)"),
    "over": (lambda x: x in OVER, f"one of {', '.join(OVER)}"),
    "mean": (lambda x: x in MEAN, f"one of {', '.join(MEAN)}"),
    "nll_over": (lambda x: x in OVER, f"one of {', '.join(OVER)}"),
    "nll_mean": (lambda x: x in MEAN, f"one of {', '.join(MEAN)}"),
}


class BoundLoss(NamedTuple):
    """A loss with its hyper-parameters filled in: `loss(policy, reference) -> (loss [B], metrics)`."""

    name: str
    hyper: dict[str, Any]
    needs: frozenset[str]

    def __call__(self, policy, reference=None):
        return LOSSES[self.name].function(policy, reference, **self.hyper)


def hyper_parameters(name: str) -> dict[str, Any]:
    """The hyper-parameters of a loss and their defaults, read off its signature.

    Example:
      >>> hyper_parameters("hinge")
      {'beta': 0.1}
    """
    parameters = inspect.signature(LOSSES[name].function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def make_loss(name: str, **hyper: Any) -> BoundLoss:
    """Looks a loss up by name and fills in its hyper-parameters.

    Args:
      name: a key of LOSSES.
      **hyper: hyper-parameters of that loss; the rest keep their defaults.

    Returns:
      The bound loss.

    Raises:
      UserError: the name is unknown, a hyper-parameter does not apply to this loss, or its value is out of range.

    Example:
      >>> make_loss("dpo", beta=0.5).hyper["beta"]
      0.5
      >>> make_loss("dpo", bta=0.5)
      Traceback (most recent call last):
      prefalign_jax.types.UserError: loss 'dpo' has no hyper-parameter 'bta'; it has beta, label_smoothing, reference_free
    """
    if name not in LOSSES:
        near = difflib.get_close_matches(name, LOSSES, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"loss.name={name!r} is unknown; {hint}The losses are {', '.join(LOSSES)}")
    defaults = hyper_parameters(name)
    for key, value in hyper.items():
        if key not in defaults:
            raise UserError(f"loss {name!r} has no hyper-parameter {key!r}; it has {', '.join(defaults)}")
        if key in VALID and not VALID[key][0](value):
            raise UserError(f"loss.{key}={value!r} is out of range; write {VALID[key][1]}")
    hyper = {**defaults, **hyper}
    return BoundLoss(name, hyper, frozenset(LOSSES[name].needs(hyper)))
