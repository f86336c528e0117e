"""Preference losses: pure functions of arrays, and the dictionary that configs choose from.

A loss is `f(policy, reference, *, hyper-parameters) -> (loss [B], {metric: [B]})`: unreduced, float32, finite and with
finite gradients for every finite log-probability <= 0. A new one is a function and a line in LOSSES.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from prefalign_jax.losses.dpo import dpo, hinge, ipo
from prefalign_jax.losses.orpo import orpo
from prefalign_jax.losses.sft import MEAN, OVER, sft
from prefalign_jax.names import Checks, check_hyper, choose, hyper_parameters
from prefalign_jax.types import Array, PairLogps


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

# A hyper-parameter has one name and one meaning whichever loss takes it, so one check.
VALID: Checks = {
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

    def __call__(self, policy: PairLogps, reference: PairLogps | None = None) -> tuple[Array, dict[str, Array]]:
        """(loss [B], metrics {name: [B]}) of policy and reference log-probabilities."""
        return LOSSES[self.name].function(policy, reference, **self.hyper)


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
      >>> make_loss("sft", beta=0.5)
      Traceback (most recent call last):
      prefalign_jax.types.UserError: loss 'sft' has no hyper-parameter 'beta'; it has over, mean
    """
    defaults = hyper_parameters(choose("loss.name", name, LOSSES).function)
    check_hyper(f"loss {name!r}", hyper, defaults, VALID)
    hyper = {**defaults, **hyper}
    return BoundLoss(name, hyper, frozenset(LOSSES[name].needs(hyper)))
