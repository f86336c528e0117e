"""Rewards that are written down, for tests and experiments whose truth must be known: select them by name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from prefalign_jax.data.records import Prompt, Text
from prefalign_jax.generation import diversity
from prefalign_jax.generation.sample_files import answer_text, as_text
from prefalign_jax.judges.judge import Scorer, Scores
from prefalign_jax.options import check_hyper, choose, hyper_parameters
from prefalign_jax.types import UserError

KIND = frozenset(
    """beautiful brave bright caring cheerful cuddle cuddled friend friendly friends fun generous gentle glad good
    grateful happily happy help helped helpful hug hugged joy joyful kind kindly kindness laugh laughed laughing
    love loved lovely loving nice peaceful play played proud safe share shared sharing smile smiled smiling sweet
    thank thanked thankful warm wonderful""".split()
)
UNKIND = frozenset(
    """afraid alone angry attack attacked bad beat bit blood bleeding broke broken cried cruel cry crying danger dark
    dead death die died evil fear fight fighting fought ghost gun hate hated hit hurt hurts kick kicked kill killed
    knife lonely lost mad mean monster pain punch punched sad sadly scared scary scream screamed shot shout shouted
    sick steal stole terrible ugly unhappy weapon worried wound""".split()
)


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation.

    Example:
      >>> words("Don't stop, Tom!")
      ["don't", 'stop', 'tom']
    """
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())


def fewer_words(prompt: str, response: str) -> float:
    """Minus the number of words."""
    return -float(len(words(response)))


def more_words(prompt: str, response: str) -> float:
    """The number of words."""
    return float(len(words(response)))


def distinct(prompt: str, response: str, *, n: int = 2) -> float:
    """distinct-n of the words, `diversity.distinct`: 1 where no n-gram is repeated; 0 for fewer than n words."""
    return diversity.distinct([words(response)], n)


def kindness(prompt: str, response: str) -> float:
    """Kind and happy words minus sad and violent ones, over all words: in [-1, 1], 0 for an empty response.

    A count over a word list (KIND, UNKIND) made for children's stories: it knows no negation and no meaning.
    """
    spoken = words(response)
    return sum((word in KIND) - (word in UNKIND) for word in spoken) / max(len(spoken), 1)


def matches(prompt: str, response: str, *, pattern: str = "") -> float:
    """1 if the regular expression is found in the response, else 0."""
    if not pattern:
        raise UserError("reward 'matches' needs a pattern")
    try:
        return float(re.search(pattern, response) is not None)
    except re.error as error:
        raise UserError(f"reward 'matches': pattern {pattern!r} is no regular expression: {error}") from None


# One of your own: REWARDS["mine"] = lambda prompt, response: ...; its keyword-only parameters are its options.
REWARDS: dict[str, Callable[..., float]] = {
    "fewer_words": fewer_words,
    "more_words": more_words,
    "distinct": distinct,
    "kindness": kindness,
    "matches": matches,
}
CHECKS = {"n": (lambda n: n >= 1, "at least 1")}


def scorer(name: str, **options: object) -> Scorer:
    """The scores that a reward of REWARDS gives, for `judge.by_reward`.

    Args:
      name: a key of REWARDS.
      options: its keyword-only parameters.

    Returns:
      (prompts, responses) -> `Scores`; a reward that is NaN or infinite is none.

    Raises:
      UserError: there is no such reward, or it has no such option.

    Example:
      >>> scorer("fewer_words")(["Hi", "Hi"], ["Good day", "Yes"]).values.tolist()
      [-2.0, -1.0]
    """
    function = choose("reward", name, REWARDS)
    check_hyper(f"reward {name!r}", options, hyper_parameters(function), CHECKS)

    def score(prompts: Sequence[Text | Prompt], responses: Sequence[Text]) -> Scores:
        texts = [as_text(p.prompt if isinstance(p, Prompt) else p) for p in prompts]
        rewards = [float(function(p, r, **options)) for p, r in zip(texts, map(answer_text, responses), strict=True)]
        reasons = ["" if math.isfinite(x) else f"the reward is {x}" for x in rewards]
        return Scores(np.where(np.isfinite(rewards), rewards, np.nan), reasons)

    return score
