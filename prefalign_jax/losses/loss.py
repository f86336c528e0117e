"""A loss as a line of a table, and bound to its hyper-parameters: checked, and shown nothing but what it declares."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Callable, Mapping, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from prefalign_jax.losses.modifiers import MODIFIERS, wpo_weight
from prefalign_jax.losses.ratios import with_logps
from prefalign_jax.options import Checks, check_hyper, hyper_parameters
from prefalign_jax.types import Array, PairLogps, UserError

# What a loss may read beyond the chosen response's log-probability. What it does not need is not computed.
NEEDS = {
    "rejected": "the rejected response",
    "reference": "log-probabilities under the reference",
    "prompt": "log-probabilities of the prompt's tokens",
    "shared": "sums over as many first tokens as the shorter response has",
    "sampled": "sums over as many tokens drawn at random",
    "token_kl": "KL(reference || policy) at every token of the responses",
    "sum_squares": "the sum of squared next-token probabilities at every token of the responses",
    "after": "one more end-of-sequence token after each response",
    "margin": "the data's score gap",
    "label": "single completions with a label, in place of pairs",
    "mismatched": "a completion of another prompt beside each completion",
    "batch": "all pairs of the global batch at once, and their weights",
    "reward": "a reward head: rewards in place of log-probabilities",
    "group": "all responses to a prompt, with their scores",
}
# The fields of PairLogps that are there only for a loss that needs them.
FIELDS = {
    "rejected": ("rejected", "rejected_tokens"),
    "prompt": ("prompt", "prompt_tokens"),
    "after": ("after", "text", "text_tokens"),
    "batch": ("weight",),
    "group": ("responses",),
    **{name: (name,) for name in ("shared", "sampled", "token_kl", "sum_squares", "margin", "label")},
}
# What makes no sense without something else.
_IMPLIED = {
    "token_kl": {"reference"},
    "shared": {"rejected"},
    "sampled": {"rejected"},
    "mismatched": {"label", "rejected"},
    "group": {"rejected"},
}
RESERVED = ("loss", "grad_norm", "learning_rate")  # metrics that the step writes

WEIGHTINGS = ("none", "wpo", "wpo_unclipped")
# Defaults of the hyper-parameters of modifiers.
MODIFYING = {"weighting": "none"}
for _modifier in MODIFIERS.values():
    MODIFYING |= hyper_parameters(_modifier.function)


class Loss(NamedTuple):
    """A loss function and what it reads.

    Attributes:
      function: (policy, reference, **hyper-parameters) -> (loss [B], metrics).
      needs: keys of NEEDS, or hyper-parameters -> keys.
      modifiers: hyper-parameters, besides its own, that change what it reads or multiply it; see modifiers.py.
      running: hyper-parameters -> {name: value at the first step} of what it carries from step to step.
      advance: (policy, reference, **hyper-parameters) -> the next `running`, from that in `policy` and the batch.
    """

    function: Callable[..., Any]
    needs: Set[str] | Callable[[Mapping[str, Any]], Set[str]] = frozenset({"rejected", "reference"})
    modifiers: tuple[str, ...] = ()
    running: Callable[[Mapping[str, Any]], Mapping[str, float]] = lambda hyper: {}
    advance: Callable[..., Mapping[str, Array]] | None = None


class BoundLoss(NamedTuple):
    """A loss with its hyper-parameters filled in: `loss(policy, reference) -> (loss [B], metrics)`.

    Attributes:
      name: of the loss, or the mixture as written.
      title: the name in words; "" where the docstring has none.
      hyper: every hyper-parameter and its value, of the modifiers those in use.
      needs: keys of NEEDS.
      running: what it carries from step to step, at the first step; {} for most.
      formula: in one line.
      function: (policy, reference) -> (loss [B], metrics).
      advance: (policy, reference) -> the next `running`.
    """

    name: str
    title: str
    hyper: dict[str, Any]
    needs: frozenset[str]
    running: dict[str, float]
    formula: str
    function: Callable[[PairLogps, PairLogps | None], Any]
    advance: Callable[[PairLogps, PairLogps | None], Mapping[str, Array]]

    @property
    def kind(self) -> str:
        """What it is trained on: pairs (a group is one that goes on), unpaired or supervised data."""
        return "unpaired" if "label" in self.needs else "pairs" if "rejected" in self.needs else "supervised"

    @property
    def unit(self) -> str:
        """What it counts: pairs, the completions of unpaired data, or groups of responses to one prompt."""
        return "completions" if "label" in self.needs else "groups" if "group" in self.needs else "pairs"

    @property
    def record_kind(self) -> dict[str, Any]:
        """Which records it takes, as options of `data.records.read_records`."""
        return {
            "responses": ("chosen", "rejected") if "rejected" in self.needs else ("chosen",),
            "unpaired": "label" in self.needs,
            "margin": "margin" in self.needs,
            "groups": "group" in self.needs,
        }

    def __call__(self, policy: PairLogps, reference: PairLogps | None = None) -> tuple[Array, dict[str, Array]]:
        """(loss [B], metrics {name: [B]}) of policy and reference log-probabilities."""
        return self.function(policy, reference)


def ties_as_trl(loss: BoundLoss) -> BoundLoss:
    """The loss with the accuracy as TRL counts it: 0 for a pair whose rewards are equal, and not one half.

    Raises:
      UserError: it is a loss of groups, whose accuracy is a share of many comparisons.
    """
    if "group" in loss.needs:
        raise UserError(
            f"accuracy_ties=trl: {loss.name!r} counts all comparisons of a group, which TRL does not; set it to half"
        )

    def function(policy: PairLogps, reference: PairLogps | None) -> tuple[Array, dict[str, Array]]:
        values, metrics = loss.function(policy, reference)
        if "rewards/accuracies" in metrics:
            metrics = {**metrics, "rewards/accuracies": jnp.floor(metrics["rewards/accuracies"])}
        return values, metrics

    return loss._replace(function=function)


def described(function: Callable[..., Any]) -> tuple[str, str]:
    """(name in words, formula) of a loss: the first two paragraphs of its docstring, each on one line.

    A docstring of one paragraph, or whose second begins a section such as Args, has a formula and no name.

    Example:
      >>> from prefalign_jax.losses.margin import ipo
      >>> described(ipo)
      ('Identity preference optimization (IPO)', '(h - 1 / (2 tau))^2')
    """
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", inspect.getdoc(function) or "")]
    if len(paragraphs) == 1 or re.match(r"[A-Z]\w*:( |$)", paragraphs[1]):
        return "", paragraphs[0]
    return paragraphs[0].rstrip("."), paragraphs[1]


def known_hyper(name: str, entry: Any) -> dict[str, Any]:
    """The hyper-parameters that a line of the table takes, its own first, with their defaults.

    Raises:
      UserError: the line is faulty.
    """
    _check_entry(name, entry)
    return {**hyper_parameters(entry.function), **{key: MODIFYING[key] for key in entry.modifiers}}


def _check_entry(name: str, entry: Any) -> None:
    """Refuses a line of the table that could not work, such as one of a user's own."""
    what = f"loss {name!r}"
    if not isinstance(entry, Loss):
        raise UserError(
            f"{what}: LOSSES[{name!r}] is a {type(entry).__name__}; write LOSSES[{name!r}] = Loss(function)"
        )
    if not callable(entry.needs) and (isinstance(entry.needs, str) or not isinstance(entry.needs, Set)):
        raise UserError(f"{what}: needs={entry.needs!r} is no set of names; write needs={{'rejected', 'reference'}}")
    for key in entry.modifiers:
        if key not in MODIFYING:
            raise UserError(f"{what}: modifier {key!r} is unknown; there are {', '.join(MODIFYING)}")
    for position, parameter in enumerate(inspect.signature(entry.function).parameters.values()):
        hyper = parameter.kind is parameter.KEYWORD_ONLY
        if position >= 2 and not hyper:
            raise UserError(f"{what}: write * before {parameter.name!r}, so that it is a hyper-parameter")
        if hyper and (parameter.default is parameter.empty or parameter.default is None):
            raise UserError(f"{what}: hyper-parameter {parameter.name!r} has no default; give it a value of its type")


