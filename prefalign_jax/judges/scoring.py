"""Numbers that a model gives single responses, batched through packed rows, and kept as they are finished."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from prefalign_jax.data.chat import check_tokens, iter_pairs, load_tokenizer
from prefalign_jax.data.pairs import digest_of
from prefalign_jax.data.pipeline import eval_batches, make_pair_set
from prefalign_jax.data.records import Prompt, Record, Text, told_by
from prefalign_jax.data.template import ChatOptions, chat_options
from prefalign_jax.data.trees import Layout
from prefalign_jax.judges.cache import open_cache
from prefalign_jax.judges.judge import Scores
from prefalign_jax.models.hf_io import load_config, resolve
from prefalign_jax.models.loading import exported, told_in_run
from prefalign_jax.policy import Policy, load
from prefalign_jax.progress import Progress
from prefalign_jax.reference import params_digest
from prefalign_jax.types import Array, LanguageModel, Pair, Params, Place, PreferenceBatch, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

# (model, parameters, a batch without rejected responses) -> [B, ...] numbers of each response.
Measure = Callable[[LanguageModel, Params, PreferenceBatch], Array]


class ScoringModel(NamedTuple):
    """A model that scores responses.

    Attributes:
      policy: the model with its tokenizer.
      chat: what its chat template is told.
      max_length: the model's positions; nothing is cut to fit.
      key: names model and computation, '' where no numbers are kept.
      cache: a file of finished numbers, None for none.
      batch_size: responses in a batch.
    """

    policy: Policy
    chat: ChatOptions
    max_length: int
    key: str
    cache: Path | None
    batch_size: int

    def pairs(self, prompts: Sequence[Text | Prompt], responses: Sequence[Text]) -> list[Pair | str]:
        """Each response tokenized as a demonstration, or the reason why it is not."""
        records, where = [], Place("a response to score")
        for given, response in zip(prompts, responses, strict=True):
            one = given if isinstance(given, Prompt) else Prompt(given, "", where)
            chosen = response
            if isinstance(response, str) and not isinstance(one.prompt, str):
                chosen = [{"role": "assistant", "content": response}]
            records.append(Record(one.prompt, chosen, type(chosen)(), where=where, **told_by(one)))
        made = iter_pairs(records, self.policy.tokenizer, max_length=self.max_length, chat=self.chat)
        return [pair for _, pair in made]

    def measure(self, pairs: Sequence[Pair], what: Measure, layout: Layout) -> list[Any]:
        """The numbers of each pair's chosen response, a float or a list; equal ones are computed once.

        Args:
          pairs: from `pairs`.
          what: makes the numbers; one file may hold those of several models, but of one `what` for each.
          layout: of the responses.
        """
        keys = [f"{self.key} {digest_of([pair])}" for pair in pairs]
        known = dict.fromkeys(keys)
        with open_cache(self.cache) if self.cache else contextlib.nullcontext() as done:
            if done:
                known = {key: done.get(key) for key in known}
            wanted = {key: pair for key, pair in zip(keys, pairs, strict=True) if known[key] is None}
            if wanted:
                known |= self._computed(wanted, what, layout, done.put if done else None)
        return [known[key] for key in keys]

    def _computed(
        self, pairs: Mapping[str, Pair], what: Measure, layout: Layout, put: Callable[[str, Any], None] | None
    ) -> dict[str, Any]:
        model, params, _ = self.policy

        @jax.jit
        def numbers(params, batch):
            return what(model, params, jax.tree.map(lambda x: x[0], batch))

        keys, out = list(pairs), {}
        options = dict(layout=layout, attends=model.attends, group=True)  # responses to a prompt share it
        data = make_pair_set(list(pairs.values()), self.batch_size, **options)
        with Progress(len(keys), "response") as progress:
            for batch in eval_batches(data):
                for number, value in zip(batch.index[0], np.asarray(numbers(params, batch)).tolist(), strict=True):
                    if number >= 0:
                        out[keys[number]] = value
                        if put:
                            put(keys[number], value)
                progress.update(len(out))
        return out


def as_scores(made: Sequence[Pair | str], values: Iterable[float], model: str) -> Scores:
    """The scores of responses, of which those that could not be tokenized have none.

    Args:
      made: from `ScoringModel.pairs`.
      values: one for each pair among them, in their order.
      model: what the reason says that they did not fit.
    """
    rest = iter(values)
    reasons = [f"{pair} for {model}" if isinstance(pair, str) else "" for pair in made]
    return Scores(np.array([np.nan if reason else next(rest) for reason in reasons]), reasons)


def scoring_model(
    path: str | Path,
    cache: str | Path | None,
    *,
    reward: bool,
    batch_size: int,
    dtype: str,
    tokenizer: Tokenizer | None = None,
    chat_template: str = "",
    **told: str,
) -> ScoringModel:
    """Loads a model that is to score responses.

    What the template is told, and not given here, is as in the run that trained the model, where `path` is a run.

    Args:
      path: a Hugging Face directory or hub name, or the working directory of a run.
      cache: see `ScoringModel`.
      reward: whether it must be a reward model, or must not.
      batch_size, dtype: of the computation.
      tokenizer: another model's, whose tokens must be the same; None takes the model's own.
      chat_template: for the model's own tokenizer, '' keeps what it has.
      **told: options of `template.chat_options`.

    Raises:
      UserError: it is the other kind of model, its tokens are others, a file is missing, or an option is invalid.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} is out of range; write at least 1")
    chat = chat_options(**told_in_run(path, **told), where="")
    directory = resolve(exported(path))
    config = load_config(directory)
    if config.reward != reward:
        kind, other = "a language model", "a reward model; train one with loss.name=bradley_terry"
        if config.reward:
            kind, other = "a reward model", "a language model; its judge is model:DIR"
        raise UserError(f"{path} is {kind}, not {other}")
    if tokenizer is None:
        tokenizer = load_tokenizer(directory, chat_template or None)
    else:
        check_tokens(path, directory, tokenizer, "the policy's tokenizer")
    policy = load(path, dtype=dtype, tokenizer=tokenizer)
    about = f"{params_digest(policy.params)} {policy.model.config.told} {dtype}"
    key = hashlib.sha256(about.encode()).hexdigest() if cache else ""
    return ScoringModel(policy, chat, config.max_position, key, Path(cache) if cache else None, batch_size)
