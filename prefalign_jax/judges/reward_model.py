"""Scores of a trained reward model, batched through the packed rows that it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefalign_jax.data.records import Prompt, Text
from prefalign_jax.data.trees import Layout
from prefalign_jax.judges.judge import Scorer, Scores
from prefalign_jax.judges.scoring import as_scores, scoring_model
from prefalign_jax.logps import preference_logps
from prefalign_jax.types import Array, LanguageModel, Params, PreferenceBatch

LAYOUT = Layout(rejected=False, rewards=True)


def scorer(
    path: str | Path,
    cache: str | Path | None = None,
    *,
    batch_size: int = 16,
    dtype: str = "float32",
    chat_template_kwargs: str = "",
    template_may_drop: str = "",
    special_in_text: str = "",
    date: str = "",
) -> Scorer:
    """The rewards of a model that loss.name=bradley_terry trained and exported, for `judge.by_reward`.

    A prompt that is a string is plain text; messages go through the tokenizer's chat template, the response as the
    assistant's. Nothing is cut: a text longer than the model's positions has no score. What the template is told, and
    not given here, is as in the run that trained the model, where `path` is a run.

    Args:
      path: a Hugging Face directory or hub name of a reward model with one label, or the working directory of a run.
      cache: a file that keeps finished scores, so that an interrupted run goes on; None keeps none.
      batch_size: responses in a batch.
      dtype: of the computation, float32 or bfloat16.
      chat_template_kwargs: variables of the chat template, a JSON object.
      template_may_drop: parts that the chat template may leave out, names of template.MAY_DROP with commas.
      special_in_text: 'keep', or 'split' to encode special tokens that texts spell as text.
      date: YYYY-MM-DD, for templates that print the date.

    Returns:
      (prompts, responses) -> `Scores`.

    Raises:
      UserError: this is no reward model, or an option is invalid.
    """
    told = dict(chat_template_kwargs=chat_template_kwargs, template_may_drop=template_may_drop)
    told |= dict(special_in_text=special_in_text, date=date)
    judge = scoring_model(path, cache, reward=True, batch_size=batch_size, dtype=dtype, **told)

    def score(prompts: Sequence[Text | Prompt], responses: Sequence[Text]) -> Scores:
        made = judge.pairs(prompts, responses)
        rewards = judge.measure([pair for pair in made if not isinstance(pair, str)], rewards_of, LAYOUT)
        return as_scores(made, rewards, "the reward model")

    return score


def rewards_of(model: LanguageModel, params: Params, batch: PreferenceBatch) -> Array:
    """[B] rewards of the responses."""
    return preference_logps(model, params, batch, needs={"reward"}).chosen