def bind(name: str, entry: Loss, given: Mapping[str, Any], checks: Checks, conditions: Mapping[str, Any]) -> BoundLoss:
    """Fills in a loss's hyper-parameters.

    Args:
      name: of the loss.
      entry: its line of the table.
      given: hyper-parameters; the rest keep their defaults.
      checks: ranges, by name.
      conditions: name -> (another hyper-parameter, those of its values that give the first a meaning).

    Returns:
      The bound loss.

    Raises:
      UserError: a hyper-parameter does not apply or is out of range, or the entry is faulty.
    """
    known = known_hyper(name, entry)
    own = hyper_parameters(entry.function)
    plain = {key: _plain(value, known.get(key)) for key, value in given.items()}
    check_hyper(f"loss {name!r}", plain, known, checks)
    hyper = {**known, **given}
    for key, (other, values) in conditions.items():
        if key in given and hyper[other] not in values:
            raise UserError(
                f"loss {name!r}: {key} applies to {other}={' or '.join(values)}, and {other} is {hyper[other]!r}"
            )
    own = {key: hyper[key] for key in own}
    modifiers = {key: m for key, m in MODIFIERS.items() if key in entry.modifiers and m.active(hyper)}
    weighting = hyper.get("weighting", "none")
    running = dict(entry.running(hyper))
    needs = _needs(name, entry, hyper, modifiers, running)

    def change(policy: PairLogps, reference: PairLogps | None) -> tuple[PairLogps, PairLogps | None]:
        policy = policy._replace(**{field: None for need in FIELDS.keys() - needs for field in FIELDS[need]})
        for modifier in modifiers.values():
            options = {key: hyper[key] for key in hyper_parameters(modifier.function)}
            policy, reference = modifier.function(policy, reference, **options)
        return policy, reference

    def function(policy: PairLogps, reference: PairLogps | None) -> tuple[Array, dict[str, Array]]:
        changed = change(policy, reference)
        try:
            result = entry.function(*changed, **own)
        except Exception as error:  # a user's own function raises whatever it likes
            raise _explained(name, entry.function, needs, error) from error
        loss, metrics = _checked(name, result, policy.chosen.shape)
        if modifiers:
            metrics = with_logps(metrics, policy)
        if weighting != "none":
            weight = wpo_weight(policy, clip=weighting == "wpo")
            loss, metrics = loss * weight, {**metrics, "wpo_weight": weight}
        return loss, metrics

    def advance(policy: PairLogps, reference: PairLogps | None) -> Mapping[str, Array]:
        assert entry.advance is not None  # only a loss that carries something is asked to
        return jax.lax.stop_gradient(entry.advance(*change(policy, reference), **own))

    def shown(key: str) -> bool:
        if key in own:
            return True
        if key in conditions:
            other, values = conditions[key]
            return hyper[other] in values
        return hyper[key] != MODIFYING[key]

    in_use = {key: value for key, value in hyper.items() if shown(key)}
    title, formula = described(entry.function)
    return BoundLoss(name, title, in_use, frozenset(needs), running, formula, function, advance)


