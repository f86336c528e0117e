"""The judges by name: a reward, a reward model, likelihoods, a model behind an endpoint, a person's verdicts."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefalign_jax.judges import endpoint, likelihood, reward_model, rewards
from prefalign_jax.judges.judge import Comparison, Judge, Scorer, Verdict, by_reward, read_verdicts
from prefalign_jax.judges.tournament import Grader, by_score, by_tournament
from prefalign_jax.options import check_hyper, choose, hyper_parameters, read_as
from prefalign_jax.types import UserError, one_line


def score_of_reward(name: str, out: Path, **options: Any) -> Scorer:
    """A reward of rewards.REWARDS."""
    return rewards.scorer(name, **options)


def score_of_model(path: str, out: Path, **options: Any) -> Scorer:
    """A reward model; its scores are kept in scores.jsonl."""
    return reward_model.scorer(path, out / "scores.jsonl", **options)


def score_of_logp(path: str, out: Path, *, per_token: bool = False, **options: Any) -> Scorer:
    """Log-probabilities under a language model; they are kept in scores.jsonl."""
    return likelihood.scorer(path, None, per_token, out / "scores.jsonl", **options)


def score_of_ratio(paths: str, out: Path, *, per_token: bool = False, **options: Any) -> Scorer:
    """Log-ratios of a policy and its reference, DPO's implicit rewards; their parts are kept in scores.jsonl."""
    policy, comma, reference = paths.rpartition(",")
    if not policy or not reference:
        raise UserError(f"judge dpo:{paths}: write dpo:POLICY,REFERENCE, two language models with a comma between them")
    return likelihood.scorer(policy, reference, per_token, out / "scores.jsonl", **options)


def of_endpoint(url: str, out: Path, **options: Any) -> Judge:
    """A language model; its replies are kept in replies.jsonl."""
    return endpoint.endpoint(url, out / "replies.jsonl", **options)


def of_person(path: str, out: Path) -> Judge:
    """A person's verdicts, matched by the texts."""
    known = {json.dumps(v.comparison[:3]): v for v in read_verdicts(path)}

    def look_up(comparisons: Sequence[Comparison]) -> list[Verdict]:
        verdicts = [known.get(json.dumps(c[:3])) for c in comparisons]
        return [
            Verdict(c, None, "not judged") if v is None else v._replace(comparison=c)
            for c, v in zip(comparisons, verdicts, strict=True)
        ]

    return look_up


# Kind -> (makes the judge, or scores of single responses; the function whose keyword-only parameters are its options).
JUDGES: dict[str, tuple[Callable[..., Any], Callable[[str], Any]]] = {
    "reward": (score_of_reward, lambda name: choose("reward", name, rewards.REWARDS)),
    "model": (score_of_model, lambda path: reward_model.scorer),
    "logp": (score_of_logp, lambda path: likelihood.scorer),
    "mean_logp": (functools.partial(score_of_logp, per_token=True), lambda path: likelihood.scorer),
    "dpo": (score_of_ratio, lambda paths: likelihood.scorer),
    "mean_dpo": (functools.partial(score_of_ratio, per_token=True), lambda paths: likelihood.scorer),
    "endpoint": (of_endpoint, lambda url: endpoint.endpoint),
    "human": (of_person, lambda path: of_person),
}
SCORING = frozenset({"reward", "model", "logp", "mean_logp", "dpo", "mean_dpo"})  # those that score


def make_judge(spec: str, given: Sequence[str], out: Path) -> Judge:
    """The judge that a text describes.

    Args:
      spec: KIND:WHAT, such as 'reward:kindness' or 'model:DIR'.
      given: its options, NAME=VALUE; =@FILE reads the value from a file.
      out: directory for what it keeps.

    Raises:
      UserError: there is no such judge, or it has no such option.
    """
    kind, made = _make(spec, given, out, ("--judge", "--option"))
    return by_reward(made) if kind in SCORING else made


def make_grader(spec: str, given: Sequence[str], out: Path, fields: tuple[str, str]) -> Grader:
    """Scores of several responses to one prompt, by the judge that a text describes.

    Args:
      spec, given, out: as in `make_judge`.
      fields: what holds `spec` and `given`, for messages.

    Raises:
      UserError: there is no such judge, it has no such option, or it cannot be asked.
    """
    if spec.startswith("human:"):
        raise UserError(f"{fields[0]}={spec}: nobody has judged what is to be drawn; write reward, model or endpoint")
    kind, made = _make(spec, given, out, fields)
    return by_score(made) if kind in SCORING else by_tournament(made)


def deal_options(specs: Sequence[str], given: Sequence[str], fields: tuple[str, str]) -> list[list[str]]:
    """The options of each of several judges: what is given goes to all that have it.

    Args:
      specs: texts that describe judges.
      given: options, NAME=VALUE.
      fields: what holds `specs` and `given`, for messages.

    Raises:
      UserError: there is no such judge, or none has the option.
    """
    known = [hyper_parameters(_kind(spec, fields[0])[2]) for spec in specs]
    for text in given:
        name = text.partition("=")[0]
        if not any(name in names for names in known):
            check_hyper("any judge", {name: None}, {key: None for names in known for key in names}, {})
    return [[text for text in given if text.partition("=")[0] in names] for names in known]


def _kind(spec: str, field: str) -> tuple[str, Callable[..., Any], Callable[..., Any], str]:
    """(kind, what makes such judges, the function that has their options, what comes after the kind)."""
    kind, _, what = spec.partition(":")
    make, taker = choose(field, kind, JUDGES)
    if not what:
        raise UserError(f"{field}={spec}: write {kind}: and a name, directory, URL or file after it")
    return kind, make, taker(what), what


def _make(spec: str, given: Sequence[str], out: Path, fields: tuple[str, str]) -> tuple[str, Any]:
    """(kind, what its line of JUDGES makes)."""
    kind, make, taker, what = _kind(spec, fields[0])
    known, options = hyper_parameters(taker), {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"{fields[1]}={text}: write NAME=VALUE")
        check_hyper(f"judge {kind!r}", {name: known.get(name)}, known, {})
        try:
            value = Path(value[1:]).read_text(encoding="utf-8") if value.startswith("@") else value
            options[name] = read_as(value, known[name])
        except (OSError, ValueError) as error:
            wanted = type(known[name]).__name__
            raise UserError(f"{fields[1]}={name}: expected a value of type {wanted}, found {one_line(error)}") from None
    return kind, make(what, out, **options)
