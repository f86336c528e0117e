"""Held-out loss, accuracy and margins, by slice and with intervals, and what training did to log-probabilities."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from prefalign_jax.data.pipeline import PairSet, eval_batches, make_pair_set
from prefalign_jax.data.records import Record
from prefalign_jax.data.trees import Layout
from prefalign_jax.intervals import (
    FEW,
    Interval,
    bootstrap_difference,
    bootstrap_mean,
    share_difference,
    share_interval,
    wilson,
)
from prefalign_jax.logps import VOCABULARY_CHUNK, sides_of, target_logps
from prefalign_jax.losses import BoundLoss
from prefalign_jax.reference import compute
from prefalign_jax.sharding import packing_of, place_batch
from prefalign_jax.types import LanguageModel, Pair, PairLogps, Params, PreferenceBatch, Sides, UserError

MOST_SLICES = 50  # values that a column to slice by may have
ROUNDING = 0.01  # nats: a response is less likely than under the reference if it is so by more
SLICED = ("loss", "rewards/accuracies", "rewards/margins")  # measured in every slice
_ACCURACY = "rewards/accuracies"


def evaluate(
    eval_step: Callable[..., tuple[PairLogps, PairLogps | None]],
    loss: BoundLoss,
    params: Params,
    reference: Params | None,
    data: PairSet,
    running: Mapping[str, jax.Array] | None = None,
) -> dict[str, np.ndarray]:
    """Runs every pair of a set once, then the loss on all of them, so that what it compares a pair with is the set.

    Args:
      eval_step: from `make_eval_step`.
      loss: bound loss.
      params, reference: of the policy and of the frozen copy, if one is kept.
      data: the pairs, with micro_steps 1.
      running: what the loss carries from step to step.

    Returns:
      {name: [len(data.pairs)]} with the loss under 'loss', every metric of every pair, and 'weight'.
    """
    return columns_of(loss, *set_logps(eval_step, params, reference, data), running)


def set_logps(
    eval_step: Callable[..., tuple[PairLogps, PairLogps | None]],
    params: Params,
    reference: Params | None,
    data: PairSet,
    members: bool = False,
) -> tuple[PairLogps, PairLogps | None]:
    """(policy, reference or None): what the loss reads of every pair of a set, [len(data.pairs)] NumPy arrays.

    Args:
      eval_step, params, reference, data: as in `evaluate`.
      members: whether the step is of K members: the arrays then have a leading axis [K].
    """
    parts, axis = [], int(members)
    for batch in eval_batches(data):
        real = batch.index[0] >= 0
        means = batch.mean_tokens[0]  # over the whole set
        records = jax.device_get(eval_step(params, reference, batch))
        of_pairs = (record and record._replace(mean_tokens=None) for record in records)
        parts.append(jax.tree.map(lambda x, real=real: np.compress(real, x, axis), tuple(of_pairs)))
    policy, frozen = jax.tree.map(lambda *columns: np.concatenate(columns, axis), *parts)
    return policy._replace(mean_tokens=np.tile(means, (len(policy.chosen), 1)) if members else means), frozen


def columns_of(
    loss: BoundLoss, policy: PairLogps, frozen: PairLogps | None, running: Mapping[str, jax.Array] | None = None
) -> dict[str, np.ndarray]:
    """`evaluate` of what `set_logps` gave."""
    policy = policy._replace(running=jax.device_get(running))
    losses, metrics = jax.device_get(jax.jit(loss.function)(policy, frozen))
    return {"loss": losses, **metrics, "weight": policy.weight}


def moved_columns(loss: BoundLoss, policy: PairLogps, frozen: PairLogps | None) -> dict[str, np.ndarray]:
    """What `analysis.signs` reads beside a loss's metrics, as columns like theirs.

    Returns:
      displacement/change [N] log policy - log reference of the chosen response in nats, of unpaired data of desirable
      completions; displacement/fell [N] whether it is below -ROUNDING; ties [N] whether both responses of a pair have
      one log-probability, or one reward. What does not apply is missing, and so is ties where no pair has any.
    """
    columns = {}
    if frozen is not None:
        good = policy.label > 0 if "label" in loss.needs else True
        change = np.where(good, policy.chosen - frozen.chosen, np.nan)
        columns |= {"displacement/change": change, "displacement/fell": np.where(good, change < -ROUNDING, np.nan)}
    if "rejected" in loss.needs and not loss.needs & {"label", "group"}:
        same = policy.chosen == policy.rejected
        columns |= {"ties": same.astype(np.float32)} if same.any() else {}
    return columns


def summary(columns: Mapping[str, np.ndarray], prefix: str = "eval/") -> dict[str, float]:
    """Weighted means of per-pair columns; accuracy with its 95% Wilson interval.

    Args:
      columns: from `evaluate`. A metric is NaN for a pair that it does not apply to, which is left out; a loss that is
        NaN is wrong, and so is its mean.
      prefix: put before every name.

    Returns:
      {name: mean, NaN where it applies to no pair}, and rewards/accuracies_low and _high where there is an accuracy.
    """

    def mean(name: str, values: np.ndarray) -> float:
        applies = _applies(name, values, columns["weight"])
        return float(np.average(values[applies], weights=columns["weight"][applies])) if applies.any() else math.nan

    weight = columns["weight"] / columns["weight"].sum()
    means = {name: mean(name, values) for name, values in columns.items() if name != "weight"}
    if _ACCURACY in means:
        size = 1 / float(np.square(weight).sum())  # effective number of pairs; their count where all weights are equal
        low, high = wilson(means[_ACCURACY], size)
        means[f"{_ACCURACY}_low"], means[f"{_ACCURACY}_high"] = low, high
    return {prefix + name: value for name, value in means.items()}


def _applies(name: str, values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """[N] which pairs a column says something of; a loss says something of all."""
    return (weight > 0) & ((name == "loss") | ~np.isnan(values))


# Intervals, slices, comparisons.


def prompt_numbers(pairs: Sequence[Pair]) -> np.ndarray:
    """[N] the same number for pairs with the same prompt: what intervals must not take for independent."""
    prompts = {}
    return np.array([prompts.setdefault(np.asarray(p.prompt, np.int32).tobytes(), len(prompts)) for p in pairs])


def intervals(columns: Mapping[str, np.ndarray], prompts: np.ndarray) -> dict[str, Interval]:
    """Weighted means of per-pair columns with 95% intervals in which whole prompts are the units.

    Args:
      columns: from `evaluate`.
      prompts: [N] from `prompt_numbers`.

    Returns:
      {name: interval}: `share_interval` of the accuracy, `bootstrap_mean` of the rest, whose ends are NaN where there
      are fewer than FEW prompts. A metric that applies to no pair is NaN, and so is a loss that is NaN for a pair.
    """

    def interval(name: str, values: np.ndarray) -> Interval:
        weight = columns["weight"]
        applies = _applies(name, values, weight)
        values, weight, units = values[applies], weight[applies], prompts[applies]
        if not applies.any() or not np.isfinite(values).all():
            return Interval(math.nan, math.nan, math.nan)
        if name == _ACCURACY:
            return share_interval(values, weight, units)
        if len(np.unique(units)) < FEW:
            return Interval(float(np.average(values, weights=weight)), math.nan, math.nan)
        return bootstrap_mean(values, weight, clusters=units)

    return {name: interval(name, values) for name, values in columns.items() if name != "weight"}


def changes(
    after: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray], prompts: np.ndarray
) -> dict[str, Interval]:
    """Means of after - before on the same pairs, with intervals as in `intervals`: what pairs have in common cancels.

    Args:
      after, before: from `evaluate`, with the same loss and pairs.
      prompts: [N] from `prompt_numbers`.
    """
    out = {}
    for name, values in after.items():
        applies = _applies(name, values - before[name], after["weight"])
        if name == "weight" or not applies.any() or len(np.unique(prompts[applies])) < FEW:
            continue
        pair = (values[applies], before[name][applies])
        if np.isfinite(pair).all():
            difference = share_difference if name == _ACCURACY else bootstrap_difference
            out[name] = difference(*pair, after["weight"][applies], clusters=prompts[applies])
    return out


def slice_labels(pairs: Sequence[Pair], records: Sequence[Record], kind: str = "pairs") -> dict[str, list[str]]:
    """Which slice every pair falls in, by each thing to slice by.

    Args:
      pairs: made of the records.
      records: with the columns to slice by, if any.
      kind: 'pairs', 'completions' (labelled ones) or 'demonstrations' (one response, no label).

    Returns:
      {by: [N] slice}. By 'length' in tokens: the chosen response longer, shorter, or within 10% of the longer one;
      'label' instead for completions; 'turns' of the user in the prompt; 'file' if there are several; every column.

    Raises:
      UserError: a column has so many values that it makes no slices.
    """
    sources = {record.where: record for record in records}
    own_sources = [sources[pair.where] for pair in pairs]
    labels = {}
    if kind == "pairs":
        labels["length"] = [_length(len(pair.chosen), len(pair.rejected)) for pair in pairs]
    if kind == "completions":
        labels["label"] = ["desirable" if pair.label else "undesirable" for pair in pairs]
    labels["turns"] = [_turns(record) for record in own_sources]
    files = [record.where.file for record in own_sources]
    if len(set(files)) > 1:
        labels["file"] = files
    for number, (name, _) in enumerate(records[0].columns):
        values = [record.columns[number][1] for record in own_sources]
        values = ["(none)" if value is None else str(value) for value in values]
        if len(set(values)) > MOST_SLICES:
            raise UserError(f"column {name!r} has {len(set(values))} values; slice by one with at most {MOST_SLICES}")
        labels[name if name not in labels else f"column {name}"] = values
    return labels


def _length(chosen: int, rejected: int) -> str:
    if abs(chosen - rejected) <= 0.1 * max(chosen, rejected):
        return "within 10%"
    return "chosen longer" if chosen > rejected else "chosen shorter"


def _turns(record: Record) -> str:
    if isinstance(record.prompt, str):
        count = max(record.prompt.count("\n\nHuman:"), 1)  # HH-RLHF's transcripts; other strings are one turn
    else:
        count = sum(message["role"] == "user" for message in record.prompt)
    return str(count) if count < 5 else "5 or more"


class Slice(NamedTuple):
    """Some of the pairs: how many, their share of the weight, and what was measured on them."""

    pairs: int
    share: float
    metrics: dict[str, Interval]


def by_slice(
    columns: Mapping[str, np.ndarray], prompts: np.ndarray, labels: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Slice]]:
    """Means within every slice; those of a thing's slices, weighted by their shares, give the mean of the whole.

    A loss that compares a pair with others has the value that it has among all pairs.

    Args:
      columns: from `evaluate`; those of SLICED are measured.
      prompts: [N] from `prompt_numbers`.
      labels: from `slice_labels`.

    Returns:
      {by: {slice: Slice}}, slices in the order of their names.
    """

    def measured(inside: np.ndarray) -> Slice:
        weight = columns["weight"]
        part = {name: values[inside] for name, values in columns.items() if name in (*SLICED, "weight")}
        share = float(weight[inside].sum() / weight.sum())
        return Slice(int(inside.sum()), share, intervals(part, prompts[inside]))

    return {
        by: {value: measured(np.array(values) == value) for value in sorted(set(values))}
        for by, values in labels.items()
    }


class Displacement(NamedTuple):
    """How the log-probabilities of some responses moved away from the reference's, in nats.

    Attributes:
      responses: how many.
      fell: the share that is less likely than under the reference.
      change: mean of log policy - log reference over all of them.
      mean, median, worst: by how much those that fell did; 0 if none fell.
    """

    responses: int
    fell: Interval
    change: Interval
    mean: float
    median: float
    worst: float


def displacement(policy: np.ndarray, reference: np.ndarray, weight: np.ndarray, prompts: np.ndarray) -> Displacement:
    """Likelihood displacement: a margin can grow while the chosen response itself becomes less likely.

    Args:
      policy, reference: [N] summed log-probabilities of the same responses.
      weight: [N].
      prompts: [N] from `prompt_numbers`.

    Source: Razin et al., arXiv 2410.08847.
    """
    change = np.asarray(policy, np.float64) - reference
    fell = (change < 0) & (weight > 0)
    share = share_interval(change < 0, weight, prompts)
    mean_change = intervals({"change": change, "weight": weight}, prompts)["change"]
    fall, mass = -change[fell], weight[fell]
    mean = median = worst = 0.0
    if fell.any():
        order = np.argsort(fall)
        half = np.searchsorted(np.cumsum(mass[order]), mass.sum() / 2)  # as much weight below as above
        mean, median, worst = np.average(fall, weights=mass), fall[order][half], fall.max()
    return Displacement(int((weight > 0).sum()), share, mean_change, float(mean), float(median), float(worst))


# Log-probabilities of single tokens, and of samples.


def response_logps(
    model: LanguageModel,
    params: Params,
    data: PairSet,
    *,
    mesh: Mesh | None = None,
    chunk: int = VOCABULARY_CHUNK,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Sides]:
    """Log-probability of every token of every response; a response's sum is that of `preference_logps`.

    Args:
      model: pure functions of params.
      params: nested dict.
      data: the pairs, with micro_steps 1.
      mesh: deals the rows of a batch to its devices; None computes on one.
      chunk: columns of logits at once.
      progress: called with the number of pairs done.

    Returns:
      For each pair (chosen, rejected), of a group its first two, [tokens] float32 each, rejected empty where the
      layout has none; of tokens whose weight is 0 there is nothing.
    """

    @functools.partial(jax.jit, out_shardings=mesh and NamedSharding(mesh, P()))
    def logps(params: Params, batch: PreferenceBatch) -> tuple[jax.Array, jax.Array]:
        batch = jax.tree.map(lambda x: x[0], batch)
        return target_logps(model, params, batch, chunk), batch.slot  # of all groups, wherever their rows lie

    out: list[Sides] = []
    for batch in eval_batches(data):
        values, slots = (np.asarray(x).ravel() for x in logps(params, place_batch(mesh, batch)))
        real = int((batch.index[0] >= 0).sum())
        # A slot's tokens lie in order, and a stable sort keeps them so.
        order = np.argsort(slots, kind="stable")
        count = sides_of(jax.tree.map(lambda x: x[0], batch)) * real
        ends = np.cumsum(np.bincount(slots, minlength=count))
        parts = np.split(values[order], ends[:count])
        own = np.arange(count).reshape(real, -1) if batch.slots is None else batch.slots[0]
        out += [Sides(*(parts[slot] for slot in own[pair, :2])) for pair in range(real)]
        progress(len(out))
    return out


def sequence_log_ratios(
    policy: tuple[LanguageModel, Params],
    reference: tuple[LanguageModel, Params],
    samples: Sequence[Pair],
    *,
    batch_size: int = 32,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """log policy(y|x) - log reference(y|x) of responses y sampled from the policy at temperature 1.

    Their mean is an unbiased estimate of KL(policy || reference) over whole responses, in nats; of samples that are cut
    off at a limit, over responses up to that limit. `bootstrap_mean` gives its interval.

    Args:
      policy, reference: (model, params).
      samples: prompts, and the samples as `chosen`, end-of-sequence tokens included where they were drawn.
      batch_size: samples at once.
      mesh: deals the rows of a batch to its devices; None computes on one.

    Returns:
      [len(samples)] float32; single values may be negative.
    """
    ours, theirs = (sequence_logps(*model, samples, batch_size, mesh) for model in (policy, reference))
    return ours - theirs


def sequence_logps(
    model: LanguageModel, params: Params, samples: Sequence[Pair], batch_size: int = 32, mesh: Mesh | None = None
) -> np.ndarray:
    """[len(samples)] float32 log-probability of the whole `chosen` response of each; arguments as above."""
    options = dict(attends=model.attends, **(packing_of(mesh) if mesh else {}))
    options |= dict(group=True, coarse=True)  # samples share a prompt, and come anew at every evaluation
    data = make_pair_set(samples, batch_size, layout=Layout(rejected=False), **options)
    return compute(model, params, data, mesh=mesh).chosen
