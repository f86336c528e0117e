"""What `losses.NAME` is: the loss of that name, called with log-probabilities and hyper-parameters.

A few losses share their name with the module that they stand in: dpo, orpo, sft, simpo. Such a module stays a module,
so that `import prefalign_jax.losses.dpo as m` gives the file, and `losses.dpo(policy, reference)` calls the loss.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from prefalign_jax.losses.loss import FIELDS, NEEDS, BoundLoss
from prefalign_jax.types import Array, PairLogps, UserError

Call = Callable[..., tuple[Array, dict[str, Array]]]


def named(name: str, function: Callable[..., Any], make: Callable[..., BoundLoss], known: Mapping[str, Any]) -> Call:
    """The function that `losses.NAME` is.

    Args:
      name: of the loss.
      function: the loss without checks, whose docstring is shown.
      make: (name, **hyper-parameters) -> the bound loss.
      known: every hyper-parameter and its default.

    Returns:
      (policy, reference=None, **hyper-parameters) -> (loss [P], metrics {name: [P]}).
    """

    @functools.wraps(function)
    def call(policy: PairLogps, reference: PairLogps | None = None, **hyper: Any) -> tuple[Array, dict[str, Array]]:
        loss = make(name, **hyper)
        return loss(_readable(loss, policy, reference), reference)

    positional = [inspect.Parameter("policy", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=PairLogps)]
    positional += [positional[0].replace(name="reference", default=None, annotation=PairLogps | None)]
    hyper = [
        inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=type(value))
        for key, value in known.items()
    ]
    call.__signature__ = inspect.Signature([*positional, *hyper])
    return call


def _readable(loss: BoundLoss, policy: PairLogps, reference: PairLogps | None) -> PairLogps:
    """The policy's record with what a caller may leave out, once all that the loss reads is known to be there."""
    for which, record in (("policy", policy), ("reference", reference)):
        if not (isinstance(record, PairLogps) or (record is None and which == "reference")):
            what = f"expected PairLogps as {which}, as prefalign_jax.logps gives them"
            raise UserError(f"loss {loss.name!r}: {what}; this is a {type(record).__name__}")
    if "reference" in loss.needs and reference is None:
        raise UserError(f"loss {loss.name!r} compares with a reference; give its PairLogps as the second argument")
    if policy.weight is None:
        policy = policy._replace(weight=jnp.ones(jnp.shape(policy.chosen)))
    if loss.running and policy.running is None:
        policy = policy._replace(running={key: jnp.float32(value) for key, value in loss.running.items()})
    for need in NEEDS:
        missing = [name for name in FIELDS.get(need, ()) if need in loss.needs and getattr(policy, name) is None]
        if missing:
            raise UserError(
                f"loss {loss.name!r} reads {NEEDS[need]}, and policy.{missing[0]} is None; tokenize with "
                f"loss={loss.name!r} and write logps(policy, pairs, needs={{{need!r}}})"
            )
    return policy
