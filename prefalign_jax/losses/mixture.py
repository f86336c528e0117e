"""Weighted sums of losses, written as '0.8*dpo + 0.2*bco(shift=none) + sft'."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from prefalign_jax.losses.loss import BoundLoss
from prefalign_jax.types import Array, PairLogps, UserError

_TERM = re.compile(
    r"\s*(?:(?P<weight>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\*\s*)?(?P<name>[A-Za-z_]\w*)\s*"
    r"(?:\((?P<options>[^()]*)\))?\s*(?P<end>\+|$)"
)


class Term(NamedTuple):
    """A weight, a loss's name, and the text of its own hyper-parameters by name."""

    weight: float
    name: str
    options: dict[str, str]


def terms(text: str) -> list[Term]:
    """Reads a weighted sum.

    Args:
      text: WEIGHT*NAME or WEIGHT*NAME(option=value, ...), with + between; a weight of 1 may be left out.

    Returns:
      The terms in order.

    Raises:
      UserError: it cannot be read.

    Example:
      >>> terms("1e-1*bco(shift=none)+sft")
      [Term(weight=0.1, name='bco', options={'shift': 'none'}), Term(weight=1.0, name='sft', options={})]
    """
    read, at = [], 0
    while True:
        match = _TERM.match(text, at)
        options = [item.partition("=") for item in ((match and match["options"]) or "").split(",") if item.strip()]
        keys = [key.strip() for key, _, _ in options]
        weight = float(match["weight"] or 1.0) if match else 0.0
        if not match or not all(equals for _, equals, _ in options) or not math.isfinite(weight):
            rest, form = text[at:].strip(), "WEIGHT*NAME or WEIGHT*NAME(option=value), with + between"
            raise UserError(f"loss.name={text!r}: cannot read {rest!r}; write {form}")
        if len(set(keys)) < len(keys):
            raise UserError(f"loss.name={text!r}: {match['name']} has an option twice")
        read.append(Term(weight, match["name"], dict(zip(keys, (value.strip() for *_, value in options), strict=True))))
        at = match.end()
        if not match["end"]:
            return read


def mix(name: str, text: str, weights: Sequence[float], parts: Sequence[BoundLoss]) -> BoundLoss:
    """sum_k weight_k loss_k.

    Args:
      name: of the mixture.
      text: its formula.
      weights, parts: of the terms.

    Returns:
      A loss with the metrics of all its parts, on a clash those of the first, and each part's loss as loss/NAME.

    Raises:
      UserError: the parts train on different kinds of data, or some compare pairs and others whole groups.
    """
    if len({("label" in part.needs, "reward" in part.needs) for part in parts}) > 1:
        raise UserError(f"loss {name!r}: its terms train on different kinds of data and cannot be added")
    whole = [part.name for part in parts if "group" in part.needs]
    two = [part.name for part in parts if "rejected" in part.needs and "group" not in part.needs]
    if whole and two:  # of a group it would read the best two, and leave the rest out in silence
        raise UserError(
            f"loss {name!r}: {two[0]!r} compares two responses and {whole[0]!r} all of a group; add losses of groups, "
            "or sft, which reads the best response"
        )
    names = [part.name for part in parts]
    labels = [n if names.count(n) == 1 else f"{n}.{names[: i + 1].count(n)}" for i, n in enumerate(names)]

    def of_part(policy: PairLogps, label: str, part: BoundLoss) -> PairLogps:
        return policy._replace(running={key: policy.running[f"{label}.{key}"] for key in part.running})

    def labelled(values: Callable[[str, BoundLoss], Mapping[str, Any]]) -> dict[str, Any]:
        """{'LABEL.KEY': value} of all parts."""
        parts_of = zip(labels, parts, strict=True)
        return {f"{label}.{key}": value for label, part in parts_of for key, value in values(label, part).items()}

    def function(policy: PairLogps, reference: PairLogps | None) -> tuple[Array, dict[str, Array]]:
        total, metrics = jnp.zeros_like(policy.chosen), {}
        for label, weight, part in zip(labels, weights, parts, strict=True):
            loss, own = part(of_part(policy, label, part), reference if "reference" in part.needs else None)
            total += weight * loss
            metrics = {**own, **metrics, f"loss/{label}": loss}
        return total, metrics

    def advance(policy: PairLogps, reference: PairLogps | None) -> Mapping[str, Array]:
        return labelled(
            lambda label, part: part.advance(of_part(policy, label, part), reference) if part.running else {}
        )

    return BoundLoss(
        name=name,
        title="Weighted sum of losses",
        hyper=labelled(lambda _, part: part.hyper),
        needs=frozenset().union(*(part.needs for part in parts)),
        running=labelled(lambda _, part: part.running),
        formula=text,
        function=function,
        advance=advance,
    )
