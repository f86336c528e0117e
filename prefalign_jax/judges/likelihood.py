"""How likely a response is under a language model, or how much likelier than under a reference: scores of responses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from prefalign_jax.data.records import Prompt, Text
from prefalign_jax.data.trees import Layout
from prefalign_jax.judges.judge import Scorer, Scores
from prefalign_jax.judges.scoring import as_scores, scoring_model
from prefalign_jax.logps import preference_logps
from prefalign_jax.types import Array, LanguageModel, Params, PreferenceBatch

LAYOUT = Layout(rejected=False)


def scorer(
    policy: str | Path,
    reference: str | Path | None,
    per_token: bool,
    cache: str | Path | None = None,
    *,
    batch_size: int = 16,
    dtype: str = "float32",
    chat_template: str = "",
    chat_template_kwargs: str = "",
    template_may_drop: str = "",
    special_in_text: str = "",
    date: str = "",
) -> Scorer:
    """Log-probabilities of responses, or implicit rewards, for `judge.by_reward`.

    log p(y | x), or with a reference log p(y | x) - log p_ref(y | x), which is DPO's implicit reward but for its beta;
    beta > 0 changes no verdict. With `per_token` that is divided by |y|, the number of tokens that are trained of the
    response: ORPO and SimPO rank by such means. The end of the response counts in both.

    Nothing is cut: a text longer than either model's positions has no score. What the chat template is told, and not
    given here, is as in the run that trained the policy.

    Args:
      policy: a Hugging Face directory or hub name of a language model, or the working directory of a run.
      reference: another such model with the same tokens, or None.
      per_token: whether the score is a mean over the response's tokens, not a sum.
      cache: a file that keeps finished log-probabilities, so that an interrupted run goes on; None keeps none.
      batch_size: responses in a batch.
      dtype: of the computation, float32 or bfloat16.
      chat_template: a name of `prefalign list` or a .jinja file; '' keeps the tokenizer's own.
      chat_template_kwargs: variables of the chat template, a JSON object.
      template_may_drop: parts that the chat template may leave out, names of template.MAY_DROP with commas.
      special_in_text: 'keep', or 'split' to encode special tokens that texts spell as text.
      date: YYYY-MM-DD, for templates that print the date.

    Returns:
      (prompts, responses) -> `Scores`.

    Raises:
      UserError: a model is missing, or a reward model, or the models' tokenizers differ.
    """
    told = dict(chat_template_kwargs=chat_template_kwargs, template_may_drop=template_may_drop)
    told |= dict(special_in_text=special_in_text, date=date)
    how = dict(reward=False, batch_size=batch_size, dtype=dtype, chat_template=chat_template, **told)
    models = [scoring_model(policy, cache, **how)]
    if reference is not None:
        models.append(scoring_model(reference, cache, tokenizer=models[0].policy.tokenizer, **how))
    reader = models[0]._replace(max_length=min(model.max_length for model in models))

    def score(prompts: Sequence[Text | Prompt], responses: Sequence[Text]) -> Scores:
        made = reader.pairs(prompts, responses)
        pairs = [pair for pair in made if not isinstance(pair, str)]
        logps, *of_reference = (np.array(model.measure(pairs, logps_of, LAYOUT)).reshape(-1, 2) for model in models)
        scores = logps[:, 0] - sum(other[:, 0] for other in of_reference)
        return as_scores(made, scores / logps[:, 1] if per_token else scores, "the model")

    return score


def logps_of(model: LanguageModel, params: Params, batch: PreferenceBatch) -> Array:
    """[B, 2] log-probability of each response, and the number of its tokens."""
    record = preference_logps(model, params, batch)
    return jnp.stack([record.chosen, record.chosen_tokens], axis=-1)