def _plain(value: Any, default: Any) -> Any:
    """A hyper-parameter as a number that can be checked: of one that is being traced nothing is known yet."""
    if isinstance(value, jax.core.Tracer):
        return default
    return value.item() if isinstance(value, jax.Array) and value.ndim == 0 else value


def _needs(name, entry, hyper, modifiers, running) -> set[str]:
    """Everything that a loss reads, its modifiers included."""
    needs = set(entry.needs(hyper) if callable(entry.needs) else entry.needs)
    if unknown := needs - NEEDS.keys():
        raise UserError(f"loss {name!r} needs {', '.join(sorted(unknown))}; what there is: {', '.join(NEEDS)}")
    for need in sorted(needs):
        if missing := _IMPLIED.get(need, set()) - needs:
            raise UserError(
                f"loss {name!r} needs {need!r}, and so {' and '.join(sorted(missing))} too; name all of them"
            )
    for key, modifier in modifiers.items():
        if "reference" in modifier.needs - needs:
            raise UserError(f"loss {name!r}: {key} compares with a reference, and it has none")
        needs |= modifier.needs
    if hyper.get("weighting", "none") != "none":
        needs.add("sum_squares")
    if running:
        if entry.advance is None:
            raise UserError(f"loss {name!r} carries {', '.join(running)} and has no function `advance` for it")
        needs.add("batch")  # a step advances it once, whatever the micro-steps
    return needs


def _checked(name: str, result: Any, shape: tuple[int, ...]) -> tuple[Array, dict[str, Array]]:
    """A loss's result, if it is one: a wrong shape would be broadcast into a wrong number."""
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
        raise UserError(f"loss {name!r} returned a {type(result).__name__}; return (loss [B], {{'metric': [B]}})")
    loss, metrics = result
    for what, value in {"the loss": loss, **{f"metric {key!r}": value for key, value in metrics.items()}}.items():
        if getattr(value, "shape", None) != shape:
            given_shape = getattr(value, "shape", type(value).__name__)
            raise UserError(f"loss {name!r}: {what} has shape {given_shape} where one number per pair is due, {shape}")
    if taken := metrics.keys() & set(RESERVED):
        raise UserError(
            f"loss {name!r}: a metric is called {taken.pop()!r}, which the step writes; give it another name"
        )
    return loss, dict(metrics)


def _explained(name: str, function: Callable[..., Any], needs: Set[str], error: Exception) -> Exception:
    """One line on where a loss failed and what it had."""
    if isinstance(error, UserError):
        return error
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == inspect.unwrap(function).__code__.co_filename]
    frame = (own or frames)[-1]  # of the loss rather than of what it calls
    last = (str(error).strip().splitlines() or [""])[0]
    return UserError(
        f"loss {name!r} failed at {frame.filename}, line {frame.lineno}: {type(error).__name__}: {last} "
        f"(it declares needs={{{', '.join(map(repr, sorted(needs)))}}}; what it does not is None)"
    )
