"""What a metric measures: the unit on its axis, and the values by which a curve is read, such as log 2."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from prefalign_jax.analysis.compare import HELD_OUT
from prefalign_jax.analysis.runs import Run
from prefalign_jax.losses import make_loss
from prefalign_jax.types import PairLogps

# Of metrics by their names, without 'eval/'.
UNITS = {
    "rewards/accuracies": "share of pairs",
    "rewards/margins": "reward",
    "rewards/chosen": "reward",
    "rewards/rejected": "reward",
    "nll_loss": "nats per token",
    "log_odds_chosen": "nats",
    "log_odds_ratio": "nats",
    "displacement/change": "nats per response",
    "displacement/fell": "share of pairs",
    "grad_norm": "norm before clipping",
    "learning_rate": "per step",
    "step_time": "seconds",
    "input_wait": "seconds",
    "packing_efficiency": "share of slots",
    "memory/host_peak_gib": "GiB",
    "memory/device_peak_gib": "GiB",
    "flops": "FLOPs per step",
    "samples/kl": "nats per response",
    "samples/reward": "the judge's reward",
    "samples/length": "tokens",
    "samples/distinct_2": "share of bigrams",
    "samples/cut_off": "share of samples",
    "samples/unscored": "share of samples",
}
MOST_STARTS = 3  # lines in one picture


class Mark(NamedTuple):
    """A value by which a curve is read."""

    value: float
    label: str


def unit_of(metric: str, runs: Sequence[Run]) -> str:
    """The unit of a metric, '' where it is not known.

    Args:
      metric: a column of metrics.jsonl or eval.jsonl.
      runs: in whose losses' units it is.

    Example:
      >>> unit_of("eval/rewards/accuracies", [])
      'share of pairs'
    """
    name = metric.removeprefix(HELD_OUT)
    if name in ("logps/chosen", "logps/rejected"):
        units = dict.fromkeys(_unit_of_logps(json.dumps(_loss(run.config), sort_keys=True)) for run in runs)
        return next(iter(units)) if len(units) == 1 else "nats, as each loss takes them"
    if name == "loss":
        return "mean over the batch" if metric == name else "mean over held-out data"
    if name.endswith("_per_second"):
        return f"{name.removesuffix('_per_second').replace('_', ' ')} per second"
    return UNITS.get(name, "")


def marks(metric: str, runs: Sequence[Run]) -> list[Mark]:
    """What to read a metric's curves against: chance, equal rewards, and the losses of a policy that is its reference.

    Args:
      metric: a column of metrics.jsonl or eval.jsonl.
      runs: that are shown.

    Returns:
      The marks; of losses none where there are more than MOST_STARTS.
    """
    name = metric.removeprefix(HELD_OUT)
    if name == "rewards/accuracies":
        return [Mark(0.5, "0.5: chance")]
    if name == "rewards/margins":
        return [Mark(0.0, "0: equal rewards")]
    if name != "loss":
        return []
    starts = sorted({start for run in runs if (start := first_loss(run)) is not None})
    if len(starts) > MOST_STARTS:
        return []
    return [Mark(start, f"{_as_log_2(start)}: policy = reference") for start in starts]


def first_loss(run: Run) -> float | None:
    """The loss of the first step where the policy is still its reference, so that all rewards are equal, else None.

    Of DPO it is log 2. It is rounded to four digits, which two machines agree on.
    """
    first = run.train[0] if run.train else {}
    margin, loss = first.get("rewards/margins"), first.get("loss")
    if first.get("step") != 1 or margin is None or loss is None or abs(margin) > 1e-5:
        return None
    return float(f"{loss:.4g}")


def _as_log_2(value: float) -> str:
    return f"log 2 = {value:.3g}" if math.isclose(value, math.log(2), abs_tol=1e-4) else f"{value:.4g}"


def _loss(config: Mapping[str, Any]) -> dict[str, Any]:
    """The loss's fields of a config with dotted names."""
    return {name.removeprefix("loss."): value for name, value in config.items() if name.startswith("loss.")}


@functools.cache
def _unit_of_logps(loss: str) -> str:
    """Asks the loss itself: of ten nats over five tokens it says 10 or 2."""
    fields = json.loads(loss)
    ten, five = jnp.full(1, -10.0), jnp.full(1, 5.0)
    pair = PairLogps(ten, ten, five, five, mean_tokens=jnp.full(2, 5.0), weight=jnp.ones(1))
    try:
        bound = make_loss(fields.pop("name", ""), **fields)
        _, metrics = bound(pair, pair)
    except Exception:  # one of the user's own, or one that reads more than a pair
        return "nats"
    value = float(metrics.get("logps/chosen", jnp.zeros(1))[0])
    return {-10.0: "nats per response", -2.0: "nats per token"}.get(round(value, 4), "nats")
