"""Scores of a trained reward model, batched through the packed rows that it was trained on."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from prefalign_jax.data.chat import iter_pairs
from prefalign_jax.data.pairs import digest_of
from prefalign_jax.data.pipeline import eval_batches, make_pair_set
from prefalign_jax.data.records import Prompt, Record, Text, told_by
from prefalign_jax.data.template import chat_options
from prefalign_jax.data.trees import Layout
from prefalign_jax.judges.cache import Cache, open_cache
from prefalign_jax.judges.judge import Scorer, Scores
from prefalign_jax.logps import preference_logps
from prefalign_jax.models.hf_io import load_config, resolve
from prefalign_jax.models.loading import exported, told_in_run
from prefalign_jax.policy import load
from prefalign_jax.reference import params_digest
from prefalign_jax.types import Pair, Place, UserError


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
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} is out of range; write at least 1")
    options = dict(chat_template_kwargs=chat_template_kwargs, template_may_drop=template_may_drop)
    options |= dict(special_in_text=special_in_text, date=date)
    chat = chat_options(**told_in_run(path, **options), where="")
    directory = resolve(exported(path))
    config = load_config(directory)
    if not config.reward:
        raise UserError(f"{path} is a language model, not a reward model; train one with loss.name=bradley_terry")
    model, params, tokenizer = load(directory, dtype=dtype)
    key = hashlib.sha256(f"{params_digest(params)} {model.config} {dtype}".encode()).hexdigest() if cache else ""
    layout = Layout(rejected=False, rewards=True)

    @jax.jit
    def rewards(params, batch):
        return preference_logps(model, params, jax.tree.map(lambda x: x[0], batch), needs={"reward"}).chosen

    def score_pairs(pairs: list[Pair], done: Cache | None) -> list[float]:
        keys = [f"{key} {digest_of([pair])}" for pair in pairs] if done else [""] * len(pairs)
        known_rewards = [done.get(key) if done else None for key in keys]
        wanted = [i for i, value in enumerate(known_rewards) if value is None]
        if wanted:
            options = dict(layout=layout, attends=model.attends, group=True)  # responses to a prompt share it
            data = make_pair_set([pairs[i] for i in wanted], batch_size, **options)
            for batch in eval_batches(data):
                values = np.asarray(rewards(params, batch))
                for number, value in zip(batch.index[0], values, strict=True):
                    if number >= 0:
                        i = wanted[number]
                        known_rewards[i] = float(value)
                        if done:
                            done.put(keys[i], known_rewards[i])
        return known_rewards

    def score(prompts: Sequence[Text | Prompt], responses: Sequence[Text]) -> Scores:
        records, where = [], Place("a response to score")
        for given, response in zip(prompts, responses, strict=True):
            one = given if isinstance(given, Prompt) else Prompt(given, "", where)
            chosen = response
            if isinstance(response, str) and not isinstance(one.prompt, str):
                chosen = [{"role": "assistant", "content": response}]
            records.append(Record(one.prompt, chosen, type(chosen)(), where=where, **told_by(one)))
        made = [pair for _, pair in iter_pairs(records, tokenizer, max_length=config.max_position, chat=chat)]
        pairs = [pair for pair in made if not isinstance(pair, str)]
        reasons = [f"{pair} for the reward model" if isinstance(pair, str) else "" for pair in made]
        with open_cache(cache) if cache else contextlib.nullcontext() as done:
            known_rewards = iter(score_pairs(pairs, done))
        return Scores(np.array([np.nan if reason else next(known_rewards) for reason in reasons]), reasons)

    return score
